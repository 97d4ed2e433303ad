"""What an answer says, in each dialect, whole or streamed: for verifiers, who read all of it before a client
does.

    body, or events ──read──▶ Answer(choices: text, finish, logprobs)        policy/escalation.py judges it
    logprobs that only the gateway asked for ──without_logprobs──▶ the same bytes as if it had not

It reads only what it needs, and takes what is no such answer for one without choices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from penstock.http.sse import DONE, EventDecoder

from .endpoints import Endpoint
from .envelope import Envelope
from .policy.escalation import Answer, Choice, Finish

_FINISHES: dict[str, Finish] = {
    "stop": "stop",
    "length": "length",
    "content_filter": "content_filter",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
    # of Messages
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
    # of Responses
    "max_output_tokens": "length",
}
_LOGPROBS = b'"logprobs"'
_INCLUDED = "message.output_text.logprobs"
"""Of Responses: what `include` asks for them with."""


@dataclass(slots=True)
class _Growing:
    """One choice, as it comes."""

    text: list[str] = field(default_factory=list)
    logprobs: list[float] | None = None
    finish: Finish = ""
    calls_tools: bool = False

    def add(self, text: Any) -> None:
        if isinstance(text, str):
            self.text.append(text)

    def tell(self, logprobs: Iterable[Any]) -> None:
        """Log-probabilities of tokens; the first one of an echoed prompt has none."""
        found = [float(each) for each in logprobs if isinstance(each, int | float)]
        self.logprobs = found if self.logprobs is None else self.logprobs + found

    def end(self, reason: Any) -> None:
        if isinstance(reason, str):
            self.finish = _FINISHES.get(reason, "")

    def choice(self) -> Choice:
        told = None if self.logprobs is None else tuple(self.logprobs)
        return Choice("".join(self.text), self.finish, told, self.calls_tools)


class Dialect:
    """One family of endpoints."""

    def ask(self, envelope: Envelope) -> bool:
        """Ask for log-probabilities, where that can be; whether the client had not, so that they must be
        taken out again."""
        return False

    def whole(self, answer: dict[str, Any]) -> list[_Growing]:
        """The choices of a whole answer."""
        raise NotImplementedError

    def streamed(self, events: Iterable[dict[str, Any]]) -> list[_Growing]:
        """The choices of a stream."""
        raise NotImplementedError


class _Choices(Dialect):
    """Chat and completions: a list of choices, also in each chunk."""

    def __init__(self, *, chat: bool) -> None:
        self._chat = chat

    def ask(self, envelope: Envelope) -> bool:
        if envelope.asks_for(("logprobs",)):
            return False
        envelope.put("logprobs", True if self._chat else 0)
        return True

    def whole(self, answer: dict[str, Any]) -> list[_Growing]:
        return self.streamed((answer,))

    def streamed(self, events: Iterable[dict[str, Any]]) -> list[_Growing]:
        found: dict[int, _Growing] = {}
        for event in events:
            for each in _dicts(event.get("choices")):
                growing = found.setdefault(_index(each), _Growing())
                said = _dict(each.get("message") or each.get("delta")) if self._chat else each
                growing.add(said.get("content" if self._chat else "text"))
                growing.calls_tools |= bool(said.get("tool_calls") or said.get("function_call"))
                growing.end(each.get("finish_reason"))
                told = _dict(each.get("logprobs"))
                if self._chat and isinstance(told.get("content"), list):
                    growing.tell(entry.get("logprob") for entry in _dicts(told["content"]))
                elif isinstance(told.get("token_logprobs"), list):
                    growing.tell(told["token_logprobs"])
        return [found[index] for index in sorted(found)]


class _Responses(Dialect):
    """One choice of several items; the last event has all of them."""

    def ask(self, envelope: Envelope) -> bool:
        included = envelope.entries("include")
        if _INCLUDED in included:
            return False
        envelope.put("include", [*included, _INCLUDED])
        return True

    def whole(self, answer: dict[str, Any]) -> list[_Growing]:
        growing = _Growing()
        for item in _dicts(answer.get("output")):
            growing.calls_tools |= str(item.get("type", "")).endswith("_call")
            for part in _dicts(item.get("content")) if item.get("type") == "message" else ():
                growing.add(part.get("text"))
                if part.get("logprobs"):
                    growing.tell(entry.get("logprob") for entry in _dicts(part["logprobs"]))
        ended = answer.get("status") == "completed"
        growing.end("stop" if ended else _dict(answer.get("incomplete_details")).get("reason"))
        if growing.calls_tools and growing.finish == "stop":
            growing.finish = "tool_calls"
        return [growing]

    def streamed(self, events: Iterable[dict[str, Any]]) -> list[_Growing]:
        last = [event["response"] for event in events if isinstance(event.get("response"), dict)][-1:]
        return self.whole(last[0]) if last else []


class _Messages(Dialect):
    """Anthropic's: one choice of several blocks, and no log-probabilities."""

    def whole(self, answer: dict[str, Any]) -> list[_Growing]:
        growing = _Growing()
        for block in _dicts(answer.get("content")):
            growing.add(block.get("text") if block.get("type") == "text" else None)
            growing.calls_tools |= block.get("type") == "tool_use"
        growing.end(answer.get("stop_reason"))
        return [growing]

    def streamed(self, events: Iterable[dict[str, Any]]) -> list[_Growing]:
        growing = _Growing()
        for event in events:
            kind, delta = event.get("type"), _dict(event.get("delta"))
            if kind == "content_block_start":
                block = _dict(event.get("content_block"))
                growing.add(block.get("text") if block.get("type") == "text" else None)
                growing.calls_tools |= block.get("type") == "tool_use"
            elif kind == "content_block_delta" and delta.get("type") == "text_delta":
                growing.add(delta.get("text"))
            elif kind == "message_delta":
                growing.end(delta.get("stop_reason"))
        return [growing]


