"""The sampler against exact distributions, transformers' warpers, and itself in other batches."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from penstock.core.sampling_params import SamplingParams
from penstock.kernels import torch_sampling as choose
from penstock.kernels.operations import Draw
from penstock.sampling import SamplingState
from penstock.sampling.random import uniform

from .current import sampler


def make_row(
    *, seed: int = 0, tokens: tuple[int, ...] = (1, 2), prompt_len: int = 2, **params: object
) -> SamplingState:
    return SamplingState(
        request="r",
        params=SamplingParams(**params),  # type: ignore[arg-type]
        prompt_len=prompt_len,
        tokens=list(tokens),
        eos_ids=(0,),
        seed=seed,
    )


def random_logits(rows: int, vocabulary: int, *, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


def sample_many(logits: torch.Tensor, count: int, **params: object) -> torch.Tensor:
    """Tokens that `count` seeds draw from one distribution [V]."""
    rows = [make_row(seed=seed, **params) for seed in range(count)]
    return torch.tensor([s.token for s in sampler().sample(logits.repeat(count, 1), rows)])


def chi_square(tokens: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Pearson's statistic as a standard normal deviate (Wilson and Hilferty, 1931)."""
    expected = probabilities * len(tokens)
    observed = torch.bincount(tokens, minlength=len(probabilities)).double()
    assert observed[expected == 0].sum() == 0
    rare = expected < 5
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
    used = expected > 0
    freedom = int(used.sum()) - 1
    if freedom == 0:
        return 0.0
    statistic = float(((observed - expected) ** 2 / expected)[used].sum())
    spread = 2 / (9 * freedom)
    return float(((statistic / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5)


def reference(logits: torch.Tensor, **params: float) -> torch.Tensor:
    """Probabilities [V] by transformers' warpers, in vLLM's order (min_p before top_k and top_p)."""
    ids, scores = torch.zeros(1, 1, dtype=torch.long), logits[None].clone()
    scores = TemperatureLogitsWarper(float(params.get("temperature", 1.0)))(ids, scores)
    if params.get("min_p"):
        scores = MinPLogitsWarper(params["min_p"])(ids, scores)
    if params.get("top_k"):
        scores = TopKLogitsWarper(int(params["top_k"]))(ids, scores)
    if params.get("top_p", 1.0) < 1.0:
        scores = TopPLogitsWarper(params["top_p"])(ids, scores)
    return scores[0].double().softmax(-1)


CUTS: list[dict[str, float]] = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.7},
    {"top_k": 1},
    {"top_k": 5},
    {"top_p": 0.9},
    {"top_p": 0.3},
    {"top_p": 1e-6},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    {"temperature": 1.3, "top_k": 40, "top_p": 0.8, "min_p": 0.05},
    {"top_p": 0.999, "min_p": 0.001},
    {"top_k": 300},
    {"top_k": 3_000_000_000},
    {"top_k": 300, "top_p": 0.9},
]


@pytest.mark.parametrize("params", CUTS, ids=str)
@pytest.mark.parametrize(("vocabulary", "scale"), [(50, 2.0), (700, 1.0), (1500, 3.0)])
def test_draws_follow_the_distribution(params, vocabulary, scale):
    logits = random_logits(1, vocabulary, scale=scale)[0]
    tokens = sample_many(logits, 4000, **params)
    assert chi_square(tokens, reference(logits, **params)) < 4


