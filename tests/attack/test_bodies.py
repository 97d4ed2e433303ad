"""Request bodies that would make much work: each is answered, or refused with its limit named, and nobody
else waits or pays memory for it.

What every field gets is generated from the protocol's types: a new field is attacked by being there.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any, get_type_hints

import pytest

from penstock.server.config import ServerConfig
from penstock.server.fields import IGNORED
from penstock.server.protocol import (
    Body,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeCompletionRequest,
)
from tests.e2e.server import Server, serving

from .harness import error_of, post, withstands

MOST = ServerConfig().max_body_bytes - 1000
"""Bytes of a value that takes all of a body."""
TEXT, CHAT, TOKENIZE, DETOKENIZE = "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"
HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving("demo", log=tmp_path_factory.mktemp("bodies") / "log") as server:
        post(server, CHAT, {"messages": HI, "max_tokens": 2})
        yield server


def body(fields: dict[str, Any], **raw: bytes) -> bytes:
    """A body with these fields, some of them as JSON already."""
    ready = json.dumps(fields)[1:-1].encode()
    more = [json.dumps(name).encode() + b":" + value for name, value in raw.items()]
    return b"{" + b",".join([*([ready] if ready else []), *more]) + b"}"


def filled(item: bytes, opening: bytes = b"[", closing: bytes = b"]") -> bytes:
    """A JSON value that repeats an item until the body is full."""
    return opening + item * (MOST // len(item)) + item.rstrip(b",") + closing


def members() -> bytes:
    """A JSON object with names that are all different."""
    return b"{" + b",".join(b'"%d":0' % number for number in range(MOST // 11)) + b"}"


def short_of(answer: tuple[int, bytes]) -> tuple[int, bytes]:
    """The answer, which does not send back what it got."""
    assert len(answer[1]) < 20_000, len(answer[1])
    return answer


# ---- bodies that are refused, and the flag that each names ----

REFUSED: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "stop strings": (
        TEXT,
        lambda: body(
            {"prompt": ["a"] * 32, "n": 128, "max_tokens": 1, "stop": [chr(256 + i) for i in range(50_000)]}
        ),
        "--max-stop-strings",
    ),
    "long stop strings": (
        TEXT,
        lambda: body({"prompt": "a", "n": 128, "stop": ["a" * i for i in range(1, 360)]}),
        "--max-stop-chars",
    ),
    "logit_bias of many choices": (
        TEXT,
        lambda: body(
            {"prompt": ["a"] * 32, "n": 128, "max_tokens": 1, "logit_bias": {str(i): 1 for i in range(2048)}}
        ),
        "--max-choice-tokens",
    ),
    "allowed_token_ids": (
        TEXT,
        lambda: body({"prompt": "a", "n": 128, "allowed_token_ids": [i % 2000 for i in range(100_000)]}),
        "--max-listed-tokens",
    ),
    "stop_token_ids of many choices": (
        TEXT,
        lambda: body({"prompt": "a", "n": 128, "stop_token_ids": [i % 2000 for i in range(60_000)]}),
        "--max-choice-tokens",
    ),
    "choices": (TEXT, lambda: body({"prompt": ["a"] * 2048, "n": 128, "max_tokens": 1}), "--max-choices"),
    "prompts": (TEXT, lambda: body({"max_tokens": 1}, prompt=filled(b'"a",')), "--max-body-values"),
    "a prompt": (TEXT, lambda: body({}, prompt=filled(b"hello wo ", b'"', b'"')), "context length"),
    "a prompt of spaces": (TEXT, lambda: body({}, prompt=filled(b" ", b'"', b'"')), "context length"),
    "prompts of texts": (
        TEXT,
        lambda: body({}, prompt=b"[" + b",".join([b'"' + b"hello wo " * 5800 + b'"'] * 190) + b"]"),
        "context length",
    ),
    "token ids": (TEXT, lambda: body({}, prompt=filled(b"7,")), "context length"),
    "token ids of a prompt": (TEXT, lambda: body({}, prompt=b"[" + filled(b"7,") + b"]"), "context length"),
    "prompt logprobs": (
        TEXT,
        lambda: body(
            {"prompt": [[7 + i % 900 for i in range(1400)]] * 64, "max_tokens": 1, "prompt_logprobs": 20}
        ),
        "--max-response-bytes",
    ),
    "echoed logprobs of many choices": (
        TEXT,
        lambda: body(
            {"prompt": [7] * 1400, "n": 128, "max_tokens": 1, "logprobs": 20, "echo": True, "stream": True}
        ),
        "--max-response-bytes",
    ),
    "token ids sent back": (
        TEXT,
        lambda: (
            body({"prompt": [[7] * 1800] * 64, "n": 64, "max_tokens": 1, "return_token_ids": True})[:-1]
            + b',"echo":true,"logprobs":5}'
        ),
        "--max-response-bytes",
    ),
    "messages": (
        CHAT,
        lambda: body({}, messages=filled(b'{"role":"user","content":""},')),
        "--max-body-values",
    ),
    "empty messages": (
        CHAT,
        lambda: body({"messages": [{"role": "user", "content": ""}] * 10_000}),
        "--max-messages",
    ),
    "as many messages as may be": (
        CHAT,
        lambda: body({"messages": [{"role": "user", "content": "x"}] * 8192}),
        "context length",
    ),
    "content parts": (
        CHAT,
        lambda: body({"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 10_000}]}),
        "--max-messages",
    ),
    "tool calls": (
        CHAT,
        lambda: body(
            {
                "messages": [
                    *HI,
                    {
                        "role": "assistant",
                        "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}] * 10_000,
                    },
                ]
            }
        ),
        "--max-messages",
    ),
    "a message": (
        CHAT,
        lambda: body({}, messages=b'[{"role":"user","content":' + filled(b"hello wo ", b'"', b'"') + b"}]"),
        "no context of this server",
    ),
    "template arguments": (
        CHAT,
        lambda: body({"messages": HI}, chat_template_kwargs=b'{"x":' + filled(b"7,") + b"}"),
        "--max-body-values",
    ),
    "keys of a message": (
        CHAT,
        lambda: body({}, messages=b'[{"role":"user","content":"","x":' + filled(b"7.5,") + b"}]"),
        "--max-body-values",
    ),
    "documents": (CHAT, lambda: body({"messages": HI}, documents=filled(b'{"a":"b"},')), "--max-body-values"),
    "empty lists": (TEXT, lambda: body({"prompt": "a"}, metadata=filled(b"[],")), "--max-body-values"),
    "objects": (TEXT, lambda: body({"prompt": "a"}, metadata=filled(b'{"":0},')), "--max-body-values"),
    "strings": (TEXT, lambda: body({"prompt": "a"}, metadata=filled('"é",'.encode())), "--max-body-values"),
    "names": (TEXT, lambda: body({"prompt": "a"}, metadata=members()), "--max-body-values"),
    "numbers": (TEXT, lambda: body({"prompt": "a"}, metadata=filled(b"1.5,")), "--max-body-values"),
    "numbers beside token ids": (
        TEXT,
        lambda: body({"prompt": [7], "stop_token_ids": [7]}, n=b"[" + filled(b"7,") + b"]"),
        "--max-body-values",
    ),
    "tools": (
        CHAT,
        lambda: body({"messages": HI}, tools=filled(b'{"type":"function"},')),
        "--max-body-values",
    ),
    "to tokenize": (
        TOKENIZE,
        lambda: body({}, prompt=filled(b"a b c d e ", b'"', b'"')),
        "--max-tokenize-length",
    ),
    "to detokenize": (DETOKENIZE, lambda: body({}, tokens=filled(b"7,")), "--max-tokenize-length"),
    "names that nobody knows": (
        TEXT,
        lambda: body({"prompt": "a", **{f"unheard of {i}": 1 for i in range(60_000)}}),
        "more than 64 fields",
    ),
    "names in messages that nobody knows": (
        CHAT,
        lambda: body({"messages": [{**HI[0], f"unheard of {i}": 1, f"_{i}": 1} for i in range(8000)]}),
        "more than 64 fields",
    ),
    "numbers as texts": (
        TEXT,
        lambda: body({"prompt": "a", "stop_token_ids": ["9" * 400] * 10_000}),
        "stop_token_ids contains token id",
    ),
    "token ids as fractions": (TEXT, lambda: body({}, prompt=filled(b"7.0,")), "maximum context length"),
    "a model's name": (TEXT, lambda: body({"prompt": "a"}, model=filled(b"m", b'"', b'"')), "does not exist"),
    "a role": (
        CHAT,
        lambda: body({}, messages=b'[{"role":' + filled(b"u", b'"', b'"') + b"}]"),
        "1 to 64 characters",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(server: Server, name: str) -> None:
    path, make, words = REFUSED[name]
    data = make()
    answers: list[tuple[int, bytes]] = []
    toll = withstands(server, lambda: answers.append(post(server, path, data)))
    print(f"{name}: {toll}")
    for answer in answers:
        error = error_of(short_of(answer))
        assert answer[0] in (400, 404)
        assert words in error["message"]


# ---- bodies that are served ----

SERVED: dict[str, tuple[str, dict[str, Any]]] = {
    "stop strings": (
        TEXT,
        {"prompt": ["a"] * 4, "n": 64, "max_tokens": 8, "stop": [f"<{i}>" for i in range(1024)]},
    ),
    "stop strings that nearly match": (
        TEXT,
        {"prompt": "a", "n": 32, "max_tokens": 8, "stop": ["a" * i + "b" for i in range(1, 170)]},
    ),
    "logit_bias": (
        TEXT,
        {"prompt": "a", "n": 128, "max_tokens": 4, "logit_bias": {str(i): 1 for i in range(2048)}},
    ),
    "allowed_token_ids": (
        TEXT,
        {"prompt": "a", "n": 16, "max_tokens": 4, "allowed_token_ids": [i % 2000 for i in range(65_536)]},
    ),
    "prompt logprobs": (
        TEXT,
        {"prompt": [[7 + i % 900 for i in range(1400)]] * 4, "max_tokens": 1, "prompt_logprobs": 20},
    ),
    "echoed logprobs": (
        TEXT,
        {
            "prompt": [7 + i % 900 for i in range(1400)],
            "n": 8,
            "max_tokens": 1,
            "logprobs": 20,
            "echo": True,
        },
    ),
    "echoed logprobs of a stream": (
        TEXT,
        {
            "prompt": [7 + i % 900 for i in range(1400)],
            "n": 5,
            "max_tokens": 1,
            "logprobs": 20,
            "echo": True,
            "stream": True,
        },
    ),
    "messages": (CHAT, {"messages": [{"role": "user", "content": ""}] * 300, "max_tokens": 1}),
    "a text to tokenize": (TOKENIZE, {"prompt": "a b c d e " * 52_000, "return_token_strs": True}),
    "tokens to detokenize": (DETOKENIZE, {"tokens": [7] * 520_000}),
    "an unknown name": (TEXT, {"prompt": "a", "k" * 5_000_000: 1, "max_tokens": 1}),
    "an unknown name in each message": (
        CHAT,
        {
            "messages": [{**HI[0], "content": "", "unknown": 1}] * 8000,
            "truncate_prompt_tokens": 5,
            "max_tokens": 1,
        },
    ),
    "token ids as texts": (TEXT, {"prompt": [[7.0] * 1000] * 4, "max_tokens": 1}),
    "the end of a long text": (
        TEXT,
        {"prompt": "hello wo " * 1_000_000, "truncate_prompt_tokens": 20, "max_tokens": 1},
    ),
}


@pytest.mark.parametrize("name", SERVED)
def test_served(server: Server, name: str) -> None:
    path, fields = SERVED[name]
    data = body(fields)
    answers: list[tuple[int, bytes]] = []
    toll = withstands(server, lambda: answers.append(post(server, path, data)))
    print(f"{name}: {toll}, {len(answers[0][1])} bytes")
    assert [status for status, _ in answers] == [200] * len(answers), answers[0][1][:300]


@pytest.mark.parametrize("name", ["a prompt", "numbers", "to tokenize"])
def test_several_at_once(server: Server, name: str) -> None:
    path, make, _ = REFUSED[name]
    data = make()

    def attack() -> None:
        callers = [threading.Thread(target=post, args=(server, path, data)) for _ in range(4)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()

    print(f"4 × {name}: {withstands(server, attack)}")


# ---- every field of every body ----

ENDPOINTS: tuple[tuple[str, type[Body], dict[str, Any]], ...] = (
    (TEXT, CompletionRequest, {"prompt": "a", "max_tokens": 1}),
    (CHAT, ChatRequest, {"messages": HI, "max_tokens": 1}),
    (TOKENIZE, TokenizeCompletionRequest, {"prompt": "a"}),
    (TOKENIZE, TokenizeChatRequest, {"messages": HI}),
    (DETOKENIZE, DetokenizeRequest, {"tokens": [7]}),
)
VALUES: dict[str, tuple[bytes, bytes, frozenset[str]]] = {
    "text": (
        filled(b"hello wo ", b'"', b'"'),
        b'"' + b"hello wo " * (MOST // 90) + b'"',
        frozenset({"str", "list", "dict", "Any"}),
    ),
    "numbers": (filled(b"7,"), b"[" + b"7," * (MOST // 20) + b"7]", frozenset({"list", "dict", "Any"})),
}
"""All of a body; a tenth of it, for the many fields that are not looked into (numbers, switches, what is
ignored): what grows faster than its value does is seen with this, too; and in what types it is."""


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize(
    ("path", "shape", "least"), [pytest.param(*each, id=each[1].__name__) for each in ENDPOINTS]
)
def test_any_field(server: Server, path: str, shape: type[Body], least: dict[str, Any], value: str) -> None:
    long, short, looked_into = VALUES[value]
    types = {name: set(re.findall(r"\w+", str(hint))) for name, hint in get_type_hints(shape).items()}
    values = {name: long if types[name] & looked_into else short for name in shape.__struct_fields__}
    if value == "text":  # numbers are refused before it is known what field they are for
        values |= dict.fromkeys({*IGNORED, *shape.neutral}, short)

    def attack() -> None:
        for name, content in values.items():
            fields = {key: known for key, known in least.items() if key != name}
            status, answer = short_of(post(server, path, body(fields, **{name: content})))
            assert status in (200, 400, 404), (name, answer[:300])

    print(f"{shape.__name__}, {value} in {len(values)} fields: {withstands(server, attack)}")
