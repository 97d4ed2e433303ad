"""Every device-second is in the ledger: a real engine and a real gateway, and clients that leave anywhere.

The short form of `python -m benchmarks.gateway.disconnects`, which has a thousand of them.
"""

from __future__ import annotations

import pytest

from benchmarks.gateway.disconnects import measure


def test_the_rows_are_what_the_engine_was_busy_with() -> None:
    found = measure(requests=60, concurrency=12, seed=3)
    assert found["settlements"] == {"settled": found["rows"]}
    assert 50 <= found["rows"] <= 60  # who leaves before the gateway has read the request has none
    assert sum(found["left"].values()) == 60
    assert found["engine_seconds"] > 0
    assert found["ledger_seconds"] == pytest.approx(found["engine_seconds"], rel=1e-3)
