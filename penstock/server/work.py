"""Heavy work of the API process: in threads, a bounded amount of it at a time, and its memory given back.

    run(size, function, …) ──▶ waits its turn ──▶ thread ──▶ result
                                (first come, first served, while the sizes under way fit CAPACITY)

Tokenising takes about 200 bytes of memory for each character while it runs: what is under way at a time is
what bounds the memory of any number of requests. It knows sizes; it does not know what is done.
"""

from __future__ import annotations

import asyncio
import ctypes
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

CAPACITY = 1 << 20
"""Characters, or entries of lists, that are worked on at a time. One larger piece of work has it all."""
IN_THREAD = 16_384
"""Characters, or entries of lists, that are too many for the event loop: it has everyone else's tokens to
serve."""
_THREADS = 4
_WORTH_A_TRIM = 1 << 22
"""Bytes that are worth giving back: glibc keeps what was freed in arenas of their own for each thread."""
_QUIET = 0.25
"""Seconds without more of it, before that is done."""
_BYTES = 128
"""Of memory, for each unit of size."""

T = TypeVar("T")


class Work:
    """Used from one event loop. Threads are started when there is work for them."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = self._free = capacity
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="work")
        self._spent = 0
        self._trim: asyncio.TimerHandle | None = None

    async def do(self, size: int, function: Callable[..., T], *args: Any) -> T:
        """`function(*args)`: here and now where that is short, else by `run`."""
        return function(*args) if size <= IN_THREAD else await self.run(size, function, *args)

    async def run(self, size: int, function: Callable[..., T], *args: Any) -> T:
        """`function(*args)`, in a thread. Whoever stops waiting for it holds its place until it has ended:
        a thread cannot be stopped."""
        size = min(size, self._capacity)
        loop = asyncio.get_running_loop()
        await self._turn(size)
        started: Future[T] = self._pool.submit(function, *args)
        started.add_done_callback(lambda _: _tell(loop, self._done, size))
        return await asyncio.wrap_future(started)

    def spent(self, size: int) -> None:
        """So many bytes were taken and will soon be free: give them back to the system in a quiet moment."""
        self._spent += size
        if self._spent >= _WORTH_A_TRIM and self._trim is None:
            self._trim = asyncio.get_running_loop().call_later(_QUIET, self._give_back)

    async def _turn(self, size: int) -> None:
        if not self._waiting and size <= self._free:
            self._free -= size
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it had come in the same moment
                self._release(size)
            raise

    def _done(self, size: int) -> None:
        self.spent(size * _BYTES)
        self._release(size)

    def _release(self, size: int) -> None:
        self._free += size
        while self._waiting and (self._waiting[0][1].done() or self._waiting[0][0] <= self._free):
            wanted, turn = self._waiting.popleft()
            if not turn.done():  # else its caller has gone
                self._free -= wanted
                turn.set_result(None)

    def _give_back(self) -> None:
        self._trim, self._spent = None, 0
        self._pool.submit(_trim_memory)


def _tell(loop: asyncio.AbstractEventLoop, done: Callable[[int], None], size: int) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(done, size)


def _trim_memory() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; other libraries give back by themselves
    if trim is not None:
        trim(0)
