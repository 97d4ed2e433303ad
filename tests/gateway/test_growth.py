"""Memory: thousands of requests leave nothing behind. `benchmarks.gateway.memory` is the long form."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.gateway.memory import measure, slope

BLOCK = 500
WARM = 8 * BLOCK
"""Until then arenas and caches fill, and what the collector frees is not there yet."""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads resident memory in /proc")
def test_memory_does_not_grow_with_requests() -> None:
    """A row that was kept would take a kilobyte and more; a whole request, ten."""
    marks = [mark for mark in measure(14 * BLOCK, BLOCK, concurrency=20) if mark[0] >= WARM]
    assert slope(marks) < 1000, marks


def test_a_slope_is_bytes_for_each_request() -> None:
    assert slope([(0, 100), (10, 150), (20, 200)]) == pytest.approx(5)
    assert slope([(0, 7), (10, 7)]) == 0
