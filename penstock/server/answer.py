"""Running a generation and sending its answer, whole or as a stream.

    Generation, Writer ──▶ answer ──▶ one JSON body
                             └──────▶ SSE: opening · chunks · ending

A Writer knows the shape of one API's answers; this module knows the order of things on the wire, when output
is due, errors in mid-stream and clients that leave. It knows no field of a request.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import aclosing
from typing import Protocol, runtime_checkable

from starlette.types import Send

from penstock.core.errors import PenstockError
from penstock.http.errors import internal
from penstock.http.exchange import JSON
from penstock.http.sse import EventStream, comment

from .generation import Choice, Generation
from .work import IN_THREAD, Work

_TOGETHER = 1 << 18
"""Bytes of pieces that are sent together."""


class Stream(Protocol):
    """Writes an answer in pieces."""

    interval: int
    """Tokens of a chunk, but for the first and the last one."""

    def opening(self, choice: Choice) -> bytes:
        """Events before a choice's first text; sent with the engine's first event."""
        ...

    def chunks(self, choice: Choice) -> bytes:
        """Events that carry what is pending."""
        ...

    def ending(self, generation: Generation) -> bytes:
        """Events after the last choice has ended."""
        ...

    def error(self, error: PenstockError) -> bytes:
        """Events that end a stream with an error."""
        ...


class Writer(Protocol):
    """The answer to one request, in the shape of its API."""

    @property
    def stream(self) -> Stream | None:
        """Who writes it in pieces; None if it is sent whole."""
        ...

    def whole(self, generation: Generation) -> Iterator[bytes]:
        """The JSON of a whole answer, in pieces that are made when they are asked for."""
        ...


@runtime_checkable
class Detached(Protocol):
    """A Writer whose answer its client does not wait for."""

    async def detach(self, send: Send, generation: Generation) -> None:
        """Begin the generation, which goes on when the client has gone, and tell the client."""
        ...


@runtime_checkable
class Headed(Protocol):
    """A Writer whose answer is no JSON."""

    def headers(self, generation: Generation) -> list[tuple[bytes, bytes]]:
        """The content type, and whatever else is told before the body."""
        ...


async def answer(
    work: Work, send: Send, id: str, generation: Generation, writer: Writer, *, tells_tokens: bool = False
) -> None:
    """Run `generation` and answer. Cancelling it stops the generation.

    Args:
        work: where long answers are written.
        id: the response's, for the log.
        tells_tokens: in a stream, the ids of each chunk's tokens stand before it in a comment, and the counts
            of the prompt's before the first one.
    """
    stream = writer.stream
    if stream is None:
        await _whole(work, send, generation, writer)
    else:
        await _stream(work, send, id, generation, stream, tells_tokens)


async def _whole(work: Work, send: Send, generation: Generation, writer: Writer) -> None:
    await generation.run()
    pieces = writer.whole(generation)
    size = _size(generation)
    headers = writer.headers(generation) if isinstance(writer, Headed) else [(b"content-type", JSON)]
    if size <= IN_THREAD:
        body = b"".join(pieces)
        length = (b"content-length", str(len(body)).encode())
        await send({"type": "http.response.start", "status": 200, "headers": [*headers, length]})
        await send({"type": "http.response.body", "body": body})
        return
    # a whole vocabulary for each token of a prompt takes seconds to write down, and is long when it is
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    while body := await work.run(size, _next, pieces):
        await send({"type": "http.response.body", "body": body, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


def _next(pieces: Iterator[bytes]) -> bytes:
    """The next pieces, some of them together; b"" at the end."""
    taken: list[bytes] = []
    size = 0
    for piece in pieces:
        taken.append(piece)
        size += len(piece)
        if size >= _TOGETHER:
            break
    return b"".join(taken)


async def _stream(
    work: Work, send: Send, id: str, generation: Generation, writer: Stream, tells_tokens: bool
) -> None:
    stream = EventStream(send)
    outbox = _Outbox(writer, tells_tokens)
    try:
        async with aclosing(generation.batches(outbox.add)) as batches:
            async for _ in batches:
                # the logprobs of a long prompt that is echoed are written down like a long answer
                if due := await work.do(outbox.size, outbox.take):
                    await stream.send(due)
        ending = writer.ending(generation)
    except PenstockError as error:
        if not stream.started:
            raise
        ending = writer.error(error)
    except Exception as error:
        if not stream.started:
            raise
        ending = writer.error(internal(error, f"stream {id}"))
    await stream.close(ending)


class _Outbox:
    """What is pending becomes events when it is due: a choice's first and last tokens at once, in between as
    many together as the interval says. Tokens whose text is held back (half a character, what may become a
    stop string) are due like others, with empty text: clients take the first event for the first token."""

    def __init__(self, writer: Stream, tells_tokens: bool) -> None:
        self._tells_tokens = tells_tokens
        self._due: dict[int, Choice] = {}
        self._writer = writer
        self._opened: set[int] = set()
        self._begun: set[int] = set()

    def add(self, choice: Choice) -> None:
        """Take in that something has changed for `choice`."""
        pending, index = choice.pending, choice.index
        enough = self._writer.interval if index in self._begun else 1
        if index not in self._opened or pending.finish_reason or len(pending.token_ids) >= enough:
            self._due[index] = choice

    @property
    def size(self) -> int:
        """Of what is due: tokens and logprobs, those of echoed prompts among them."""
        size = 0
        for choice in self._due.values():
            tokens, logprobs = len(choice.pending.token_ids), choice.pending.logprobs
            if logprobs:
                tokens += 0 if choice.index in self._begun else len(choice.prompt.ids)
                tokens *= 2 + len(logprobs[0].top)
            size += tokens
        return size

    def take(self) -> bytes:
        """The events that are due; b"" if there are none."""
        due, self._due = self._due, {}
        events: list[bytes] = []
        for choice in due.values():
            if choice.index not in self._opened:
                self._opened.add(choice.index)
                if self._tells_tokens:
                    size = len(choice.prompt.ids)
                    events.append(comment(f"prompt {size} {min(choice.cached, size)}"))
                events.append(self._writer.opening(choice))
            if choice.pending.token_ids or choice.pending.finish_reason:
                self._begun.add(choice.index)
                if self._tells_tokens:  # in the same event: whoever has its text has its tokens
                    events.append(comment("tokens " + ",".join(map(str, choice.pending.token_ids))))
                events.append(self._writer.chunks(choice))
                choice.pending.clear()
        return b"".join(events)


def _size(generation: Generation) -> int:
    """Of an answer: its tokens and logprobs."""
    entries = 0
    for choice in generation.choices:
        entries += len(choice.pending.token_ids)
        for logprobs in (choice.prompt_logprobs, choice.pending.logprobs):
            if logprobs:
                entries += len(logprobs) * (1 + len(logprobs[0].top))
    return entries
