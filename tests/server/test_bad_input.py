"""Bad input gets its status and an OpenAI-shaped body that names the field, and the server goes on."""

from __future__ import annotations

import json
import shlex
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

from penstock.core.errors import RequestFailed
from penstock.text.chat_template import ChatTemplate
from penstock.text.tokenizer import Tokenizer

from .conftest import LiveServer, running
from .tiny import MODEL, REPLY

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HI: list[Any] = [{"role": "user", "content": "Hi"}]

#: the least that each endpoint takes
ASKS: list[tuple[str, dict[str, Any]]] = [(CHAT, {"messages": HI}), (TEXT, {"prompt": "a"})]

#: (path, fields, param, code)
REFUSED: list[tuple[str, dict[str, Any], str | None, str | None]] = [
    # types
    (CHAT, {"messages": "Hi"}, "messages", "invalid_type"),
    (CHAT, {"messages": [1]}, "messages[0]", "invalid_type"),
    (CHAT, {"messages": HI, "temperature": "hot"}, "temperature", "invalid_type"),
    (CHAT, {"messages": HI, "temperature": []}, "temperature", "invalid_type"),
    (CHAT, {"messages": HI, "max_tokens": 1.5}, "max_tokens", "invalid_type"),
    (CHAT, {"messages": HI, "stream": "maybe"}, "stream", "invalid_type"),
    (CHAT, {"messages": HI, "top_logprobs": "1", "logprobs": True}, "top_logprobs", "invalid_type"),
    (CHAT, {"messages": HI, "stop": [1]}, "stop[0]", "invalid_type"),
    (CHAT, {"messages": HI, "logprobs": 3}, "logprobs", "invalid_type"),
    (CHAT, {"messages": HI, "logit_bias": {"5": "x"}}, "logit_bias", "invalid_type"),
    (CHAT, {"messages": HI, "model": 5}, "model", "invalid_type"),
    (TEXT, {"prompt": {"a": 1}}, "prompt", "invalid_type"),
    (TEXT, {"prompt": "a", "logprobs": "1"}, "logprobs", "invalid_type"),
    (TEXT, {"prompt": "a", "prompt_logprobs": "1"}, "prompt_logprobs", "invalid_type"),
    (TEXT, {"prompt": [1, "a"]}, "prompt", None),
    (TEXT, {"prompt": [1.5]}, "prompt", None),
    (TEXT, {"prompt": [[1, 2.5]]}, "prompt[0]", None),
    (TEXT, {"prompt": ["a", {}]}, "prompt[1]", None),
    # missing and empty
    (CHAT, {}, "messages", None),
    (CHAT, {"messages": None}, "messages", None),
    (CHAT, {"messages": []}, "messages", None),
    (TEXT, {}, "prompt", None),
    (TEXT, {"prompt": ""}, "prompt", None),
    (TEXT, {"prompt": []}, "prompt", None),
    (TEXT, {"prompt": [[]]}, "prompt[0]", None),
    (TEXT, {"prompt": ["a", ""]}, "prompt[1]", None),
    # ranges
    (CHAT, {"messages": HI, "temperature": -1}, "temperature", None),
    (CHAT, {"messages": HI, "top_p": 0}, "top_p", None),
    (CHAT, {"messages": HI, "top_p": 1.5}, "top_p", None),
    (CHAT, {"messages": HI, "n": 0}, "n", None),
    (CHAT, {"messages": HI, "n": 1000}, "n", None),
    (CHAT, {"messages": HI, "presence_penalty": 3}, "presence_penalty", None),
    (CHAT, {"messages": HI, "max_tokens": 0}, "max_tokens", None),
    (CHAT, {"messages": HI, "max_completion_tokens": -1}, "max_completion_tokens", None),
    (CHAT, {"messages": HI, "min_tokens": 5, "max_tokens": 2}, "min_tokens", None),
    (CHAT, {"messages": HI, "top_logprobs": 2}, "top_logprobs", None),
    (CHAT, {"messages": HI, "logprobs": True, "top_logprobs": 21}, "top_logprobs", None),
    (CHAT, {"messages": HI, "prompt_logprobs": 21}, "prompt_logprobs", None),
    (CHAT, {"messages": HI, "stream": True, "prompt_logprobs": 1}, "prompt_logprobs", None),
    (CHAT, {"messages": HI, "stop": ""}, "stop", None),
    (CHAT, {"messages": HI, "seed": 2**70}, "seed", None),
    (CHAT, {"messages": HI, "top_k": 2**63}, "top_k", None),
    (CHAT, {"messages": HI, "min_tokens": 10**30}, "min_tokens", None),
    (CHAT, {"messages": HI, "temperature": 10**400}, "temperature", None),
    (CHAT, {"messages": HI, "stop_token_ids": [2**64]}, "stop_token_ids", None),
    (CHAT, {"messages": HI, "logit_bias": {"9" * 5000: 1}}, "logit_bias", None),
    (TEXT, {"prompt": [2**64]}, "prompt", None),
    (CHAT, {"messages": HI, "cache_salt": ""}, "cache_salt", None),
    (CHAT, {"messages": HI, "request_id": ""}, "request_id", None),
    *(
        (path, body | {"request_id": f"a{c}b"}, "request_id", None)
        for path, body in ASKS
        for c in "\r\n\0\x7f"
    ),
    *((path, body | {"stop": ["x" * 40_000, "y" * 40_000]}, "stop", None) for path, body in ASKS),
    *((path, body | {"n": 1.5}, "n", "invalid_type") for path, body in ASKS),
    (CHAT, {"messages": HI, "seed": 1e19}, "seed", "invalid_type"),
    (CHAT, {"messages": HI, "stream_interval": 0}, "stream_interval", None),
    (CHAT, {"messages": HI, "truncate_prompt_tokens": 0}, "truncate_prompt_tokens", None),
    (CHAT, {"messages": HI, "truncation_side": "up"}, "truncation_side", None),
    (TEXT, {"prompt": "a", "max_tokens": 0}, "max_tokens", None),
    (TEXT, {"prompt": "a", "logprobs": 21}, "logprobs", None),
    (TEXT, {"prompt": "a", "n": 128, "best_of": 128} | {"prompt": ["a"] * 33}, "prompt", None),
    # vocabulary
    (CHAT, {"messages": HI, "logit_bias": {"320": 1}}, "logit_bias", None),
    (CHAT, {"messages": HI, "logit_bias": {"a": 1}}, "logit_bias", None),
    (CHAT, {"messages": HI, "logit_bias": {"5": 101}}, "logit_bias", None),
    *(
        (CHAT, {"messages": HI, "logit_bias": {k: 1}}, "logit_bias", None)
        for k in (" 1", "01", "1_0", "+1", "٣")
    ),
    (CHAT, {"messages": HI, "stop_token_ids": [-1]}, "stop_token_ids", None),
    (CHAT, {"messages": HI, "allowed_token_ids": []}, "allowed_token_ids", None),
    (TEXT, {"prompt": [320]}, "prompt", None),
    (TEXT, {"prompt": [[1], [-1]]}, "prompt[1]", None),
    # the context of 256 tokens
    (CHAT, {"messages": [{"role": "user", "content": "x" * 300}]}, "messages", "context_length_exceeded"),
    (CHAT, {"messages": HI, "max_tokens": 250}, "max_tokens", "context_length_exceeded"),
    (
        CHAT,
        {"messages": HI, "max_completion_tokens": 250},
        "max_completion_tokens",
        "context_length_exceeded",
    ),
    (TEXT, {"prompt": [1] * 256}, "prompt", "context_length_exceeded"),
    (TEXT, {"prompt": [1] * 250, "max_tokens": 7}, "max_tokens", "context_length_exceeded"),
    # typing errors: see test_fields
    (CHAT, {"messages": HI, "temprature": 1}, "temprature", "unknown_parameter"),
    # known fields that are not implemented
    (CHAT, {"messages": HI, "tools": [{"type": "function"}]}, "tools[0].function", "invalid_type"),
    (CHAT, {"messages": HI, "tools": [{"type": "web_search"}]}, "tools[0].type", "unsupported_parameter"),
    (CHAT, {"messages": HI, "tool_choice": "required"}, "tool_choice", 400),
    (CHAT, {"messages": HI, "functions": [{}]}, "functions", "unsupported_parameter"),
    (CHAT, {"messages": HI, "audio": {}}, "audio", "unsupported_parameter"),
    (CHAT, {"messages": HI, "modalities": ["audio"]}, "modalities", "unsupported_parameter"),
    (CHAT, {"messages": HI, "guided_json": {}}, "guided_json", "unsupported_parameter"),
    (CHAT, {"messages": HI, "bad_words": [" "]}, "bad_words", None),
    (CHAT, {"messages": HI, "bad_words": [1]}, "bad_words[0]", "invalid_type"),
    (CHAT, {"messages": HI, "bad_words": ["x"] * 1025}, "bad_words", None),
    (CHAT, {"messages": HI, "vllm_xargs": {"a": {"b": 1}}}, "vllm_xargs", None),
    (CHAT, {"messages": HI, "vllm_xargs": {"a": 2**63}}, "vllm_xargs", None),
    (TEXT, {"prompt": "a", "vllm_xargs": {"a": ["b", -(2**63) - 1]}}, "vllm_xargs", None),
    (CHAT, {"messages": HI, "use_beam_search": True, "top_k": 5}, "top_k", "unsupported_parameter"),
    (CHAT, {"messages": HI, "use_beam_search": 2}, "use_beam_search", "invalid_type"),
    (TEXT, {"prompt": "a", "suffix": "b"}, "suffix", "unsupported_parameter"),
    (TEXT, {"prompt": "a", "prompt_embeds": "x"}, "prompt_embeds", "unsupported_parameter"),
    (TEXT, {"prompt_embeds": "x"}, "prompt_embeds", "unsupported_parameter"),
    (TEXT, {"prompt": None, "prompt_embeds": []}, "prompt", None),
    # nothing left to sample, or not enough room for min_tokens
    (TEXT, {"prompt": "a", "min_tokens": 17}, "min_tokens", None),
    (CHAT, {"messages": HI, "min_tokens": 1, "allowed_token_ids": [258]}, "allowed_token_ids", None),
    (CHAT, {"messages": HI, "min_tokens": 1, "stop_token_ids": list(range(320))}, "stop_token_ids", None),
    (
        TEXT,
        {"prompt": "a", "min_tokens": 1, "allowed_token_ids": [5, 258], "stop_token_ids": [5]},
        "allowed_token_ids",
        None,
    ),
    # messages
    (CHAT, {"messages": [{"role": "", "content": "a"}]}, "messages[0].role", None),
    (CHAT, {"messages": [{"role": 5, "content": "a"}]}, "messages[0].role", None),
    (CHAT, {"messages": [{"role": "a" * 65, "content": "a"}]}, "messages[0].role", None),
    (CHAT, {"messages": [{"content": "a"}]}, "messages[0].role", None),
    (CHAT, {"messages": [*HI, {"role": "user"}]}, "messages[1].content", None),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content", None),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages[0].content[0].text",
        None,
    ),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content[0].type",
        "unsupported_parameter",
    ),
    (
        CHAT,
        {"messages": HI, "continue_final_message": True, "add_generation_prompt": True},
        "continue_final_message",
        None,
    ),
    ("/tokenize", {}, "prompt", None),
    ("/tokenize", {"prompt": "a", "modell": "b"}, "modell", "unknown_parameter"),
    ("/detokenize", {"tokens": [320]}, "tokens", None),
    ("/detokenize", {"tokens": ["a"]}, "tokens[0]", "invalid_type"),
]