@given(
    seed=st.integers(0, 10**6),
    vocabulary=st.sampled_from([3, 40, 257, 300, 1100]),
    scale=st.sampled_from([0.0, 0.1, 1.0, 8.0]),
    grid=st.sampled_from([0.0, 0.5]),
    top_k=st.sampled_from([0, 1, 7, 255, 256, 257, 5000]),
    top_p=st.sampled_from([1.0, 0.99, 0.7, 0.05]),
    min_p=st.sampled_from([0.0, 0.01, 0.5]),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
)
@settings(derandomize=True, max_examples=300, deadline=None)
def test_only_tokens_that_the_warpers_keep(seed, vocabulary, scale, grid, top_k, top_p, min_p, temperature):
    """The kept set, ties included, is transformers' one, up to rounding at the border of top_p."""
    logits = random_logits(1, vocabulary, seed=seed, scale=scale)
    if grid:
        logits = (logits / grid).round() * grid  # many equal logits
    params = {"temperature": temperature, "top_k": min(top_k, vocabulary), "top_p": top_p, "min_p": min_p}
    wanted = reference(logits[0], **params)
    draws = [Draw(u, temperature, min_p, top_k, top_p) for u in (0.0, 0.31, 0.77, 1 - 2.0**-48)]
    kind = choose.choose_cut if top_k or top_p < 1 else choose.choose_open
    tokens, _ = kind(logits.repeat(4, 1), draws)
    # Which of several equal logits stands at the border of top_p is free: compare values, not ids.
    chosen = logits[0][tokens]
    least = logits[0][wanted > 0].min()
    rounding = wanted[logits[0] == least].sum() < 1e-6  # then float32 sums may see the border elsewhere
    assert (chosen >= least).all() or rounding
    if kind is choose.choose_cut:
        assert chosen[0] == logits.max()
        assert chosen[3] == least or rounding
        assert tokens[0] == logits[0].argmax()


def test_greedy_is_argmax_and_takes_the_first_of_equals():
    logits = random_logits(8, 1000)
    logits[3, [17, 400]] = 99.0
    wanted = logits.argmax(-1).tolist()
    assert wanted[3] == 17
    rows = [make_row(temperature=0, seed=i) for i in range(8)]
    assert [s.token for s in sampler().sample(logits, rows)] == wanted


PARAMS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.7, 1.0]),
        "top_k": st.sampled_from([0, 3, 400]),
        "top_p": st.sampled_from([1.0, 0.9]),
        "min_p": st.sampled_from([0.0, 0.1]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "frequency_penalty": st.sampled_from([0.0, 0.5]),
        "logit_bias": st.sampled_from([{}, {4: 5.0, 9: -100.0}]),
        "allowed_token_ids": st.sampled_from([None, (4, 5, 6)]),
        "min_tokens": st.sampled_from([0, 4]),
        "logprobs": st.sampled_from([None, 0, 3]),
    }
)


@given(params=st.lists(PARAMS, min_size=2, max_size=6), seed=st.integers(0, 10**6))
@settings(derandomize=True, max_examples=100, deadline=None)
def test_a_row_does_not_depend_on_its_neighbours(params, seed):
    logits = (random_logits(len(params), 600, seed=seed) * 4).round() / 4

    def rows():
        return [make_row(seed=seed + i, tokens=(1, 2, i, 4), **p) for i, p in enumerate(params)]

    together = sampler().sample(logits.clone(), rows())
    alone = [sampler().sample(logits[i : i + 1].clone(), [row])[0] for i, row in enumerate(rows())]
    order = list(reversed(range(len(params))))
    shuffled = sampler().sample(logits[order].clone(), [rows()[i] for i in order])
    assert together == alone
    assert [shuffled[order.index(i)] for i in range(len(params))] == alone


def test_a_preempted_row_goes_on_as_it_would_have():
    logits = random_logits(1, 300, scale=0.5)
    params = {"temperature": 1.0, "repetition_penalty": 1.2, "frequency_penalty": 0.3}
    row = make_row(seed=7, **params)
    for _ in range(20):
        row.tokens.append(sampler().sample(logits.clone(), [row])[0].token)
    resumed = make_row(seed=7, tokens=tuple(row.tokens[:9]), prompt_len=2, **params)
    for _ in range(13):
        resumed.tokens.append(sampler().sample(logits.clone(), [resumed])[0].token)
    assert resumed.tokens == row.tokens
    assert len(set(row.tokens)) > 5


