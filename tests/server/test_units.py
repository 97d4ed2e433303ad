"""The pure parts: configuration, parameters, messages, fields, chunks."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from penstock.core.errors import (
    ContextLengthExceeded,
    InvalidRequest,
    QueueFull,
    StartupError,
    UnsupportedParameter,
)
from penstock.core.plan import Event, Failure
from penstock.core.sampling_params import SamplingParams
from penstock.server import fields
from penstock.server.app import ROUTES
from penstock.server.config import ServerConfig
from penstock.server.conversation import normalise
from penstock.server.generation import event_error
from penstock.server.ignored import Ignored
from penstock.server.openai import ChunkFormat
from penstock.server.params import output_budget
from penstock.server.protocol import ChatRequest, CompletionRequest

# ---- configuration ----


def test_every_field_explains_itself() -> None:
    for field in dataclasses.fields(ServerConfig):
        text = field.metadata["help"]
        assert text.endswith("."), field.name
        assert "\n" not in text, field.name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", -1),
        ("port", 65536),
        ("max_logprobs", -2),
        ("stream_interval", 0),
        ("max_body_bytes", 0),
        ("shutdown_timeout", -1),
        ("api_key", ("good", " ")),
        ("uvicorn_log_level", "loud"),
        ("root_path", "llm"),
        ("ssl_certfile", "cert.pem"),
    ],
)
def test_configurations_that_cannot_work_name_the_flag(name: str, value: Any) -> None:
    with pytest.raises(StartupError) as caught:
        ServerConfig(**{name: value})
    assert "--" + name.replace("_", "-") in str(caught.value)


def test_a_single_string_is_a_tuple_of_one() -> None:
    assert ServerConfig(api_key="k").api_key == ("k",)  # type: ignore[arg-type]


def test_the_public_surface() -> None:
    assert sorted(f"{method} {path}" for path, method, _ in ROUTES) == [
        "DELETE /v1/files/{name}",
        "DELETE /v1/responses/{name}",
        "GET /health",
        "GET /livez",
        "GET /load",
        "GET /metrics",
        "GET /ping",
        "GET /readyz",
        "GET /v1/batches",
        "GET /v1/batches/{name}",
        "GET /v1/bills",
        "GET /v1/files",
        "GET /v1/files/{name}",
        "GET /v1/files/{name}/content",
        "GET /v1/models",
        "GET /v1/models/{name:path}",
        "GET /v1/responses/{name}",
        "GET /v1/responses/{name}/input_items",
        "GET /version",
        "POST /classify",
        "POST /detokenize",
        "POST /invocations",
        "POST /ping",
        "POST /pooling",
        "POST /rerank",
        "POST /score",
        "POST /tokenize",
        "POST /v1/batches",
        "POST /v1/batches/{name}/cancel",
        "POST /v1/chat/completions",
        "POST /v1/chat/completions/batch",
        "POST /v1/chat/completions/render",
        "POST /v1/completions",
        "POST /v1/completions/render",
        "POST /v1/embeddings",
        "POST /v1/files",
        "POST /v1/messages",
        "POST /v1/messages/count_tokens",
        "POST /v1/messages/render",
        "POST /v1/rerank",
        "POST /v1/responses",
        "POST /v1/responses/input_tokens",
        "POST /v1/responses/render",
        "POST /v1/responses/{name}/cancel",
        "POST /v1/score",
        "POST /v2/embed",
        "POST /v2/rerank",
    ]


# ---- fields ----


@pytest.mark.parametrize(
    ("shape", "neutral"),
    [(ChatRequest, fields.CHAT_NEUTRAL), (CompletionRequest, fields.COMPLETION_NEUTRAL)],
)
def test_a_field_stands_in_one_table_only(shape: Any, neutral: Any) -> None:
    implemented = set(shape.__struct_fields__)
    assert not implemented & fields.IGNORED
    assert not implemented & set(neutral)
    assert not fields.IGNORED & set(neutral)


def test_every_sampling_parameter_can_be_asked_for() -> None:
    parameters = {field.name for field in dataclasses.fields(SamplingParams)}
    # made of bad_words and thinking_token_budget; asked for as vllm_xargs
    parameters -= {"bad_words_ids", "thought", "extra_args"}
    for shape in (ChatRequest, CompletionRequest):
        assert parameters <= set(shape.__struct_fields__)


# ---- parameters ----


@pytest.mark.parametrize(
    ("prompt", "asked", "default", "budget"),
    [(10, None, None, 90), (10, None, 16, 16), (95, None, 16, 5), (10, 90, 16, 90), (99, 1, None, 1)],
)
def test_output_budgets(prompt: int, asked: int | None, default: int | None, budget: int) -> None:
    assert output_budget(prompt, 100, asked, default, prompt="prompt", limit="max_tokens") == budget


@pytest.mark.parametrize(("prompt", "asked"), [(100, None), (150, 1), (10, 91)])
def test_output_budgets_over_the_context(prompt: int, asked: int | None) -> None:
    with pytest.raises(ContextLengthExceeded) as caught:
        output_budget(prompt, 100, asked, 16, prompt="prompt", limit="max_tokens")
    assert str(prompt) in str(caught.value)
    assert "100 tokens" in str(caught.value)


# ---- messages ----


def test_messages_are_brought_into_the_templates_form() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages: list[dict[str, Any]] = [
        {"role": "developer", "content": "be nice", "name": "boss"},
        {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {}}, "b"]},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "annotations": []},
        {"role": "tool", "content": "2", "tool_call_id": "c"},
        {"role": "assistant", "content": "", "reasoning_content": "hm"},
    ]
    assert normalise(messages) == [
        {"role": "developer", "content": "be nice", "name": "boss"},
        {"role": "user", "content": "a\nb"},
        {
            "role": "assistant",
            "tool_calls": [{**call, "function": {"name": "f", "arguments": {"x": 1}}}],
            "content": "",
        },
        {"role": "tool", "content": "2", "tool_call_id": "c"},
        {"role": "assistant", "content": "", "reasoning_content": "hm"},
    ]


def test_messages_as_vllm_takes_them() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "assistant", "content": None, "id": "m1", "prefix": True, "mood": None},
        {"role": "assistant"},
        {"role": "function", "name": "f", "content": "2"},
    ]
    assert normalise(messages) == [
        {"role": "assistant", "id": "m1", "prefix": True, "content": ""},
        {"role": "assistant", "content": ""},
        {"role": "function", "name": "f", "content": "2"},
    ]


def test_messages_as_parts() -> None:
    assert normalise([{"role": "user", "content": "a"}], as_parts=True) == [
        {"role": "user", "content": [{"type": "text", "text": "a"}]}
    ]


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user", "content": None}, "content"),
        ({"role": "tool"}, "content"),
        ({"role": "assistant", "tool_calls": [{}]}, "tool_calls[0].function"),
        ({"role": "assistant", "tool_calls": "x"}, "tool_calls"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
            "tool_calls[0].function.arguments",
        ),
        ({"role": "user", "content": "a", "name": 5}, "name"),
        ({"role": "user", "content": [5]}, "content[0]"),
    ],
)
def test_messages_that_make_no_sense(message: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        normalise([message])
    assert caught.value.param == f"messages[0].{param}"


def test_messages_with_more_than_text() -> None:
    message = {"role": "assistant", "content": "a", "audio": {"id": "x"}}
    ignored = Ignored()
    assert normalise([message], ignored) == [{"role": "assistant", "content": "a"}]
    assert list(ignored.names) == ["messages[].audio"]
    with pytest.raises(UnsupportedParameter):
        normalise([message], Ignored(strict=True))


# ---- chunks ----


def test_chunks_are_the_json_they_stand_for() -> None:
    form = ChunkFormat({"id": "x", "created": 1}, null_usage=True)
    plain = form.chunk(2, b'"text":"a"')
    full = form.chunk(2, b'"text":"a"', rest={"finish_reason": "stop"}, usage={"n": 1}, top={"ids": [5]})
    assert [
        json.loads(chunk.removeprefix(b"data: ")) for chunk in (plain, full, form.usage_chunk({"n": 2}))
    ] == [
        {
            "id": "x",
            "created": 1,
            "choices": [{"index": 2, "text": "a", "logprobs": None, "finish_reason": None}],
            "usage": None,
        },
        {
            "id": "x",
            "created": 1,
            "choices": [{"index": 2, "text": "a", "finish_reason": "stop"}],
            "ids": [5],
            "usage": {"n": 1},
        },
        {"id": "x", "created": 1, "choices": [], "usage": {"n": 2}},
    ]
    assert all(chunk.endswith(b"\n\n") for chunk in (plain, full))
    assert b"usage" not in ChunkFormat({"id": "x"}, null_usage=False).chunk(0, b'"text":""')


def test_what_the_engine_refuses_keeps_its_param_and_names_the_flag() -> None:
    too_long = Event(
        "a", failure=Failure("too long.", "ContextLengthExceeded", "max_tokens", "Ask for fewer.")
    )
    error = event_error(too_long)
    assert (type(error), error.param, error.status) == (ContextLengthExceeded, "max_tokens", 400)
    assert str(error) == "too long. Ask for fewer."
    full = event_error(
        Event("a", failure=Failure("full.", "QueueFull", "max_num_queued_tokens", retry_after=3))
    )
    assert isinstance(full, QueueFull)
    assert (full.param, full.bound, full.retry_after) == (None, "max_num_queued_tokens", 3)
    assert str(full) == "full. The limit is set by --max-num-queued-tokens."
    unknown = event_error(Event("a"))
    assert (unknown.status, unknown.code) == (500, "request_failed")


def test_a_limit_on_logprobs_says_which_flag_sets_it() -> None:
    with pytest.raises(InvalidRequest, match="at most 20, got 21") as caught:
        SamplingParams(logprobs=21).verify(100, 20, "--max-logprobs")
    assert caught.value.advice == "The server's limit is set by --max-logprobs."
