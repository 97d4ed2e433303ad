"""From fields to parameters, at the ends of every range: truncation, budgets, token ids, names."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.errors import ContextLengthExceeded, InvalidRequest
from penstock.core.sampling_params import Sampling, SamplingParams
from penstock.server.config import ServerConfig
from penstock.server.ignored import Ignored
from penstock.server.params import (
    check_common,
    check_generate,
    check_length,
    output_budget,
    truncate,
    usable_tokens,
    without_text,
)
from penstock.server.protocol import CompletionRequest, Request, StreamOptions

from .conftest import LiveServer
from .fake_engine import INFO

TEXT = "/v1/completions"
HI: list[Any] = [{"role": "user", "content": "Hi"}]


def request(**fields: Any) -> Request:
    return Request(**fields)


# ---- truncation ----


@given(
    ids=st.lists(st.integers(0, 99), max_size=40),
    keep=st.integers(1, 50),
    side=st.sampled_from(["left", "right"]),
)
def test_as_many_tokens_are_kept_as_were_asked_for(ids: list[int], keep: int, side: str) -> None:
    kept = truncate(ids, request(truncate_prompt_tokens=keep, truncation_side=side), room=7)
    assert len(kept) == min(keep, len(ids))
    whole = list(reversed(ids)) if side == "left" else ids
    assert list(reversed(kept) if side == "left" else kept) == whole[:keep]


@given(count=st.integers(0, 40), room=st.integers(-5, 50), side=st.sampled_from(["left", "right"]))
def test_minus_one_keeps_what_fits_and_one_token_at_least(count: int, room: int, side: str) -> None:
    asked = request(truncate_prompt_tokens=-1, truncation_side=side)
    by_number = request(truncate_prompt_tokens=max(room, 1), truncation_side=side)
    ids = list(range(count))
    assert truncate(ids, asked, room) == truncate(ids, by_number, room)


@given(ids=st.lists(st.integers(0, 99), max_size=40), room=st.integers(1, 50))
def test_without_truncation_nothing_is_cut(ids: list[int], room: int) -> None:
    assert truncate(ids, request(), room) == tuple(ids)


@pytest.mark.parametrize("keep", [0, -2, -(2**62)])
def test_no_other_number_below_one_is_taken(keep: int) -> None:
    with pytest.raises(InvalidRequest, match=f"-1 or at least 1, got {keep}") as caught:
        truncate([1, 2, 3], request(truncate_prompt_tokens=keep), room=2)
    assert caught.value.param == "truncate_prompt_tokens"


@given(
    keep=st.none() | st.just(-1) | st.integers(1, 60),
    side=st.sampled_from(["left", "right"]),
    room=st.integers(-3, 50),
    context=st.integers(1, 50),
)
def test_what_truncation_leaves_is_usable(keep: int | None, side: str, room: int, context: int) -> None:
    """As many tokens of an endless text are read as truncation and context leave of it, at the same end."""
    asked = request(truncate_prompt_tokens=keep, truncation_side=side)
    usable = usable_tokens(asked, room, context, prompt="messages")
    kept = truncate(range(1000), asked, room)
    assert usable.most == min(len(kept), context)
    assert usable.side == (None if keep is None else side)
    assert usable.field == "messages"


# ---- budgets ----


@given(prompt=st.integers(0, 30), wanted=st.integers(0, 5), context=st.integers(1, 30))
def test_prompt_and_answer_fit_or_are_refused(prompt: int, wanted: int, context: int) -> None:
    if prompt + wanted <= context:
        check_length(prompt, context, prompt="messages", wanted=wanted)
        return
    with pytest.raises(ContextLengthExceeded) as caught:
        check_length(prompt, context, prompt="messages", wanted=wanted)
    assert caught.value.param == "messages"
    assert f"is {context} tokens" in str(caught.value)
    assert f"has {prompt} prompt tokens" in str(caught.value)
    assert f"Shorten the messages to at most {context - wanted} tokens." in str(caught.value)


@given(
    prompt=st.integers(1, 29), asked=st.none() | st.integers(1, 40), default=st.none() | st.integers(0, 40)
)
def test_a_budget_is_what_was_asked_for_or_what_fits(
    prompt: int, asked: int | None, default: int | None
) -> None:
    def budget() -> int:
        return output_budget(prompt, 30, asked, default, prompt="messages", limit="max_completion_tokens")

    if asked is not None and prompt + asked > 30:
        with pytest.raises(ContextLengthExceeded) as caught:
            budget()
        assert caught.value.param == "max_completion_tokens"
        said = str(caught.value)
        assert f"requested {prompt + asked} tokens ({prompt} in the messages, {asked} in" in said
        assert f"set max_completion_tokens to at most {30 - prompt}." in said
        return
    assert budget() >= 1
    assert prompt + budget() <= 30
    if asked is not None:
        assert budget() == asked
    else:
        # more would not fit, or more was not wanted
        assert prompt + budget() == 30 or budget() == max(1, default if default is not None else 30)


# ---- what all endpoints refuse ----


@pytest.mark.parametrize("priority", [-1, 1, 2**40])
def test_a_priority_needs_a_server_that_schedules_by_it(priority: int) -> None:
    check_common(request(priority=priority), "priority")
    check_common(request(priority=0), "fcfs")
    with pytest.raises(InvalidRequest, match="--scheduling-policy priority") as caught:
        check_common(request(priority=priority), "fcfs")
    assert caught.value.param == "priority"


@pytest.mark.parametrize(("field", "longest"), [("cache_salt", 128), ("request_id", 256)])
def test_names_have_a_length(field: str, longest: int) -> None:
    for length in (1, longest):
        check_common(request(**{field: "x" * length}), "fcfs")
    for length in (0, longest + 1):
        with pytest.raises(InvalidRequest, match=str(length)) as caught:
            check_common(request(**{field: "x" * length}), "fcfs")
        assert caught.value.param == field


def test_options_of_a_stream_go_with_a_stream() -> None:
    def ignored(*, strict: bool = False, **fields: Any) -> list[str]:
        names = Ignored(strict=strict)
        check_generate(CompletionRequest(prompt="a", **fields), ServerConfig(), names)
        return list(names.names)

    def refused(**fields: Any) -> str | None:
        with pytest.raises(InvalidRequest) as caught:
            ignored(**fields)
        return caught.value.param

    assert ignored(stream=True, stream_interval=1) == []
    for interval in (0, -1):
        assert refused(stream=True, stream_interval=interval) == "stream_interval"
        assert refused(stream=False, stream_interval=interval) == "stream_interval"
    for logprobs in (0, 1):
        assert ignored(stream=False, prompt_logprobs=logprobs) == []
    assert ignored(stream=True, prompt_logprobs=0) == [], "0 and a stream is what vLLM takes"
    for logprobs in (1, -1):
        assert refused(stream=True, prompt_logprobs=logprobs) == "prompt_logprobs"
    options = StreamOptions()
    for strict in (False, True):
        assert ignored(strict=strict, stream=True, stream_options=options) == []
        assert refused(strict=strict, stream=False, stream_options=options) == "stream_options"


# ---- token ids ----


def test_the_first_and_the_last_id_can_be_biased(server: LiveServer) -> None:
    body = {"prompt": "a", "logit_bias": {"0": -100, str(INFO.vocab_size - 1): 100}}
    assert server.post(TEXT, body).status == 200
    assert server.engine.adds[0].params.logit_bias == {0: -100.0, INFO.vocab_size - 1: 100.0}
    for token in (-1, INFO.vocab_size):
        error = server.post(TEXT, {"prompt": "a", "logit_bias": {str(token): 1}}).error
        assert f"ids {token}; the vocabulary has ids 0 to {INFO.vocab_size - 1}." in error["message"]


@pytest.mark.parametrize(("count", "more"), [(20, ""), (21, " and 1 more"), (25, " and 5 more")])
def test_twenty_values_are_named_and_the_others_counted(server: LiveServer, count: int, more: str) -> None:
    outside = {str(INFO.vocab_size + number): 1 for number in range(count)}
    message = server.post(TEXT, {"prompt": "a", "logit_bias": outside}).error["message"]
    assert ", ".join(list(outside)[:20]) + more + ";" in message


def test_ids_that_end_the_output_are_counted_with_the_end_of_sequence(server: LiveServer) -> None:
    """min_tokens forbids them, also with ignore_eos, as in vLLM: one that is left is enough."""
    vocabulary = range(INFO.vocab_size)
    [end] = INFO.eos_ids
    others = [token for token in vocabulary if token != end]
    cases: list[tuple[dict[str, Any], int]] = [
        ({"min_tokens": 1, "stop_token_ids": others}, 400),
        ({"min_tokens": 1, "stop_token_ids": others[1:]}, 200),
        ({"min_tokens": 1, "stop_token_ids": others, "ignore_eos": True}, 400),
        ({"min_tokens": 1, "stop_token_ids": others[1:], "ignore_eos": True}, 200),
        ({"min_tokens": 0, "stop_token_ids": list(vocabulary)}, 200),
        ({"min_tokens": 1, "allowed_token_ids": [5, end], "stop_token_ids": [5]}, 400),
        ({"min_tokens": 1, "allowed_token_ids": [5, 6, end], "stop_token_ids": [5]}, 200),
        ({"min_tokens": 0, "allowed_token_ids": [5, end], "stop_token_ids": [5]}, 200),
    ]
    for fields, status in cases:
        assert server.post(TEXT, {"prompt": "a", **fields}).status == status, fields


# ---- defaults ----


def test_what_nobody_sets_is_openais_default(server: LiveServer) -> None:
    for path, body in ((TEXT, {"prompt": "a"}), ("/v1/chat/completions", {"messages": HI})):
        assert server.post(path, body).status == 200
    assert [add.params for add in server.engine.adds] == [Sampling()] * 2
    params = server.engine.adds[0].params
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 1.0, 0, 0.0)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.0, 0.0, 0.0)


def test_what_is_logged_has_no_word_of_the_client() -> None:
    params = SamplingParams(stop=("secret", "words"), top_k=3)
    assert without_text(params) == params.with_(stop=("…", "…"))
