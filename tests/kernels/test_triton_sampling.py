"""Triton's sampling and log-probabilities: the same tokens and ranks as the specification's."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from penstock.kernels import reference
from penstock.kernels.operations import Draw

from .test_sampling import DRAWS, GREEDY, LAST, agree, random_logits
from .triton import DEVICE, DTYPES, needs_triton, quiet, table

pytestmark = [needs_triton, quiet]


@pytest.mark.parametrize("dtype", DTYPES)
def test_greedy_takes_the_lowest_of_the_largest(dtype: torch.dtype) -> None:
    """In every part of a row, among zeros of both signs, and where almost nothing is possible."""
    vocabulary = 2500
    places = [0, 1023, 1024, vocabulary - 1]
    logits = random_logits(7, vocabulary).to(dtype)
    logits[range(4), places] = 100.0
    logits[2, 2000] = 100.0
    logits[4] = 0.0
    logits[4, 5] = -0.0
    logits[5] = -math.inf
    logits[5, 1500:1502] = -6e4
    logits[6, 3] = logits[6].max() + 1
    tokens, checks = table(dtype).sample(logits.to(DEVICE), [GREEDY] * 7)
    assert tokens == [*places, 0, 1500, 3]
    assert checks == logits.float().amax(1).tolist()


KINDS = [Draw(0.0, 0.0), Draw(0.5, 0.7), Draw(0.5, 0.7, top_p=0.9), Draw(0.5, 0.7, top_k=3)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rows_without_a_distribution_say_so(value: float) -> None:
    """And change nothing for those beside them."""
    logits = random_logits(8, 40).half()
    logits[4:] = value if value == -math.inf else logits[4:]
    logits[4:, 39] = value
    operations = table(torch.float16)
    tokens, checks = operations.sample(logits.to(DEVICE), KINDS + KINDS)
    assert [math.isfinite(check) for check in checks] == [True] * 4 + [False] * 4
    assert all(0 <= token < 40 for token in tokens), "the next step embeds it all the same"
    assert tokens[:4] == reference.sample(logits[:4], KINDS)[0]


@given(
    draws=st.lists(DRAWS, min_size=1, max_size=2),
    vocabulary=st.sampled_from([1, 3, 49, 700, 1301]),
    seed=st.integers(0, 10**6),
    grid=st.sampled_from([1e-6, 0.125, 2.0]),
    scale=st.sampled_from([0.0, 1.0, 5.0]),
    masked=st.sampled_from([0.0, 0.7, 0.99]),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=4)
@example(
    [Draw(LAST, 1.0, top_p=0.5)], 49, 0, 2.0, 0.0, 0.0, torch.float32
)  # equal ones, cut among themselves
@example([Draw(0.999, 3.0, top_k=40, top_p=0.95, min_p=0.02)], 1301, 1, 0.125, 5.0, 0.7, torch.bfloat16)
@example([Draw(0.3, 1.0, top_p=1e-9), Draw(0.99, 1.0, top_k=1)], 700, 2, 2.0, 1.0, 0.0, torch.float16)
@example(
    [Draw(0.97, 0.8, top_k=4, top_p=0.9), Draw(0.4, 1.0, top_k=30)], 9000, 3, 1e-6, 5.0, 0.0, torch.float32
)
@example(
    [Draw(0.9995, 1.0, top_p=0.9995), Draw(0.8, 0.5, top_p=0.99)], 9000, 4, 0.125, 1.0, 0.3, torch.bfloat16
)
@example([Draw(LAST, 2.0, top_k=8999), Draw(0.2, 1e-6, top_p=0.99)], 9000, 5, 1e-6, 1.0, 0.99, torch.float32)
def test_the_tokens_that_the_specification_chooses(
    draws: list[Draw],
    vocabulary: int,
    seed: int,
    grid: float,
    scale: float,
    masked: float,
    dtype: torch.dtype,
) -> None:
    """Ties (a coarse grid), and logits of which most are masked."""
    logits = ((random_logits(len(draws), vocabulary, seed, scale) / grid).round() * grid).to(dtype)
    logits[:, : int(masked * vocabulary)] = -math.inf
    agree("triton", logits.to(DEVICE), draws)


def test_the_last_of_the_most_probable() -> None:
    """In as many parts, fewer, and more of them than there are."""
    logits = random_logits(1, 9000, 6).repeat(3, 1)
    draws = [Draw(0.9999, 5.0, top_k=count) for count in (4, 9, 30)]
    order = logits[0].argsort(descending=True, stable=True)
    tokens, _ = table(torch.float32).sample(logits.to(DEVICE), draws)
    assert tokens == [int(order[draw.top_k - 1]) for draw in draws]


def test_what_is_far_below_the_largest_is_drawn_too() -> None:
    """Each of 8,999 tokens has a weight of 4e-8: together 0.04 % of the mass. (The largest one is the last:
    the interpreter adds them up one by one.)"""
    logits = torch.zeros(3, 9000)
    logits[:, -1] = 17.0
    draws = [Draw(uniform, 1.0, top_p=0.99999) for uniform in (0.9995, 0.9997, 0.9999)]
    agree("triton", logits.to(DEVICE), draws)
    tokens, _ = table(torch.float32).sample(logits.to(DEVICE), draws)
    assert tokens[1] < tokens[2] < tokens[0] == 8999


def test_a_row_does_not_depend_on_its_company() -> None:
    logits = random_logits(4, 300).half().to(DEVICE)
    operations = table(torch.float16)
    together = operations.sample(logits, KINDS)[0]
    assert together == [operations.sample(logits[i : i + 1], [KINDS[i]])[0][0] for i in range(4)]


def test_the_answer_may_stay_on_the_device() -> None:
    logits = random_logits(2, 100).half().to(DEVICE)
    operations = table(torch.float16)
    assert operations.choose is not None
    tokens, checks = operations.choose(logits, KINDS[:2])
    assert (tokens.device.type, tokens.dtype, checks.dtype) == (DEVICE.type, torch.int64, torch.float32)
    assert (tokens.tolist(), checks.tolist()) == operations.sample(logits, KINDS[:2])
    assert operations.sample(logits[:0], []) == ([], [])


@pytest.mark.parametrize("dtype", DTYPES)
def test_logprobs(dtype: torch.dtype) -> None:
    logits = random_logits(3, 1301).to(dtype)
    logits[1, 700:] = -math.inf
    tokens, counts = [1300, 5, 0], [5, 0, 1301]
    got = table(dtype).logprobs(logits.to(DEVICE), tokens, counts)
    for found, want in zip(got, reference.logprobs(logits, tokens, counts), strict=True):
        assert found.logprob == pytest.approx(want.logprob, rel=2e-6, abs=2e-6)
        assert found.rank == want.rank
        assert found.best == want.best
        assert found.logprobs == pytest.approx(want.logprobs, rel=2e-6, abs=2e-6)
    assert table(dtype).logprobs(logits[:0].to(DEVICE), [], []) == []


def test_what_the_kernels_would_misread_is_refused() -> None:
    operations, logits = table(torch.float32), torch.zeros(2, 5, device=DEVICE)
    with pytest.raises(ValueError, match=r"need logits of shape \[1, V\], got \[2, 5\]"):
        operations.sample(logits, [GREEDY])
    with pytest.raises(ValueError, match=r"logits of torch\.float64"):
        operations.sample(logits.double(), [GREEDY] * 2)
    with pytest.raises(ValueError, match=r"tokens \[0, 5\]"):
        operations.logprobs(logits, [0, 5], [0, 0])
