"""Tasks that run beside requests, and their end."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

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
