"""What is wrong with an answer, if anything.

Whatever was sent: no 5xx but a 503 that says the server is full or shutting down, an error in OpenAI's shape
with few words, an answer whose counts add up, a stream that ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import msgspec

from .cases import GETS, Case
from .requests import (
    CHAT,
    CHAT_BATCH,
    COHERE,
    COUNT,
    DETOKENIZE,
    EMBEDDINGS,
    INVOCATIONS,
    MESSAGES,
    POOL,
    RANKS,
    RESPONSES,
    RESPONSES_COUNT,
    SCORES,
    TEXT,
    TOKENIZE,
)

MOST_WORDS = 1024
"""Bytes that an error may take, beside what surrounds its message."""
REFUSALS = (400, 404, 405, 408, 413, 414, 415, 431)
FULL = ("queue_full", "draining")
_LISTS = (EMBEDDINGS, POOL, *SCORES, *RANKS)
_LAST = {
    MESSAGES: ("message_stop",),
    RESPONSES: ("response.completed", "response.incomplete"),
}
"""What a stream that was served ends with."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    """Names in lower case."""
    body: bytes


def wrong(case: Case, answer: Answer) -> str | None:
    """What is wrong, in a few words that are the same for the same fault; None if nothing is."""
    try:
        return _wrong(case, answer)
    except (KeyError, IndexError, TypeError, ValueError, msgspec.MsgspecError) as error:
        return f"shapeless {answer.status}: {type(error).__name__}: {str(error)[:60]}"


def _wrong(case: Case, answer: Answer) -> str | None:
    status = answer.status
    if "x-request-id" not in answer.headers and case.method != "OPTIONS":
        return f"{status} without a request id"
    if case.method == "HEAD":
        return None if status in (200, 403, *REFUSALS) else f"HEAD answered with {status}"
    if case.method == "OPTIONS" and status == 200:  # CORS
        return None
    if status == 200:
        return _wrong_success(case, answer)
    error = _error(answer)
    if status == 503:
        return None if error.get("reason") in FULL else f"503 {error.get('reason')}"
    if status == 403:  # of what is for gateways only
        return None if error.get("reason") == "permission_denied" else f"403 {error.get('reason')}"
    if status not in REFUSALS:
        return f"{status} {error['code']}: {error['message'][:60]}"
    if case.must_serve:
        return f"a valid request refused: {error['message'][:80]}"
    if case.field is not None and error["param"] is None and error.get("reason") != "invalid_json":
        return f"no param: {error['message'][:60]}"
    return None


def _error(answer: Answer) -> dict[str, Any]:
    body = msgspec.json.decode(answer.body)
    if set(body) == {"type", "error"}:  # of Anthropic's paths
        if body["type"] != "error" or set(body["error"]) < {"type", "message"}:
            raise ValueError(f"error keys {sorted(body['error'])}")
        return {"code": answer.status, "param": "", **body["error"]}
    if set(body) - {"status"} != {"error"}:  # probes say a status, too
        raise ValueError(f"keys {sorted(body)}")
    error: dict[str, Any] = body["error"]
    if set(error) - {"reason"} != {"message", "type", "param", "code"}:
        raise ValueError(f"error keys {sorted(error)}")
    if not answer.headers["content-type"].startswith("application/json"):
        raise ValueError("an error that is not declared as JSON")
    if error["code"] != answer.status and not isinstance(error["code"], str):
        raise ValueError(f"code {error['code']} of {answer.status}")
    message = error["message"]
    if not isinstance(message, str) or not message.strip():
        raise ValueError("no message")
    if len(message.encode()) > MOST_WORDS or len(str(error["param"])) > MOST_WORDS:
        raise ValueError(f"a message of over {MOST_WORDS} bytes: {message[:12]}")
    if "Traceback" in message or "object at 0x" in message:
        raise ValueError(f"Python in a message: {message[:60]}")
    return error


def _wrong_success(case: Case, answer: Answer) -> str | None:
    kind = answer.headers["content-type"]
    if kind.startswith("text/event-stream"):
        if case.path in _LAST:
            return _wrong_events(answer.body, _LAST[case.path])
        return _wrong_stream(answer.body)
    if kind == "application/octet-stream":
        return None if answer.body and len(answer.body) % 2 == 0 else "bytes of no numbers"
    if kind.startswith("text/plain"):
        return None if b"vllm:" in answer.body else "plain text"
    body = msgspec.json.decode(answer.body)
    path = "/" + unquote(case.path).removeprefix("http://fuzz").strip("/")
    if path in (CHAT, CHAT_BATCH, TEXT, INVOCATIONS) and "choices" in body:
        return _wrong_generation(body)
    if path in _LISTS or (path == INVOCATIONS and {"data", "results"} & set(body)):
        return _wrong_list(body)
    if path == COHERE:
        return _wrong_types(body)
    if path in (COUNT, RESPONSES_COUNT):
        return None if body["input_tokens"] > 0 else "counts no tokens"
    if path == MESSAGES:
        return None if body["stop_reason"] and body["usage"]["output_tokens"] >= 0 else "no stop_reason"
    if path == RESPONSES:
        known = ("completed", "incomplete", "queued", "in_progress")
        return None if body["status"] in known else f"status {body['status']}"
    if path == TOKENIZE:
        return None if body["count"] == len(body["tokens"]) else "count is not that of the tokens"
    if path == DETOKENIZE:
        return None if isinstance(body["prompt"], str) else "no text"
    known = path in GETS or path.startswith("/v1/models") or path.endswith("/render")
    return None if known or "status" in body or "id" in body else f"served: {path[:40]}"


def _wrong_list(body: Any) -> str | None:
    entries = body["results"] if "results" in body else body["data"]
    indices = [each["index"] for each in entries]
    if not indices or sorted(set(indices)) != sorted(indices):
        return "indices of a list"
    return _wrong_usage(body["usage"])


def _wrong_types(body: Any) -> str | None:
    lengths = {len(vectors) for vectors in body["embeddings"].values()}
    if len(lengths) != 1 or (body.get("texts") is not None and lengths != {len(body["texts"])}):
        return "embeddings that are not as many as texts"
    return _wrong_usage(body["usage"])


def _wrong_generation(body: Any) -> str | None:
    choices = body["choices"]
    if not choices or [choice["index"] for choice in choices] != list(range(len(choices))):
        return "indices of choices"
    if any(choice["finish_reason"] not in ("stop", "length") for choice in choices):
        return f"finish_reason {choices[0]['finish_reason']}"
    return _wrong_usage(body["usage"])


def _wrong_usage(usage: Any) -> str | None:
    if usage["prompt_tokens"] < 1 or usage["completion_tokens"] < 0:
        return "usage below nothing"
    if usage["prompt_tokens"] + usage["completion_tokens"] != usage["total_tokens"]:
        return "usage does not add up"
    return None


def _wrong_events(body: bytes, last: tuple[str, ...]) -> str | None:
    """Of the dialects whose events have names."""
    *events, rest = body.split(b"\n\n")
    names = []
    for event in events:
        name, _, data = event.partition(b"\n")
        if not name.startswith(b"event: ") or not data.startswith(b"data: "):
            return "an event without a name, or without data"
        names.append(name[7:].decode())
        if msgspec.json.decode(data[6:])["type"] != names[-1]:
            return "an event whose type is not its name"
    if rest or not names or names[-1] not in last or set(names[:-1]) & set(last):
        return f"a stream that ends with {names[-1:]}"
    return None


def _wrong_stream(body: bytes) -> str | None:
    *events, rest = body.split(b"\n\n")
    failed = bool(events) and events[-1].startswith(b'data: {"error"')
    if rest or not events or (not failed and events.pop() != b"data: [DONE]"):
        return "a stream without its end"
    ends: dict[int, str | None] = {}
    for event in events:
        if not event.startswith(b"data: "):
            return "an event without data"
        chunk = msgspec.json.decode(event[6:])
        if "error" in chunk:
            error = chunk["error"]
            reason = error.get("reason", error["code"])
            if reason in FULL and failed:
                return None
            return f"a stream that ends with {reason}: {error['message'][:60]}"
        if chunk.get("usage") is not None and (problem := _wrong_usage(chunk["usage"])) is not None:
            return problem
        for choice in chunk["choices"]:
            if ends.get(choice["index"]) is not None:
                return "a choice that goes on after its end"
            ends[choice["index"]] = choice["finish_reason"]
    if not ends or any(reason not in ("stop", "length") for reason in ends.values()):
        return f"a stream whose choices end with {sorted(map(str, set(ends.values())))}"
    return None