@pytest.mark.parametrize(("path", "fields", "param", "code"), REFUSED)
def test_refused(
    server: LiveServer, path: str, fields: dict[str, Any], param: str | None, code: str | None
) -> None:
    answer = server.post(path, fields)
    assert answer.status == 400, answer.body
    error = answer.error
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert error["code"] == (code or 400)
    assert server.engine.adds == []
    assert server.post(CHAT, {"messages": HI}).status == 200  # and on it goes


def test_the_message_says_both_lengths(server: LiveServer) -> None:
    message = server.post(TEXT, {"prompt": [1] * 300}).error["message"]
    assert "256 tokens" in message
    assert "300" in message
    message = server.post(TEXT, {"prompt": [1] * 200, "max_tokens": 100}).error["message"]
    assert all(number in message for number in ("256", "300", "200", "100", "at most 56"))


@pytest.mark.parametrize(
    ("path", "fields", "words"),
    [
        (TEXT, {"prompt": [320]}, "out of vocabulary"),
        ("/detokenize", {"tokens": [320]}, "out of vocabulary"),
        (TEXT, {"prompt": None}, "Either prompt or prompt_embeds must be provided and non-empty."),
        (TEXT, {"prompt": "a", "logit_bias": {"320": 1, "5": 1, "-1": 1}}, "320, -1;"),
        (TEXT, {"prompt": "a", "logit_bias": {"a": 1, "5": 1, "01": 1}}, "'a', '01'."),
        (TEXT, {"prompt": "a", "logit_bias": {"5": "x"}}, "'5'"),
        (TEXT, {"prompt": "a", "stop": "x" * 16_385}, "at most 16384, got 16385"),
        (TEXT, {"prompt": "a", "min_tokens": 17}, "max_tokens=16"),
    ],
)
def test_messages_say_which_value(server: LiveServer, path: str, fields: dict[str, Any], words: str) -> None:
    assert words in server.post(path, fields).error["message"]


