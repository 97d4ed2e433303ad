"""The sampling kernels against torch's operators: the same tokens, ranks and log-probabilities."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.kernels.cpu import library
from penstock.kernels.cpu.library import available
from penstock.kernels.cpu.sampling import Sampling, kernels
from penstock.sampling import choose
from penstock.sampling.choose import Draw
from penstock.sampling.logprobs import gather_logprobs

pytestmark = pytest.mark.skipif(
    available(wait_seconds=120) is None, reason="no C++ compiler, or PENSTOCK_CPU_KERNELS=0"
)

DTYPES = [torch.float32, torch.bfloat16]
LAST = 1 - 2.0**-48


def fast(logits: torch.Tensor) -> Sampling:
    found = kernels(logits)
    assert found is not None
    return found


def greedy(logits: torch.Tensor) -> tuple[list[int], list[float]]:
    draws = [Draw(0.0, 0.0)] * len(logits)
    return sample(logits, draws)


def sample(logits: torch.Tensor, draws: list[Draw]) -> tuple[list[int], list[float]]:
    return fast(logits).sample(
        logits,
        temperatures=[draw.temperature for draw in draws],
        uniforms=[draw.uniform for draw in draws],
        min_ps=[draw.min_p for draw in draws],
        top_ks=[draw.top_k for draw in draws],
        top_ps=[draw.top_p for draw in draws],
    )


def specified(logits: torch.Tensor, draws: list[Draw]) -> list[int]:
    """The tokens of whole sorted rows, or of the open distribution."""
    logits = logits.float()
    tokens = []
    for row, draw in zip(logits.split(1), draws, strict=True):
        if draw.top_k or draw.top_p < 1:
            values, ids = choose.ranked(row, row.shape[1])
            tokens.append(int(ids.gather(1, choose._cut(row, values, [draw])[0])))
        else:
            tokens.append(int(choose.choose_open(row, [draw])[0]))
    return tokens


def random_logits(rows: int, vocabulary: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


NUMBERS = st.sampled_from([0.0, -0.0, 1.0, 1.0, -1.0, 1e-30, 3.0, -3e38, 3e38, -math.inf])


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
def test_greedy_is_argmax(rows: list[list[float]], dtype: torch.dtype) -> None:
    """Ties to the lowest id, zeros of both signs equal, -inf everywhere is not finite."""
    logits = torch.tensor(rows, dtype=dtype)
    tokens, checks = greedy(logits)
    wanted, largest = choose.choose_greedy(logits)
    assert checks == largest.float().tolist()
    finite = largest.isfinite().tolist()
    assert [t for t, ok in zip(tokens, finite, strict=True) if ok] == wanted[largest.isfinite()].tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 15, 16, 17, 255, 256, 257, 5003])
def test_every_place_can_be_the_largest(dtype: torch.dtype, vocabulary: int, threads: int) -> None:
    places = sorted({0, vocabulary - 1, vocabulary // 2, vocabulary // 3})
    logits = random_logits(len(places), vocabulary).to(dtype)
    logits[range(len(places)), places] = 100.0
    assert greedy(logits)[0] == places
    logits[:, 0] = 100.0
    assert greedy(logits)[0] == [0] * len(places)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 16, 23, 700, 20000])
@pytest.mark.parametrize(
    "draw", [Draw(0.0, 0.0), Draw(0.5, 0.7), Draw(0.5, 0.7, top_p=0.9), Draw(0.5, 0.7, top_k=3)], ids=str
)
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
def test_rows_without_a_distribution_say_so(
    dtype: torch.dtype, vocabulary: int, draw: Draw, value: float
) -> None:
    logits = random_logits(3, vocabulary).to(dtype)
    logits[1] = value if value == -math.inf else logits[1]
    logits[1, vocabulary - 1] = value
    tokens, checks = sample(logits, [draw] * 3)
    assert str(checks[1]).strip("-") == str(abs(value))
    keep = [0, 2]
    assert [tokens[i] for i in keep] == sample(logits[keep], [draw] * 2)[0]
    assert [checks[i] for i in keep] == logits[keep].amax(1).tolist()


DRAWS = st.builds(
    Draw,
    uniform=st.floats(1e-9, LAST),  # at 0, weights that underflow here and not there would decide
    temperature=st.sampled_from([0.01, 0.7, 1.0, 3.0]),
    min_p=st.sampled_from([0.0, 0.0, 0.02, 1.0]),
    top_k=st.sampled_from([0, 0, 1, 40, 299, 1500, 30000]),
    top_p=st.sampled_from([1.0, 0.95, 0.999999, 0.5, 1e-9]),
)


def agree(logits: torch.Tensor, draws: list[Draw]) -> None:
    """The same token, or one that the specification draws for a number a millionth beside it."""
    tokens, wanted = sample(logits, draws)[0], specified(logits, draws)
    for row, draw in enumerate(draws):
        if tokens[row] != wanted[row]:
            beside = [
                replace(
                    draw,
                    uniform=min(max(0.0, draw.uniform + shift), LAST),
                    top_p=draw.top_p * top_p,
                    min_p=draw.min_p * min_p,
                )
                for shift in (-2e-6, 0.0, 2e-6)
                for top_p in (1 - 1e-6, 1.0, 1 + 1e-6)
                for min_p in (1 - 1e-6, 1.0, 1 + 1e-6)
            ]
            assert tokens[row] in specified(logits[row].repeat(len(beside), 1), beside)


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
def test_the_tokens_that_torch_chooses(
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
    agree(logits, draws)


@given(
    draws=st.lists(DRAWS, min_size=1, max_size=3),
    seed=st.integers(0, 10**6),
    shape=st.sampled_from(["flat", "steep", "ties", "equal", "one", "two heights"]),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=120)
def test_large_vocabularies(draws: list[Draw], seed: int, shape: str, dtype: torch.dtype) -> None:
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
    agree(logits.to(dtype), draws)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.5, 5.0])
@pytest.mark.parametrize("top_p", [0.9, 1 - 1e-12])
def test_draws_at_the_very_ends(dtype: torch.dtype, scale: float, top_p: float) -> None:
    """No number is so large that it leads out of what is kept, whatever the rounding of sums."""
    logits = random_logits(1, 20011, scale=scale).to(dtype)
    order = choose.ranked(logits.float(), 20011)[1][0].tolist()
    numbers = [0.0, *(1 - 2.0**-power for power in range(20, 49))]
    tokens, _ = sample(logits.repeat(len(numbers), 1), [Draw(u, 1.0, top_p=top_p) for u in numbers])
    places = [order.index(token) for token in tokens]
    assert places[0] == 0
    assert places == sorted(places)
    [end] = specified(logits, [Draw(LAST, 1.0, top_p=top_p)])
    assert places[-1] <= order.index(end) + 1
    assert sample(logits, [Draw(LAST, 1.0, top_k=3)])[0] == specified(logits, [Draw(LAST, 1.0, top_k=3)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_depends_neither_on_threads_nor_on_its_neighbours(dtype: torch.dtype, threads: int) -> None:
    draws = [
        Draw(0.3, 0.0),
        Draw(0.3, 0.7, top_p=0.95),
        Draw(0.9, 1.0),
        Draw(0.6, 1.3, top_k=50, top_p=0.8),
        Draw(0.1, 0.7, min_p=0.01),
    ]
    logits = random_logits(len(draws), 20011, scale=1.0).to(dtype)
    alone = [sample(logits[i : i + 1], [draw])[0][0] for i, draw in enumerate(draws)]
    assert sample(logits, draws)[0] == alone
    assert sample(logits.flip(0), draws[::-1])[0] == alone[::-1]
    assert sample(logits.t().contiguous().t(), draws)[0] == alone  # columns side by side


def test_logits_are_left_as_they_are() -> None:
    logits = random_logits(2, 3000)
    before = logits.clone()
    sample(logits, [Draw(0.5, 0.7, top_p=0.9)] * 2)
    fast(logits).logprobs(logits, [1, 2], [3, 0])
    assert torch.equal(logits, before)


@given(
    counts=st.lists(st.sampled_from([0, 1, 5, 20, 80]), min_size=1, max_size=5),
    vocabulary=st.sampled_from([640, 1000, 1301, 20011]),
    seed=st.integers(0, 10**6),
    grid=st.sampled_from([0.125, 2.0]),
    masked=st.sampled_from([0, 600]),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=150)
def test_logprobs(
    counts: list[int], vocabulary: int, seed: int, grid: float, masked: int, dtype: torch.dtype
) -> None:
    logits = ((random_logits(len(counts), vocabulary, seed) / grid).round() * grid).to(dtype)
    logits[:, :masked] = -math.inf
    tokens = [(seed * (i + 1)) % vocabulary for i in range(len(counts))]
    got = gather_logprobs(logits, tokens, counts)
    with pytest.MonkeyPatch.context() as context:
        context.setattr(library._State, "library", None)
        wanted = gather_logprobs(logits, tokens, counts)
    # torch sums a row in float32: with AVX2, 20,011 terms lose up to 2.7e-5, where the kernels lose 1.3e-6
    exact = logits.double().log_softmax(-1).tolist()
    # of many equals at its border, torch.topk takes any; a whole sort knows which
    order = logits.float().sort(descending=True, stable=True).indices.tolist()
    for one, other, count, ids, logprobs in zip(got, wanted, counts, order, exact, strict=True):
        assert (one.token, one.rank) == (other.token, other.rank)
        assert one.logprob == pytest.approx(logprobs[one.token], abs=1e-5)
        assert one.logprob == pytest.approx(other.logprob, abs=5e-5)
        assert [token for token, _ in one.top] == ids[:count]
        assert [value for _, value in one.top] == pytest.approx([logprobs[i] for i in ids[:count]], abs=1e-5)
        assert [value for _, value in one.top] == pytest.approx([value for _, value in other.top], abs=5e-5)


def test_more_alternatives_than_chunks_of_the_vocabulary() -> None:
    logits = random_logits(2, 5000)
    [(_, _, best, _), (_, _, none, _)] = fast(logits).logprobs(logits, [0, 1], [700, 0]) or ()
    assert best == logits[0].argsort(descending=True)[:700].tolist()
    assert none == []


def test_rows_without_a_distribution_have_no_logprobs() -> None:
    logits = random_logits(2, 50)
    logits[1, 3] = math.nan
    assert fast(logits).logprobs(logits, [0, 0], [1, 1]) is None


def test_what_does_not_fit_is_refused() -> None:
    logits = random_logits(2, 50)
    with pytest.raises(ValueError, match=r"\[3, V\]"):
        sample(logits, [Draw(0.0, 0.0)] * 3)
    with pytest.raises(ValueError, match="0 to 49"):
        fast(logits).logprobs(logits, [0, 50], [1, 1])
    with pytest.raises(ValueError, match="0 to 50"):
        fast(logits).logprobs(logits, [0, 0], [1, 51])
    assert sample(logits[:0], []) == ([], [])


def test_other_dtypes_and_devices_are_left_to_torch() -> None:
    assert kernels(torch.empty(0, 5, dtype=torch.float16)) is None
    assert kernels(torch.empty(0, 5, device="meta")) is None
