"""Tasks that run beside requests, and their end."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

_PATIENCE = 1.0
"""Seconds until a task that still runs is cancelled again."""


async def ended(tasks: Iterable[asyncio.Task[None]]) -> None:
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
