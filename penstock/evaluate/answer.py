"""An answer as it is kept and graded: its text, what it took, and when it was given. Plain data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

NANO = 1_000_000_000


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What a server said to one request. Times are nanoseconds."""

    text: str
    """What is graded. An answer that is all tool calls is their JSON: [{"name": …, "arguments": …}]."""
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    """Of the prompt, read from the server's cache."""
    device_time: int | None = None
    """Device time that the request used, where the server says so (Penstock does)."""
    latency: int
    """From sending the request to the end of its answer."""
    asked_at: float
    """Seconds since 1970."""
    concurrency: int
    """Requests that were kept under way at the time."""
    fingerprint: str | None = None
    """OpenAI's `system_fingerprint`."""


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """No answer, for a reason that lies with this request: it is wrong, and not kept."""

    status: int
    """HTTP status; 0 for an answer that did not come in time."""
    message: str


def read_answer(body: Any, *, latency: int, asked_at: float, concurrency: int) -> Answer:
    """From the JSON of a completion or a chat completion. Raises ValueError where it is none."""
    choices = body.get("choices") if isinstance(body, Mapping) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, Mapping):
        raise ValueError("the answer has no choices")
    message = choice.get("message")
    text: Any = message.get("content") if isinstance(message, Mapping) else choice.get("text")
    calls = message.get("tool_calls") if isinstance(message, Mapping) else None
    if not text and isinstance(calls, list) and calls:
        text = msgspec.json.encode([_call(call) for call in calls]).decode()
    if text is None and isinstance(message, Mapping):
        text = message.get("refusal") or ""
    if not isinstance(text, str):
        raise ValueError("the first choice of the answer has no text")
    usage = body.get("usage")
    usage = usage if isinstance(usage, Mapping) else {}
    details = usage.get("prompt_tokens_details")
    seconds = usage.get("device_seconds")
    fingerprint = body.get("system_fingerprint")
    reason = choice.get("finish_reason")
    return Answer(
        text=text,
        finish_reason=reason if isinstance(reason, str) else None,
        prompt_tokens=_count(usage.get("prompt_tokens")),
        completion_tokens=_count(usage.get("completion_tokens")),
        cached_tokens=_count(details.get("cached_tokens")) if isinstance(details, Mapping) else None,
        device_time=round(seconds * NANO)
        if isinstance(seconds, int | float) and 0 <= seconds < 1e6
        else None,
        latency=latency,
        asked_at=asked_at,
        concurrency=concurrency,
        fingerprint=fingerprint if isinstance(fingerprint, str) else None,
    )


def _call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return call
    arguments = function.get("arguments")
    try:
        arguments = msgspec.json.decode(arguments) if isinstance(arguments, str) else arguments
    except (msgspec.DecodeError, RecursionError):
        pass  # as it is: a grader will see that it is no JSON
    return {"name": function.get("name"), "arguments": arguments}


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53 else None
