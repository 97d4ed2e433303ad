"""The API as an OpenAPI 3.1 document, made from the types that requests are decoded to, and from `shapes`.

    routes ─▶ paths          a row of OPERATIONS each; one without a row is described by its handler's words
    types  ─▶ schemas        msgspec's, with what they cannot say: null for "not given", ranges, messages

It knows types and routes; nothing of it is read while requests are served.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec

from penstock.core.sampling_params import RANGES
from penstock.http.auth import OPEN_PATHS

from . import protocol, shapes
from . import protocol_pooling as pooling
from .bills import Page
from .messages import shapes as messages
from .responses import shapes as responses

_REF = "#/components/schemas/{name}"
_ERRORS = {
    "400": "The request can never work; param names the field.",
    "401": "No API key, or a wrong one.",
    "404": "No such model, or no such path.",
    "413": "The body is over --max-body-bytes.",
    "415": "The body is declared as something else than JSON.",
    "500": "This request broke in the engine, or an error of the server.",
    "503": "The queue is full, the server drains, or the engine is dead.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """What a route takes and gives."""

    summary: str = ""
    takes: tuple[type, ...] = ()
    """The body: one of these."""
    gives: type | None = None
    """As JSON; None for something else, or for nothing in particular."""
    streams: type | None = None
    """The events of a stream, where it may be one."""
    media: str = "application/json"
    tag: str = "OpenAI"
    unwell: type | None = None
    """Of a 503 that is no error object."""
    fails: type = shapes.Error
    """The shape of errors."""


_PROBE = Operation(gives=shapes.Health, unwell=shapes.Unhealthy, tag="Operations")

_SCORE = Operation(
    summary="How near texts are to each other",
    takes=(pooling.ScoreRequest,),
    gives=shapes.Scores,
    tag="Pooling",
)
_RERANK = Operation(
    summary="Documents by how near they are to a query",
    takes=(pooling.RerankRequest,),
    gives=shapes.Ranking,
    tag="Pooling",
)

OPERATIONS: Mapping[str, Operation] = {
    "/v1/chat/completions": Operation(
        summary="The next message of a conversation, whole or as a stream of events",
        takes=(protocol.ChatRequest,),
        gives=shapes.ChatCompletion,
        streams=shapes.ChatCompletionChunk,
    ),
    "/v1/completions": Operation(
        summary="How prompts go on, whole or as a stream of events",
        takes=(protocol.CompletionRequest,),
        gives=shapes.Completion,
        streams=shapes.CompletionChunk,
    ),
    "/v1/embeddings": Operation(
        summary="The embeddings of texts", takes=(pooling.EmbeddingRequest,), gives=shapes.Embeddings
    ),
    "/pooling": Operation(
        summary="What the model makes of texts: a vector of each, or of each of their tokens",
        takes=(pooling.PoolingRequest,),
        gives=shapes.PooledInputs,
        tag="Pooling",
    ),
    "/classify": Operation(
        summary="The labels of texts",
        takes=(pooling.ClassifyRequest,),
        gives=shapes.Classifications,
        tag="Pooling",
    ),
    "/score": _SCORE,
    "/v1/score": _SCORE,
    "/rerank": _RERANK,
    "/v1/rerank": _RERANK,
    "/v2/rerank": _RERANK,
    "/v1/chat/completions/batch": Operation(
        summary="The next message of each of many conversations",
        takes=(protocol.ChatBatchRequest,),
        gives=shapes.ChatCompletion,
    ),
    "/v2/embed": Operation(
        summary="The embeddings of texts, in Cohere's shape",
        takes=(pooling.CohereEmbedRequest,),
        gives=shapes.CohereEmbeddings,
        tag="Pooling",
    ),
    "/v1/responses": Operation(
        summary="An answer to texts and items, whole, as a stream of events or in the background",
        takes=(responses.ResponsesRequest,),
        gives=responses.Response,
        streams=responses.ResponsesEvent,
    ),
    "/v1/batches/{name}/cancel": Operation(summary="Ask nothing more of a batch"),
    "/v1/responses/{name}": Operation(gives=responses.Response),
    "/v1/responses/{name}/cancel": Operation(gives=responses.Response),
    "/v1/responses/{name}/input_items": Operation(gives=responses.InputItems),
    "/v1/messages": Operation(
        summary="The next message of a conversation, in Anthropic's dialect",
        takes=(messages.MessagesRequest,),
        gives=messages.Message,
        streams=messages.MessagesEvent,
        fails=messages.MessagesError,
        tag="Anthropic",
    ),
    "/v1/messages/count_tokens": Operation(
        summary="How many tokens a conversation has",
        takes=(messages.CountTokensRequest,),
        gives=messages.TokenCount,
        fails=messages.MessagesError,
        tag="Anthropic",
    ),
    "/v1/chat/completions/render": Operation(
        summary="What the engine would be asked for a chat",
        takes=(protocol.ChatRequest,),
        gives=shapes.Rendered,
    ),
    "/v1/messages/render": Operation(
        summary="What the engine would be asked for a conversation in Anthropic's dialect",
        takes=(messages.MessagesRequest,),
        gives=shapes.Rendered,
        tag="Anthropic",
    ),
    "/v1/responses/input_tokens": Operation(
        summary="How many tokens of input a response would have",
        takes=(responses.ResponsesRequest,),
        gives=responses.InputTokens,
    ),
    "/v1/responses/render": Operation(
        summary="What the engine would be asked for a response",
        takes=(responses.ResponsesRequest,),
        gives=shapes.Rendered,
    ),
    "/v1/completions/render": Operation(
        summary="What the engine would be asked for each prompt", takes=(protocol.CompletionRequest,)
    ),
    "/v1/models": Operation(summary="The names that the model is served under", gives=shapes.ModelList),
    "/v1/models/{name:path}": Operation(
        summary="One of these names; it may contain slashes", gives=shapes.Model
    ),
    "/tokenize": Operation(
        takes=(protocol.TokenizeCompletionRequest, protocol.TokenizeChatRequest),
        summary="The tokens of a text, or of messages as the chat template writes them",
        gives=shapes.Tokens,
        tag="Tokens",
    ),
    "/detokenize": Operation(
        summary="The text of tokens, special ones included",
        takes=(protocol.DetokenizeRequest,),
        gives=shapes.Text,
        tag="Tokens",
    ),
    "/v1/bills": Operation(summary="Final bills of requests behind a cursor", gives=Page, tag="Gateways"),
    "/tokenizer_info": Operation(gives=shapes.TokenizerInfo, tag="Tokens"),
    "/health": _PROBE,
    "/ping": _PROBE,
    "/livez": _PROBE,
    "/readyz": _PROBE,
    "/metrics": Operation(media="text/plain", tag="Operations"),
    "/version": Operation(gives=shapes.Version, tag="Operations"),
    "/load": Operation(gives=shapes.Load, tag="Operations"),
    "/openapi.json": Operation(tag="Documentation"),
    "/docs": Operation(media="text/html", tag="Documentation"),
}

_MESSAGE = {
    "type": "object",
    "required": ["role"],
    "properties": {
        "role": {"type": "string"},
        "content": {
            "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}, {"type": "null"}]
        },
    },
}
_IDS = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
_TEXT = {"type": "string", "minLength": 1}
#: Properties that are said more exactly than their types say it, wherever they occur.
_PROPERTIES: Mapping[str, Any] = {
    "messages": {"type": "array", "minItems": 1, "items": _MESSAGE},
    "tokens": {"type": "array", "items": {"type": "integer", "minimum": 0}},
}
_COMPLETION_PROMPT = {
    "description": "A text, texts, token ids, or lists of token ids.",
    "anyOf": [
        _TEXT,
        {"type": "array", "minItems": 1, "items": _TEXT},
        _IDS,
        {"type": "array", "minItems": 1, "items": _IDS},
    ],
}
_WHOLE = {"n": (1, 128), "min_tokens": (0, None), "stream_interval": (1, None), "top_k": (-1, None)}


def describe(
    routes: Sequence[tuple[str, str, Callable[..., object]]], *, version: str, needs_key: bool, root_path: str
) -> dict[str, Any]:
    """The document.

    Args:
        routes: (path, method, handler) of everything that is served.
        version: of Penstock.
        needs_key: whether keys are configured.
        root_path: under which a proxy publishes the server.
    """
    paths: dict[str, dict[str, Any]] = {}
    for path, method, handler in routes:
        operation = _operation(path, method, handler, needs_key)
        paths.setdefault(path.replace(":path}", "}"), {})[method.lower()] = operation
    schemes = {"bearer": {"type": "http", "scheme": "bearer", "description": "A key of --api-key."}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Penstock",
            "version": version,
            "description": "OpenAI's API, and vLLM's additions to it. Null stands for not given.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": root_path or "/"}],
        "paths": paths,
        "components": {"schemas": _schemas(), "securitySchemes": schemes},
    }


def _operation(path: str, method: str, handler: Callable[..., object], needs_key: bool) -> dict[str, Any]:
    known = OPERATIONS.get(path, Operation(tag="Others"))
    guarded = needs_key and path not in OPEN_PATHS
    said: dict[str, Any] = {
        "operationId": f"{method.lower()}_{path.strip('/').replace('{name:path}', 'one')}".translate(_PLAIN),
        "summary": _summary(path, handler),
        "tags": [known.tag],
        "security": [{"bearer": []}] if guarded else [],
        "responses": dict(_responses(known, bool(known.takes or method == "POST"), guarded)),
    }
    if "{name" in path:
        schema = {"type": "string", "minLength": 1}
        said["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": schema}]
    if known.takes:
        schema = _reference(*known.takes)
        said["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    elif method == "POST" and path not in OPERATIONS:
        said["requestBody"] = {"content": {"application/json": {"schema": {"type": "object"}}}}
    return said


_PLAIN = str.maketrans("/.-", "___", "{}")


def _summary(path: str, handler: Callable[..., object]) -> str:
    """The first sentence of what the handler says of itself, unless it is one for many paths."""
    if (known := OPERATIONS.get(path)) is not None and known.summary:
        return known.summary
    function = handler.func if isinstance(handler, partial) else handler
    words = " ".join((inspect.getdoc(function) or path).split())
    return words.partition(". ")[0].removesuffix(".")


def _responses(known: Operation, has_body: bool, guarded: bool) -> Iterator[tuple[str, Any]]:
    content: dict[str, Any] = {known.media: {"schema": _reference(known.gives) if known.gives else {}}}
    if known.streams is not None:
        events = "Server-sent events: `data: ` and an object each"
        events += (
            ", then `data: [DONE]`." if known.fails is shapes.Error else ", after `event: ` and its type."
        )
        content["text/event-stream"] = {
            "schema": {"type": "string", "description": events},
            "x-event-schema": _reference(known.streams),
        }
    yield "200", {"description": "Success.", "content": content}
    for status, why in _ERRORS.items():
        if not (guarded if status == "401" else has_body or status not in ("400", "413", "415")):
            continue
        if status == "503" and known.unwell is not None:
            yield status, _failure("What is wrong.", known.unwell)
        else:
            yield status, _failure(why, known.fails)
    yield "default", _failure("Another error, such as one of HTTP.", known.fails)


def _failure(why: str, shape: type) -> dict[str, Any]:
    return {"description": why, "content": {"application/json": {"schema": _reference(shape)}}}


def _reference(*types: type) -> dict[str, Any]:
    found = [{"$ref": _REF.format(name=each.__name__)} for each in types]
    return found[0] if len(found) == 1 else {"anyOf": found}


def _schemas() -> dict[str, Any]:
    types: set[type] = {shapes.Error}
    for known in OPERATIONS.values():
        types.update(filter(None, (*known.takes, known.gives, known.streams, known.unwell, known.fails)))
    ordered = sorted(types, key=lambda each: each.__name__)
    _, schemas = msgspec.json.schema_components(ordered, ref_template=_REF)
    for shape in {shape for known in OPERATIONS.values() for shape in known.takes}:
        _refine(schemas[shape.__name__])
    completion = schemas[protocol.CompletionRequest.__name__]
    completion["properties"]["prompt"] = _COMPLETION_PROMPT
    completion["required"] = ["prompt"]
    conversations = {"type": "array", "minItems": 1, "items": _PROPERTIES["messages"]}
    schemas[protocol.ChatBatchRequest.__name__]["properties"]["messages"] = conversations
    return schemas


def _refine(schema: dict[str, Any]) -> None:
    """Say of a request's properties what its Struct does not."""
    properties = schema["properties"]
    for name, said in properties.items():
        if name in _PROPERTIES:
            properties[name] = _PROPERTIES[name]
            continue
        _bound(name, said)
        if name not in schema.get("required", ()) and not _takes_null(said):
            default = {"default": said.pop("default")} if "default" in said else {}
            properties[name] = {"anyOf": [said, {"type": "null"}], **default}


def _bound(name: str, said: dict[str, Any]) -> None:
    """Ranges, of the number in it."""
    low: float | None
    high: float | None
    for part in (said, *said.get("anyOf", ())):
        if part.get("type") == "integer":
            part["format"] = "int64"
            low, high = _WHOLE.get(name, (None, None))
        elif part.get("type") == "number" and name in RANGES:
            low, high = RANGES[name]
        else:
            continue
        if low is not None:
            part["exclusiveMinimum" if name == "top_p" else "minimum"] = low
        if high is not None:
            part["maximum"] = high


def _takes_null(said: Mapping[str, Any]) -> bool:
    return not said or any(part.get("type") == "null" for part in (said, *said.get("anyOf", ())))
