"""What an upstream says that a request has used, in any dialect, taken out of the bytes of its answer.

    OpenAI      usage.prompt_tokens · completion_tokens · prompt_tokens_details.cached_tokens
    Responses   usage.input_tokens · output_tokens · input_tokens_details (response.usage of events)
    Anthropic   usage.input_tokens + cache_read_input_tokens + cache_creation_input_tokens · output_tokens
                (message.usage in the first event, usage in the last but one)
    Cohere      meta.billed_units.input_tokens, where there is no usage
    ours        usage.device_seconds

Of an answer only these fields are decoded. What is no number, or none that can be, is as if it was not said.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from .policy.amounts import NANO

_MOST_TOKENS = 1 << 40
_MOST_SECONDS = 1e9


class _Usage(msgspec.Struct):
    prompt_tokens: Any = None
    completion_tokens: Any = None
    total_tokens: Any = None
    prompt_tokens_details: Any = None
    input_tokens: Any = None
    output_tokens: Any = None
    input_tokens_details: Any = None
    cache_read_input_tokens: Any = None
    cache_creation_input_tokens: Any = None
    device_seconds: Any = None


class Event(msgspec.Struct):
    """The payload of an event, with what the gateway reads of it."""

    usage: Any = None
    response: Any = None
    message: Any = None
    choices: Any = None
    error: Any = None
    type: Any = None


class _Plain(msgspec.Struct):
    """A whole answer: only its usage is of interest, and whether all of it is JSON."""

    usage: _Usage | None = None
    meta: Any = None


_EVENT = msgspec.json.Decoder(Event)
_PLAIN = msgspec.json.Decoder(_Plain)
_ANYTHING = msgspec.json.Decoder(msgspec.Raw)


@dataclass(slots=True)
class Tally:
    """What is known of a request's use so far."""

    input: int = 0
    output: int = 0
    cached: int = 0
    device_seconds: int | None = None
    """Nanoseconds of the engine's time."""
    told: bool = False
    """Whether the upstream said it."""
    final: bool = False
    """Whether it also said the output, which comes last."""
    events: int = 0
    """Of a stream, those that may carry output: what is reckoned with when it is never told."""

    def take(self, usage: _Usage) -> None:
        """Take in what an upstream says; later words count over earlier ones."""
        given = _tokens(usage.prompt_tokens)
        if given is not None or usage.completion_tokens is not None:
            self._input(given, _detail(usage.prompt_tokens_details))
        elif (given := _tokens(usage.input_tokens)) is not None:
            read, made = _tokens(usage.cache_read_input_tokens), _tokens(usage.cache_creation_input_tokens)
            if read is not None or made is not None:
                self._input(given + (read or 0) + (made or 0), read)
            else:
                self._input(given, _detail(usage.input_tokens_details))
        elif (given := _tokens(usage.total_tokens)) is not None:  # of reranking
            self._input(given, None)
            self.final = True
        output = _tokens(usage.completion_tokens)
        output = _tokens(usage.output_tokens) if output is None else output
        if output is not None:
            self.output, self.told, self.final = output, True, True
        elif usage.total_tokens is not None:  # of embeddings: nothing comes out
            self.final = True
        seconds = usage.device_seconds
        if isinstance(seconds, int | float) and 0 <= seconds <= _MOST_SECONDS:
            self.device_seconds = round(seconds * NANO)

    def _input(self, tokens: int | None, cached: int | None) -> None:
        if tokens is not None:
            self.input, self.told = tokens, True
        if cached is not None:
            self.cached = min(cached, self.input)


def read_answer(body: bytes, tally: Tally) -> bool:
    """Take the usage out of a whole answer; false where that is no JSON object."""
    try:
        answer = _PLAIN.decode(body)
    except msgspec.ValidationError:  # a usage in a shape of its own; is the rest JSON?
        try:
            return bytes(_ANYTHING.decode(body)).lstrip()[:1] == b"{"
        except (msgspec.MsgspecError, RecursionError):
            return False
    except (msgspec.MsgspecError, RecursionError):
        return False
    if answer.usage is not None:
        tally.take(answer.usage)
    elif isinstance(answer.meta, dict) and isinstance(billed := answer.meta.get("billed_units"), dict):
        tally.take(_Usage(total_tokens=billed.get("input_tokens")))
    return True


def read_event(data: bytes, tally: Tally) -> Event | None:
    """Take the usage out of an event's payload; None where that is no JSON object."""
    try:
        event = _EVENT.decode(data)
    except (msgspec.MsgspecError, RecursionError):
        return None
    for holder in (event.response, event.message):
        if isinstance(holder, dict):
            _take(holder.get("usage"), tally)
    _take(event.usage, tally)
    return event


def _take(usage: object, tally: Tally) -> None:
    if isinstance(usage, dict):
        tally.take(msgspec.convert(usage, _Usage, strict=False))


def _tokens(value: object) -> int | None:
    """A count that can be one."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MOST_TOKENS:
        return None
    return value


def _detail(details: object) -> int | None:
    return _tokens(details.get("cached_tokens")) if isinstance(details, dict) else None
