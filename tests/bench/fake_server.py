"""A small OpenAI server with scripted answers, on the loopback interface, in a thread of this process.

Each request takes the next `Reply` of the script (the last one stays). Waiting is done with events: a
reply may hold its stream at a chosen token until the test releases it.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from tests.in_thread import served


@dataclass(frozen=True)
class Reply:
    """What one request gets."""

    tokens: tuple[str, ...] = ("Hello", " world", "!")
    status: int = 200
    body: Any = None
    """JSON body of a reply that is not a stream."""
    usage: dict[str, Any] | None = None
    """Added to the counted usage; with `send_usage` False none is sent."""
    send_usage: bool = True
    error: dict[str, Any] | None = None
    """Sent as an event after the tokens, in place of the end."""
    raw: str | None = None
    """Sent as the data of an event after the tokens."""
    done: bool = True
    cut: bool = False
    """Close the connection after the tokens."""
    hold_at: int | None = None
    """Hold the stream before this token until the server's `release`."""


class FakeServer:
    """Answers and remembers."""

    def __init__(self) -> None:
        self.script: list[Reply] = [Reply()]
        self.models: list[str] = ["fake-model"]
        self.key: str | None = None
        self.tokens_per_word: float | None = None
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.holding = threading.Event()
        self.on_hold: Any = lambda: None
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._release = asyncio.Event()

    def release(self) -> None:
        """Let every held stream go on."""
        self._loop.call_soon_threadsafe(self._release.set)

    @contextmanager
    def running(self) -> Iterator[FakeServer]:
        """Serve on a free port inside the block."""
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        app.router.add_get("/version", self._version)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_post("/v1/completions", self._generate)
        app.router.add_post("/v1/chat/completions", self._generate)
        with served(app, self._loop) as self.url:
            try:
                yield self
            finally:
                self.release()

    def _refused(self, request: web.Request) -> web.Response | None:
        if self.key is None or request.headers.get("Authorization") == f"Bearer {self.key}":
            return None
        return web.json_response({"error": {"message": "Invalid key", "type": "auth"}}, status=401)

    async def _models(self, request: web.Request) -> web.Response:
        return self._refused(request) or web.json_response({"data": [{"id": name} for name in self.models]})

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "9.9"})

    async def _tokenize(self, request: web.Request) -> web.Response:
        if self.tokens_per_word is None:
            return web.Response(status=404)
        words = (await request.json())["prompt"].split()
        return web.json_response({"count": int(len(words) * self.tokens_per_word)})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        if (refusal := self._refused(request)) is not None:
            return refusal
        body = await request.json()
        self.requests.append(body)
        self.headers.append(dict(request.headers))
        reply = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if body["model"] not in self.models:
            message = f"The model `{body['model']}` does not exist."
            return web.json_response({"error": {"message": message}}, status=404)
        if reply.status != 200 or reply.body is not None:
            return web.json_response(reply.body, status=reply.status)
        chat = request.path.endswith("/chat/completions")
        usage = {
            "prompt_tokens": len(body.get("prompt", body.get("messages", []))),
            "completion_tokens": len(reply.tokens),
            **(reply.usage or {}),
        }
        if not body.get("stream"):
            message = {"role": "assistant", "content": "".join(reply.tokens)}
            choice = {"message": message, "finish_reason": "stop"}
            return web.json_response({"choices": [choice], "usage": usage})
        return await self._stream(request, reply, usage if reply.send_usage else None, chat=chat)

    async def _stream(
        self, request: web.Request, reply: Reply, usage: dict[str, Any] | None, *, chat: bool
    ) -> web.StreamResponse:
        stream = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await stream.prepare(request)

        async def send(data: Any) -> None:
            text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
            await stream.write(f"data: {text}\n\n".encode())

        def choice(text: str | None, finish_reason: str | None = None) -> dict[str, Any]:
            if not chat:
                return {"choices": [{"text": text or "", "finish_reason": finish_reason}]}
            delta = {} if text is None else {"content": text}
            return {"choices": [{"delta": delta, "finish_reason": finish_reason}]}

        try:
            if chat:
                await send({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
            for index, token in enumerate(reply.tokens):
                if index == reply.hold_at:
                    self.holding.set()
                    self.on_hold()
                    await self._release.wait()
                await send(choice(token))
            if reply.cut and request.transport is not None:
                request.transport.close()
                return stream
            if reply.raw is not None:
                await send(reply.raw)
            if reply.error is not None:
                await send({"error": reply.error})
                return stream
            await send(choice(None, "stop"))
            if usage is not None:
                await send({"choices": [], "usage": usage})
            if reply.done:
                await send("[DONE]")
        except ConnectionError:
            pass  # the client has gone, as some tests want
        return stream
