"""Requests that must be served, for every endpoint that takes a body.

Fields that are not here are given by mutation only. Everything is small: the engine is to be exercised, not
filled.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any, get_args

import msgspec

from penstock.server.fields import HARMLESS, IGNORED, OTHERS
from penstock.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ReasoningEffort,
    TokenizeChatRequest,
    TokenizeCompletionRequest,
)

from .values import Raw

CHAT, TEXT, TOKENIZE, DETOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"
INVOCATIONS = "/invocations"

#: Endpoint → the Structs that its body may be.
SHAPES: dict[str, tuple[type[msgspec.Struct], ...]] = {
    CHAT: (ChatRequest,),
    TEXT: (CompletionRequest,),
    TOKENIZE: (TokenizeCompletionRequest, TokenizeChatRequest),
    DETOKENIZE: (DetokenizeRequest,),
    INVOCATIONS: (ChatRequest, CompletionRequest),
}

PROSE = (
    *(
        "Hi",
        "What is a KV cache?",
        "Once upon a time",
        "def f(x):\n    return",
        " ",
        "\n\n",
        "🌊 wörld",
        "a\x00b",
    ),
    *("e\u0301" * 9, "\u202eabc", "<|im_start|>user", "中文字符", "1 2 3 4 5", "{{ 1 }}", "A pod is " * 4),
)
_NAMES = ("a", "left", "é", "x" * 40, "tenant 5", "🌊")
_VOCABULARY = 2048

Make = Callable[[Random], Any]


def _among(*values: Any) -> Make:
    return lambda random: random.choice(values)


def _ids(low: int, high: int, most: int) -> Make:
    return lambda random: [random.randrange(low, high) for _ in range(random.randint(1, most))]


def _flag(random: Random) -> bool:
    return random.random() < 0.5


#: Numbers at the borders of each range, and within.
VALUES: dict[str, tuple[Any, ...]] = {
    "temperature": (0, -0.0, 5e-324, 9.9e-6, 1e-5, 0.7, 1, 2.5, 100, 100.0, None),
    "top_p": (5e-324, 1e-45, 1e-7, 0.1, 0.9, 0.9999999999999999, 1, 1.0, "0.5", " 1e-3 ", True, None),
    "top_k": (-1, 0, 1, 2, 40, 2047, 2048, 2**31, 2**63 - 1, 3.0, None),
    "min_p": (0, 5e-324, 1e-45, 0.05, 0.999999, 1, None),
    "repetition_penalty": (0.001, 0.5, 1, 1.1, 999.99, 1000, None),
    "presence_penalty": (-2, -0.5, 0, 2, 2.0),
    "frequency_penalty": (-2.0, 0.0, 1.5, 2),
    "logit_bias": (
        {"5": -100, "0": 100},
        {"2047": 5e-324},
        {"7": Raw("1e2")},
        {"7": Raw("-1E-7")},
        {"7": -0.0},
    ),
    "seed": (0, 1, -1, -2, 2**63 - 1, -(2**63), 7.0, None),
    "truncate_prompt_tokens": (-1, 1, 2, 40, 100, 2**63 - 1, None),
    "stream_interval": (1, 2, 5, 2**63 - 1, None),
    "prompt_logprobs": (0, 1, 20, None),
    "min_tokens": (0, 1, "1", 1.0, True),
    "priority": (0, 0.0, -0.0, None),
}

#: What endpoints share that generate text.
_COMMON: dict[str, Make] = {
    **{name: _among(*values) for name, values in VALUES.items()},
    "model": _among("demo", None),
    "add_special_tokens": _flag,
    "truncation_side": _among("left", "right"),
    "cache_salt": _among(*_NAMES),
    "request_id": _among(*_NAMES),
    "n": _among(1, 1, 1, 2, 3),
    "stream": _flag,
    "allowed_token_ids": _ids(300, 400, 9),
    "stop": _among("\n", "a", ["a", "b"], [], ["🌊", "\n\n"], "\x00", ["x" * 50] * 9),
    "stop_token_ids": _ids(100, 200, 5),
    "include_stop_str_in_output": _flag,
    "ignore_eos": _flag,
    "skip_special_tokens": _flag,
    "spaces_between_special_tokens": _flag,
    "echo": _flag,
    "return_token_ids": _flag,
    "return_tokens_as_token_ids": _among(True, False, None),
    "user": _among(*_NAMES),
}


def _prompt(random: Random) -> Any:
    kind = random.random()
    if kind < 0.6:
        return random.choice(PROSE)
    if kind < 0.75:
        return [random.choice(PROSE) for _ in range(random.randint(1, 3))]
    ids = _ids(3, _VOCABULARY, 12)
    return ids(random) if kind < 0.9 else [ids(random) for _ in range(random.randint(1, 3))]


def _content(random: Random) -> Any:
    if random.random() < 0.8:
        return random.choice(PROSE)
    return [{"type": "text", "text": random.choice(PROSE)} for _ in range(random.randint(1, 3))]


#: What a message of an earlier answer may have, and who else may speak.
_ANSWERED: tuple[dict[str, Any], ...] = (
    {"refusal": "no", "annotations": [{"type": "x"}], "audio": {"id": "a"}},
    {"function_call": {"name": "f", "arguments": "{}"}, "content": None},
    {"content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a", "cache_control": {}}]},
    {"content": []},
    {"role": "critic"},
)


def _messages(random: Random) -> list[Any]:
    messages: list[Any] = []
    if random.random() < 0.3:
        messages.append({"role": "system", "content": _content(random)})
    for _ in range(random.choice((0, 0, 0, 1, 2))):
        messages.append({"role": "user", "content": _content(random)})
        messages.append({"role": "assistant", "content": random.choice(PROSE)})
        if random.random() < 0.2:
            messages[-1] |= random.choice(_ANSWERED)
        if random.random() < 0.3:
            arguments = random.choice(('{"a": 1}', "{}", "", None, {"a": [1]}, "[" * 60 + "]" * 60))
            call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
            messages[-1] |= {"content": None, "tool_calls": [call]}
            messages.append({"role": "tool", "tool_call_id": "c", "content": "5"})
    messages.append(
        {"role": "user", "content": _content(random), **({"x": 1} if random.random() < 0.1 else {})}
    )
    return messages


_CHAT: dict[str, Make] = {
    **_COMMON,
    "max_completion_tokens": _among(1, 2, 4),
    "logprobs": _flag,
    "top_logprobs": _among(0, 1, 20),
    "add_generation_prompt": _among(True, False, None),
    "documents": _among([], [{"title": "a", "text": "b"}], None),
    "chat_template_kwargs": _among({}, {"enable_thinking": False}, {"a": [1, {"b": None}], "é": 2**70}),
    "reasoning_effort": _among(*get_args(ReasoningEffort), None),
    "return_prompt_text": _flag,
}
_TEXT: dict[str, Make] = {**_COMMON, "logprobs": _among(0, 1, 20, None)}


def _some(random: Random, fields: dict[str, Make]) -> dict[str, Any]:
    names = random.sample(list(fields), min(len(fields), random.choice((0, 0, 1, 2, 3, 5, 8))))
    return {name: fields[name](random) for name in names}


def _generating(random: Random, fields: dict[str, Make]) -> dict[str, Any]:
    request = {"max_tokens": random.choice((1, 1, 1, 2, 3, 4)), **_some(random, fields)}
    if "prompt_logprobs" in request:
        request.pop("stream", None)
    if request.get("stream") and random.random() < 0.5:
        request["stream_options"] = {"include_usage": True, "continuous_usage_stats": random.random() < 0.5}
    if random.random() < 0.1:
        request[random.choice(_UNUSED)] = _harmless(random)
    if random.random() < 0.1:
        request |= {"logprob_token_ids": _ids(0, _VOCABULARY, 128)(random), "logprobs": 1}
    return request


_UNUSED = sorted(IGNORED | (OTHERS - {"stream_options", "tool_choice"}) | HARMLESS)


def _harmless(random: Random) -> Any:
    """A value that is JSON, and not too deep."""
    return random.choice(
        (None, 5, {"a": "b"}, [1, [2]], "x" * 100, 2**80, Raw("1e300"), Raw("[" * 60 + "]" * 60))
    )


def chat(random: Random) -> dict[str, Any]:
    """A body of /v1/chat/completions."""
    request = {"messages": _messages(random), **_generating(random, _CHAT)}
    if "top_logprobs" in request:
        request["logprobs"] = True
    return request


def completion(random: Random) -> dict[str, Any]:
    """A body of /v1/completions."""
    request = {"prompt": _prompt(random), **_generating(random, _TEXT)}
    if random.random() < 0.03:
        request = {**request, "echo": True, "max_tokens": 0, "min_tokens": 0}
    return request


def tokenize(random: Random) -> dict[str, Any]:
    """A body of /tokenize."""
    given = {"prompt": random.choice(PROSE)} if random.random() < 0.6 else {"messages": _messages(random)}
    return {
        **given,
        **_some(
            random, {"add_special_tokens": _flag, "return_token_strs": _flag, "model": _among("demo", None)}
        ),
    }


def detokenize(random: Random) -> dict[str, Any]:
    """A body of /detokenize."""
    return {"tokens": random.choice(([], [0], [_VOCABULARY - 1], _ids(0, _VOCABULARY, 60)(random)))}


VALID: dict[str, Callable[[Random], dict[str, Any]]] = {
    CHAT: chat,
    TEXT: completion,
    TOKENIZE: tokenize,
    DETOKENIZE: detokenize,
    INVOCATIONS: lambda random: random.choice((chat, completion))(random),
}
