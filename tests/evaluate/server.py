"""An OpenAI server on loopback that answers by a function, in a thread of this process; it can be taken down.

`after(n, …)` is how a server dies in the middle: from the n-th request on it closes the connection.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from aiohttp import web

from tests.in_thread import served

Reply = str | tuple[int, Any] | None
"""A text, (status, JSON), or None: the connection is closed."""


class AnsweringServer:
    """Answers and remembers."""

    def __init__(self, answer: Callable[[str], Reply], *, model: str = "m") -> None:
        """`answer`: of the last message's text, or the prompt."""
        self.answer = answer
        self.model = model
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.url = ""
        self.down = False
        self.dies_at: int | None = None
        """From which request on it is down."""
        self.usage: dict[str, Any] = {"prompt_tokens": 10, "completion_tokens": 5, "device_seconds": 0.25}
        self.fingerprint = "fp_1"
        self.most_at_once = self._at_once = 0
        self.gate: threading.Event | None = None
        """Answers wait for it."""
        self._loop = asyncio.new_event_loop()

    @property
    def asked(self) -> list[str]:
        """The texts of all requests that were answered or refused, in their order."""
        return [_question(body) for body in self.bodies]

    @contextmanager
    def running(self) -> Iterator[AnsweringServer]:
        """Serve on a free port inside the block."""
        app = web.Application(client_max_size=64 << 20)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/version", self._version)
        app.router.add_post("/v1/{path:.*}", self._generate)
        with served(app, self._loop) as self.url:
            yield self

    async def _models(self, request: web.Request) -> web.Response:
        self._check(request)
        return web.json_response({"data": [{"id": self.model, "owned_by": "tests"}]})

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "1.0"})

    def _check(self, request: web.Request) -> None:
        if self.down and request.transport is not None:
            request.transport.abort()

    async def _generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        if self.dies_at is not None and len(self.bodies) >= self.dies_at:
            self.down = True
        self._check(request)
        if self.down:
            return web.Response()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        if self.gate is not None:
            await asyncio.get_running_loop().run_in_executor(None, self.gate.wait)
        self._at_once -= 1
        reply = self.answer(_question(body))
        if reply is None:
            if request.transport is not None:
                request.transport.abort()
            return web.Response()
        if isinstance(reply, tuple):
            status, payload = reply
            headers = payload.pop("headers", {}) if isinstance(payload, dict) else {}
            return web.json_response(payload, status=status, headers=headers)
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
        if request.path.endswith("/chat/completions"):
            choice["message"] = {"role": "assistant", "content": reply}
        else:
            choice["text"] = reply
        return web.json_response(
            {"choices": [choice], "usage": self.usage, "system_fingerprint": self.fingerprint}
        )


def _question(body: dict[str, Any]) -> str:
    body = body.get("request", body)  # a grader is sent the request in an object
    return str(body["messages"][-1]["content"] if "messages" in body else body["prompt"])
