"""Which path a request means, however it is written, and which route answers it.

    /llm/v1/models/   ─ normal ─▶  /v1/models   ─ template ─▶  /v1/models

Every layer works with the normal path, so that none is open or closed by its spelling.
"""

from __future__ import annotations

from collections.abc import Sequence

from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

#: What probes and scrapers read: without a key, also on connections beyond the limit, and not logged.
PROBES = frozenset({"/health", "/livez", "/readyz", "/ping", "/metrics"})

_LONGEST_MISTAKE = 200
"""Characters of a path that is compared with routes."""


class Paths:
    """The routes of an application that a proxy publishes under `root_path`."""

    def __init__(self, routes: Sequence[Route], root_path: str = "") -> None:
        self._root = root_path.rstrip("/")
        self._exact = {route.path for route in routes if not route.param_convertors}
        self._others = [route for route in routes if route.param_convertors]

    def normal(self, path: str) -> str:
        """Without the root path, which a proxy may have taken off or left, and without slashes at the end."""
        if self._root and (path == self._root or path.startswith(f"{self._root}/")):
            path = path[len(self._root) :]
        return path.rstrip("/") or "/"

    def template(self, path: str) -> str | None:
        """The route of a normal path, as it was declared; None where nothing is served."""
        if path in self._exact:
            return path
        return next((route.path for route in self._others if route.path_regex.match(path)), None)

    def near(self, path: str) -> str | None:
        """The route of a client whose base URL lacks /v1, has it twice, or ends with a route already."""
        if len(path) > _LONGEST_MISTAKE:
            return None
        parts = path.split("/")
        ends = ("/" + "/".join(parts[first:]) for first in range(1, len(parts)))
        return next((known for end in ends for known in (end, f"/v1{end}") if known in self._exact), None)


def normalised(app: ASGIApp, paths: Paths) -> ASGIApp:
    """The application behind normal paths."""

    async def stripped(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["path"] = paths.normal(scope["path"])
        await app(scope, receive, send)

    return stripped
