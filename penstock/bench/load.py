"""When to send: arrival times drawn beforehand, and the open and closed loops that follow them.

The open loop sends on time whether or not earlier requests have finished, as independent users do;
the closed loop keeps a fixed number in flight, as a batch job does. Knows nothing of HTTP: a request
is `send(index, intended)`, and the clock and the sleep are arguments.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from itertools import accumulate
from typing import Any

from penstock.bench.errors import BenchError

Clock = Callable[[], float]
"""Seconds, monotonic."""
Send = Callable[[int, float], Awaitable[None]]
"""Sends request `index`, which was due at `intended` seconds of the clock. Must not raise."""


def arrival_times(count: int, rate: float, *, burstiness: float = 1.0, seed: int = 0) -> list[float]:
    """Times in seconds from the start at which `count` requests are due; non-decreasing.

    Gaps are gamma distributed with shape `burstiness` and mean 1/`rate` (requests per second): 1 is a
    Poisson process, below 1 is burstier, above 1 is more even, inf is constant. As in `vllm bench
    serve`, times are scaled so that the last is exactly count/rate: the offered rate is then the same
    for every seed. An infinite rate makes everything due at 0.
    """
    if count < 1:
        raise BenchError(f"--num-prompts is {count}; it must be at least 1")
    if not rate > 0:
        raise BenchError(f"--request-rate is {rate}; it must be above 0 requests per second, or inf")
    if not burstiness > 0:
        raise BenchError(f"--burstiness is {burstiness}; it must be above 0 (1 = Poisson, inf = even)")
    if math.isinf(rate):
        return [0.0] * count
    if math.isinf(burstiness):
        gaps = [1.0] * count
    else:
        rng = random.Random(seed)
        gaps = [rng.gammavariate(burstiness, 1.0) for _ in range(count)]
    times = list(accumulate(gaps))
    # A tiny shape can underflow every gap to 0; all at the end is then the honest limit of one burst.
    if times[-1] == 0:
        return [count / rate] * count
    return [time / times[-1] * (count / rate) for time in times]


async def open_loop(
    arrivals: Sequence[float],
    send: Send,
    *,
    start: float,
    clock: Clock,
    max_concurrency: int | None = None,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Send request i at `start + arrivals[i]`, in order of arrival, and wait for all to finish.

    With `max_concurrency`, a request that is due waits on the client for a free place; its intended
    time stays, so the wait shows in the latencies measured from it.
    """
    gate = asyncio.Semaphore(max_concurrency) if max_concurrency else None

    async def send_gated(index: int, intended: float) -> None:
        async with gate or contextlib.nullcontext():
            await send(index, intended)

    async with asyncio.TaskGroup() as group:
        for index, arrival in enumerate(arrivals):
            intended = start + arrival
            # Sleeping 0 when late still yields, so that the requests already due go out.
            await sleep(max(0.0, intended - clock()))
            group.create_task(send_gated(index, intended))


async def closed_loop(count: int, concurrency: int, send: Send, *, clock: Clock) -> None:
    """Keep `concurrency` requests in flight until `count` were sent; each is due when a place is free."""
    indices = iter(range(count))

    async def worker() -> None:
        for index in indices:
            await send(index, clock())

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, count)):
            group.create_task(worker())


class Stop:
    """A request to end early, with its reason; the first reason stays."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._event = asyncio.Event()

    def set(self, reason: str) -> None:
        """Ask for the end."""
        self.reason = self.reason or reason
        self._event.set()

    async def wait(self) -> None:
        """Return once the end was asked for."""
        await self._event.wait()

    async def bound(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` to its end, or cancel it, requests in flight included, when the stop is set."""
        running = asyncio.create_task(work)
        stopping = asyncio.create_task(self._event.wait())
        try:
            await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
            running.cancel()
            await asyncio.wait({running, stopping})
        if not running.cancelled():
            running.result()


@contextlib.asynccontextmanager
async def stop_after(stop: Stop, max_duration: float | None) -> AsyncIterator[None]:
    """Set `stop` when `max_duration` seconds have passed inside the block."""
    if max_duration is None:
        yield
        return
    handle = asyncio.get_running_loop().call_later(max_duration, stop.set, "max-duration")
    try:
        yield
    finally:
        handle.cancel()
