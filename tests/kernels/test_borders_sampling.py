"""Draws exactly on a border: equal logits weigh the same, so that their sums have no rounding."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.kernels.operations import Draw, Operations
from tests.kernels.tables import TABLES, specification, table

NAMES = ["reference", *TABLES]
over_tables = pytest.mark.parametrize("name", NAMES)
LAST = 1 - 2.0**-48


def operations(name: str) -> Operations:
    return specification(torch.float32) if name == "reference" else table(name, torch.float32)


@over_tables
@given(
    rows=st.lists(
        st.tuples(
            st.integers(0, 9),  # as many equals as 2 to this power
            st.integers(0, 2**10),
            st.integers(1, 2**10),
            st.sampled_from([0.0, 0.5, 1.0]),
            st.sampled_from([0, 1, 2, 30, 600, 2000]),
            st.sampled_from([-math.inf, -300.0]),
        ),
        min_size=1,
        max_size=4,
    ),
    vocabulary=st.sampled_from([512, 513, 700, 1024, 1100]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=200)
def test_a_border_belongs_to_the_token_above_it(
    name: str, rows: list[tuple[int, int, int, float, int, float]], vocabulary: int, seed: int
) -> None:
    """Of m equals u takes the one at place floor(u · m); top_p keeps the first ceil(top_p · m) of them."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.empty(len(rows), vocabulary)
    draws, wanted = [], []
    for row, (power, number, top_p, min_p, top_k, low) in zip(logits, rows, strict=True):
        count = 2**power
        equals = torch.randperm(vocabulary, generator=generator)[:count].sort().values
        row[:] = low
        row[equals] = 2.5
        kept = math.ceil(count * top_p / 2**10)
        draw = Draw(min(number / 2**10, LAST), 1.0, min_p, top_k, top_p / 2**10)
        draws.append(draw)
        wanted.append(int(equals[math.floor(draw.uniform * kept)]))
    tokens, checks = operations(name).sample(logits, draws)
    assert tokens == wanted
    assert all(map(math.isfinite, checks))
