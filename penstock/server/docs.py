"""GET /openapi.json and GET /docs: the API described, for client generators, fuzzers and people.

The page renders the document in the browser, with a script of its own: it loads nothing from elsewhere.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Awaitable, Callable, Sequence
from functools import cached_property
from hashlib import sha256
from importlib.resources import files

from msgspec.json import encode
from starlette.types import Receive, Scope, Send

from penstock import assets
from penstock.http.exchange import respond

from .config import ServerConfig
from .openapi import describe
from .state import State


class Document:
    """The description of these routes, made when somebody first asks for it."""

    def __init__(
        self, routes: Sequence[tuple[str, str, Callable[..., object]]], version: str, config: ServerConfig
    ) -> None:
        self._routes = tuple(routes)
        self._version = version
        self._config = config

    @cached_property
    def json(self) -> bytes:
        """The OpenAPI document."""
        return encode(
            describe(
                self._routes,
                version=self._version,
                needs_key=bool(self._config.api_key),
                root_path=self._config.root_path.rstrip("/"),
            )
        )

    @cached_property
    def page(self) -> tuple[bytes, str]:
        """The page, and the policy that lets it run its own script and style and nothing else."""
        html = files(assets).joinpath("docs.html").read_bytes()
        hashes = {
            tag: base64.b64encode(sha256(match[1]).digest()).decode()
            for tag in ("script", "style")
            if (match := re.search(rf"<{tag}>(.*?)</{tag}>".encode(), html, re.DOTALL))
        }
        policy = (
            f"default-src 'none'; connect-src 'self'; base-uri 'none'; frame-ancestors 'none'; "
            f"script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'"
        )
        return html, policy


async def openapi(document: Document, state: State, scope: Scope, receive: Receive, send: Send) -> None:
    """The API's description, OpenAPI 3.1."""
    await respond(send, document.json)


async def page(document: Document, state: State, scope: Scope, receive: Receive, send: Send) -> None:
    """The API's description as a page."""
    html, policy = document.page
    headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}
    await respond(send, html, content_type=b"text/html; charset=utf-8", headers=headers)


#: (path, method, handler), where handlers also take the document.
DOCS: tuple[tuple[str, str, Callable[..., Awaitable[None]]], ...] = (
    ("/openapi.json", "GET", openapi),
    ("/docs", "GET", page),
)
