"""The budget of a thought: after so many tokens its end is generated, whatever the model would say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.errors import InvalidRequest
from penstock.core.sampling_params import Sampling, SamplingParams, ThoughtLimit
from penstock.sampling.sampler import Sampler
from penstock.sampling.state import SamplingState
from penstock.sampling.thought import Thought

from . import current

START, END, WAIT = 1, 2, 3
PLAIN = st.integers(4, 6)


def state(tokens: list[int], prompt_len: int, limit: ThoughtLimit, **params: Any) -> SamplingState:
    chosen = Sampling(temperature=0.0, thought=limit, **params)
    return SamplingState("a", chosen, prompt_len=prompt_len, tokens=tokens)


def generate(prompt: list[int], limit: ThoughtLimit, wishes: list[int]) -> list[int]:
    """An output of a model that would say this, token for token."""
    tokens, thought = list(prompt), Thought(limit, prompt)
    for wish in wishes:
        thought.follow(tokens)
        forced = thought.forced(len(tokens))
        tokens.append(wish if forced is None else forced)
    return tokens[len(prompt) :]


@settings(max_examples=30)
@given(
    st.lists(PLAIN, max_size=3),
    st.lists(PLAIN, max_size=4),
    st.integers(0, 6),
    st.lists(st.one_of(PLAIN, st.just(END)), min_size=12, max_size=12),
    st.booleans(),
)
def test_a_thought_has_its_budget_and_no_more(
    before: list[int], thought: list[int], budget: int, wishes: list[int], told: bool
) -> None:
    limit = ThoughtLimit(budget, END, (END,), START, begun=told)
    output = generate([*before, START, *thought], limit, wishes)
    own = wishes.index(END) if END in wishes else len(wishes)
    room = max(0, budget - len(thought))
    assert output[: min(own, room)] == wishes[: min(own, room)]
    assert output[min(own, room)] == END
    assert output[min(own, room) + 1 :] == wishes[min(own, room) + 1 :]  # the answer is free


@settings(max_examples=30)
@given(st.integers(0, 5), st.lists(PLAIN, min_size=9, max_size=9))
def test_a_thought_may_begin_in_the_output_and_end_with_words(budget: int, wishes: list[int]) -> None:
    limit = ThoughtLimit(budget, END, (WAIT, END, WAIT), START)
    assert generate([5], limit, wishes) == wishes  # no thought
    output = generate([5], limit, [4, START, *wishes])
    assert output == [4, START, *wishes[:budget], WAIT, END, WAIT, *wishes[budget + 3 :]]


def test_where_output_begins_in_a_thought_the_mark_is_not_counted() -> None:
    limit = ThoughtLimit(2, END, (END,), START, begun=True)
    assert generate([5], limit, [4, 4, 4, 4]) == [4, 4, END, 4]
    assert generate([5], limit, [START, 4, 4, 4]) == [START, 4, 4, END]
    assert generate([5], limit, [START, START, START, 4]) == [START, START, START, END]  # nobody thinks anew
    assert generate([5], ThoughtLimit(0, END, (END,), START, begun=True), [START, 4]) == [END, 4]
    assert generate([5, START, 4, END], limit, [4, 4, 4]) == [4, 4, END]  # the server knows better
    assert generate([5, START, 4, END], ThoughtLimit(2, END, (END,), START), [4, 4, 4]) == [4, 4, 4]


@settings(max_examples=30)
@given(st.lists(st.integers(1, 5), min_size=3, max_size=14), st.integers(1, 3), st.integers(0, 4))
def test_what_is_followed_token_by_token_is_what_all_of_them_say(
    tokens: list[int], prompt_len: int, budget: int
) -> None:
    """A preemption forgets nothing; and where nothing waits, unseen tokens change nothing."""
    limit = ThoughtLimit(budget, END, (WAIT, END), START, begun=budget % 2 == 0)
    along = Thought(limit, tokens[:prompt_len])
    for at in range(prompt_len, len(tokens) + 1):
        anew = Thought(limit, tokens[:prompt_len])
        anew.follow(tokens[:at])
        blind = along.waits(at)
        early = along.forced(at)
        along.follow(tokens[:at])
        assert along.forced(at) == anew.forced(at)
        assert blind or early == along.forced(at) or along.ended


def test_the_sampler_obeys_beside_others_and_whatever_else_is_asked() -> None:
    limit = ThoughtLimit(1, END, (END,), START)
    other = SamplingState("b", Sampling(temperature=0.0), prompt_len=1, tokens=[4])
    asked: dict[str, Any] = {"allowed_token_ids": (4, 5), "bad_words_ids": ((END,),), "logprobs": 1}
    held = state([START, 4], 1, limit, **asked)
    free = state([START], 1, limit)
    logits = torch.arange(8, dtype=torch.float32).repeat(3, 1)
    assert current.operations is not None
    sampled = Sampler(current.operations).sample(logits, [held, other, free])
    assert [each.token for each in sampled] == [END, 7, 7]
    own = torch.arange(8, dtype=torch.float32).log_softmax(0)[END]
    assert sampled[0].logprob is not None
    assert sampled[0].logprob.logprob == pytest.approx(float(own), abs=1e-5)  # as the model has it


def test_only_what_depends_on_tokens_waits_for_them() -> None:
    limit = ThoughtLimit(3, END, (END,), START)
    each = state([START, 4], 1, limit)
    assert not each.waits
    each.pending = 2
    assert each.waits  # whether it has ended by itself
    ended = state([START, END, 4], 1, limit)
    ended.pending = 2
    assert not ended.waits
    assert state([5], 1, limit).waits  # whether it begins


@pytest.mark.parametrize("value", [-2, 0.5, True, "1", 2**63])
def test_budgets_that_cannot_be(value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(thinking_token_budget=value)
    assert caught.value.param == "thinking_token_budget"


def test_no_limit() -> None:
    assert SamplingParams(thinking_token_budget=-1).thinking_token_budget is None
    assert SamplingParams(thinking_token_budget=0).thinking_token_budget == 0
