"""An engine that another process has started, as one of several API processes sees it: an EngineClient.

    engine = AttachedEngine(directory, config, client, slot)
    await engine.start()                waits until it is ready
    engine.died(failure)                says whoever has started it
    await engine.drain(timeout)         lets the requests of this process end; the engine goes on

Each has its own sockets, so that the events of its requests, and what waits of them when it dies, are
nobody else's. What it has counted of a request it tells the engine (`settled`): what it has not counted
when it dies, the process that has started the engine counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from penstock.core.errors import PenstockError
from penstock.core.stats import EngineStats

from .config import EngineConfig
from .connection import EngineConnection
from .messages import Settled, encode

_LOOK = 0.02
"""Seconds between two looks at whether the last request has ended."""


_LINGER = 500
"""Milliseconds for the last messages to the engine."""


class AttachedEngine(EngineConnection):
    """Implements EngineClient. All methods run on one event loop.

    Args:
        client: the number under which the engine was told of this process.
        slot: which of the heartbeat's counts is this process's.
    """

    def __init__(self, directory: Path, config: EngineConfig, client: int, slot: int) -> None:
        super().__init__(directory, config, client, slot)
        self._settled: list[str] = []

    async def start(self) -> None:
        """Wait until the engine is ready. Raises what stopped it."""
        self._connect()
        await self._started.wait()
        if self._failure is not None:
            raise self._failure

    def settled(self, id: str) -> None:
        """See EngineClient.settled. One message for all that one turn of the loop has counted."""
        if self._closed or self._failure is not None:
            return
        if not self._settled:
            asyncio.get_running_loop().call_soon(self._tell_settled)
        self._settled.append(id)

    def _tell_settled(self) -> None:
        settled, self._settled = self._settled, []
        if settled and not self._closed:
            self._outbox.send(encode(Settled(tuple(settled))))

    def on_stats(self, callback: Callable[[EngineStats], None]) -> None:
        """The statistics of every step are for one process: the one that has started the engine."""

    async def died(self, failure: PenstockError) -> None:
        """The engine has ended, and this is why. What it has still sent is taken in first."""
        await self._quiet()
        self._fail(failure)

    async def drain(self, timeout: float) -> None:
        """Refuse new requests; let running ones end within `timeout` seconds, abort the rest; then leave."""
        self._draining = True
        if not await self._all_ended(time.monotonic() + timeout):
            self.abort(sorted(self._owed))
            await self._all_ended(time.monotonic() + self._config.liveness_grace)
        await self.close()

    async def close(self) -> None:
        """Leave the engine. May be called twice."""
        self._draining = True
        if self._owed and self._failure is None and not self._closed:
            self.abort(sorted(self._owed))
            with contextlib.suppress(Exception):
                await self._all_ended(time.monotonic() + 1.0)
        self._tell_settled()
        await self._stop_receiving()
        self._disconnect(linger=0 if self._failure is not None else _LINGER)

    async def _all_ended(self, deadline: float) -> bool:
        while self._owed and time.monotonic() < deadline:  # an engine that dies owes nothing more
            await asyncio.sleep(_LOOK)
        return not self._owed
