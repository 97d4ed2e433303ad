"""Limits in Valkey or Redis: one script for each decision, by the server's clock.

    {penstock}:a:ACCOUNT   hash: u = used of a budget, s:SECOND = used then, r:WORKER = reserved
    {penstock}:o:WORKER    hash: number → what that request has reserved
    {penstock}:w:WORKER    when it was last heard of; gone two minutes after its death

A budget that the server does not know, as after it has lost its memory, begins with what the ledger's
database has charged. Amounts pass through Lua's numbers: exact up to 2^53 (nine million dollars, 2,500
GPU-hours), and within some nanoseconds or nanodollars beyond.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from typing import Any, Literal

from penstock.core.errors import StartupError, Unavailable
from penstock.gateway.meter import NotCounted, Standing
from penstock.gateway.policy.accounts import SPAN, account_id, window_end, window_start
from penstock.gateway.policy.amounts import Amounts, Limit, Unit
from penstock.gateway.policy.leases import TTL
from penstock.gateway.tasks import ended

from .counters import NOTHING, Left, Uses, refusal

logger = logging.getLogger("penstock.gateway")

_PREFIX = "{penstock}"
_DAY = 86_400
_SLOWEST = 5.0
_CONNECTIONS = 32
_UNITS: tuple[Unit, ...] = ("requests", "tokens", "dollars", "device_seconds")
TIMEOUT = 1.0
"""Seconds until an answer; then it counts as down."""


class Held:
    """What one request has reserved."""

    __slots__ = ("ids", "left", "limits", "number")

    def __init__(
        self, number: int | None, limits: Sequence[Limit], ids: Sequence[str], left: Sequence[int]
    ) -> None:
        self.number = number  # None: let through without being counted
        self.limits = limits
        self.ids = ids
        self.left = left

    @property
    def charged(self) -> tuple[str, ...]:
        """Ids of the budgets."""
        return tuple(id for id, limit in zip(self.ids, self.limits, strict=True) if _is_budget(limit))


class ValkeyCounters:
    """The counters of one worker. Belongs to the running event loop; `start` it."""

    def __init__(
        self,
        url: str,
        worker: str,
        *,
        failure: Literal["open", "closed"] = "closed",
        known: Callable[[str], asyncio.Future[int]] | None = None,
        clock: Callable[[], float] | None = None,
        draw: Callable[[], int] | None = None,
    ) -> None:
        """`failure`: whether requests pass, uncounted, while the server cannot be reached. `known`: what the
        ledger has charged to an account. `clock`: in place of the server's. `draw`: numbers for
        requests, the same that the journal has for them. Raises StartupError."""
        try:
            import redis.asyncio as client
            from redis.exceptions import RedisError
        except ModuleNotFoundError:
            raise StartupError(
                "Counters in Valkey or Redis need their client.", advice='pip install "penstock[redis]"'
            ) from None
        try:
            # a burst waits for a connection in place of opening one for each of its requests
            pool = client.BlockingConnectionPool.from_url(
                url,
                max_connections=_CONNECTIONS,
                timeout=TIMEOUT,
                socket_timeout=TIMEOUT,
                socket_connect_timeout=TIMEOUT,
            )
            self._client: Any = client.Redis.from_pool(pool)
        except ValueError as error:
            raise StartupError(
                f"The counters' URL cannot be used: {error}.",
                param="ledger.counters",
                advice="As redis://HOST:6379.",
            ) from None
        self._errors: tuple[type[Exception], ...] = (RedisError, OSError, TimeoutError)
        scripts = files(__package__)
        self._reserve = self._client.register_script((scripts / "reserve.lua").read_text())
        self._settle = self._client.register_script((scripts / "settle.lua").read_text())
        self._split = self._client.register_script((scripts / "split.lua").read_text())
        self._worker = worker
        self._failure = failure
        self._known = known
        self._clock = clock
        self._draw = draw or itertools.count().__next__
        self._behind: deque[tuple[int, Amounts, int | None]] = deque()
        self._ready = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._tasks: list[asyncio.Task[None]] = []
        self._down = False

    def start(self) -> None:
        """Begin to talk to the server."""
        self._tasks = [asyncio.create_task(self._settling()), asyncio.create_task(self._pulse())]

    def reserve_now(self, limits: Sequence[Limit], worst: Amounts) -> Held | None:
        """Only where there is nothing to count."""
        return None if limits else Held(None, (), (), ())

    async def reserve(self, limits: Sequence[Limit], worst: Amounts) -> Held:
        """One script. Raises LimitReached; NotCounted where there is no answer and failures close."""
        now = self._now()
        ids = [_id(limit, now) for limit in limits]
        amounts = [worst.of(limit.unit) for limit in limits]
        number = self._draw()
        try:
            while True:
                answer = await self._ask(number, limits, ids, amounts, now)
                if answer[0] != 2:
                    break
                await self._introduce(ids[int(answer[1])])
        except self._errors as error:
            self._tell(number, NOTHING)  # it may have been reserved all the same
            return self._uncounted(limits, ids, error)
        except asyncio.CancelledError:
            self._tell(number, NOTHING)
            raise
        self._heard()
        if answer[0] == 1:
            left = [limit.cap - int(sum_) for limit, sum_ in zip(limits, answer[1:], strict=True)]
            return Held(number, limits, ids, left)
        limit, counted, frees = limits[int(answer[1])], int(float(answer[2])), float(answer[3])
        if _is_budget(limit):
            frees = _resets_at(limit, now) - now
        raise refusal(
            limit,
            worst.of(limit.unit),
            remaining=limit.cap - counted,
            now=now,
            resets_at=_resets_at(limit, now),
            frees_in=None if frees < 0 else frees,
        )

    def split(self, ticket: Held, later: Amounts) -> Held:
        """A part of a reservation goes on under a number of its own; the server is told behind."""
        if ticket.number is None:
            return Held(None, ticket.limits, ticket.ids, ())
        number = self._draw()
        self._tell(ticket.number, later, number)
        return Held(number, ticket.limits, ticket.ids, ticket.left)

    def settle(self, ticket: Held, used: Amounts) -> None:
        """A request has ended; the server is told behind."""
        if ticket.number is not None:
            self._tell(ticket.number, used)

    def standings(self, ticket: Held) -> Sequence[Standing]:
        """What was left of each limit when the request was let through."""
        now = self._now()
        return [
            Left(limit, max(0, left), _resets_at(limit, now))
            for limit, left in zip(ticket.limits, ticket.left, strict=False)
        ]

    def folded(self, amounts: Mapping[str, int], *, doubted: bool = False) -> None:
        """The ledger's sums are its own business."""

    async def corrected(self, amounts: Mapping[str, int]) -> None:
        """Budgets that the server knows change with the ledger's; others begin with it. Should the server not
        be reached now, its sum stays as it was until the window's end."""
        try:
            for id, amount in amounts.items():
                if await self._client.hexists(_key(id), "u"):
                    await self._client.hincrby(_key(id), "u", amount)
        except self._errors as error:
            logger.warning("the counters have missed a correction: %s", error or type(error).__name__)

    async def bury(self, worker: str, used: Uses) -> None:
        """A worker has died: settle what it had open. Its requests no longer count as under way. Raises
        Unavailable."""
        try:
            key = f"{_PREFIX}:o:{worker}"
            numbers = [int(name) for name in await self._client.hkeys(key)]
            amounts = await used(numbers) if numbers else {}
            for number in numbers:
                given = amounts.get(number, {})
                words = [word for unit in _UNITS for word in (unit, given.get(unit, 0))]
                await self._settle(keys=[key], args=[worker, number, self._argument(), *words])
        except self._errors as error:
            raise Unavailable(f"The counters do not answer: {error}.", retry_after=1) from error

    async def close(self) -> None:
        """Tell the server of everything that has ended, for a second or so."""
        try:
            await asyncio.wait_for(self._idle.wait(), TIMEOUT)
        except TimeoutError:
            logger.warning("%d ended requests stay reserved in the counters", len(self._behind))
        await ended(self._tasks)
        await self._client.aclose()

    async def _ask(
        self, number: int, limits: Sequence[Limit], ids: Sequence[str], amounts: Sequence[int], now: float
    ) -> list[Any]:
        words: list[Any] = [self._worker, number, self._argument(), TTL]
        for limit, amount in zip(limits, amounts, strict=True):
            end = window_end(limit.window, window_start(limit.window, now)) if _is_budget(limit) else now
            words += [_kind(limit), limit.cap, amount, round(end) + 2 * _DAY]
        keys = [f"{_PREFIX}:w:{self._worker}", f"{_PREFIX}:o:{self._worker}", *map(_key, ids)]
        found: list[Any] = await self._reserve(keys=keys, args=words)
        return found

    async def _introduce(self, id: str) -> None:
        """A budget of which the server knows nothing."""
        used = 0 if self._known is None else await self._known(id)
        await self._client.hsetnx(_key(id), "u", used)

    def _tell(self, number: int, amounts: Amounts, later: int | None = None) -> None:
        """That a request has ended, with what it used; or has handed over this much to a `later` one."""
        self._behind.append((number, amounts, later))
        self._idle.clear()
        self._ready.set()

    def _uncounted(self, limits: Sequence[Limit], ids: Sequence[str], error: Exception) -> Held:
        if not self._down:
            passes = "pass uncounted" if self._failure == "open" else "are refused"
            logger.error("the counters do not answer; requests %s: %s", passes, error or type(error).__name__)
        self._down = True
        if self._failure == "open":
            return Held(None, limits, ids, ())
        raise NotCounted("Limits cannot be counted: the counters do not answer.", retry_after=1)

    def _heard(self) -> None:
        if self._down:
            logger.info("the counters answer again")
        self._down = False

    async def _settling(self) -> None:
        wait = 0.05
        while True:
            await self._ready.wait()
            batch = [self._behind[index] for index in range(min(256, len(self._behind)))]
            try:
                pipe = self._client.pipeline(transaction=False)
                for number, amounts, later in batch:
                    words = [
                        word
                        for unit in ("tokens", "dollars", "device_seconds")
                        for word in (unit, amounts.of(unit))
                    ]
                    key = f"{_PREFIX}:o:{self._worker}"
                    if later is not None:
                        await self._split(keys=[key], args=[number, later, *words], client=pipe)
                        continue
                    words += ["requests", amounts.requests]
                    await self._settle(
                        keys=[key], args=[self._worker, number, self._argument(), *words], client=pipe
                    )
                await pipe.execute()
            except self._errors:
                await asyncio.sleep(wait)  # settling or splitting twice changes nothing
                wait = min(_SLOWEST, 2 * wait)
                continue
            wait = 0.05
            for _ in batch:
                self._behind.popleft()
            if not self._behind:
                self._ready.clear()
                self._idle.set()

    async def _pulse(self) -> None:
        while True:
            try:
                seen = f"{self._clock():.3f}" if self._clock else await self._server_time()
                await self._client.set(f"{_PREFIX}:w:{self._worker}", seen, ex=round(TTL) + 122)
            except self._errors:
                pass  # requests say it
            await asyncio.sleep(1.0)

    async def _server_time(self) -> str:
        seconds, micros = await self._client.time()
        return f"{seconds + micros / 1e6:.3f}"

    def _now(self) -> float:
        """For the names of windows, which are days and months; the rest is by the server's clock."""
        return self._clock() if self._clock is not None else time.time()

    def _argument(self) -> str:
        return "" if self._clock is None else repr(self._clock())


def _is_budget(limit: Limit) -> bool:
    return limit.window in ("day", "month")


def _kind(limit: Limit) -> str:
    if _is_budget(limit):
        return "b"
    if limit.window == "now":
        return "c"
    return "q" if limit.unit == "requests" else "t"


def _id(limit: Limit, now: float) -> str:
    return account_id(limit.scope, limit.unit, limit.window, window_start(limit.window, now))


def _key(id: str) -> str:
    return f"{_PREFIX}:a:{id}"


def _resets_at(limit: Limit, now: float) -> float:
    if _is_budget(limit):
        return window_end(limit.window, window_start(limit.window, now))
    return now + SPAN if limit.window == "minute" else now
