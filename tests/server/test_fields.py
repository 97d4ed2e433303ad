"""What becomes of the fields that others send: refused, taken for a typing error, or served and named."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from penstock.server.fields import OTHERS
from penstock.server.ignored import Ignored, IgnoredLog
from penstock.server.near import Names
from penstock.text.chat_template import ChatTemplate
from penstock.text.tokenizer import Tokenizer

from .conftest import LiveServer, running
from .tiny import MODEL, REPLY

CHAT, TEXT, TOKENIZE, DETOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
HI: list[Any] = [{"role": "user", "content": "Hi"}]
LEAST: dict[str, dict[str, Any]] = {
    CHAT: {"messages": HI},
    TEXT: {"prompt": "a"},
    TOKENIZE: {"prompt": "a"},
    DETOKENIZE: {"tokens": [1]},
}
HEADER = "x-penstock-ignored"

#: The names of the issue, and what clients send of them.
SERVED: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"verbosity": "low"}),
    (CHAT, {"prompt_cache_options": {"ttl": "1h"}}),
    (CHAT, {"moderation": {"model": "x"}}),
    (CHAT, {"thinking": {"type": "enabled", "budget_tokens": 100}}),
    (CHAT, {"reasoning": {"effort": "low"}}),
    (CHAT, {"provider": {"order": ["a"]}}),
    (CHAT, {"transforms": []}),
    (CHAT, {"chat_id": "x"}),
    (CHAT, {"num_ctx": 4096}),
    (CHAT, {"keep_alive": "5m"}),
    (CHAT, {"options": {"num_ctx": 4096}}),
    (CHAT, {"repeat_penalty": 1.1}),
    (CHAT, {"do_sample": True}),
    (CHAT, {"max_new_tokens": 5}),
    (CHAT, {"safe_prompt": True}),
    (TEXT, {"tool_choice": "none"}),
    (TEXT, {"max_completion_tokens": 5}),
    (TOKENIZE, {"num_ctx": 5}),
    (DETOKENIZE, {"num_ctx": 5}),
    # bookkeeping, and what nobody has ever heard of
    (CHAT, {"user": "me"}),
    (CHAT, {"metadata": {"a": "b"}}),
    (TEXT, {"frobnicate": [1, 2]}),
    (TEXT, {"vllm_xargs": {"a": 1}}),
    (TEXT, {"length_penalty": 2.0}),
]


@pytest.fixture(scope="module")
def strict(tokenizer: Tokenizer, says: Any) -> Iterator[LiveServer]:
    with running(tokenizer, says(REPLY), strict_fields=True) as server:
        yield server


@pytest.mark.parametrize(("path", "fields"), SERVED)
def test_served_and_named(server: LiveServer, path: str, fields: dict[str, Any]) -> None:
    answer = server.post(path, LEAST[path] | fields)
    assert answer.status == 200, answer.body
    assert answer.headers[HEADER] == next(iter(fields))


@pytest.mark.parametrize(
    ("path", "body", "moved", "to"),
    [
        (CHAT, {"messages": HI}, {"max_output_tokens": 5}, "max_completion_tokens"),
        (RESPONSES, {"input": "Hi"}, {"max_tokens": 5}, "max_output_tokens"),
        (RESPONSES, {"input": "Hi"}, {"max_completion_tokens": 5}, "max_output_tokens"),
        (RESPONSES, {"input": "Hi"}, {"response_format": {"type": "json_object"}}, "text.format"),
        (RESPONSES, {"input": "Hi", "text": {}}, {"response_format": {"type": "text"}}, "text.format"),
        (RESPONSES, {"input": "Hi"}, {"reasoning_effort": "low"}, "reasoning.effort"),
        (RESPONSES, {}, {"messages": HI}, "input"),
        (MESSAGES, {"messages": HI, "max_tokens": 5, "model": MODEL}, {"stop": ["a"]}, "stop_sequences"),
        (MESSAGES, {"messages": HI, "model": MODEL}, {"max_completion_tokens": 5}, "max_tokens"),
    ],
)
def test_what_another_endpoint_calls_otherwise(
    server: LiveServer, path: str, body: Any, moved: dict[str, Any], to: str
) -> None:
    """It would change the answer, and OpenAI and Anthropic refuse it, too."""
    answer = server.post(path, body | moved)
    assert answer.status == 400
    assert f"It is {to} here" in answer.json["error"]["message"]
    assert not server.engine.adds


def test_both_names_are_one_limit(server: LiveServer) -> None:
    """Load generators send both, to all endpoints."""
    assert (
        server.post(CHAT, {**LEAST[CHAT], "max_completion_tokens": 3, "max_output_tokens": 3}).status == 200
    )
    assert server.post(RESPONSES, {"input": "Hi", "max_output_tokens": 3, "max_tokens": 3}).status == 200
    assert [add.max_tokens for add in server.engine.adds] == [3, 3]


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"functions": [{"name": "f"}]}, "as tools"), ({"function_call": {"name": "f"}}, "as tool_choice")],
)
def test_what_was_before_tools_says_what_came_after(server: LiveServer, fields: Any, words: str) -> None:
    error = server.post(CHAT, LEAST[CHAT] | fields).error
    assert (error["code"], words in error["message"]) == ("unsupported_parameter", True)


def test_nothing_is_named_where_nothing_is_ignored(server: LiveServer) -> None:
    fields = {"temperature": 0.5, "tool_choice": "none", "use_beam_search": False, "best_of": 1, "tools": []}
    answer = server.post(CHAT, {**LEAST[CHAT], **fields, "frobnicate": None})
    assert answer.status == 200
    assert HEADER in answer.headers  # best_of is no field of chats
    assert answer.headers[HEADER] == "best_of"
    assert HEADER not in server.post(TEXT, LEAST[TEXT] | {"best_of": 1, "n": 1, "echo": True}).headers


@pytest.mark.parametrize(("path", "part"), [(CHAT, b'"delta"'), (TEXT, b'"text"')])
def test_streams_name_them_too(server: LiveServer, path: str, part: bytes) -> None:
    answer = server.post(path, LEAST[path] | {"stream": True, "num_ctx": 5, "provider": {}})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers[HEADER] == "num_ctx, provider"
    assert part in answer.body


def test_the_official_client_sees_it(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=HI, verbosity="low", user="me", extra_body={"num_ctx": 5}
    )
    assert set(raw.headers[HEADER].split(", ")) == {"verbosity", "user", "num_ctx"}
    assert raw.parse().choices[0].message.content == REPLY


@pytest.mark.parametrize(
    ("path", "fields", "param", "meant"),
    [
        (CHAT, {"temprature": 1}, "temprature", "temperature"),
        (CHAT, {"maxTokens": 5}, "maxTokens", "max_tokens"),
        (CHAT, {"max_token": 5}, "max_token", "max_tokens"),
        (CHAT, {"tool": [{}]}, "tool", "tools"),
        (CHAT, {"response_fromat": {}}, "response_fromat", "response_format"),
        (TEXT, {"presence_penality": 1}, "presence_penality", "presence_penalty"),
        (TEXT, {"logprob": 1}, "logprob", "logprobs"),
        (DETOKENIZE, {"modle": "x"}, "modle", "model"),
        (
            CHAT,
            {"stream": True, "stream_options": {"includeusage": True}},
            "stream_options.includeusage",
            None,
        ),
        (CHAT, {"response_format": {"type": "text", "typ": "json"}}, "response_format.typ", "type"),
        (CHAT, {"messages": [{"role": "user", "content": "a", "nmae": "b"}]}, "messages[].nmae", "name"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "txet": "b"}]}]},
            "messages[].content[].txet",
            "text",
        ),
    ],
)
def test_typing_errors(
    server: LiveServer, path: str, fields: dict[str, Any], param: str, meant: str | None
) -> None:
    error = server.post(path, LEAST[path] | fields).error
    assert (error["param"], error["code"]) == (param, "unknown_parameter")
    assert error["message"].startswith(f"Unrecognized request argument supplied: {param}. Did you mean ")
    assert meant is None or error["message"].endswith(f"Did you mean {meant}?")


def test_names_of_others_are_never_typing_errors(server: LiveServer) -> None:
    for path in (CHAT, TEXT):
        for name in OTHERS - {"stream_options"}:
            answer = server.post(path, LEAST[path] | {name: "low"})
            assert (answer.status, answer.headers.get(HEADER)) == (200, name)


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"stream": True, "stream_options": {"include_usage": True, "foo": 1}}, "stream_options.foo"),
        (
            {"response_format": {"type": "text", "json_schema": {}, "verbose": 1, "x": None}},
            "response_format.verbose",
        ),
    ],
)
def test_objects_in_requests(server: LiveServer, fields: dict[str, Any], names: str) -> None:
    answer = server.post(CHAT, LEAST[CHAT] | fields)
    assert (answer.status, answer.headers[HEADER]) == (200, names)


HISTORY: list[dict[str, Any]] = [
    {"role": "user", "content": "Hi"},
    {
        "role": "assistant",
        "content": "Hm",
        "refusal": "I would rather not",
        "annotations": [{"type": "url_citation"}],
        "audio": {"id": "a"},
        "function_call": {"name": "f", "arguments": "{}"},
    },
]


def prompt_of(server: LiveServer, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(server.engine.adds[-1].prompt, skip_special_tokens=False)


def test_a_replayed_history(server: LiveServer, tokenizer: Tokenizer) -> None:
    answer = server.post(CHAT, {"messages": [*HISTORY, *HISTORY, *HI]})
    assert answer.status == 200, answer.body
    names = [f"messages[].{name}" for name in ("refusal", "annotations", "audio", "function_call")]
    assert answer.headers[HEADER] == ", ".join(names)
    plain = prompt_of(server, tokenizer)
    bare = [{"role": each["role"], "content": each["content"]} for each in (*HISTORY, *HISTORY, *HI)]
    assert HEADER not in server.post(CHAT, {"messages": bare}).headers
    assert prompt_of(server, tokenizer) == plain
    empty = [*HI, {"role": "assistant", "content": "a", "refusal": "", "annotations": [], "audio": None}]
    assert HEADER not in server.post(CHAT, {"messages": empty}).headers


def test_thoughts_empty_contents_and_roles_of_ones_own(server: LiveServer, tokenizer: Tokenizer) -> None:
    messages = [
        {"role": "critic", "content": "Be brief"},
        {"role": "judge"},
        {"role": "user", "content": []},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "closed": True},
                {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}},
            ],
        },
    ]
    answer = server.post(CHAT, {"messages": messages})
    assert (answer.status, answer.headers[HEADER]) == (200, "messages[].content[].cache_control")
    assert prompt_of(server, tokenizer) == (
        "<|start|>critic\nBe brief<|end|>\n<|start|>judge\n<|end|>\n<|start|>user\n<|end|>\n"
        "<|start|>assistant\nhm\na<|end|>\n<|start|>assistant\n"
    )


def test_what_the_template_reads_is_not_ignored(tokenizer: Tokenizer, says: Any) -> None:
    reading = "{% for m in messages %}{{ m.content }}{{ m.mood or '' }}{% endfor %}"
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}", "extra": 1}}
    messages = [{"role": "assistant", "content": "a", "mood": "b", "prefix": True, "tool_calls": [call]}]
    with running(tokenizer, says(REPLY), template=ChatTemplate({"default": reading})) as server:
        answer = server.post(CHAT, {"messages": messages})
        assert answer.headers[HEADER] == "messages[].prefix, messages[].tool_calls[].function.extra"
        assert prompt_of(server, tokenizer) == "ab"
        tokenized = server.post(TOKENIZE, {"messages": messages})
        assert tokenized.headers[HEADER] == answer.headers[HEADER]


def test_parts_keep_what_the_template_reads(tokenizer: Tokenizer, says: Any) -> None:
    reading = (
        "{% for m in messages %}{% for p in m.content %}{{ p.text }}{{ p.mood }}{% endfor %}{% endfor %}"
    )
    messages = [{"role": "user", "content": [{"type": "text", "text": "a", "mood": "b", "other": 1}]}]
    with running(tokenizer, says(REPLY), template=ChatTemplate({"default": reading})) as server:
        answer = server.post(CHAT, {"messages": messages})
        assert answer.headers[HEADER] == "messages[].content[].other"
        assert prompt_of(server, tokenizer) == "ab"


# ---- --strict-fields ----


@pytest.mark.parametrize(("path", "fields"), SERVED)
def test_strict_refuses_all_but_bookkeeping(strict: LiveServer, path: str, fields: dict[str, Any]) -> None:
    name = next(iter(fields))
    answer = strict.post(path, LEAST[path] | fields)
    if name in ("user", "metadata"):
        assert (answer.status, answer.headers[HEADER]) == (200, name)
    else:
        assert (answer.status, answer.error["param"]) == (400, name)


@pytest.mark.parametrize(
    ("message", "param"),
    [
        (HISTORY[1], "messages[0].refusal"),
        ({"role": "user", "content": []}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "thinking", "thinking": "a"}]}, "messages[0].content[0].type"),
    ],
)
def test_strict_refuses_in_messages(strict: LiveServer, message: dict[str, Any], param: str) -> None:
    assert strict.post(CHAT, {"messages": [message]}).error["param"] == param


def test_strict_leaves_keys_of_messages_to_the_template(strict: LiveServer) -> None:
    assert strict.post(CHAT, {"messages": [{"role": "user", "content": "a", "prefix": True}]}).status == 200


# ---- nothing that a client makes up is unbounded ----


def test_many_made_up_names_are_refused(server: LiveServer) -> None:
    some = server.post(TEXT, LEAST[TEXT] | {f"q{i}": 1 for i in range(64)})
    assert some.status == 200
    many = server.post(TEXT, LEAST[TEXT] | {f"q{i}": 1 for i in range(65)})
    assert (many.status, many.error["param"]) == (400, "q64")
    inside = [{"role": "user", "content": "a", f"q{i}": 1} for i in range(65)]
    assert server.post(CHAT, {"messages": inside}).error["param"] == "messages[].q64"
    again = [{"role": "user", "content": "a", "q": 1} for i in range(65)]
    assert server.post(CHAT, {"messages": again, "max_tokens": 1, "truncate_prompt_tokens": 5}).status == 200


def test_the_header_is_short_and_safe(server: LiveServer) -> None:
    odd = {"a\r\nX-Evil: 1": 1, "é, b": 2, "x" * 300: 3, '"\x00\x7f': 4}
    answer = server.post(TEXT, LEAST[TEXT] | odd)
    assert "x-evil" not in answer.headers
    names = answer.headers[HEADER].split(", ")
    assert names == ["a??X-Evil??1", "???b", "x" * 61 + "...", "???"]
    long = server.post(TEXT, LEAST[TEXT] | {f"{i:02}" + "y" * 50: 1 for i in range(40)}).headers[HEADER]
    assert 900 < len(long) <= 1024
    assert long.endswith("y, ...")


def test_a_line_per_name_and_hour(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "penstock.requests")
    now = 0.0
    log = IgnoredLog(lambda: now)
    for _ in range(3):
        log.say(["user", "num_ctx"])
    assert [record.args for record in caplog.records] == [("user",), ("num_ctx",)]
    now = 3599.0
    log.say(["user", "a\nb"])
    assert [record.args for record in caplog.records[2:]] == [("a?b",)]
    now = 3600.0
    log.say(["user", "a\nb"])
    assert [record.args for record in caplog.records[3:]] == [("user",)]


def test_the_log_remembers_a_bounded_number_of_names(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "penstock.requests")
    now = 0.0
    log = IgnoredLog(lambda: now)
    for number in range(10_000):
        now += 0.1
        log.say([f"q{number}"])
    assert len(log._said_at) == 256
    assert len(caplog.records) == 257
    assert "more than 256 different names" in caplog.messages[256]
    now = 3600.0 + 25.6  # the first ones may be forgotten
    log.say(["q1", "new", "newer"])
    assert len(log._said_at) == 256
    assert [record.args for record in caplog.records[257:]] == [("q1",), ("new",), ("newer",)]


def test_an_unknown_name_is_looked_at_once() -> None:
    class Counting(Names):
        looked = 0

        def near(self, name: str) -> str | None:
            self.looked += 1
            return super().near(name)

    names, ignored = Counting(("temperature",)), Ignored()
    for _ in range(100):
        ignored.unknown("foo", names, "messages[]")
    assert names.looked == 1
    assert list(ignored.names) == ["messages[].foo"]


# ---- values of other types ----


@pytest.mark.parametrize(
    ("path", "fields", "meant"),
    [
        (CHAT, {"max_tokens": "5"}, {"max_tokens": 5}),
        (CHAT, {"max_tokens": 5.0}, {"max_tokens": 5}),
        (CHAT, {"n": True}, {"n": 1}),
        (CHAT, {"temperature": "0.5"}, {"temperature": 0.5}),
        (CHAT, {"logprobs": "true", "top_logprobs": 2.0}, {"logprobs": True, "top_logprobs": 2}),
        (CHAT, {"seed": " 7 ", "temperature": 1}, {"seed": 7, "temperature": 1.0}),
        (CHAT, {"stop_token_ids": ["3", 4.0]}, {"stop_token_ids": [3, 4]}),
        (CHAT, {"logit_bias": {"5": "1.5"}}, {"logit_bias": {"5": 1.5}}),
        (CHAT, {"ignore_eos": "yes", "min_tokens": "1"}, {"ignore_eos": True, "min_tokens": 1}),
        (TEXT, {"prompt": [1.0, 2]}, {"prompt": [1, 2]}),
        (TEXT, {"prompt": [[1, True], ["3"]]}, {"prompt": [[1, 1], [3]]}),
        (TEXT, {"logprobs": 1.0}, {"logprobs": 1}),
        (TEXT, {"echo": 1, "add_special_tokens": "off"}, {"echo": True, "add_special_tokens": False}),
        (TEXT, {"use_beam_search": 0, "length_penalty": "1"}, {}),
    ],
)
def test_values_are_converted(
    server: LiveServer, path: str, fields: dict[str, Any], meant: dict[str, Any]
) -> None:
    def asked(body: dict[str, Any]) -> list[Any]:
        server.engine.adds.clear()
        answer = server.post(path, LEAST[path] | body)
        assert answer.status == 200, answer.body
        assert HEADER not in answer.headers
        return [(add.prompt, add.params, add.max_tokens) for add in server.engine.adds]

    assert asked(fields) == asked(meant)


def test_streams_are_asked_for_in_words(server: LiveServer) -> None:
    answer = server.post(CHAT, LEAST[CHAT] | {"stream": "true", "stream_options": {"include_usage": "1"}})
    assert answer.body.endswith(b"data: [DONE]\n\n")
    assert b'"choices":[],"usage":{' in answer.body


def test_a_value_that_stays_wrong_is_named_as_it_was_sent(server: LiveServer) -> None:
    error = server.post(CHAT, LEAST[CHAT] | {"n": "5", "temperature": "hot"}).error
    assert (error["param"], error["code"]) == ("temperature", "invalid_type")
    assert error["message"] == "Invalid type for temperature: expected float | null, got str."
