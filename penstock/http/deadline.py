"""A deadline that moves with every piece of an answer: asyncio.timeout, without a new timer for each move.

    async with Deadline(30) as deadline:     TimeoutError 30 s from now
        deadline.reschedule(when)            … then instead; None: never

A timer that comes early waits on. Moving a deadline further away is one assignment; with asyncio's own, it is
a timer cancelled and another one started, twice for each chunk of a stream.
"""

from __future__ import annotations

import asyncio
from types import TracebackType


class Deadline:
    """An asynchronous context manager, used once."""

    __slots__ = ("_armed", "_cancelling", "_loop", "_passed", "_seconds", "_task", "_timer", "_when")

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._timer: asyncio.TimerHandle | None = None
        self._passed = False

    async def __aenter__(self) -> Deadline:
        task = asyncio.current_task()
        assert task is not None
        self._task, self._cancelling = task, task.cancelling()
        self._loop = asyncio.get_running_loop()
        self.reschedule(self._loop.time() + self._seconds)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        # somebody else may have cancelled the task as well: then it ends
        if self._passed and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise TimeoutError from error

    def reschedule(self, when: float | None) -> None:
        """Move it to a time of the loop's clock."""
        self._when = when
        if when is None or self._passed:
            return
        if self._timer is not None:
            if self._armed <= when:
                return
            self._timer.cancel()
        self._arm(when)

    def _arm(self, when: float) -> None:
        self._armed = when
        self._timer = self._loop.call_at(when, self._due)

    def _due(self) -> None:
        self._timer = None
        if self._when is None:
            return
        if self._loop.time() < self._when:
            self._arm(self._when)
            return
        self._passed = True
        self._task.cancel()
