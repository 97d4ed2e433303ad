"""One thread in which all work on the store is done, in order: leases ahead of rows.

What a result changes in the event loop (`apply`) is done there in the order in which the store was changed;
leases.py relies on it.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
_Job = tuple[Callable[[], Any], Callable[[Any], None] | None, "asyncio.Future[Any]"]


class StoreThread:
    """Belongs to the event loop that is running when it is made."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.turn = asyncio.Lock()
        self._urgent: deque[_Job] = deque()
        self._others: deque[_Job] = deque()
        self._ready = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="penstock-ledger", daemon=True)
        self._thread.start()

    def call(
        self, work: Callable[[], T], *, apply: Callable[[T], None] | None = None, urgent: bool = False
    ) -> asyncio.Future[T]:
        """Do `work` in the thread; its result goes through `apply` in the event loop, whether anybody awaits
        the future or not."""
        future: asyncio.Future[T] = self._loop.create_future()
        with self._ready:
            if self._ended:
                raise RuntimeError("the ledger's thread has ended")
            (self._urgent if urgent else self._others).append((work, apply, future))
            self._ready.notify()
        return future

    def close(self) -> None:
        """No more work; waits for what is under way."""
        with self._ready:
            self._ended = True
            self._ready.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._ready:
                while not (self._urgent or self._others or self._ended):
                    self._ready.wait()
                if not (self._urgent or self._others):
                    return
                work, apply, future = (self._urgent or self._others).popleft()
            result, error = None, None
            try:
                result = work()
            except Exception as exc:
                error = exc
            try:
                self._loop.call_soon_threadsafe(_deliver, apply, future, result, error)
            except RuntimeError:  # the loop has ended
                return


def _deliver(
    apply: Callable[[Any], None] | None, future: asyncio.Future[Any], result: Any, error: Exception | None
) -> None:
    if error is None and apply is not None:
        try:
            apply(result)
        except Exception as exc:
            error = exc
    if future.cancelled():
        return
    if error is not None:
        future.set_exception(error)
        future.exception()  # whoever does not wait need not hear of it
    else:
        future.set_result(result)
