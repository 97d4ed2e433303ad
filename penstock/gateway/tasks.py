"""Tasks that run beside requests, and their end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import Any

from penstock.core.errors import Unavailable

logger = logging.getLogger("penstock.gateway")

_PATIENCE = 1.0
"""Seconds until a task that still runs is cancelled again."""


class Beside:
    """Something that runs beside requests, from `start` to `stop`."""

    def __init__(self) -> None:
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin, in the running loop."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """End, and wait until it has ended."""
        if self._task is not None:
            await ended([self._task])
            self._task = None

    async def _run(self) -> None:
        """What runs, for ever."""
        raise NotImplementedError


class Repeated(Beside):
    """Something that is done again and again: `look`, a pause, `look`, …, whatever becomes of it."""

    interval = 1.0
    """Seconds between the end of one look and the next."""
    failure = "a task beside requests failed"
    """What the log says where a look raises."""

    async def look(self) -> None:
        """Once. Raises Unavailable where the ledger does not answer, which its writer says."""
        raise NotImplementedError

    async def _run(self) -> None:
        while True:
            try:
                await self.look()
            except Unavailable:
                pass
            except Exception:
                logger.exception(self.failure)
            await asyncio.sleep(self.interval)


async def ended(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks, and wait until they have ended, whatever they raise.

    Once is not always enough: a library (and `asyncio.wait_for` before Python 3.12) may take a cancellation
    that meets the end of its own waiting for that.
    """
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        done, left = await asyncio.wait(left, timeout=_PATIENCE)
        await asyncio.gather(*done, return_exceptions=True)
