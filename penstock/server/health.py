"""Health, load, version and metrics: what probes, gateways and scrapers read.

/health   200 while the engine lives, else 503 with the cause       (as in vLLM)
/livez    200 while it makes progress: restart the server if not
/readyz   200 while it takes new requests: send them elsewhere if not
"""

from __future__ import annotations

from typing import Any

from msgspec.json import encode
from starlette.types import Receive, Scope, Send

from penstock.core.errors import EngineDead, PenstockError, Unavailable
from penstock.http.errors import error_object
from penstock.http.exchange import respond
from penstock.observe.metrics import CONTENT_TYPE

from .state import State


async def health(state: State, scope: Scope, receive: Receive, send: Send) -> None:
    """Whether the engine lives."""
    failure = state.engine.failure
    await _report(send, None if failure is None else EngineDead(str(failure)))


async def livez(state: State, scope: Scope, receive: Receive, send: Send) -> None:
    """Whether the engine makes progress."""
    liveness = state.engine.liveness()
    await _report(send, None if liveness.alive else Unavailable(liveness.reason))


async def readyz(state: State, scope: Scope, receive: Receive, send: Send) -> None:
    """Whether new requests are taken."""
    await _report(send, state.unavailable())


async def metrics(state: State, scope: Scope, receive: Receive, send: Send) -> None:
    """The Prometheus page."""
    await respond(send, state.metrics.page(state.monotonic()), content_type=CONTENT_TYPE.encode())


async def version(state: State, scope: Scope, receive: Receive, send: Send) -> None:
    """The version of Penstock."""
    await respond(send, encode({"version": state.version}))


async def load(state: State, scope: Scope, receive: Receive, send: Send) -> None:
    """Requests accepted and not yet finished, in vLLM's shape."""
    await respond(send, encode({"server_load": state.engine.load}))


async def _report(send: Send, problem: PenstockError | None) -> None:
    if problem is None:
        await respond(send, encode({"status": "ok"}))
        return
    body: dict[str, Any] = {"status": "unavailable", **error_object(problem)}
    await respond(send, encode(body), status=503, headers={"Cache-Control": "no-store"})