def test_whole_numbers_may_be_written_as_floats(server: LiveServer) -> None:
    numbers = {"max_tokens": 5.0, "n": 1.0, "top_k": 3.0, "seed": 7.0, "stop_token_ids": [9.0]}
    for path, body in ASKS:
        assert server.post(path, body | numbers).status == 200
    for add in server.engine.adds:
        assert (add.max_tokens, add.params.top_k, add.seed) == (5, 3, 7)
        assert repr(add.params.stop_token_ids) == "(9,)"


def test_a_seed_of_minus_one_is_none(server: LiveServer) -> None:
    server.post(CHAT, {"messages": HI, "seed": -1, "n": 3})
    assert [add.seed for add in server.engine.adds] == [None, None, None]


def test_ids_that_end_the_output_may_be_all_where_they_may_end_it(server: LiveServer) -> None:
    body = {"prompt": "a", "allowed_token_ids": [258]}
    assert server.post(TEXT, body).status == 200
    # min_tokens holds them back with ignore_eos, too, as in vLLM
    refused = server.post(TEXT, body | {"min_tokens": 1, "ignore_eos": True})
    assert (refused.status, refused.error["param"]) == (400, "allowed_token_ids")


def test_a_misspelt_field_gets_a_hint(server: LiveServer) -> None:
    message = server.post(CHAT, {"messages": HI, "temprature": 1}).error["message"]
    assert message == "Unrecognized request argument supplied: temprature. Did you mean temperature?"


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "empty"),
        (b"   ", "empty"),
        (b"{", "JSON"),
        (b"{}x", "JSON"),
        (b"[]", "an object, got an array"),
        (b'"a"', "an object, got a string"),
        (b"5", "an object, got a number"),
        (b"null", "an object, got null"),
        (b'{"prompt":"\xff"}', "not valid UTF-8 at byte 11"),
        (b'{"prompt":"\\ud800"}', "\\ud800 without its other half"),
        (b'{"prompt":"\\uD83C x"}', "\\uD83C without its other half"),
        (b'{"prompt":"\\ud83c\\udf0a \\udf0a"}', "\\udf0a without its other half"),
        (b'{"prompt":"a', "truncated"),
        (b'{"prompt":"a","temperature":NaN}', "JSON"),
        (b'{"prompt":"a","temperature":1e999}', "JSON"),
        (b'{"prompt":"a","seed":' + b"9" * 5000 + b"}", "JSON"),
        (b'{"prompt":' + b"[" * 5000 + b"]" * 5000 + b"}", "nested too deeply"),
    ],
)
def test_bodies_that_are_no_json_object(server: LiveServer, body: bytes, why: str) -> None:
    answer = server.post(TEXT, body)
    assert answer.status == 400
    assert answer.error["reason"] == "invalid_json"
    assert why in answer.error["message"]


