"""The paths of files and batches, and what is the same for all of them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from penstock.core.errors import PenstockError
from penstock.gateway import quota
from penstock.gateway.meter import LimitReached
from penstock.gateway.metering import LedgerMeter
from penstock.http.errors import send_error

from .batches import PATH, Batches
from .common import Shared
from .desk import Desk
from .settling import Settling

if TYPE_CHECKING:
    from penstock.gateway.door import Door

_Handler = Callable[[Scope, Receive, Send], Awaitable[None]]


class Files:
    """All of it: routes of requests, and what runs beside them."""

    def __init__(self, door: Door, meter: LedgerMeter, folder: Path) -> None:
        """`folder`: on disk, for uploads under way; made if it is not there."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        shared = Shared(door, meter, folder)
        self._door = door
        self.settling = Settling(shared)
        desk, batches = Desk(shared), Batches(shared, self.settling)
        self._paths: tuple[tuple[str, str, _Handler], ...] = (
            ("POST", "/v1/files", desk.upload),
            ("GET", "/v1/files", desk.list),
            ("GET", "/v1/files/{name}", desk.get),
            ("DELETE", "/v1/files/{name}", desk.delete),
            ("GET", "/v1/files/{name}/content", desk.content),
            ("POST", "/v1/batches", batches.create),
            ("GET", "/v1/batches", batches.list),
            ("GET", "/v1/batches/{name}", batches.get),
            ("POST", "/v1/batches/{name}/cancel", batches.cancel),
        )

    def routes(self) -> list[Route]:
        """For the application."""
        by_path: dict[str, dict[str, _Handler]] = {}
        for method, path, handler in self._paths:
            by_path.setdefault(path, {})[method] = handler
        return [
            Route(path, _Page(self._door, path, handlers), methods=list(handlers))
            for path, handlers in by_path.items()
        ]


@dataclass(frozen=True, slots=True)
class _Page:
    """The methods of a path."""

    door: Door
    path: str
    handlers: dict[str, _Handler]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        method: str = scope["method"]
        handler = self.handlers["GET" if method == "HEAD" else method]
        tracing = self.door.tracing
        if tracing is not None and (method, self.path) == ("POST", PATH):  # what has a row has a span
            await tracing.around(PATH, scope, send, lambda send: self._serve(handler, scope, receive, send))
            return
        await self._serve(handler, scope, receive, send)

    async def _serve(self, handler: _Handler, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self.door.under_way():
                await handler(scope, receive, send)
        except LimitReached as error:
            self.door.metrics.refused(error.code or "")
            await send_error(send, error, quota.refusal(error, self.door.wall()))
        except PenstockError as error:
            self.door.metrics.refused(error.code or str(error.status))
            raise
