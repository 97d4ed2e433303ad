"""Requests that must be served, for every endpoint that takes a body.

Fields that are not here are given by mutation only. Everything is small: the engine is to be exercised, not
filled.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any, ClassVar, get_args

import msgspec

from penstock.server.fields import HARMLESS, IGNORED, OTHERS
from penstock.server.messages.shapes import CountTokensRequest, MessagesRequest
from penstock.server.protocol import (
    ChatBatchRequest,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ReasoningEffort,
    TokenizeChatRequest,
    TokenizeCompletionRequest,
)
from penstock.server.protocol_pooling import (
    ClassifyRequest,
    CohereEmbedRequest,
    EmbeddingRequest,
    PoolingRequest,
    RerankRequest,
    ScoreRequest,
)
from penstock.server.responses.shapes import ResponsesRequest

from .values import Raw

CHAT, TEXT, TOKENIZE, DETOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"
INVOCATIONS = "/invocations"
RESPONSES, MESSAGES, COUNT = "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"
CHAT_RENDER, TEXT_RENDER = "/v1/chat/completions/render", "/v1/completions/render"
MESSAGES_RENDER, RESPONSES_RENDER = "/v1/messages/render", "/v1/responses/render"
RESPONSES_COUNT = "/v1/responses/input_tokens"
CHAT_BATCH = "/v1/chat/completions/batch"
FILES, BATCHES = "/v1/files", "/v1/batches"
EMBEDDINGS, POOL, CLASSIFY = "/v1/embeddings", "/pooling", "/classify"
SCORES = ("/score", "/v1/score")
RANKS = ("/rerank", "/v1/rerank", "/v2/rerank")
COHERE = "/v2/embed"


class BatchRequest(msgspec.Struct):
    """POST /v1/batches, whose fields the server reads one by one."""

    neutral: ClassVar[tuple[str, ...]] = ()
    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None = None
    output_expires_after: dict[str, Any] | None = None


#: Endpoint → the Structs that its body may be.
SHAPES: dict[str, tuple[type[msgspec.Struct], ...]] = {
    CHAT: (ChatRequest,),
    TEXT: (CompletionRequest,),
    TOKENIZE: (TokenizeCompletionRequest, TokenizeChatRequest),
    DETOKENIZE: (DetokenizeRequest,),
    INVOCATIONS: (ChatRequest, CompletionRequest),
    RESPONSES: (ResponsesRequest,),
    MESSAGES: (MessagesRequest,),
    COUNT: (CountTokensRequest,),
    CHAT_RENDER: (ChatRequest,),
    TEXT_RENDER: (CompletionRequest,),
    MESSAGES_RENDER: (MessagesRequest,),
    RESPONSES_RENDER: (ResponsesRequest,),
    RESPONSES_COUNT: (ResponsesRequest,),
    CHAT_BATCH: (ChatBatchRequest,),
    BATCHES: (BatchRequest,),
}
#: Of a model that pools.
POOLING_SHAPES: dict[str, tuple[type[msgspec.Struct], ...]] = {
    EMBEDDINGS: (EmbeddingRequest,),
    POOL: (PoolingRequest,),
    CLASSIFY: (ClassifyRequest,),
    **dict.fromkeys(SCORES, (ScoreRequest,)),
    **dict.fromkeys(RANKS, (RerankRequest,)),
    COHERE: (CohereEmbedRequest,),
    INVOCATIONS: (EmbeddingRequest, ScoreRequest, RerankRequest),
    TOKENIZE: (TokenizeCompletionRequest,),
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
            arguments = random.choice(
                ('{"a": 1}', "{}", "", None, {"a": [1]}, '{"a": ' + "[" * 2 + "]" * 2 + "}")
            )
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
    "tool_choice": _among("none", None),
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


_UNUSED = sorted(IGNORED | (OTHERS - {"stream_options"}) | HARMLESS)


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


def chats(random: Random) -> dict[str, Any]:
    """A body of /v1/chat/completions/batch."""
    alone = ("stream", "stream_options", "n", "prompt_logprobs", "return_prompt_text")
    request = {name: value for name, value in chat(random).items() if name not in alone}
    # a whole conversation may be longer than the context, and three of them are more often
    return {**request, "messages": [_messages(random)[-1:] for _ in range(random.randint(1, 3))]}


def completion(random: Random) -> dict[str, Any]:
    """A body of /v1/completions."""
    request = {"prompt": _prompt(random), **_generating(random, _TEXT)}
    if random.random() < 0.03:
        request = {**request, "echo": True, "max_tokens": 0, "min_tokens": 0}
        request.pop("logprob_token_ids", None)
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


def response(random: Random) -> dict[str, Any]:
    """A body of /v1/responses."""
    items: list[Any] = [{"role": "user", "content": random.choice(PROSE)}]
    if random.random() < 0.3:
        text = {"type": "input_text", "text": random.choice(PROSE)}
        items.insert(0, {"type": "message", "role": "user", "content": [text]})
        items.insert(1, {"role": "assistant", "content": random.choice(PROSE)})
    if random.random() < 0.2:
        call = {"call_id": "c", "type": "function_call", "name": "f", "arguments": "{}"}
        items += [call, {"type": "function_call_output", "call_id": "c", "output": "5"}]
    fields: dict[str, Make] = {
        "instructions": _among(*PROSE, None),
        "temperature": _among(0, 0.7, 2, None),
        "top_p": _among(0.1, 1, None),
        "top_k": _among(-1, 1, 40),
        "seed": _among(0, 1, None),
        "store": _among(True, False, None),
        "stream": _flag,
        "metadata": _among({}, {"a": "b"}),
        "truncation": _among("disabled"),
        "text": _among({}, {"format": {"type": "text"}}),
        "parallel_tool_calls": _flag,
        "user": _among(*_NAMES),
        "include": _among([], ["reasoning.encrypted_content"]),
    }
    return {
        "input": items if random.random() < 0.7 else random.choice(PROSE),
        "max_output_tokens": random.choice((1, 1, 2, 3)),
        **_some(random, fields),
    }


_SPOKEN: dict[str, Make] = {
    "system": _among(
        "", "Be brief.", [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]
    ),
    "thinking": _among(None, {"type": "disabled"}),
    "tool_choice": _among(None),
    "tools": _among([]),
}


def _turns(random: Random) -> list[Any]:
    turns: list[Any] = [{"role": "user", "content": _content(random)}]
    if random.random() < 0.3:
        turns += [{"role": "assistant", "content": _content(random)}, {"role": "user", "content": "a"}]
    if random.random() < 0.2:
        used = {"type": "tool_use", "id": "c", "name": "f", "input": {"a": 1}}
        result = {"type": "tool_result", "tool_use_id": "c", "content": "5"}
        turns += [{"role": "assistant", "content": [used]}, {"role": "user", "content": [result]}]
    return turns


def message(random: Random) -> dict[str, Any]:
    """A body of /v1/messages."""
    fields: dict[str, Make] = {
        **_SPOKEN,
        "stop_sequences": _among([], ["\n"], ["a", "🌊"]),
        "stream": _flag,
        "temperature": _among(0, 0.5, 1, None),
        "top_k": _among(1, 40, None),
        "top_p": _among(0.1, 1, None),
        "metadata": _among({"user_id": "a"}),
    }
    return {**count(random), "max_tokens": random.choice((1, 1, 2, 3)), **_some(random, fields)}


def count(random: Random) -> dict[str, Any]:
    """A body of /v1/messages/count_tokens."""
    return {"model": "demo", "messages": _turns(random), **_some(random, _SPOKEN)}


def batch(random: Random) -> dict[str, Any]:
    """A body of /v1/batches, for a file that is not there."""
    return {
        "input_file_id": "file-" + random.choice(_NAMES),
        "endpoint": CHAT,
        "completion_window": random.choice(("24h", "1s", "30d")),
    }


def upload(random: Random) -> tuple[str, bytes]:
    """(content type, body) of POST /v1/files."""
    boundary = random.choice(("x", "-" * 20 + "7", "a b"))
    parts = [("purpose", random.choice(("batch", "user_data")).encode()), ("file", b"")]
    line = b'{"custom_id": "%d", "url": "/v1/completions", "body": {}}\n'
    lines = [line % number for number in range(random.randint(0, 3))]
    if random.random() < 0.3:
        parts += [("expires_after[anchor]", b"created_at"), ("expires_after[seconds]", b"3600")]
    random.shuffle(parts)
    body = b""
    for name, value in parts:
        file = '; filename="a.jsonl"\r\nContent-Type: application/jsonl' if name == "file" else ""
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'
        body += head.encode() + (b"".join(lines) if name == "file" else value) + b"\r\n"
    return f'multipart/form-data; boundary="{boundary}"', body + f"--{boundary}--\r\n".encode()


# ---- of models that pool ----

_POOLED: dict[str, Make] = {
    "model": _among("demo", None),
    "truncate_prompt_tokens": _among(-1, 5, 60, None),  # fewer would not hold the special tokens of a pair
    "truncation_side": _among("left", "right", None),
    "add_special_tokens": _among(True, None),
    "use_activation": _among(True, False, None),
    "request_id": _among(*_NAMES),
    "priority": _among(0, None),
    "user": _among(*_NAMES),
}
_VECTORS: dict[str, Make] = {
    **_POOLED,
    "encoding_format": _among("float", "base64", "bytes", "bytes_only"),
    "embed_dtype": _among("float32", "float16", "bfloat16"),
    "endianness": _among("native", "little", "big"),
}
_WORDS = ("w1", "w1 w2 w3", "🌊 wörld", "w5 " * 20, "中文", "\x00", "<s>")


def embedding(random: Random) -> dict[str, Any]:
    """A body of /v1/embeddings."""
    ids = _ids(3, 90, 12)
    given = random.choice((_among(*_WORDS), _several, ids, lambda random: [ids(random), ids(random)]))
    return {"input": given(random), **_some(random, _VECTORS)}


def cohere(random: Random) -> dict[str, Any]:
    """A body of /v2/embed."""
    fields: dict[str, Make] = {
        "model": _among("demo", None),
        "embedding_types": _among(["float"], ["base64", "ubinary", "binary"], [], None),
        "input_type": _among("search_query", "x", None),
        "truncate": _among("START", "END", None),
        "max_tokens": _among(5, 60, None),
        "priority": _among(0, None),
    }
    return {"texts": _several(random), **_some(random, fields)}


def pooling(random: Random) -> dict[str, Any]:
    """A body of /pooling."""
    return {**embedding(random), **_some(random, {"task": _among("embed", "token_embed", None)})}


def _several(random: Random) -> list[str]:
    return [random.choice(_WORDS) for _ in range(random.randint(1, 4))]


def score(random: Random) -> dict[str, Any]:
    """A body of /score."""
    left, right = random.choice((("text_1", "text_2"), ("queries", "documents"), ("data_1", "data_2")))
    limits = {"max_tokens_per_query": _among(0, 5), "max_tokens_per_doc": _among(0, 5)}
    return {left: random.choice(_WORDS), right: _several(random), **_some(random, _POOLED | limits)}


def rank(random: Random) -> dict[str, Any]:
    """A body of /rerank."""
    documents: list[Any] = _several(random)
    if random.random() < 0.3:
        documents = [{"text": text} for text in documents]
    more = {"top_n": _among(0, 1, 100, None), "return_documents": _flag}
    return {"query": random.choice(_WORDS), "documents": documents, **_some(random, _POOLED | more)}


Bodies = dict[str, Callable[[Random], dict[str, Any]]]
VALID: Bodies = {
    CHAT: chat,
    TEXT: completion,
    TOKENIZE: tokenize,
    DETOKENIZE: detokenize,
    INVOCATIONS: lambda random: random.choice((chat, completion))(random),
    RESPONSES: response,
    MESSAGES: message,
    COUNT: count,
    CHAT_RENDER: chat,
    TEXT_RENDER: completion,
    MESSAGES_RENDER: message,
    RESPONSES_RENDER: response,
    RESPONSES_COUNT: response,
    CHAT_BATCH: chats,
    BATCHES: batch,
}
POOLING_VALID: Bodies = {
    EMBEDDINGS: embedding,
    POOL: pooling,
    CLASSIFY: lambda random: {"input": _several(random), **_some(random, _POOLED)},
    **dict.fromkeys(SCORES, score),
    **dict.fromkeys(RANKS, rank),
    COHERE: cohere,
    INVOCATIONS: lambda random: random.choice((embedding, score, rank))(random),
    TOKENIZE: lambda random: {"prompt": random.choice(_WORDS)},
}
#: A valid body of these is refused: there is no such file, or no such class.
REFUSED = (BATCHES, CLASSIFY)