def test_a_body_declared_as_something_else(server: LiveServer) -> None:
    form = server.post(TEXT, b'{"prompt":"a"}', {"Content-Type": "application/x-www-form-urlencoded"})
    assert form.status == 415
    assert "Content-Type: application/json" in form.error["message"]
    json = server.post(TEXT, b'{"prompt":"a"}', {"Content-Type": "application/json; charset=utf-8"})
    assert json.status == 200


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br"])
def test_a_body_that_is_compressed(server: LiveServer, encoding: str) -> None:
    answer = server.post(TEXT, b"\x1f\x8b", {"Content-Encoding": encoding})
    assert answer.status == 415
    assert encoding in answer.error["message"]
    assert server.post(TEXT, {"prompt": "a"}, {"Content-Encoding": "identity"}).status == 200


def test_a_byte_order_mark_is_no_error(server: LiveServer) -> None:
    assert server.post(TEXT, b'\xef\xbb\xbf{"prompt":"a"}').status == 200


def test_an_unknown_model(server: LiveServer, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="huge", messages=HI)
    assert caught.value.code == "model_not_found"
    assert MODEL in caught.value.message
    for path, body in (
        (TEXT, {"prompt": "a"}),
        ("/tokenize", {"prompt": "a"}),
        ("/tokenize", {"messages": HI}),
        ("/detokenize", {"tokens": [1]}),
    ):
        answer = server.post(path, {**body, "model": "huge"})
        assert (answer.status, answer.error["param"]) == (404, "model")


