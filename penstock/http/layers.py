"""The layers around every application, and where a path leads that nobody serves.

    CORSMiddleware         only when origins are allowed; outermost, so that browsers can read errors too
      ErrorMiddleware      exceptions → OpenAI-shaped answers; request ids
        AuthMiddleware     only when keys are configured
          Router           path → endpoint; /health/ is /health

It knows the order of the layers; it does not know the endpoints.
"""

from __future__ import annotations

from collections.abc import Sequence

from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from penstock.core.errors import RouteNotFound, brief

from .auth import AuthMiddleware, is_open
from .config import HttpConfig
from .errors import ErrorMiddleware, TooManyConnections


def application(routes: Sequence[Route], config: HttpConfig) -> ASGIApp:
    """The application of these routes, with what `config` wants around it."""
    app: ASGIApp = Router(routes, default=_no_route, redirect_slashes=False)
    if config.api_key:
        app = AuthMiddleware(app, config.api_key)
    app = ErrorMiddleware(_without_trailing_slash(app), id_header=config.enable_request_id_headers)
    if config.allowed_origins:
        app = CORSMiddleware(
            app,
            allow_origins=config.allowed_origins,
            allow_methods=config.allowed_methods,
            allow_headers=config.allowed_headers,
            allow_credentials=config.allow_credentials,
            expose_headers=("X-Request-Id", "X-Penstock-Ignored"),
        )
    return app


def _without_trailing_slash(app: ASGIApp) -> ASGIApp:
    """Every layer below sees the same path, so that none is open or closed by its spelling."""

    async def stripped(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["path"] = scope["path"].rstrip("/") or "/"
        await app(scope, receive, send)

    return stripped


def restricted(app: ASGIApp) -> ASGIApp:
    """The application for connections beyond the limit: health and metrics, and a 503 for everything else."""

    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        raise TooManyConnections(
            "All connections of this server, or of this client, are taken.",
            advice="Use fewer connections, keep them open between requests, or try again later.",
            retry_after=1,
        )

    refused = ErrorMiddleware(refuse)

    async def reserved(scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].rstrip("/")
        await (app if is_open({**scope, "path": path}) else refused)(scope, receive, send)

    return reserved


async def _no_route(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "http":
        raise RouteNotFound(f"There is no {scope['method']} {brief(scope['path'])}.")
