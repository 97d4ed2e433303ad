"""Draws exactly on a border: equal logits weigh the same, so that their sums have no rounding."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.kernels import reference, torch_sampling
from penstock.kernels.operations import Draw, Operations
from tests.kernels.tables import TABLES, specification, table
from tests.kernels.test_sampling import agree

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
@settings(max_examples=100)
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


# ---- torch's operators, with blocks and candidates so small that every border is met ----

HEIGHTS = st.sampled_from([0.0, 0.0, 1.0, -1.0, 2.5, -3.0, -math.inf])
SMALL_DRAWS = st.builds(
    Draw,
    uniform=st.floats(1e-6, LAST),
    temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 0.3, 1.0]),
    top_k=st.sampled_from([0, 0, 1, 2, 7, 8, 9, 40]),
    top_p=st.sampled_from([1.0, 1.0, 0.9, 0.5, 0.01]),
)


@given(
    rows=st.integers(1, 40).flatmap(
        lambda width: st.lists(st.lists(HEIGHTS, min_size=width, max_size=width), min_size=1, max_size=5)
    ),
    draws=st.lists(SMALL_DRAWS, min_size=5, max_size=5),
    counts=st.lists(st.integers(0, 5), min_size=5, max_size=5),
    tile=st.sampled_from([1, 50, 1 << 20]),
    margin=st.sampled_from([0, 40]),
)
@settings(max_examples=80)
def test_small_blocks_candidates_and_tiles_change_nothing(
    rows: list[list[float]], draws: list[Draw], counts: list[int], tile: int, margin: int
) -> None:
    # the first one is finite: a row without a distribution has no token
    logits = torch.tensor([[max(row[0], -3.0), *row[1:]] for row in rows])
    draws, counts = draws[: len(rows)], [min(count, logits.shape[1]) for count in counts[: len(rows)]]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("_BLOCK", 4), ("_CANDIDATES", 8), ("_TILE", tile), ("_MARGIN", margin)):
            patch.setattr(torch_sampling, name, value)
        agree("torch", logits, draws)
        checks = operations("torch").sample(logits, draws)[1]
        tokens = [place % logits.shape[1] for place in range(len(rows))]
        found = operations("torch").logprobs(logits, tokens, counts)
    assert all(map(math.isfinite, checks))
    for row, one, other, count in zip(
        logits, found, reference.logprobs(logits, tokens, counts), counts, strict=True
    ):
        assert (one.rank, len(one.best)) == (other.rank, count)
        assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
        assert row[one.best].tolist() == row[other.best].tolist()
        if margin:  # enough to find every equal of the last one
            assert one.best == other.best


def test_a_tile_is_at_most_32_mib() -> None:
    assert torch_sampling.tiles(torch.empty(2, 1 << 22)) == [(0, 2)]
    assert torch_sampling.tiles(torch.empty(3, 1 << 22)) == [(0, 2), (2, 3)]


@given(rows=st.integers(1, 50), width=st.integers(1, 50), tile=st.integers(1, 400))
def test_tiles_are_all_rows_in_order_and_as_many_as_fit(rows: int, width: int, tile: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_sampling, "_TILE", tile)
        found = torch_sampling.tiles(torch.empty(rows, width))
        assert torch_sampling.tiles(torch.empty(rows, width, device="meta")) == [(0, rows)]
    assert [row for start, stop in found for row in range(start, stop)] == list(range(rows))
    most = max(1, tile // width)
    assert [stop - start for start, stop in found[:-1]] == [most] * (len(found) - 1)
    assert 1 <= found[-1][1] - found[-1][0] <= most


@given(
    values=st.lists(st.sampled_from([1.0, 2.0, 3.0, -math.inf]), min_size=1, max_size=12),
    width=st.integers(1, 14),
)
def test_ranks_are_by_value_then_by_id(values: list[float], width: int) -> None:
    row = torch.tensor([values])
    ordered, ids = torch_sampling.ranked(row, width)
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    count = min(width, len(values))
    assert ordered.shape == ids.shape == (1, count)
    assert ordered[0].tolist() == [values[i] for i in order[:count]]
    last = ordered[0, -1].item()
    above = [i for i in order if values[i] > last]
    assert ids[0, : len(above)].tolist() == above
    rest = ids[0, len(above) :].tolist()
    assert rest == sorted(rest)
    assert all(values[i] == last for i in rest)
    if width >= len(values):
        assert ids[0].tolist() == order
