"""A small application with everything around it that the room has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from msgspec.json import encode
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from penstock.http.body import parse_object, read_body
from penstock.http.config import HttpConfig
from penstock.http.exchange import respond
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


def make_app(config: HttpConfig) -> ASGIApp:
    echo = Echo(config)
    routes = [Route("/echo", echo, methods=["POST"]), Route("/health", echo, methods=["GET"])]
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
