"""Edits of the logits against transformers and against definitions written out."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from penstock.core.sampling_params import SamplingParams
from penstock.kernels.operations import Draw
from penstock.sampling import SamplingState
from penstock.sampling.logits import edit
from penstock.sampling.random import uniform

VOCABULARY = 40


def make_row(tokens, prompt_len, **params):
    return SamplingState("r", SamplingParams(**params), prompt_len, list(tokens), eos_ids=(3, 4))


def edited(row, logits):
    logits = logits.clone()[None]
    edit(logits, [row], [0] if row.edited else [])
    return logits[0]


LOGITS = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(1)) * 4
TOKENS = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=30)


@given(tokens=TOKENS, penalty=st.sampled_from([0.5, 1.0, 1.1, 2.0]), prompt=st.integers(1, 30))
@settings(derandomize=True, max_examples=60, deadline=None)
def test_repetition_penalty_equals_transformers(tokens, penalty, prompt):
    wanted = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([tokens]), LOGITS.clone()[None])[0]
    row = make_row(tokens, min(prompt, len(tokens)), repetition_penalty=penalty)
    torch.testing.assert_close(edited(row, LOGITS), wanted, rtol=1e-6, atol=0)


@given(tokens=TOKENS, prompt=st.integers(0, 30), frequency=st.sampled_from([-0.5, 0.0, 0.7]))
@settings(derandomize=True, max_examples=60, deadline=None)
def test_frequency_and_presence_penalties_count_the_output_only(tokens, prompt, frequency):
    prompt = min(prompt, len(tokens))
    counts = torch.bincount(torch.tensor(tokens[prompt:], dtype=torch.long), minlength=VOCABULARY)
    wanted = LOGITS - frequency * counts - 0.25 * (counts > 0)
    row = make_row(tokens, prompt, frequency_penalty=frequency, presence_penalty=0.25)
    torch.testing.assert_close(edited(row, LOGITS), wanted)


@given(tokens=TOKENS, cuts=st.lists(st.integers(0, 30), max_size=5))
@settings(derandomize=True, max_examples=60, deadline=None)
def test_penalties_follow_a_row_that_grows(tokens, cuts):
    params = {"repetition_penalty": 1.4, "frequency_penalty": 0.5, "presence_penalty": -0.5}
    growing = make_row(tokens[:1], 1, **params)
    for end in sorted(cuts):
        growing.tokens.extend(tokens[len(growing.tokens) : end])
        edited(growing, LOGITS)
    growing.tokens.extend(tokens[len(growing.tokens) :])
    assert torch.equal(edited(growing, LOGITS), edited(make_row(tokens, 1, **params), LOGITS))


def test_penalties_of_nothing_change_nothing():
    assert torch.equal(edited(make_row((), 0, repetition_penalty=2.0), LOGITS), LOGITS)


def test_repetition_comes_before_the_other_penalties():
    logits = torch.zeros(VOCABULARY)
    logits[5], logits[6] = 2.0, -2.0
    row = make_row((5, 6), 0, repetition_penalty=2.0, presence_penalty=1.0)
    result = edited(row, logits)
    assert result[5] == 2.0 / 2 - 1
    assert result[6] == -2.0 * 2 - 1


def test_logit_bias_adds_and_leaves_the_rest():
    result = edited(make_row((1,), 1, logit_bias={5: 10.0, 7: -100.0}), LOGITS)
    assert result[5] == LOGITS[5] + 10
    assert result[7] == LOGITS[7] - 100
    rest = [i for i in range(VOCABULARY) if i not in (5, 7)]
    assert torch.equal(result[rest], LOGITS[rest])


def test_allowed_tokens_exclude_the_others():
    result = edited(make_row((1,), 1, allowed_token_ids=(5, 7, 5)), LOGITS)
    assert result.isfinite().nonzero()[:, 0].tolist() == [5, 7]
    assert torch.equal(result[[5, 7]], LOGITS[[5, 7]])


@pytest.mark.parametrize(("generated", "masked"), [(0, True), (1, True), (2, False), (3, False)])
def test_min_tokens_holds_back_what_would_end_the_output(generated, masked):
    row = make_row([1] + [9] * generated, 1, min_tokens=2, stop_token_ids=(20,), max_tokens=50)
    result = edited(row, LOGITS)
    assert (result == -math.inf).nonzero()[:, 0].tolist() == ([3, 4, 20] if masked else [])


def test_a_plain_row_is_not_edited():
    assert not make_row((1, 2), 1, temperature=0.5, top_k=3, top_p=0.5, min_p=0.1).edited


def test_a_state_begins_with_no_seed_of_its_own():
    plain = SamplingState("r", SamplingParams(), 1, [1])
    assert (plain.seed, plain.eos_ids, plain.generated) == (0, (), 0)


@pytest.mark.parametrize(
    ("params", "penalised"),
    [
        ({}, False),
        ({"repetition_penalty": 1.1}, True),
        ({"frequency_penalty": 0.1}, True),
        ({"presence_penalty": -0.1}, True),
    ],
    ids=str,
)
def test_each_penalty_counts_alone(params, penalised):
    row = make_row((1, 2), 1, **params)
    assert (row.penalised, row.edited) == (penalised, penalised)
    assert torch.equal(edited(row, LOGITS), LOGITS) != penalised


def test_how_the_next_token_is_drawn():
    for temperature in (0.0, 9e-6):  # nearly none is none
        assert make_row((1, 2), 1, temperature=temperature, top_k=3).draw == Draw(0.0, 0.0)
    row = make_row((1, 2, 3), 1, temperature=0.5, top_k=-1, top_p=0.25, min_p=0.125)
    assert row.draw == Draw(uniform(0, 2), 0.5, 0.125, 0, 0.25)


def test_only_the_named_rows_change():
    logits = LOGITS.repeat(3, 1)
    rows = [make_row((1, 2), 1, logit_bias={0: 1.0}, repetition_penalty=1.5) for _ in range(3)]
    edit(logits, rows, [1])
    assert torch.equal(logits[0], LOGITS)
    assert torch.equal(logits[2], LOGITS)
    assert not torch.equal(logits[1], LOGITS)


def test_edits_become_tensors_once():
    params = {"logit_bias": {5: 10.0}, "allowed_token_ids": (5, 7), "min_tokens": 3}
    row = make_row((1,), 1, **params)
    want = edited(row, LOGITS)
    made = row.edits.on(LOGITS.device)
    tensors = [made.allowed, made.forbidden, made.biased, made.biases]
    assert torch.equal(edited(row, LOGITS), want)
    again = row.edits.on(LOGITS.device)
    assert all(
        map(lambda a, b: a is b, tensors, [again.allowed, again.forbidden, again.biased, again.biases])
    )


@pytest.mark.parametrize("params", [{}, {"logit_bias": {5: 10}, "allowed_token_ids": (5, 7)}], ids=str)
def test_tensors_of_edits_lie_where_the_logits_do_and_have_their_types(params):
    made = SamplingState("r", SamplingParams(**params), 1, [1]).edits.on(torch.device("meta"))
    tensors = {"forbidden": torch.int64, "biased": torch.int64, "biases": torch.float32}
    if params:
        tensors["allowed"] = torch.int64
    for name, dtype in tensors.items():
        tensor = getattr(made, name)
        assert (tensor.device.type, tensor.dtype) == ("meta", dtype)
    assert (made.allowed is None) == (not params)


def test_a_second_state_shares_the_tensors_and_not_the_tokens():
    row = make_row((1, 2), 1, logit_bias={5: 10.0}, repetition_penalty=2.0)
    other = SamplingState("s", row.params, 1, [1, 6], eos_ids=row.eos_ids, sharing=row)
    assert other.edits is row.edits
    assert not torch.equal(edited(row, LOGITS), edited(other, LOGITS))
    alone = make_row((1, 6), 1, logit_bias={5: 10.0}, repetition_penalty=2.0)
    assert torch.equal(edited(other, LOGITS), edited(alone, LOGITS))


def test_rows_with_edits_of_any_length_side_by_side():
    rows = [
        make_row((1,), 1, logit_bias={5: 10.0, 7: -3.0}, min_tokens=2),
        make_row((1,), 1),
        make_row((1,), 1, min_tokens=2, stop_token_ids=(9,)),
        make_row((1,), 1, logit_bias={6: 1.0}, allowed_token_ids=(6, 8)),
    ]
    logits = LOGITS.repeat(4, 1)
    edit(logits, rows, [0, 2, 3])
    for row, got in zip(rows, logits, strict=True):
        assert torch.equal(got, edited(row, LOGITS))


@pytest.mark.parametrize("count", [1, VOCABULARY // 16 - 1, VOCABULARY // 16 + 1, VOCABULARY])
def test_a_long_allow_list_and_a_short_one_mean_the_same(count):
    """One is an index, the other a mask, made once for all rows of a request."""
    ids = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(count))[:count].tolist()
    row = make_row((1,), 1, allowed_token_ids=(*ids, ids[0]))
    wanted = torch.full_like(LOGITS, -math.inf)
    wanted[ids] = LOGITS[ids]
    sibling = SamplingState("s", row.params, 1, [1], sharing=row)
    for state in (row, sibling, row):
        assert torch.equal(edited(state, LOGITS), wanted)
