"""A small application with everything around it that the room has."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from msgspec.json import encode
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from penstock.http.body import parse_object, read_body
from penstock.http.config import HttpConfig
from penstock.http.exchange import respond, until_disconnect
from penstock.http.layers import application

from .live import Live


class Echo:
    """POST /echo answers with the object that it got; GET /health with nothing."""

    def __init__(self, config: HttpConfig) -> None:
        self._config = config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked: dict[str, Any] = {}
        if scope["method"] == "POST":
            asked = parse_object(await read_body(scope, receive, self._config.max_body_bytes))
        await respond(send, encode(asked))


@dataclass(frozen=True)
class Endpoint:
    """A function as an ASGI application; Starlette takes a bare one for something else."""

    function: Callable[[Scope, Receive, Send], Awaitable[None]]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.function(scope, receive, send)


async def slow(scope: Scope, receive: Receive, send: Send) -> None:
    """GET /slow?SECONDS: that long before the answer begins, and again before it ends."""
    seconds = float(scope["query_string"]) / 2
    await asyncio.sleep(seconds)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"begun", "more_body": True})
    await asyncio.sleep(seconds)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def large(scope: Scope, receive: Receive, send: Send) -> None:
    """GET /large: a whole answer that no socket buffers."""
    await respond(send, b"x" * (32 << 20))


async def endless(scope: Scope, receive: Receive, send: Send) -> None:
    """GET /endless: a stream until the client leaves."""

    async def stream() -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while True:
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
            await asyncio.sleep(0)  # sending to nobody does not wait

    await until_disconnect(receive, stream())


def make_app(config: HttpConfig) -> ASGIApp:
    echo = Echo(config)
    routes = [
        Route("/echo", echo, methods=["POST"]),
        Route("/health", echo, methods=["GET"]),
        *(Route(f"/{each.__name__}", Endpoint(each)) for each in (slow, large, endless)),
    ]
    return application(routes, config)


@contextmanager
def listening(**options: Any) -> Iterator[Live]:
    """A server; options of HttpConfig."""
    config = HttpConfig(host="127.0.0.1", port=0, **options)
    server = Live(make_app(config), config)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def server() -> Iterator[Live]:
    with listening() as server:
        yield server
