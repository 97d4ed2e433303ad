"""Sampling and log-probabilities of every table against the specification: the same tokens and ranks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from penstock.kernels import reference
from penstock.kernels.operations import Draw, Likelihood

from .tables import DTYPES, TABLES, table

over_tables = pytest.mark.parametrize("name", TABLES)
GREEDY = Draw(0.0, 0.0)
LAST = 1 - 2.0**-48


def sample(name: str, logits: torch.Tensor, draws: list[Draw]) -> tuple[list[int], list[float]]:
    return table(name, logits.dtype).sample(logits, draws)


def logprobs(name: str, logits: torch.Tensor, tokens: list[int], counts: list[int]) -> list[Likelihood]:
    return table(name, logits.dtype).logprobs(logits, tokens, counts)


def specified(logits: torch.Tensor, draws: list[Draw]) -> list[int]:
    return reference.sample(logits, draws)[0]


def random_logits(rows: int, vocabulary: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


NUMBERS = st.sampled_from([0.0, -0.0, 1.0, 1.0, -1.0, 1e-30, 3.0, -3e38, 3e38, -math.inf])


@over_tables
@given(
    rows=st.integers(1, 4).flatmap(
        lambda count: st.integers(1, 70).flatmap(
            lambda width: st.lists(
                st.lists(NUMBERS, min_size=width, max_size=width), min_size=count, max_size=count
            )
        )
    ),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=200)
def test_greedy_is_argmax(name: str, rows: list[list[float]], dtype: torch.dtype) -> None:
    """Ties to the lowest id, zeros of both signs equal, -inf everywhere is not finite."""
    logits = torch.tensor(rows, dtype=dtype)
    tokens, checks = sample(name, logits, [GREEDY] * len(rows))
    wanted, largest = reference.sample(logits, [GREEDY] * len(rows))
    assert checks == largest
    finite = [i for i, check in enumerate(checks) if math.isfinite(check)]
    assert [tokens[i] for i in finite] == [wanted[i] for i in finite]


@over_tables
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 15, 16, 17, 255, 256, 257, 5003])
def test_every_place_can_be_the_largest(name: str, dtype: torch.dtype, vocabulary: int, threads: int) -> None:
    places = sorted({0, vocabulary - 1, vocabulary // 2, vocabulary // 3})
    logits = random_logits(len(places), vocabulary).to(dtype)
    logits[range(len(places)), places] = 100.0
    assert sample(name, logits, [GREEDY] * len(places))[0] == places
    logits[:, 0] = 100.0
    assert sample(name, logits, [GREEDY] * len(places))[0] == [0] * len(places)


@over_tables
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 16, 23, 700, 20000])
@pytest.mark.parametrize(
    "draw", [Draw(0.0, 0.0), Draw(0.5, 0.7), Draw(0.5, 0.7, top_p=0.9), Draw(0.5, 0.7, top_k=3)], ids=str
)
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
def test_rows_without_a_distribution_say_so(
    name: str, dtype: torch.dtype, vocabulary: int, draw: Draw, value: float
) -> None:
    logits = random_logits(3, vocabulary).to(dtype)
    logits[1] = value if value == -math.inf else logits[1]
    logits[1, vocabulary - 1] = value
    tokens, checks = sample(name, logits, [draw] * 3)
    assert [math.isfinite(check) for check in checks] == [True, False, True]
    keep = [0, 2]
    assert [tokens[i] for i in keep] == sample(name, logits[keep], [draw] * 2)[0]
    if name == "cpu":
        assert str(checks[1]).strip("-") == str(abs(value))
        assert [checks[i] for i in keep] == logits[keep].amax(1).tolist()


DRAWS = st.builds(
    Draw,
    uniform=st.floats(1e-9, LAST),  # at 0, weights that underflow here and not there would decide
    temperature=st.sampled_from([0.01, 0.7, 1.0, 3.0]),
    min_p=st.sampled_from([0.0, 0.0, 0.02, 1.0]),
    top_k=st.sampled_from([0, 0, 1, 40, 299, 1500, 30000]),
    top_p=st.sampled_from([1.0, 0.95, 0.999999, 0.5, 1e-9]),
)


def agree(name: str, logits: torch.Tensor, draws: list[Draw]) -> None:
    """The same token, or one that the specification draws for a number within two millionths of it."""
    tokens, wanted = sample(name, logits, draws)[0], specified(logits, draws)
    for row, token, draw in zip(logits.float(), tokens, draws, strict=True):
        if token == wanted.pop(0):
            continue
        beside = [
            draw._replace(
                uniform=min(max(0.0, draw.uniform + shift), 1.0),  # 1: the last token that is possible
                top_p=min(draw.top_p * top_p, 1.0),
                min_p=min(draw.min_p * min_p, 1.0),  # above 1 no token would be left
            )
            for shift in (-2e-6, 0.0, 2e-6)
            for top_p in (1 - 1e-6, 1.0, 1 + 1e-6)
            for min_p in (1 - 1e-6, 1.0, 1 + 1e-6)
        ]
        near = specified(row.repeat(len(beside), 1), beside)
        if token in near:
            continue
        assert not draw.min_p  # what lies between two tokens that are drawn is kept, too
        assert row[token] > -math.inf
        order = list(range(len(row)))
        if draw.top_k or draw.top_p < 1:
            order = row.argsort(descending=True, stable=True).tolist()
        places = [order.index(other) for other in near]
        assert min(places) < order.index(token) < max(places)


@over_tables
@given(
    draws=st.lists(DRAWS, min_size=1, max_size=5),
    vocabulary=st.sampled_from([1, 3, 17, 48, 49, 257, 700, 1301]),
    seed=st.integers(0, 10**6),
    grid=st.sampled_from([1e-6, 0.125, 2.0]),
    scale=st.sampled_from([0.0, 1.0, 5.0]),
    masked=st.sampled_from([0.0, 0.7, 0.99]),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=400)
def test_the_tokens_that_the_specification_chooses(
    name: str,
    draws: list[Draw],
    vocabulary: int,
    seed: int,
    grid: float,
    scale: float,
    masked: float,
    dtype: torch.dtype,
) -> None:
    logits = ((random_logits(len(draws), vocabulary, seed, scale) / grid).round() * grid).to(dtype)
    logits[:, : int(masked * vocabulary)] = -math.inf
    agree(name, logits, draws)


@over_tables
@given(
    draws=st.lists(DRAWS, min_size=1, max_size=3),
    seed=st.integers(0, 10**6),
    shape=st.sampled_from(["flat", "steep", "ties", "equal", "one", "two heights"]),
    dtype=st.sampled_from(DTYPES),
)
@example(draws=[Draw(LAST, 1.0)], seed=0, shape="one", dtype=torch.float32)
@settings(max_examples=120)
def test_large_vocabularies(name: str, draws: list[Draw], seed: int, shape: str, dtype: torch.dtype) -> None:
    """Beyond 16,384 tokens a few of them are looked at first; right or wrong, they change no token."""
    logits = random_logits(len(draws), 20011, seed, {"flat": 0.5, "steep": 4.0}.get(shape, 1.0))
    if shape == "ties":
        logits = logits.round()
    elif shape == "equal":
        logits = torch.zeros_like(logits)
    elif shape == "one":
        logits[:, 7777] = 40.0
    elif shape == "two heights":  # all that counts lies between the places that are looked at
        logits[:, ::128] -= 6.0
    agree(name, logits.to(dtype), draws)


@over_tables
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.5, 5.0])
@pytest.mark.parametrize("top_p", [0.9, 1 - 1e-12])
def test_draws_at_the_very_ends(name: str, dtype: torch.dtype, scale: float, top_p: float) -> None:
    """No number is so large that it leads out of what is kept, whatever the rounding of sums."""
    logits = random_logits(1, 20011, scale=scale).to(dtype)
    order = logits[0].float().argsort(descending=True, stable=True).tolist()
    numbers = [0.0, *(1 - 2.0**-power for power in range(20, 49))]
    tokens, _ = sample(name, logits.repeat(len(numbers), 1), [Draw(u, 1.0, top_p=top_p) for u in numbers])
    places = [order.index(token) for token in tokens]
    assert places[0] == 0
    assert places == sorted(places)
    [end] = specified(logits, [Draw(LAST, 1.0, top_p=top_p)])
    assert places[-1] <= order.index(end) + 1
    third = [Draw(LAST, 1.0, top_k=3)]
    assert sample(name, logits, third)[0] == specified(logits, third)


@over_tables
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_depends_neither_on_threads_nor_on_its_neighbours(
    name: str, dtype: torch.dtype, threads: int
) -> None:
    draws = [
        Draw(0.3, 0.0),
        Draw(0.3, 0.7, top_p=0.95),
        Draw(0.9, 1.0),
        Draw(0.6, 1.3, top_k=50, top_p=0.8),
        Draw(0.1, 0.7, min_p=0.01),
    ]
    logits = random_logits(len(draws), 20011, scale=1.0).to(dtype)
    alone = [sample(name, logits[i : i + 1], [draw])[0][0] for i, draw in enumerate(draws)]
    assert sample(name, logits, draws)[0] == alone
    assert sample(name, logits.flip(0), draws[::-1])[0] == alone[::-1]
    assert sample(name, logits.t().contiguous().t(), draws)[0] == alone  # columns side by side


@over_tables
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_are_left_as_they_are(name: str, dtype: torch.dtype) -> None:
    logits = random_logits(2, 3000).to(dtype)
    before = logits.clone()
    sample(name, logits, [Draw(0.5, 0.7, top_p=0.9)] * 2)
    sample(name, logits, [Draw(0.5, 0.7, min_p=0.1), GREEDY])
    logprobs(name, logits, [1, 2], [3, 0])
    assert torch.equal(logits, before)


@over_tables
@given(
    counts=st.lists(st.sampled_from([0, 1, 5, 20, 80, 640]), min_size=1, max_size=5),
    vocabulary=st.sampled_from([640, 1000, 1301, 20011]),
    seed=st.integers(0, 10**6),
    grid=st.sampled_from([0.125, 2.0]),
    masked=st.sampled_from([0, 600]),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=150)
def test_logprobs(
    name: str, counts: list[int], vocabulary: int, seed: int, grid: float, masked: int, dtype: torch.dtype
) -> None:
    logits = ((random_logits(len(counts), vocabulary, seed) / grid).round() * grid).to(dtype)
    logits[:, :masked] = -math.inf
    tokens = [(seed * (i + 1)) % vocabulary for i in range(len(counts))]
    got, wanted = logprobs(name, logits, tokens, counts), reference.logprobs(logits, tokens, counts)
    # torch sums a row in float32: with AVX2, 20,011 terms lose up to 2.7e-5, where the kernels lose 1.3e-6
    fast = name == "cpu" and 8 * max(counts) <= vocabulary
    tolerance = 1e-5 if fast else 5e-5
    exact = logits.double().log_softmax(-1).tolist()
    for one, other, count, token, values in zip(got, wanted, counts, tokens, exact, strict=True):
        assert one.rank == other.rank
        assert one.logprob == pytest.approx(values[token], abs=tolerance)
        assert one.logprobs == pytest.approx([values[token] for token in one.best], abs=tolerance)
        if fast:
            assert one.best == other.best
        else:  # of many equals at its border, torch.topk takes any
            assert len(one.best) == count
            assert one.logprobs == pytest.approx(other.logprobs, abs=5e-5)


def test_more_alternatives_than_chunks_of_the_vocabulary() -> None:
    logits = random_logits(2, 6000)
    many, none = logprobs("cpu", logits, [0, 1], [700, 0])
    assert many.best == logits[0].argsort(descending=True)[:700].tolist()
    assert none.best == []


@over_tables
def test_rows_without_a_distribution_leave_the_others_as_they_are(name: str) -> None:
    logits = random_logits(2, 50)
    want = reference.logprobs(logits[:1], [0], [1])[0]
    logits[1, 3] = math.nan
    fine, broken = logprobs(name, logits, [0, 0], [1, 1])
    assert (fine.rank, fine.best) == (want.rank, want.best)
    assert fine.logprob == pytest.approx(want.logprob, abs=1e-5)
    assert math.isnan(broken.logprob)


def test_what_does_not_fit_is_refused() -> None:
    logits = random_logits(2, 50)
    with pytest.raises(ValueError, match=r"\[3, V\]"):
        sample("cpu", logits, [GREEDY] * 3)
    with pytest.raises(ValueError, match="0 to 49"):
        logprobs("cpu", logits, [0, 50], [1, 1])
    with pytest.raises(ValueError, match="0 to 50"):
        logprobs("cpu", logits, [0, 0], [1, 51])
    assert sample("cpu", logits[:0], []) == ([], [])
    with pytest.raises(ValueError, match="take float32 and bfloat16"):
        table("cpu", torch.float32).sample(logits.half(), [GREEDY] * 2)
