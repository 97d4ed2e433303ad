"""Every exchange, as it ends: who asked for what, the answer's status, and how long it took.

    Watched(app) ─▶ Exchange ─▶ observers: the access log here; metrics, where an application has them

It knows no header but lengths, no query and no body: nothing of them can come into a log.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .config import HttpConfig
from .exchange import header
from .paths import PROBES, Paths

logger = logging.getLogger("penstock.access")

CLIENT_LEFT = 499
"""The status of an exchange whose client left before the answer began; nginx's."""
_PATH_SHOWN = 256
"""Characters of a path in the access log."""
_SILENT = PROBES | {"/load"}


@dataclass(slots=True)  # frozen, it would take three times as long to make
class Exchange:
    """One request and its answer."""

    client: str
    """Address and port; "unix" where it came over a Unix socket."""
    method: str
    path: str
    """As it was asked for, decoded, without the query."""
    normal: str
    """The same without root path and slashes at the end."""
    template: str | None
    """The route's path; None where nothing is served."""
    version: str
    """Of HTTP."""
    status: int
    seconds: float
    """From the end of the headers to the end of the answer."""
    request_bytes: int
    response_bytes: int
    """As Content-Length says; 0 where it says nothing."""
    whole: bool
    """Whether the answer came to its end."""
    request_id: str | None


Observer = Callable[[Exchange], None]


class Watched:
    """An application that tells observers of its exchanges."""

    def __init__(
        self,
        app: ASGIApp,
        paths: Paths,
        observers: Sequence[Observer],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._app = app
        self._paths = paths
        self._observers = tuple(observers)
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = self._clock()
        path = scope["path"]
        status, size, told = CLIENT_LEFT, 0, False

        async def watched(message: Message) -> None:
            nonlocal status, size, told
            if message["type"] == "http.response.start":
                status, size = message["status"], _length(message["headers"])
            elif not message.get("more_body", False) and not told:
                told = True  # before the client can know of it: who counts then, counts this one
                self._tell(scope, path, began, status, size, whole=True)
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            if not told:
                self._tell(scope, path, began, status, size, whole=False)

    def _tell(self, scope: Scope, path: str, began: float, status: int, size: int, *, whole: bool) -> None:
        normal = self._paths.normal(path)
        client = scope.get("client")
        exchange = Exchange(
            client=f"{client[0]}:{client[1]}" if client else "unix",
            method=scope["method"],
            path=path,
            normal=normal,
            template=self._paths.template(normal),
            version=scope["http_version"],
            status=status,
            seconds=max(0.0, self._clock() - began),
            request_bytes=_number(header(scope, b"content-length")),
            response_bytes=size,
            whole=whole,
            request_id=scope.get("request_id"),
        )
        for observer in self._observers:
            observer(exchange)


class AccessLog:
    """A line for every exchange but those of probes, and of endpoints that are not wanted."""

    def __init__(self, config: HttpConfig) -> None:
        unwanted = (config.disable_access_log_for_endpoints or "").split(",")
        self._silent = frozenset(path.strip() for path in unwanted if path.strip())
        if not config.enable_access_log_for_probes:
            self._silent |= _SILENT

    def __call__(self, exchange: Exchange) -> None:
        """Log it. The fields are for logs in JSON."""
        if exchange.normal in self._silent or exchange.path in self._silent:
            return
        if not logger.isEnabledFor(logging.INFO):
            return
        path = quote(exchange.path)
        path = path if len(path) <= _PATH_SHOWN else path[:_PATH_SHOWN] + "…"
        logger.info(
            '%s - "%s %s HTTP/%s" %d %.3f s %s%s',
            exchange.client,
            exchange.method,
            path,
            exchange.version,
            exchange.status,
            exchange.seconds,
            exchange.request_id or "-",
            "" if exchange.whole else " (not finished)",
            extra={
                "fields": {
                    "client": exchange.client,
                    "method": exchange.method,
                    "path": path,
                    "status": exchange.status,
                    "duration": round(exchange.seconds, 6),
                    "request_id": exchange.request_id,
                    "finished": exchange.whole,
                }
            },
        )


def _length(headers: Sequence[tuple[bytes, bytes]]) -> int:
    for name, value in headers:
        if name.lower() == b"content-length":
            return _number(value.decode("latin-1"))
    return 0


def _number(text: str | None) -> int:
    return int(text) if text is not None and text.isascii() and text.isdecimal() else 0