@pytest.mark.parametrize("path", [CHAT, TEXT, f"{TEXT}/"])
def test_a_get_is_told_the_form_that_works(server: LiveServer, path: str) -> None:
    # what a guide says: hey -z 60s -c 20 http://your-service/v1/chat/completions
    wrong = server.get(path)
    assert (wrong.status, wrong.headers["allow"], wrong.error["code"]) == (405, "POST", 405)
    command = wrong.error["message"].partition("curl ")[2].partition(" (")[0].replace("MODEL", MODEL)
    words = shlex.split(command)
    assert words[:2] == ["-X", "POST"]
    address = urlsplit(words[2])
    assert (address.netloc, address.path) == (f"127.0.0.1:{server.port}", path.rstrip("/"))
    header, body = words[words.index("-H") + 1], words[words.index("-d") + 1]
    assert header == "Content-Type: application/json"
    assert server.post(address.path, json.loads(body)).status == 200


@pytest.mark.parametrize("host", ["a b", 'x"; rm -rf /', "[::1", "a" * 300, "evil.example/path"])
def test_a_host_that_is_none_is_not_repeated(server: LiveServer, host: str) -> None:
    wrong = server.request("GET", TEXT, headers={"Host": host})
    if wrong.status == 405:
        assert "http://HOST/v1/completions" in wrong.error["message"]
        assert host not in wrong.error["message"]


