"""What somebody probably meant."""

from __future__ import annotations

import pytest

from penstock.core.near import meant, nearest

KNOWN = ("max_model_len", "quantization", "replicas")


@pytest.mark.parametrize(
    ("name", "cutoff", "found"),
    [
        ("max_model_length", 0.6, "max_model_len"),
        ("quantisation", 0.6, "quantization"),
        ("replicas", 0.6, "replicas"),
        ("devices", 0.6, None),
        ("replica", 0.97, None),
        ("", 0.6, None),
        ("r" * 100_000, 0.6, None),
    ],
)
def test_the_name_that_is_most_like_it(name: str, cutoff: float, found: str | None) -> None:
    assert nearest(name, KNOWN, cutoff) == found
    assert nearest(name, reversed(KNOWN), cutoff) == found
    assert meant(name, KNOWN, cutoff) == (f"Did you mean {found}?" if found else "")
