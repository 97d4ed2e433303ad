"""What a batch has used: the sum over its answers, in the shape of OpenAI's batches, with the device's time.

OpenAI, Responses   prompt_tokens or input_tokens, all of the prompt
Anthropic           input_tokens, and beside it what the cache had or was given
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
from msgspec import Struct


class _Details(Struct, frozen=True):
    cached_tokens: int = 0
    reasoning_tokens: int = 0


class _Usage(Struct, frozen=True):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details = _Details()
    completion_tokens_details: _Details = _Details()
    input_tokens: int = 0
    output_tokens: int = 0
    input_tokens_details: _Details = _Details()
    output_tokens_details: _Details = _Details()
    cache_read_input_tokens: int = 0
    cache_creation_input_tokens: int = 0
    device_seconds: float = 0.0


class _Body(Struct, frozen=True):
    usage: _Usage | None = None


class _Response(Struct):
    body: _Body | str
    """What is no JSON, is kept as a text."""


class _Line(Struct):
    response: _Response


_LINE = msgspec.json.Decoder(_Line)


def usage_of(lines: Iterable[bytes]) -> dict[str, Any]:
    """The sum over lines of an output, as `lines.answered` writes them; those are answers of this server."""
    given = output = cached = thought = 0
    seconds = 0.0
    for line in lines:
        body = _LINE.decode(line).response.body
        used = body.usage if isinstance(body, _Body) else None
        if used is None:
            continue
        given += used.prompt_tokens + used.input_tokens
        given += used.cache_read_input_tokens + used.cache_creation_input_tokens
        output += used.completion_tokens + used.output_tokens
        cached += used.prompt_tokens_details.cached_tokens + used.input_tokens_details.cached_tokens
        cached += used.cache_read_input_tokens
        for details in (used.completion_tokens_details, used.output_tokens_details):
            thought += details.reasoning_tokens
        seconds += used.device_seconds
    return {
        "input_tokens": given,
        "input_tokens_details": {"cached_tokens": cached},
        "output_tokens": output,
        "output_tokens_details": {"reasoning_tokens": thought},
        "total_tokens": given + output,
        "device_seconds": round(seconds, 9),
    }