def test_unknown_paths_and_methods(server: LiveServer) -> None:
    missing = server.get("/v2/models")
    assert missing.status == 404
    assert "GET /v2/models" in missing.error["message"]
    wrong = server.get(CHAT)
    assert wrong.status == 405
    assert wrong.headers["allow"] == "POST"
    assert wrong.error["reason"] == "method_not_allowed"
    assert "curl -X POST http://" in wrong.error["message"]
    assert server.request("DELETE", "/v1/models").status == 405
    assert server.post("/health", {}).status == 405


def test_a_chat_without_a_template(tokenizer: Tokenizer, says: Any) -> None:
    with running(tokenizer, says(REPLY), template=ChatTemplate({})) as server:
        answer = server.post(CHAT, {"messages": HI})
        assert answer.status == 400
        assert "no chat template" in answer.error["message"]
        assert server.post(TEXT, {"prompt": "a"}).status == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue(server: LiveServer, stream: bool) -> None:
    server.engine.queue_limit = 0
    answer = server.post(CHAT, {"messages": HI, "stream": stream})
    assert answer.status == 503
    assert answer.headers["retry-after"] == "3"
    assert answer.error["reason"] == "queue_full"
    assert answer.error["type"] == "service_unavailable"


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_fails_at_once(server: LiveServer, stream: bool) -> None:
    server.engine.fail_at = 0
    answer = server.post(CHAT, {"messages": HI, "stream": stream, "n": 2})
    assert answer.status == 500
    assert answer.error["reason"] == RequestFailed.code
    assert answer.error["message"] == "device says no"


def test_a_request_that_fails_in_mid_stream(server: LiveServer) -> None:
    server.engine.fail_at = 2
    *text, error = server.events(CHAT, {"messages": HI})
    assert [event["choices"][0]["delta"]["content"] for event in text] == ["", "H", "e"]
    assert error == {
        "error": {
            "message": "device says no",
            "type": "internal_error",
            "param": None,
            "code": 500,
            "reason": "request_failed",
        }
    }
    assert server.post(CHAT, {"messages": HI}).status == 500


@pytest.mark.parametrize("stream", [False, True])
def test_a_bug_shows_an_id_and_no_trace(
    server: LiveServer, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    server.engine.crash = ZeroDivisionError("secret detail")
    answer = server.post(CHAT, {"messages": HI, "stream": stream})
    assert answer.status == 500
    assert answer.error["reason"] == "internal_error"
    assert b"secret" not in answer.body
    assert b"Traceback" not in answer.body
    (record,) = [r for r in caplog.records if r.name == "penstock.http"]
    error_id = str(record.getMessage()).split()[1]
    assert error_id in answer.error["message"]
    assert "secret detail" in caplog.text


@pytest.mark.parametrize("path", [CHAT, TEXT, "/tokenize", "/detokenize"])
def test_a_body_over_the_limit(tokenizer: Tokenizer, says: Any, path: str) -> None:
    with running(tokenizer, says(REPLY), max_body_bytes=1000) as server:
        answer = server.post(path, b'{"messages": "' + b"x" * 1000 + b'"}')
        assert (answer.status, answer.error["reason"]) == (413, "payload_too_large")


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/chat/completions", CHAT),
        (f"/v1{CHAT}", CHAT),
        (f"{CHAT}/chat/completions", CHAT),
        ("/api/v1/responses", "/v1/responses"),
        ("/v1/v1/messages", "/v1/messages"),
        ("/llm/health", "/health"),
        ("/embeddings", "/v1/embeddings"),
        ("/v1/moderations", None),
        ("/v1/threads/runs", None),
        ("/", None),
        ("/x" * 200 + CHAT, None),
    ],
)
def test_a_base_url_that_is_nearly_right_is_told(server: LiveServer, path: str, meant: str | None) -> None:
    answer = server.post(path, {"messages": HI})
    assert answer.status == 404
    message = answer.error["message"]
    assert (f"Did you mean {meant}?" in message) if meant else message.endswith((".", "..."))
    assert ("base URL" in message) == (meant is not None)
