"""The layers around every application, and where a path leads that nobody serves.

  Forwarded                only behind trusted proxies: who the client is
    Watched                observers of exchanges: the access log, metrics
      CORSMiddleware       only when origins are allowed; so far out that browsers can read errors, too
        ErrorMiddleware    exceptions → OpenAI-shaped answers; request ids
          normalised       /llm/health/ is /health
            reserved       a 503 for what is no probe, on connections beyond the limit
            few_of_each    the same for a client behind a proxy, with too many requests at a time
              spoken           where a dialect has errors of its own
                AuthMiddleware   only when keys are configured
                  Router     path → endpoint

It knows the order of the layers; it does not know the endpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from penstock.core.errors import RouteNotFound, brief

from .auth import AuthMiddleware
from .config import HttpConfig
from .dialects import ErrorBody, spoken
from .errors import ErrorMiddleware, TooManyConnections
from .exchanges import AccessLog, Observer, Watched
from .paths import PROBES, Paths, normalised
from .proxies import Forwarded, Proxies, few_of_each


def application(
    routes: Sequence[Route],
    config: HttpConfig,
    observers: Sequence[Observer] = (),
    trusted_keys: Sequence[str] = (),
    error_bodies: Mapping[str, ErrorBody] | None = None,
) -> ASGIApp:
    """The application of these routes, with what `config` wants around it; `observers` hear of exchanges.

    trusted_keys: are keys, too; who has one may speak for others. error_bodies: of paths with a
    dialect of their own.
    """
    paths = Paths(routes, config.root_path)
    app: ASGIApp = Router(routes, default=_nowhere(paths), redirect_slashes=False)
    if config.api_key or trusted_keys:
        app = AuthMiddleware(app, config.api_key, trusted_keys)
    if error_bodies:
        app = spoken(app, error_bodies)
    proxies = Proxies(config.trusted_proxies) if config.trusted_proxies else None
    if proxies is not None and config.max_connections_per_client:
        app = few_of_each(app, config.max_connections_per_client)
    app = normalised(_reserved(app), paths)
    app = ErrorMiddleware(app, id_header=config.enable_request_id_headers)
    if config.allowed_origins:
        app = CORSMiddleware(
            app,
            allow_origins=config.allowed_origins,
            allow_methods=config.allowed_methods,
            allow_headers=config.allowed_headers,
            allow_credentials=config.allow_credentials,
            expose_headers=("X-Request-Id", "X-Penstock-Ignored"),
        )
    if not config.disable_uvicorn_access_log:
        observers = (*observers, AccessLog(config))
    if observers:
        app = Watched(app, paths, observers)
    return app if proxies is None else Forwarded(app, proxies)


def restricted(app: ASGIApp) -> ASGIApp:
    """An `application` on a connection beyond the limit: health and metrics, and a 503 for all else."""

    async def marked(scope: Scope, receive: Receive, send: Send) -> None:
        scope["restricted"] = True
        await app(scope, receive, send)

    return marked


def _reserved(app: ASGIApp) -> ASGIApp:
    async def reserved(scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get("restricted") and scope["path"] not in PROBES:
            raise TooManyConnections(
                "All connections of this server, or of this client, are taken.",
                advice="Use fewer connections, keep them open between requests, or try again later.",
                retry_after=1,
            )
        await app(scope, receive, send)

    return reserved


def _nowhere(paths: Paths) -> ASGIApp:
    async def no_route(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            near = paths.near(scope["path"])
            raise RouteNotFound(
                f"There is no {scope['method']} {brief(scope['path'])}.",
                advice=f"Did you mean {near}? Look at the base URL of the client." if near else "",
            )

    return no_route
