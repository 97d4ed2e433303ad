"""An event loop in virtual time: where nothing is ready, the clock is set to the next timer.

Seconds of delay take no time, and the same program has the same order of events every time.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from penstock.core.errors import Unavailable

T = TypeVar("T")


class _Selector(selectors.SelectSelector):
    """Waits for nobody: time passes at once."""

    now = 1000.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "everybody waits, and nothing will happen"
            self.now += max(0.0, timeout)
        return ready


class Loop(asyncio.SelectorEventLoop):
    """Its `time` moves by timers alone. No threads."""

    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now


def run(body: Coroutine[Any, Any, T]) -> T:
    """To its end."""
    with asyncio.Runner(loop_factory=Loop) as runner:
        return runner.run(body)


class Line:
    """A Caller (limits/leased.py): one thing after the other, each after a delay, some of them lost.

    `draw` says for each piece of work: seconds until it is done, seconds until the answer is there, and
    whether it fails before (`call`) or after (`answer`) it was done, or not (``).
    """

    def __init__(self, draw: Callable[[], tuple[float, float, str]]) -> None:
        self.draw = draw
        self._loop = asyncio.get_running_loop()
        self._free = asyncio.Lock()
        self.turn = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    def call(
        self,
        work: Callable[[], T],
        *,
        apply: Callable[[T], None] | None = None,
        urgent: bool = False,
        lost: tuple[str, ...] = ("", "call", "answer"),
    ) -> asyncio.Future[T]:
        """`lost`: what may happen to it."""
        future: asyncio.Future[T] = self._loop.create_future()
        task = self._loop.create_task(self._do(work, apply, future, lost))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return future

    async def _do(
        self,
        work: Callable[[], T],
        apply: Callable[[T], None] | None,
        future: asyncio.Future[T],
        may: tuple[str, ...],
    ) -> None:
        async with self._free:
            there, back, lost = self.draw()
            lost = lost if lost in may else ""
            await asyncio.sleep(there)
            result = None if lost == "call" else work()
            await asyncio.sleep(back)
            if lost:
                if not future.cancelled():
                    future.set_exception(Unavailable("The bank does not answer."))
                    future.exception()
                return
            if apply is not None:
                apply(result)  # type: ignore[arg-type]
            if not future.cancelled():
                future.set_result(result)  # type: ignore[arg-type]

    async def close(self) -> None:
        """Nothing more arrives."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
