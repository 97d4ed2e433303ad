"""Chunks of OpenAI streams and the errors of OpenAI-compatible servers, as a client reads them.

Pure functions of decoded payloads (`sse` gets them out of the bytes): no sockets, no clock, standard library
only. Both completions and chat completions are understood, and the error bodies of the common servers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Chunk:
    """One event of an OpenAI stream, completions or chat completions."""

    text: str = ""
    """Generated text shown to the user."""
    reasoning: str = ""
    """Generated text that is not part of the answer (`reasoning` or `reasoning_content`)."""
    has_choice: bool = False
    """Whether the event carries any choice; the closing usage event does not."""
    is_token: bool = False
    """Whether the model generated at least one token for this event."""
    finish_reason: str | None = None
    usage: Mapping[str, Any] | None = None
    error: str | None = None
    """Set when the event is an error instead of output."""


def read_chunk(payload: object) -> Chunk:
    """Interpret the decoded JSON of one event."""
    if not isinstance(payload, Mapping):
        return Chunk(error=f"expected a JSON object in the stream, got {str(payload)[:200]!r}")
    if payload.get("error") or payload.get("object") == "error":
        return Chunk(error=describe_error(payload))
    texts: list[str] = []
    reasonings: list[str] = []
    is_token = False
    finish_reason: str | None = None
    choices = [choice for choice in payload.get("choices") or [] if isinstance(choice, Mapping)]
    for choice in choices:
        delta = choice.get("delta")
        fields = delta if isinstance(delta, Mapping) else choice
        text = fields.get("content") if fields is delta else fields.get("text")
        reasoning = fields.get("reasoning_content") or fields.get("reasoning") or ""
        finish_reason = choice.get("finish_reason") or finish_reason
        generated = bool(text or reasoning or fields.get("tool_calls"))
        # An empty text is a token whose character is not complete yet, unless the event only
        # announces the role or only says why the stream ends.
        silent = text == "" and "role" not in fields and not choice.get("finish_reason")
        is_token = is_token or generated or silent
        texts.append(text or "")
        reasonings.append(reasoning)
    usage = payload.get("usage")
    return Chunk(
        text="".join(texts),
        reasoning="".join(reasonings),
        has_choice=bool(choices),
        is_token=is_token,
        finish_reason=finish_reason,
        usage=usage if isinstance(usage, Mapping) else None,
    )


def describe_error(body: object) -> str:
    """One line saying what the server said, from an error body in any of the common shapes.

    Understood: OpenAI `{"error": {"message", "type", "code"}}`, `{"error": "text"}`, FastAPI's
    `{"detail": …}`, the older `{"object": "error", "message": …}`, and plain text or bytes.
    """
    if isinstance(body, bytes | str):
        text = body if isinstance(body, str) else body.decode("utf-8", errors="replace")
        try:
            body = json.loads(text)
        except ValueError:
            return _one_line(text) or "(empty body)"
    if isinstance(body, Mapping):
        for key in ("error", "message", "detail"):
            if inner := body.get(key):
                return describe_error(inner) if isinstance(inner, Mapping) else _one_line(str(inner))
    return _one_line(str(body))


def _one_line(text: str, limit: int = 300) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
