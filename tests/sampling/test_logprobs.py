"""Log-probabilities: raw, ranked, and the same in tiles as at once."""

import math

import pytest
import torch

from penstock.core.sampling_params import SamplingParams
from penstock.kernels import torch_sampling
from penstock.sampling import SamplingState, prompt_logprobs
from penstock.sampling.logprobs import gather_logprobs

from .current import sampler, table


def random_logits(rows, vocabulary, seed=0):
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("count", [0, 1, 5, 60, 500, -1])
@pytest.mark.parametrize("vocabulary", [8, 90, 900])
def test_values_ranks_and_order(count, vocabulary):
    logits = random_logits(6, vocabulary)
    targets = [3, 0, vocabulary - 1, 5, 5, 1]
    result = prompt_logprobs(table(), logits, targets, count)
    exact = logits.double().log_softmax(-1)
    for i, entry in enumerate(result):
        assert entry.token == targets[i]
        assert entry.logprob == pytest.approx(exact[i, targets[i]].item(), abs=1e-5)
        assert entry.rank == int((logits[i] >= logits[i, targets[i]]).sum())
        wanted = vocabulary if count == -1 else min(count, vocabulary)
        assert [token for token, _ in entry.top] == logits[i].argsort(descending=True)[:wanted].tolist()
        assert [value for _, value in entry.top] == pytest.approx(
            exact[i].sort(descending=True).values[:wanted].tolist(), abs=1e-5
        )


def test_equal_logits_are_listed_by_id():
    logits = torch.zeros(1, 300)
    logits[0, [250, 20, 100]] = 1.0
    [entry] = prompt_logprobs(table(), logits, [100], 3)
    assert [token for token, _ in entry.top] == [20, 100, 250]
    assert entry.rank == 3  # as many are at least as probable


def test_tiles_change_nothing(monkeypatch):
    logits = random_logits(50, 400)
    targets = list(range(50))
    whole = prompt_logprobs(table(), logits, targets, 4)
    monkeypatch.setattr(torch_sampling, "_TILE", 400 * 7)
    assert torch_sampling.tiles(logits)[:2] == [(0, 7), (7, 14)]
    assert prompt_logprobs(table(), logits, targets, 4) == whole


def test_sampled_logprobs_are_of_the_raw_distribution():
    logits = random_logits(3, 500)
    exact = logits.log_softmax(-1)
    params = {"temperature": 0.0, "repetition_penalty": 1.8, "logit_bias": {77: 100.0}}
    rows = [
        SamplingState("a", SamplingParams(logprobs=2, **params), 1, [1, 5]),
        SamplingState("b", SamplingParams(**params), 1, [1, 5]),
        SamplingState("c", SamplingParams(logprobs=0, temperature=0.1, seed=1), 1, [1, 5]),
    ]
    biased, silent, plain = sampler().sample(logits.clone(), rows)
    assert biased.token == silent.token == 77
    assert silent.logprob is None
    assert biased.logprob is not None
    assert biased.logprob.logprob == pytest.approx(exact[0, 77].item())
    assert biased.logprob.rank == int((exact[0] >= exact[0, 77]).sum())
    assert [token for token, _ in biased.logprob.top] == exact[0].topk(2).indices.tolist()
    assert plain.logprob is not None
    assert plain.logprob.top == ()
    assert plain.logprob.logprob == pytest.approx(exact[2, plain.token].item())


def test_logprobs_of_named_tokens():
    """Their values are those of the whole list, and they take nothing from rows that ask for others."""
    logits = random_logits(3, 500)
    exact = logits.log_softmax(-1)
    named = (7, 3, 499, 7, 250)
    params = {"temperature": 0.0, "logit_bias": {250: 100.0}}
    rows = [
        SamplingState("a", SamplingParams(logprob_token_ids=named, **params), 1, [1]),
        SamplingState("b", SamplingParams(logprobs=2, **params), 1, [1]),
        SamplingState("c", SamplingParams(logprob_token_ids=(9,), temperature=0.0), 1, [1]),
    ]
    a, b, c = (each.logprob for each in sampler().sample(logits.clone(), rows))
    assert None not in (a, b, c)
    assert (a.token, a.rank) == (250, int((exact[0] >= exact[0, 250]).sum()))
    assert [token for token, _ in a.top] == [250, 7, 3, 499]  # the sampled one stands first
    assert [value for _, value in a.top] == pytest.approx(exact[0, [250, 7, 3, 499]].tolist(), abs=1e-5)
    assert a.top[0] == (250, a.logprob)
    assert [token for token, _ in b.top] == exact[1].topk(2).indices.tolist()
    assert [token for token, _ in c.top] == [c.token, 9]


def test_named_tokens_where_the_sampled_one_is_impossible():
    """A bias can force a token that the model rules out: there is no difference of logits to it."""
    logits = random_logits(1, 50)
    logits[0, 7] = -math.inf
    [entry] = gather_logprobs(table(), logits, [7], [0], [(7, 3)])
    assert entry.top[0] == (7, -math.inf)
    assert entry.top[1][1] == pytest.approx(logits.log_softmax(-1)[0, 3].item(), abs=1e-5)


@pytest.mark.parametrize("asking", [(0,), (1,), (2,), (0, 2), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize("broken", [None, 1])
def test_logprobs_are_of_the_rows_that_ask(asking, broken):
    logits = random_logits(3, 50)
    exact = logits.log_softmax(-1)
    if broken is not None:
        logits[broken, 7] = math.nan
    rows = [
        SamplingState(str(i), SamplingParams(logprobs=1 if i in asking else None, temperature=0), 1, [1])
        for i in range(3)
    ]
    for i, result in enumerate(sampler().sample(logits.clone(), rows)):
        if i not in asking or i == broken:
            assert result.logprob is None
        else:
            assert result.logprob is not None
            assert result.logprob.token == result.token == int(exact[i].argmax())
            assert result.logprob.logprob == pytest.approx(exact[i].max().item())
            assert result.logprob.top == ((result.token, result.logprob.logprob),)


def test_forbidden_tokens_have_minus_infinity():
    logits = torch.zeros(1, 4)
    logits[0, 2] = -math.inf
    [entry] = prompt_logprobs(table(), logits, [2], 1)
    assert entry.logprob == -math.inf
    assert entry.rank == 4


def test_bfloat16_logits_are_taken_as_they_are():
    logits = random_logits(2, 100).bfloat16()
    a = prompt_logprobs(table(), logits, [1, 2], 2)
    assert a == prompt_logprobs(table(), logits.float(), [1, 2], 2)
