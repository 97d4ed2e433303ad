"""Limits within leases: a request waits for the bank only where its worker's lease is used up.

One task carries asks to the bank and grants back (a round), for all requests that wait; another says every
second that the worker lives, learns what others are short of, and lets idle leases go.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from penstock.core.errors import Unavailable
from penstock.gateway.ledger.store import Beat
from penstock.gateway.meter import LimitReached, NotCounted, Standing
from penstock.gateway.policy.amounts import Amounts, Limit
from penstock.gateway.policy.leases import TTL, Ask, Grant
from penstock.gateway.policy.shares import Share, Shares, Ticket
from penstock.gateway.tasks import ended

from .counters import Left, Uses, reads, refusal

logger = logging.getLogger("penstock.gateway")

T = TypeVar("T")
PATIENCE = 2.0
"""Seconds that a request waits for other workers to give back what they do not use."""
SLOWEST = 10.0
"""Seconds that a request waits for the bank, all rounds together."""
POLL = 0.05
"""Seconds between two looks at what others are short of."""
PULSE = 1.0
"""Seconds between two signs of life, and between two rounds of giving back."""


class Bank(Protocol):
    """Where the accounts are that workers share. All methods block, and raise Unavailable."""

    def lease(self, worker: str, asks: Sequence[Ask]) -> list[Grant]:
        """Give leases."""
        ...

    def beat(self, worker: str, *, write: bool = True) -> Beat:
        """The worker lives."""
        ...


class Caller(Protocol):
    """Does blocking work elsewhere, in order (ledger/thread.py)."""

    turn: asyncio.Lock
    """Held by whoever changes leases, from before he says what to until he knows that it was done: what is
    asked for while rows are charged would be the old lease, with what they have used in it."""

    def call(
        self, work: Callable[[], T], *, apply: Callable[[T], None] | None = None, urgent: bool = False
    ) -> asyncio.Future[T]:
        """Do it; `apply` its result in the event loop, in the same order."""
        ...


class LeasedCounters:
    """The counters of one worker. Belongs to the running event loop; `start` it."""

    def __init__(
        self,
        bank: Bank,
        worker: str,
        caller: Caller,
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        on_beat: Callable[[Beat], None] | None = None,
    ) -> None:
        self._bank = bank
        self._worker = worker
        self._caller = caller
        self._wall = clock
        self._monotonic = monotonic
        self._offset = clock() - monotonic()
        self._on_beat = on_beat
        self._valid_until = float("-inf")
        self._wanted = asyncio.Event()
        self._round: asyncio.Future[Unavailable | None] = asyncio.get_running_loop().create_future()
        self._tasks: list[asyncio.Task[None]] = []
        self._down = False
        self.shares = Shares()
        self.rounds = 0
        """Rounds to the bank so far."""

    def start(self) -> None:
        """Begin to talk to the bank."""
        self._tasks = [asyncio.create_task(_forever(self._lease)), asyncio.create_task(_forever(self._pulse))]

    def now(self) -> float:
        """Unix time that does not jump: where the clock is set, the accounts are told first."""
        return self._offset + self._monotonic()

    def _follow(self) -> None:
        ahead = self._wall() - self.now()
        if abs(ahead) >= 1:
            self._offset += ahead
            self.shares.shift(math.ceil(ahead))

    def reserve_now(self, limits: Sequence[Limit], worst: Amounts) -> Ticket | None:
        """Within the lease."""
        now = self.now()
        ticket = self.shares.reserve(limits, worst, now, valid=self._monotonic() < self._valid_until)
        if self.shares.low:
            self._wanted.set()
        return ticket

    async def reserve(self, limits: Sequence[Limit], worst: Amounts) -> Ticket:
        """Within the lease, or after a round. Raises LimitReached where the bank has said so, NotCounted
        where it cannot say, or not in time."""
        waiting: dict[Share, tuple[int, int]] = {}
        try:
            async with asyncio.timeout(SLOWEST):
                return await self._wait(limits, worst, waiting)
        except TimeoutError:
            raise NotCounted(
                f"Limits cannot be counted now: the ledger's database has not answered for {SLOWEST:.0f} s.",
                retry_after=5,
            ) from None
        finally:
            for share, (amount, _) in waiting.items():
                share.waiting.remove(amount)
                if share.pending:
                    share.returning = True  # so that the bank forgets that it is wanted
                    if not share.waiting:
                        self._wanted.set()

    async def _wait(
        self, limits: Sequence[Limit], worst: Amounts, waiting: dict[Share, tuple[int, int]]
    ) -> Ticket:
        """Round after round, in `waiting` what is waited for: amounts, and after which round that began."""
        pending_since: float | None = None
        while True:
            if self._monotonic() >= self._valid_until:
                await self._alive()
            now = self.now()
            ticket = self.reserve_now(limits, worst)
            if ticket is not None:
                return ticket
            short = self.shares.short(limits, worst, now)
            self._refuse(short, waiting, now)
            pending = [share for share, _ in short if share in waiting and share.pending]
            if not pending:
                pending_since = None
            elif pending_since is None:
                pending_since = self._monotonic()
            elif self._monotonic() - pending_since > PATIENCE:
                raise _unknown(pending[0])
            for share, amount in short:
                if share not in waiting:
                    waiting[share] = amount, self.shares.number
                    share.waiting.append(amount)
            if pending:
                await asyncio.sleep(POLL / 2)
            self._wanted.set()
            failed = await asyncio.shield(self._round)
            if failed is not None:
                raise NotCounted(failed.message, retry_after=1) from None

    def split(self, ticket: Ticket, later: Amounts) -> Ticket:
        """A part of a reservation goes on by itself."""
        return self.shares.split(ticket, later)

    def settle(self, ticket: Ticket, used: Amounts) -> None:
        """A request has ended."""
        self.shares.settle(ticket, used, self.now())

    def standings(self, ticket: Ticket) -> Sequence[Standing]:
        """What is left of each limit, as far as this worker knows."""
        now = self.now()
        return [Left(share.limit, share.remaining(now), share.resets_at(now)) for share in ticket.shares]

    def folded(self, amounts: Mapping[str, int], *, doubted: bool = False) -> None:
        """The ledger has charged these amounts; `doubted`: some time ago."""
        self.shares.folded(amounts, doubted=doubted)

    async def corrected(self, amounts: Mapping[str, int]) -> None:
        """The accounts in the database are what leases are given by."""

    async def bury(self, worker: str, used: Uses) -> None:
        """Its leases were in the database, and went with its journal."""

    async def close(self) -> None:
        """Give back what is not in use."""
        await ended(self._tasks)
        async with self._caller.turn:
            asks = self.shares.give_back(self.now())
            if asks:
                try:
                    await self._caller.call(lambda: self._bank.lease(self._worker, asks), urgent=True)
                except Unavailable as error:
                    logger.warning("leases could not be given back: %s", error.message)

    def _refuse(
        self, short: list[tuple[Share, int]], waiting: dict[Share, tuple[int, int]], now: float
    ) -> None:
        """Raise LimitReached where the bank has said that the limit is reached, and NotCounted where it has
        said that nobody knows: since this request waits, and of no earlier time."""
        doubtful: Share | None = None
        for share, amount in short:
            refused = share.refused is not None and amount >= share.refused
            if refused and self._monotonic() >= share.refused_until:
                refused = share in waiting and waiting[share][1] < share.refused_before
            if amount > share.cap or (refused and not share.doubt):
                raise _refusal(share, amount, now)
            if refused:
                doubtful = share
        if doubtful is not None:
            raise _unknown(doubtful)

    async def _lease(self) -> None:
        """One round: whoever waits when it begins is told when it has ended."""
        await self._wanted.wait()
        async with self._caller.turn:
            await self._ask()

    async def _ask(self) -> None:
        self._wanted.clear()
        told, self._round = self._round, asyncio.get_running_loop().create_future()
        failed: Unavailable | None = None
        asks = self.shares.asks(self.now())
        asked = self._monotonic()
        try:
            if asks:
                self.rounds += 1
                await self._caller.call(
                    lambda: self._bank.lease(self._worker, asks),
                    apply=lambda grants: self.shares.granted(asks, grants, asked),
                    urgent=True,
                )
            self._heard()
        except Unavailable as error:
            failed = error
            self.shares.lost(asks)
            self._lost(error)
        except Exception as error:
            failed = NotCounted("Limits cannot be counted.")
            failed.__cause__ = error
            self.shares.lost(asks)
            raise
        finally:
            told.set_result(failed)

    async def _pulse(self) -> None:
        """A sign of life, and then looks at what others need, as often as there are others."""
        begun = self._monotonic()
        try:
            self._follow()
            await self._beat(write=True)
            if self.shares.tick(self.now()):
                self._wanted.set()
            while (rest := begun + PULSE - self._monotonic()) > 0:
                await asyncio.sleep(rest if self.shares.alone else min(rest, POLL))
                if not self.shares.alone and rest > POLL:
                    await self._beat(write=False)
        except Unavailable:
            await asyncio.sleep(PULSE)

    async def _alive(self) -> None:
        try:
            await self._beat(write=True)
        except Unavailable as error:
            raise NotCounted(error.message, retry_after=1) from None

    async def _beat(self, *, write: bool) -> None:
        sent = self._monotonic()

        def apply(beat: Beat) -> None:
            if write:
                self._valid_until = sent + TTL - PULSE
            self.shares.alone = beat.others == 0
            if beat.pressed and self.shares.pressed(beat.pressed, self.now()):
                self._wanted.set()
            if self._on_beat is not None:
                self._on_beat(beat)

        try:
            await self._caller.call(
                lambda: self._bank.beat(self._worker, write=write), apply=apply, urgent=True
            )
            self._heard()
        except Unavailable as error:
            self._lost(error)
            raise

    def _lost(self, error: Unavailable) -> None:
        if not self._down:
            logger.error("limits cannot be counted beyond the leases: %s", error.message)
        self._down = True

    def _heard(self) -> None:
        if self._down:
            logger.info("limits are counted again")
        self._down = False


def _refusal(share: Share, amount: int, now: float) -> LimitReached:
    return refusal(
        share.limit,
        amount,
        remaining=share.remaining(now),
        now=now,
        resets_at=share.resets_at(now),
        frees_in=share.frees_in(amount, now),
    )


def _unknown(share: Share) -> NotCounted:
    return NotCounted(
        f"Whether the limit of {reads(share.limit)} is reached cannot be told now: a part of it is leased to "
        "a worker of the gateway that is not heard of.",
        retry_after=5,
    )


async def _forever(step: Callable[[], Coroutine[Any, Any, None]]) -> None:
    while True:
        try:
            await step()
        except Exception:
            logger.exception("a part of the meter failed; it goes on")
            await asyncio.sleep(PULSE)
