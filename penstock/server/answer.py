"""Running a generation and sending its answer, whole or as a stream.

    Generation, Writer ──▶ answer ──▶ one JSON body
                             └──────▶ SSE: opening · chunks · usage · [DONE]

A Writer knows the shape of one API's answers; this module knows the order of things on the wire, errors in
mid-stream and clients that leave. It knows no field of a request but those of streaming.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any, Protocol

from msgspec.json import encode
from starlette.types import Receive, Send

from penstock.core.errors import PenstockError
from penstock.http.errors import error_bytes, internal
from penstock.http.exchange import respond, until_disconnect
from penstock.http.sse import END, EventStream, event

from .generation import Choice, Generation
from .protocol import GenerateRequest
from .state import State
from .stream import ChunkFormat
from .tokens import IN_THREAD


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

    def chunks(self, form: ChunkFormat, choice: Choice, usage: dict[str, Any] | None) -> bytes:
        """Chunks that carry what is pending."""
        ...


async def answer(
    state: State,
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
        work = _stream(_Chunks(state, request, head, writer), send, id, generation)
    else:
        work = _whole(send, head, generation, writer)
    await until_disconnect(receive, work)


async def _whole(send: Send, head: dict[str, Any], generation: Generation, writer: Writer) -> None:
    await generation.run()

    def body() -> bytes:
        return encode({**head, **writer.whole(generation), "usage": generation.usage()})

    # a whole vocabulary for each token of a prompt takes seconds to write down
    await respond(send, await asyncio.to_thread(body) if _is_long(generation) else body())


async def _stream(chunks: _Chunks, send: Send, id: str, generation: Generation) -> None:
    stream = EventStream(send)
    try:
        async with aclosing(generation.batches(chunks.write)) as batches:
            async for _ in batches:
                if chunks.due:
                    await stream.send(chunks.take())
        ending = chunks.ending(generation)
    except PenstockError as error:
        if not stream.started:
            raise
        ending = event(error_bytes(error))
    except Exception as error:
        if not stream.started:
            raise
        ending = event(error_bytes(internal(error, f"stream {id}")))
    await stream.close(ending + END)


class _Chunks:
    """What is pending becomes chunks as soon as it is due: the first and the last text of a choice at once,
    in between as many tokens together as the interval says."""

    due = b""

    def __init__(self, state: State, request: GenerateRequest, head: dict[str, Any], writer: Writer) -> None:
        options = request.stream_options
        self._include_usage = state.config.enable_force_include_usage or (
            options is not None and bool(options.include_usage)
        )
        self._continuous = (
            self._include_usage and options is not None and bool(options.continuous_usage_stats)
        )
        self._interval = max(state.config.stream_interval, request.stream_interval or 1)
        self._form = ChunkFormat(head, null_usage=self._include_usage)
        self._writer = writer
        self._opened: set[int] = set()
        self._begun: set[int] = set()

    def write(self, choice: Choice) -> None:
        """Take in that something has changed for `choice`."""
        pending = choice.pending
        if choice.index not in self._opened:
            self._opened.add(choice.index)
            usage = _counts(choice, 0) if self._continuous else None
            self.due += self._writer.opening(self._form, choice, usage)
        if pending.finish_reason is None:
            if not pending.pieces:
                return  # half a character, or the beginning of what may be a stop string
            if choice.index in self._begun and len(pending.token_ids) < self._interval:
                return
        self._begun.add(choice.index)
        usage = _counts(choice, choice.generated) if self._continuous else None
        self.due += self._writer.chunks(self._form, choice, usage)
        pending.clear()

    def take(self) -> bytes:
        """The chunks that are due."""
        taken, self.due = self.due, b""
        return taken

    def ending(self, generation: Generation) -> bytes:
        """What comes after the last choice has ended."""
        return self._form.usage_chunk(generation.usage()) if self._include_usage else b""


def _is_long(generation: Generation) -> bool:
    """Whether the answer has many logprobs."""
    entries = 0
    for choice in generation.choices:
        entries += sum(1 + len(entry.top) for entry in choice.prompt_logprobs or ())
        entries += sum(1 + len(entry.top) for entry in choice.pending.logprobs)
    return entries > IN_THREAD


def _counts(choice: Choice, generated: int) -> dict[str, Any]:
    """One choice's usage so far, as vLLM's continuous_usage_stats counts it."""
    prompt_tokens = len(choice.prompt.ids)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": prompt_tokens + generated,
    }