DIALECTS: dict[str, Dialect] = {
    "/v1/chat/completions": _Choices(chat=True),
    "/v1/completions": _Choices(chat=False),
    "/v1/responses": _Responses(),
    "/v1/messages": _Messages(),
}
"""Endpoints whose answers can be judged, by their paths."""


def read(endpoint: Endpoint, body: bytes, *, streamed: bool, tokens: int | None) -> Answer:
    """All that verifiers are shown of an answer; `tokens`: generated, as counted."""
    dialect = DIALECTS[endpoint.path]
    if streamed:
        choices = dialect.streamed(filter(None, map(_object, _payloads(body))))
    else:
        choices = dialect.whole(_object(body) or {})
    return Answer(tuple(each.choice() for each in choices), tokens)


def without_logprobs(body: bytes, *, streamed: bool) -> bytes:
    """An answer as if nobody had asked for log-probabilities. What has none stays as it came, byte by
    byte."""
    if _LOGPROBS not in body:
        return body
    if not streamed:
        return _bare(body)
    lines = body.split(b"\n")
    for index, line in enumerate(lines):
        if line.startswith(b"data:") and _LOGPROBS in line:
            lines[index] = b"data: " + _bare(line[5:].strip())
    return b"\n".join(lines)


def _bare(data: bytes) -> bytes:
    found = _object(data)
    if found is None:
        return data
    for choice in _dicts(found.get("choices")):
        if "logprobs" in choice:
            choice["logprobs"] = None
    for holder in _parts(found):
        if "logprobs" in holder:
            holder["logprobs"] = []
    return msgspec.json.encode(found)


def _parts(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Where a response, or one of its events, has log-probabilities."""
    response, item = _dict(found.get("response")), _dict(found.get("item"))
    if str(found.get("type", "")).startswith("response."):
        yield found
    yield _dict(found.get("part"))
    for each in (*_dicts(found.get("output")), *_dicts(response.get("output")), item):
        yield from _dicts(each.get("content"))


def _payloads(body: bytes) -> Iterator[bytes]:
    for payload in EventDecoder().feed(body):
        if payload != DONE:
            yield payload.encode()


def _object(data: bytes) -> dict[str, Any] | None:
    try:
        found = msgspec.json.decode(data)
    except (msgspec.MsgspecError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _index(choice: dict[str, Any]) -> int:
    index = choice.get("index", 0)
    return index if isinstance(index, int) else 0
