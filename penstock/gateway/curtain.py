"""What stands between an answer that is still judged and the client.

    attempt ──hold──▶ kept ──release──▶ client      meanwhile, of a stream: `: penstock …` every few seconds
    the dearer answer ──pass_on──▶ client           unless it is a refusal, which is kept, too

Clients skip comments, but they keep time-outs of clients and proxies away. With the first one, headers are
out: what else is to be said then is said in the stream. It knows ASGI messages, and nothing of verdicts.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.types import Message, Send

from penstock.http.sse import comment, event

from .relay import MOST_BYTES, UpstreamError
from .tasks import ended

KEEP_ALIVE = 5.0
"""Seconds between two comments."""
_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]

Fields = list[tuple[bytes, bytes]]


class Kept:
    """An answer that the client does not have."""

    def __init__(self, most: int) -> None:
        self.status = 0
        self.fields: Fields = []
        self.body = bytearray()
        self._most = most

    async def take(self, message: Message) -> None:
        """An ASGI `send`. Raises UpstreamError where it is more than is kept of an answer."""
        if message["type"] == "http.response.start":
            self.status, self.fields = message["status"], list(message["headers"])
            return
        self.body += message.get("body", b"")
        if len(self.body) > self._most:
            self.body.clear()
            error = UpstreamError(f"The upstream sent an answer of over {self._most} bytes.")
            error.code = "upstream_invalid"
            raise error


class Curtain:
    """Of one request."""

    def __init__(self, send: Send, *, stream: bool) -> None:
        self.started = False
        """Whether the client has headers."""
        self.refusal: Kept | None = None
        """What `pass_on` was given that is no answer."""
        self._send = send
        self._stream = stream
        self._speaking = asyncio.Lock()
        self._open = False

    @asynccontextmanager
    async def company(self) -> AsyncIterator[None]:
        """Keep a stream's client company until its answer comes."""
        tasks = [asyncio.ensure_future(self._comments())] if self._stream else []
        try:
            yield
        finally:
            await ended(tasks)

    async def pass_on(self, message: Message) -> None:
        """An ASGI `send` straight to the client; an answer of another status than 200 is kept."""
        if message["type"] == "http.response.start" and message["status"] != 200:
            self.refusal = Kept(MOST_BYTES)
        if self.refusal is not None:
            await self.refusal.take(message)
        elif message["type"] == "http.response.start":
            await self._begin(message["status"], list(message["headers"]))
        else:
            await self._send(message)

    async def release(self, kept: Kept, body: bytes, more: Fields) -> None:
        """Give the client an answer that was kept, with `body` as its body and `more` headers. What was to
        stand in headers stands in a comment where these are out."""
        fields = [*kept.fields, *more]
        fields = [
            (name, str(len(body)).encode() if name == b"content-length" else value) for name, value in fields
        ]
        if self.started and kept.status != 200:  # of an error, which is JSON
            body = event(body.replace(b"\n", b" "))
        await self._begin(kept.status, fields)
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def fail(self, event: bytes) -> None:
        """End a stream whose headers are out with an event that says why."""
        async with self._speaking:
            self._open = True
        await self._send({"type": "http.response.body", "body": event, "more_body": False})

    async def _begin(self, status: int, fields: Fields) -> None:
        """The client gets an answer from now on, and no more comments."""
        async with self._speaking:
            self._open = True
        if not self.started:
            self.started = True
            await self._send({"type": "http.response.start", "status": status, "headers": fields})
            return
        said = b" ".join(b"%s=%s" % pair for pair in fields if pair[0].startswith(b"x-penstock-"))
        line = comment(f"penstock {said.decode()}") + b"\n"
        await self._send({"type": "http.response.body", "body": line, "more_body": True})

    async def _comments(self) -> None:
        while True:
            await asyncio.sleep(KEEP_ALIVE)
            async with self._speaking:
                if self._open:
                    return
                if not self.started:
                    self.started = True
                    await self._send({"type": "http.response.start", "status": 200, "headers": _STREAM})
                line = comment("penstock checks the answer") + b"\n"
                await self._send({"type": "http.response.body", "body": line, "more_body": True})
