"""An engine of our own while its answers are wanted, as `penstock up` has them: watched, and ended with us.

It is not started again when it dies: its answers would come from two processes, and why it died is worth
knowing.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator

import aiohttp

from penstock.gateway.fleet import Replica
from penstock.gateway.local.supervisor import Port, Supervisor

from .asking import ServerDown
from .sides import Local

_NOTICED = 5.0
"""Seconds within which the end of a process is noticed."""


class Engine:
    """A running one."""

    def __init__(self, supervisor: Supervisor, changed: asyncio.Event, url: str, key: str) -> None:
        self._supervisor = supervisor
        self._changed = changed
        self.root = f"{url}/v1"
        self.headers = {"Authorization": f"Bearer {key}"}

    async def fate(self) -> str:
        """Why it has ended, if it has: a connection that breaks is noticed before the process has gone."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_NOTICED):
                while self._supervisor.replica.state in ("ready", "stopping"):
                    self._changed.clear()
                    await self._changed.wait()
        return self._supervisor.replica.why


@contextlib.asynccontextmanager
async def running(local: Local, session: aiohttp.ClientSession) -> AsyncIterator[Engine]:
    """Start it, wait until it takes requests, and end it after the block. Raises ServerDown, saying why."""
    port, key = Port(), secrets.token_urlsafe(32)
    changed = asyncio.Event()

    def note(_: Replica) -> None:
        changed.set()

    replica = Replica(
        model=local.model,
        index=0,
        url=f"http://127.0.0.1:{port.number}",
        state="asleep",
        since=0.0,
        device="",
        devices=1,
    )
    said: list[str] = []
    supervisor = Supervisor(
        replica,
        local.command(port.number, key),
        session=lambda: session,
        on_change=note,
        show=lambda line: said.append(line) if len(said) < 200 else None,
        wanted=lambda: False,
    )
    try:
        supervisor.wake()
        while supervisor.replica.state not in ("ready", "waiting"):
            await changed.wait()
            changed.clear()
        if supervisor.replica.state != "ready":
            lines = "\n  ".join(line.partition("] ")[2] for line in said[-12:])
            raise ServerDown(f"its engine does not start: {supervisor.replica.why}\n  {lines}")
        yield Engine(supervisor, changed, replica.url, key)
    finally:
        await supervisor.close()
        port.close()
