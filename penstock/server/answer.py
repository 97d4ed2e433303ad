"""What both generating endpoints do alike: run a generation, and send the answer whole or as a stream.

    endpoint ──▶ Generation, Writer ──▶ answer ──▶ one JSON body
                                          └──────▶ SSE: opening · chunks · usage · [DONE]

A Writer knows the shape of one API's answers; this module knows the order of things on the wire, errors in
mid-stream and clients that leave. It knows no field of a request but those of streaming.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

from msgspec.json import encode
from starlette.types import Receive, Scope, Send

from penstock.core.errors import PenstockError
from penstock.http.errors import error_bytes, internal
from penstock.http.exchange import respond, until_disconnect
from penstock.http.sse import END, EventStream, event
from penstock.text.output import DecodedLogprob, Delta

from .generation import Choice, Generation
from .protocol import GenerateRequest
from .state import State
from .stream import ChunkFormat

_IN_THREAD = 16_384
"""Texts of more characters, and lists of more ids, are converted in a thread: the event loop has everyone
else's tokens to serve."""


@dataclass(slots=True)
class Pending:
    """What a choice has produced and its client has not got yet."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[DecodedLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    total: int = 0
    """Tokens of the choice so far, those already sent included."""

    def add(self, delta: Delta) -> None:
        """Append a delta."""
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.total += len(delta.token_ids)
        self.logprobs += delta.logprobs or ()
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason


class Writer(Protocol):
    """The shape of one API's answers."""

    object: str
    """Of a whole answer."""
    chunk_object: str

    def whole(self, generation: Generation) -> dict[str, Any]:
        """The fields of a whole answer besides id, object, created, model, fingerprint and usage."""
        ...

    def opening(self, form: ChunkFormat, choice: Choice, usage: dict[str, Any] | None) -> bytes:
        """Chunks before a choice's first text; sent with the engine's first event."""
        ...

    def chunks(
        self, form: ChunkFormat, choice: Choice, pending: Pending, usage: dict[str, Any] | None
    ) -> bytes:
        """Chunks that carry `pending`."""
        ...


async def answer(
    state: State,
    scope: Scope,
    receive: Receive,
    send: Send,
    *,
    request: GenerateRequest,
    id: str,
    generation: Generation,
    writer: Writer,
) -> None:
    """Run `generation` and answer; stop it when the client leaves."""
    head = {
        "id": id,
        "object": writer.chunk_object if request.stream else writer.object,
        "created": int(state.wall()),
        "model": state.model_name,
        "system_fingerprint": state.fingerprint,
    }
    if request.stream:
        work = _stream(state, send, request, head, generation, writer)
    else:
        work = _whole(send, head, generation, writer)
    await until_disconnect(receive, work)


async def encode_texts(state: State, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
    """Token ids of each text."""
    encode_batch = state.tokenizer.encode_batch
    if sum(map(len, texts)) <= _IN_THREAD:
        return encode_batch(texts, add_special_tokens)
    return await asyncio.to_thread(encode_batch, texts, add_special_tokens)


async def decode_ids(state: State, ids: Sequence[int], skip_special_tokens: bool) -> str:
    """Text of token ids."""
    if len(ids) <= _IN_THREAD:
        return state.tokenizer.decode(ids, skip_special_tokens)
    return await asyncio.to_thread(state.tokenizer.decode, ids, skip_special_tokens)


async def _whole(send: Send, head: dict[str, Any], generation: Generation, writer: Writer) -> None:
    await generation.run()

    def body() -> bytes:
        return encode({**head, **writer.whole(generation), "usage": generation.usage()})

    # a whole vocabulary for each token of a prompt takes seconds to write down
    await respond(send, await asyncio.to_thread(body) if _is_long(generation) else body())


async def _stream(
    state: State,
    send: Send,
    request: GenerateRequest,
    head: dict[str, Any],
    generation: Generation,
    writer: Writer,
) -> None:
    options = request.stream_options
    include_usage = state.config.enable_force_include_usage or (
        options is not None and bool(options.include_usage)
    )
    continuous = include_usage and options is not None and bool(options.continuous_usage_stats)
    interval = max(state.config.stream_interval, request.stream_interval or 1)
    form = ChunkFormat(head, null_usage=include_usage)
    stream = EventStream(send)
    waiting: dict[int, Pending] = {}
    begun: set[int] = set()
    try:
        async with aclosing(generation.deltas()) as batches:
            async for changes in batches:
                out = b""
                for choice, delta in changes:
                    pending = waiting.get(choice.index)
                    if pending is None:
                        pending = waiting[choice.index] = Pending()
                        out += writer.opening(form, choice, _counts(choice, 0) if continuous else None)
                    pending.add(delta)
                    if delta.finish_reason is None:
                        if not pending.text:
                            continue  # half a character, or the beginning of what may be a stop string
                        if choice.index in begun and len(pending.token_ids) < interval:
                            continue
                    begun.add(choice.index)
                    usage = _counts(choice, pending.total) if continuous else None
                    out += writer.chunks(form, choice, pending, usage)
                    waiting[choice.index] = Pending(total=pending.total)
                if out:
                    await stream.send(out)
        ending = form.usage_chunk(generation.usage()) if include_usage else b""
    except PenstockError as error:
        if not stream.started:
            raise
        ending = event(error_bytes(error))
    except Exception as error:
        if not stream.started:
            raise
        ending = event(error_bytes(internal(error, f"stream {head['id']}")))
    await stream.close(ending + END)


def _is_long(generation: Generation) -> bool:
    """Whether the answer has many logprobs."""
    entries = 0
    for choice in generation.choices:
        entries += sum(1 + len(entry.top) for entry in choice.prompt_logprobs or ())
        entries += sum(1 + len(entry.top) for entry in choice.logprobs)
    return entries > _IN_THREAD


def _counts(choice: Choice, generated: int) -> dict[str, Any]:
    """One choice's usage so far, as vLLM's continuous_usage_stats counts it."""
    prompt_tokens = len(choice.prompt.ids)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": prompt_tokens + generated,
    }