@pytest.mark.parametrize("vocabulary", [7, 511, 512, 513, 1025, 2048])
def test_every_token_can_be_drawn_at_the_borders_of_blocks(vocabulary):
    logits = torch.full((vocabulary, vocabulary), -50.0)
    logits.fill_diagonal_(50.0)
    draws = [Draw((i % 10 + 0.5) / 10, 1.0) for i in range(vocabulary)]
    assert choose.choose_open(logits, draws)[0].tolist() == list(range(vocabulary))
    flat = torch.zeros(2, vocabulary)
    ends, _ = choose.choose_open(flat, [Draw(0.0, 1.0), Draw(1 - 2.0**-48, 1.0)])
    assert ends.tolist() == [0, vocabulary - 1]


def test_masked_tokens_are_never_drawn_even_at_the_ends():
    logits = torch.zeros(2, 1500)
    logits[:, :600] = -math.inf
    logits[:, 1400:] = -math.inf
    ends = [Draw(0.0, 1.0), Draw(1 - 2.0**-48, 1.0)]
    assert choose.choose_open(logits, ends)[0].tolist() == [600, 1399]
    cut = [Draw(draw.uniform, 1.0, top_p=0.999999) for draw in ends]
    assert choose.choose_cut(logits, cut)[0].tolist() == [600, 1399]


@pytest.mark.parametrize(
    "params", [{"temperature": 0}, {}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}], ids=str
)
@pytest.mark.parametrize(
    ("value", "cause"), [(math.nan, "NaN"), (math.inf, r"\+inf"), (-math.inf, "-inf for the whole")]
)
@pytest.mark.parametrize("vocabulary", [100, 1000])
def test_broken_logits_fail_their_row_only(params, value, cause, vocabulary):
    logits = random_logits(3, vocabulary)
    if value == -math.inf:
        logits[1] = value
    else:
        logits[1, 77] = value
    rows = [make_row(seed=i, logprobs=2, **params) for i in range(3)]
    healthy = sampler().sample(logits[[0, 2]].clone(), [rows[0], rows[2]])
    result = sampler().sample(logits, rows)
    assert [result[0], result[2]] == healthy
    assert result[1].token == -1
    assert result[1].logprob is None
    with pytest.raises(AssertionError, match=cause):
        raise AssertionError(result[1].error)


def test_masks_that_leave_nothing_are_an_error_of_the_request():
    row = make_row(allowed_token_ids=(0,), min_tokens=3)  # 0 is the end of sequence
    [result] = sampler().sample(random_logits(1, 50), [row])
    assert result.error is not None
    assert result.error.startswith("no token may be generated")


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"\[2, V\]"):
        sampler().sample(torch.zeros(3, 10), [make_row(), make_row()])
    for shape in ((2,), (2, 10, 1)):
        with pytest.raises(ValueError, match=r"\[2, V\]"):
            sampler().sample(torch.zeros(shape), [make_row(), make_row()])
    assert sampler().sample(torch.zeros(0, 10), []) == []


def test_uniform_numbers_are_uniform_and_independent():
    numbers = torch.tensor(
        [[uniform(seed, n) for n in range(200)] for seed in range(200)], dtype=torch.float64
    )
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert chi_square((numbers * 100).long().flatten(), torch.full((100,), 0.01)) < 4
    for a, b in ((numbers[:, 1:], numbers[:, :-1]), (numbers[1:], numbers[:-1])):
        pairs = (a * 10).long() * 10 + (b * 10).long()
        assert chi_square(pairs.flatten(), torch.full((100,), 0.01)) < 4
    assert len(numbers.unique()) == numbers.numel()


def test_uniform_is_fixed_for_ever():
    """Seeded results are promises to users: a change of the hash would break them."""
    assert [uniform(seed, n) for seed, n in ((0, 0), (0, 1), (1, 0), (-1, 0), (2**63 - 1, 10**6))] == [
        0.6524484863740305,
        0.7012121095215242,
        0.36818951565166813,
        0.36624209016975584,
        0.39854775898749395,
    ]
