"""Rules of single fields and answers that are vLLM 0.32's."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from penstock.core.errors import BY_NAME, InvalidRequest, PenstockError
from penstock.http.errors import error_object
from penstock.text.chat_template import ChatTemplate
from penstock.text.tokenizer import Tokenizer

from .conftest import LiveServer, running
from .tiny import MODEL, REPLY

CHAT, TEXT, INVOCATIONS = "/v1/chat/completions", "/v1/completions", "/invocations"
HI: list[Any] = [{"role": "user", "content": "Hi"}]
VOCABULARY = 320


# ---- reasoning_effort ----

THINKING = (
    "{{ reasoning_effort | default('-') }} {{ enable_thinking if enable_thinking is defined else 'unset' }}"
)


@pytest.fixture(scope="module")
def thinking(tokenizer: Tokenizer, says: Any) -> Any:
    template = ChatTemplate({"default": THINKING})
    with running(tokenizer, says(REPLY), template=template) as server:
        yield server


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({}, "- unset"),
        ({"reasoning_effort": None}, "- unset"),
        ({"reasoning_effort": "none"}, "none False"),
        *(
            ({"reasoning_effort": effort}, f"{effort} True")
            for effort in ("minimal", "low", "medium", "high", "xhigh", "max")
        ),
        ({"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}}, "none True"),
        ({"reasoning_effort": "high", "chat_template_kwargs": {"enable_thinking": False}}, "high False"),
    ],
)
def test_reasoning_effort(
    thinking: LiveServer, tokenizer: Tokenizer, fields: dict[str, Any], prompt: str
) -> None:
    assert thinking.post(CHAT, {"messages": HI, **fields}).status == 200
    assert tokenizer.decode(thinking.engine.adds[-1].prompt) == prompt


def test_reasoning_effort_beats_the_servers_default(tokenizer: Tokenizer, says: Any) -> None:
    template = ChatTemplate({"default": THINKING})
    with running(
        tokenizer, says(REPLY), template=template, default_chat_template_kwargs={"enable_thinking": True}
    ) as server:
        for fields in ({}, {"reasoning_effort": "none"}):
            server.post(CHAT, {"messages": HI, **fields})
        prompts = [tokenizer.decode(add.prompt) for add in server.engine.adds]
        assert prompts == ["- True", "none False"]


@pytest.mark.parametrize("effort", ["", "x", "Low", "ultra", "x" * 10_000])
def test_no_other_efforts(server: LiveServer, effort: str) -> None:
    error = server.post(CHAT, {"messages": HI, "reasoning_effort": effort}).error
    assert error["param"] == "reasoning_effort"
    known = "none, minimal, low, medium, high, xhigh, max"
    assert error["message"].startswith(f"reasoning_effort must be one of {known}, got '{effort[:70]}")
    assert len(error["message"]) < 200


# ---- stream_options ----


@pytest.mark.parametrize("fields", [{"include_usage": True}, {"include_usage": None}, {}])
def test_options_of_a_stream_are_for_streams(server: LiveServer, fields: dict[str, Any]) -> None:
    """As at OpenAI, too."""
    for path, body in ((CHAT, {"messages": HI}), (TEXT, {"prompt": "a"})):
        assert server.post(path, {**body, "stream_options": fields}).error["param"] == "stream_options"
        assert server.post(path, {**body, "stream": True, "stream_options": fields}).status == 200


# ---- generation_config.json ----


def test_penalties_of_the_model(tokenizer: Tokenizer, says: Any) -> None:
    defaults = {"presence_penalty": 1.5, "frequency_penalty": 0.25}
    with running(tokenizer, says(REPLY), default_sampling=defaults) as server:
        bodies: list[dict[str, Any]] = [{}, {"presence_penalty": 0, "frequency_penalty": None}]
        for body in bodies:
            assert server.post(CHAT, {"messages": HI, **body}).status == 200
            assert server.post(TEXT, {"prompt": "a", **body}).status == 200
        got = [(add.params.presence_penalty, add.params.frequency_penalty) for add in server.engine.adds]
        assert got == [(1.5, 0.25)] * 2 + [(0.0, 0.25)] * 2


# ---- logprobs ----


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"messages": HI, "prompt_logprobs": -1}),
        (TEXT, {"prompt": "a", "prompt_logprobs": -1}),
        (TEXT, {"prompt": "a", "logprobs": -1}),
        (CHAT, {"messages": HI, "logprobs": True, "top_logprobs": -1}),
    ],
)
def test_all_logprobs_where_as_many_are_allowed(
    tokenizer: Tokenizer, says: Any, path: str, fields: dict[str, Any]
) -> None:
    for most, status in ((-1, 200), (VOCABULARY, 200), (VOCABULARY + 1, 200), (VOCABULARY - 1, 400)):
        with running(tokenizer, says(REPLY), max_logprobs=most) as server:
            answer = server.post(path, {**fields, "max_tokens": 1})
            assert answer.status == status, (most, answer.body)
            if status == 400:
                assert answer.error["param"] == list(fields)[-1]


def test_no_prompt_logprobs_are_no_reason_to_refuse_a_stream(server: LiveServer) -> None:
    for path, body in ((CHAT, {"messages": HI}), (TEXT, {"prompt": "a"})):
        assert server.post(path, {**body, "stream": True, "prompt_logprobs": 0}).status == 200
        assert server.post(path, {**body, "stream": True, "prompt_logprobs": -1}).status == 400


def test_a_chats_echo_with_logprobs_tells_those_of_the_prompt(server: LiveServer) -> None:
    messages = [*HI, {"role": "assistant", "content": "So"}]
    body = {"messages": messages, "echo": True, "add_generation_prompt": False, "max_tokens": 1}
    assert server.post(CHAT, body).json["prompt_logprobs"] is None
    told = server.post(CHAT, {**body, "logprobs": True, "top_logprobs": 1}).json["prompt_logprobs"]
    assert told[0] is None
    assert {len(entry) for entry in told[1:]} == {2}
    assert server.post(CHAT, {**body, "logprobs": True, "stream": True}).status == 200


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_named_tokens_in_chats(server: LiveServer, tokenizer: Tokenizer, stream: bool) -> None:
    ids = [tokenizer.encode(letter)[0] for letter in "xHy"]
    body = {"messages": HI, "logprobs": True, "logprob_token_ids": [*ids, ids[0]], "max_tokens": 1}
    if stream:
        pieces = [event["choices"][0].get("logprobs") for event in server.events(CHAT, body)]
        (entry,) = [each for piece in pieces if piece for each in piece["content"]]
    else:
        (entry,) = server.post(CHAT, body).json["choices"][0]["logprobs"]["content"]
    assert (entry["token"], entry["logprob"]) == ("H", -0.5)
    # the sampled token first, then the named ones in the order of the request
    named = [("H", -0.5), ("x", -ids[0] / 100), ("y", -ids[2] / 100)]
    assert [(each["token"], each["logprob"]) for each in entry["top_logprobs"]] == named
    params = server.engine.adds[-1].params
    assert (params.logprobs, params.logprob_token_ids) == (3, tuple(ids))


@pytest.mark.parametrize("echo", [False, True])
def test_logprobs_of_named_tokens_in_completions(
    server: LiveServer, tokenizer: Tokenizer, echo: bool
) -> None:
    ids = [tokenizer.encode(letter)[0] for letter in "xy"]
    body = {"prompt": "ab", "logprobs": 1, "logprob_token_ids": ids, "max_tokens": 1, "echo": echo}
    logprobs = server.post(TEXT, body).json["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"][-1] == {"H": -0.5, "x": -ids[0] / 100, "y": -ids[1] / 100}
    assert logprobs["tokens"] == (["a", "b", "H"] if echo else ["H"])


@pytest.mark.parametrize(
    ("path", "fields", "why"),
    [
        (CHAT, {"messages": HI, "logprob_token_ids": [1]}, "only allowed with logprobs"),
        (CHAT, {"messages": HI, "logprobs": False, "logprob_token_ids": [1]}, "only allowed with logprobs"),
        (TEXT, {"prompt": "a", "logprob_token_ids": [1]}, "only allowed with logprobs"),
        (TEXT, {"prompt": "a", "logprobs": 1, "logprob_token_ids": [VOCABULARY]}, "0 to 319"),
        (TEXT, {"prompt": "a", "logprobs": 1, "logprob_token_ids": [-1]}, "0 to 319"),
        (TEXT, {"prompt": "a", "logprobs": 1, "logprob_token_ids": list(range(129))}, "at most 128"),
        (
            TEXT,
            {"prompt": "a", "logprobs": 1, "logprob_token_ids": [1], "echo": True, "max_tokens": 0},
            "generate nothing",
        ),
    ],
)
def test_named_tokens_that_cannot_be_told(
    server: LiveServer, path: str, fields: dict[str, Any], why: str
) -> None:
    error = server.post(path, fields).error
    assert error["param"] == "logprob_token_ids"
    assert why in error["message"]


def test_named_tokens_are_not_bound_by_max_logprobs(tokenizer: Tokenizer, says: Any) -> None:
    """vLLM limits their number to 128, and nothing else."""
    ids = list(range(128))
    with running(tokenizer, says(REPLY), max_logprobs=2) as server:
        body = {"messages": HI, "logprobs": True, "logprob_token_ids": ids, "max_tokens": 1}
        (entry,) = server.post(CHAT, body).json["choices"][0]["logprobs"]["content"]
        assert len(entry["top_logprobs"]) == 128
        assert server.post(TEXT, {"prompt": "a", "logprobs": 0, "logprob_token_ids": []}).status == 200


# ---- cache_salt ----


@pytest.mark.parametrize("salt", ["a", "x" * 128, "a b", "ü.-_:~", "a\nb"])
def test_salts(server: LiveServer, salt: str) -> None:
    assert server.post(TEXT, {"prompt": "a", "cache_salt": salt}).status == 200
    assert server.engine.adds[-1].spec.cache_salt == salt


@pytest.mark.parametrize("salt", ["", "x" * 129, "a/b", "a@b", "a\\b", "a\0b", "\n/"])
def test_salts_that_vllm_refuses(server: LiveServer, salt: str) -> None:
    for path, body in ((CHAT, {"messages": HI}), (TEXT, {"prompt": "a"})):
        error = server.post(path, {**body, "cache_salt": salt}).error
        assert error["param"] == "cache_salt"
        assert "1 to 128 characters" in error["message"]


# ---- error.code ----

OPENAIS = {
    "ContextLengthExceeded": "context_length_exceeded",
    "UnsupportedParameter": "unsupported_parameter",
}


@pytest.mark.parametrize("error", BY_NAME.values(), ids=BY_NAME.keys())
def test_the_code_is_openais_word_or_the_status(error: type[PenstockError]) -> None:
    body = error_object(error("what happened"))["error"]
    if word := OPENAIS.get(error.__name__):
        assert body["code"] == word
        assert "reason" not in body
    else:
        assert body["code"] == error.status
        assert body.get("reason") == error.code


def test_the_official_client_passes_numbers_through(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=HI, temperature=101)
    assert (str(caught.value.code), caught.value.param) == ("400", "temperature")  # as a text of its own
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=HI, max_tokens=10_000)
    assert caught.value.code == "context_length_exceeded"
    assert InvalidRequest.code is None


# ---- /invocations ----


def test_invocations_go_by_the_shape_of_the_body(server: LiveServer) -> None:
    chat = server.post(INVOCATIONS, {"messages": HI})
    assert chat.json["object"] == "chat.completion"
    assert chat.json["id"].startswith("chatcmpl-")
    text = server.post(INVOCATIONS, {"prompt": "a", "messages": None, "num_ctx": 5})
    assert text.json["object"] == "text_completion"
    assert text.headers["x-penstock-ignored"] == "num_ctx"
    assert server.post(INVOCATIONS, {"prompt": "a", "messages": HI}).json["object"] == "chat.completion"
    for body, part in (({"messages": HI}, "delta"), ({"prompt": "a"}, "text")):
        assert part in server.events(INVOCATIONS, body)[0]["choices"][0]


def test_invocations_say_what_is_wrong(server: LiveServer) -> None:
    neither = server.post(INVOCATIONS, {"input": "a"})
    assert (neither.status, neither.error["message"]) == (
        400,
        "Missing required parameter: messages or prompt.",
    )
    assert server.post(INVOCATIONS, {"messages": HI, "temperature": "hot"}).error["param"] == "temperature"
    assert server.post(INVOCATIONS, {"prompt": "a", "temprature": 1}).error["param"] == "temprature"
    assert server.post(INVOCATIONS, {"prompt": "a", "model": "huge"}).status == 404
    assert server.get(INVOCATIONS).status == 405


def test_invocations_need_a_key_where_the_others_do(tokenizer: Tokenizer, says: Any) -> None:
    with running(tokenizer, says(REPLY), api_key=("sesame",)) as server:
        assert server.post(INVOCATIONS, {"prompt": "a"}).status == 401
        key = {"Authorization": "Bearer sesame"}
        assert server.post(INVOCATIONS, {"prompt": "a"}, key).status == 200
