"""The meter: limits (limits/), a journal before the upstream sees a request, and the ledger behind it.

reserve   counters ─▶ journal: open        nothing waits for the database but a lease that is used up
commit    journal: end ─▶ counters         never waits, never raises
behind    journal ─▶ store, batch by batch; journals of dead workers likewise
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from penstock.core.errors import Unavailable
from penstock.spec.model import Ledger

from .ledger.journal import Journal
from .ledger.store import Beat, Entry, Store, unit_of
from .ledger.thread import StoreThread
from .ledger.writer import Charged, Writer, bury
from .limits.counters import NOTHING, Counters, Ticket
from .limits.leased import LeasedCounters
from .limits.valkey import ValkeyCounters
from .meter import Standing
from .policy.amounts import Amounts, Limit, Unit
from .records import Asked, Row
from .tasks import ended

logger = logging.getLogger("penstock.gateway")

BEHIND = 0.1
"""Seconds between two looks at the journal."""
BURY = 1.0
"""Seconds between two looks for dead workers."""
_SLOWEST = 5.0


class Reserved:
    """What was granted to one request."""

    __slots__ = ("_counters", "number", "row", "ticket")

    def __init__(self, row: Row, number: int, ticket: Ticket, counters: Counters[Any]) -> None:
        self.row = row
        self.number = number
        self.ticket: Ticket | None = ticket
        self._counters = counters

    @property
    def standings(self) -> Sequence[Standing]:
        """What is left of its limits now; nothing after it has ended."""
        return [] if self.ticket is None else self._counters.standings(self.ticket)


class LedgerMeter:
    """One worker's meter. Made by `open`, in the event loop that it belongs to."""

    def __init__(
        self,
        store: Store,
        journal: Journal,
        thread: StoreThread,
        counters: Counters[Any],
    ) -> None:
        self.store = store
        self.journal = journal
        self.thread = thread
        self.counters = counters
        self.writer = Writer(store, journal)
        self._failing = False
        self._tasks: list[asyncio.Task[None]] = []
        self._open = 0
        self._dead: dict[str, list[Entry]] = {}
        """Workers whose journals are in the ledger, of which the counters do not know yet."""
        self._leased: LeasedCounters | None = None

    @classmethod
    async def open(
        cls,
        ledger: Ledger,
        *,
        worker: str | None = None,
        clock: Callable[[], float] = time.time,
        on_beat: Callable[[Beat], None] | None = None,
    ) -> LedgerMeter:
        """Open spool and database, take over what dead workers left, and begin. Raises StartupError."""
        store = Store(ledger.url, clock=None if clock is time.time else clock)
        await asyncio.to_thread(store.open)
        spool = Path(ledger.spool)
        journal = Journal(spool, worker)
        thread = StoreThread()
        meter: LedgerMeter | None = None
        try:
            await thread.call(lambda: store.register(journal.worker, socket.gethostname()))
            leased = LeasedCounters(store, journal.worker, thread, clock=clock, on_beat=on_beat)
            counters: LeasedCounters | ValkeyCounters = leased
            if ledger.counters is not None:
                leased.start()  # it tells that this worker lives, and hears of keys
                counters = ValkeyCounters(
                    ledger.counters,
                    journal.worker,
                    failure=ledger.counters_failure,
                    known=lambda id: thread.call(lambda: store.charged(id), urgent=True),
                    draw=journal.draw,
                )
            meter = cls(store, journal, thread, counters)
            meter._leased = leased
            await meter._take_over()
            counters.start()
            meter._tasks = [asyncio.create_task(meter._write()), asyncio.create_task(meter._bury())]
            return meter
        except BaseException:
            thread.close()
            journal.shut(delete=True)
            store.close()
            raise

    @property
    def backlog(self) -> bool:
        """Whether the database does not take rows at present; they wait in the spool."""
        return self._failing

    @property
    def under_way(self) -> int:
        """Requests that have been let through and have not ended."""
        return self._open

    async def reserve(self, row: Row, limits: Sequence[Limit], worst: Amounts) -> Reserved:
        """Let a request through. Raises LimitReached, SpoolFull, Unavailable."""
        ticket = self.counters.reserve_now(limits, worst)
        if ticket is None:
            ticket = await self.counters.reserve(limits, worst)
        row.reserved_tokens = worst.tokens
        row.reserved_dollars = worst.dollars
        row.reserved_device_seconds = worst.device_seconds
        row.settlement = "open"
        try:
            number = self.journal.open(row, charges(ticket, worst), ticket.number)
        except BaseException:
            self.counters.settle(ticket, NOTHING)
            raise
        self._open += 1
        return Reserved(row, number, ticket, self.counters)

    async def count(self, limits: Sequence[Limit]) -> None:
        """Count a request that has no row: at once, since it uses nothing that would be known later. Raises
        LimitReached, Unavailable."""
        ticket = self.counters.reserve_now(limits, Amounts())
        if ticket is None:
            ticket = await self.counters.reserve(limits, Amounts())
        self.counters.settle(ticket, Amounts())

    def asked(self, reservation: Reserved, asked: Asked) -> None:
        """An upstream will be asked now, on disk before it is."""
        if reservation.ticket is not None:
            self.journal.ask(reservation.number, asked)

    async def owed(self, since: int, most: int) -> list[tuple[str, int, Row]]:
        """See Store.owed. Raises Unavailable."""
        return await self.thread.call(lambda: self.store.owed(since, most))

    async def resettle(
        self, places: Collection[tuple[str, int]], settle: Callable[[Row], Amounts | None]
    ) -> None:
        """See Store.resettle; whoever counts learns of it. Raises Unavailable."""
        added = await self.thread.call(lambda: self.store.resettle(places, settle))
        await self.counters.corrected(added)

    def hand_over(self, reservation: Reserved, used: Amounts, row: Row, worst: Amounts) -> Reserved:
        """A request has ended, and another one goes on with `worst` of its reservation. Raises SpoolFull, and
        then the first one goes on."""
        ticket = reservation.ticket
        assert ticket is not None
        later = self.counters.split(ticket, worst)
        row.reserved_tokens, row.reserved_dollars = worst.tokens, worst.dollars
        row.reserved_device_seconds = worst.device_seconds
        row.settlement = "open"
        ended = reservation.row
        if ended.settlement == "open":
            ended.settlement = "settled"
        try:
            number = self.journal.hand_over(
                reservation.number, ended, charges(ticket, used), row, charges(later, worst), later.number
            )
        except BaseException:
            self.counters.settle(later, NOTHING)
            raise
        reservation.ticket = None
        self.counters.settle(ticket, used)
        return Reserved(row, number, later, self.counters)

    def commit(self, reservation: Reserved, used: Amounts) -> None:
        """A request has ended, with what it used. The second time it does nothing."""
        ticket, reservation.ticket = reservation.ticket, None
        if ticket is None:
            logger.error("request %s was committed twice", reservation.row.id)
            return
        self._open -= 1
        if reservation.row.settlement == "open":
            reservation.row.settlement = "settled"
        self.journal.close(reservation.number, reservation.row, charges(ticket, used))
        self.counters.settle(ticket, used)

    async def flush(self) -> None:
        """Everything that has ended is in the database. Raises Unavailable."""
        self.journal.retry()
        while not self.writer.is_done:
            await self._step()
        await self.thread.call(lambda: None)  # a step that was cancelled has told what it did

    async def close(self) -> None:
        """Write what is left, give back leases. What cannot be written stays in the spool until the next
        start."""
        await ended(self._tasks)
        whole = False
        try:
            await self.flush()
            whole = self._open == 0 and not self.journal.pending
        except Unavailable as error:
            logger.error(
                "rows stay in the spool %s until the next start: %s", self.journal.spool, error.message
            )
        await self.counters.close()
        if self._leased is not None and self._leased is not self.counters:
            await self._leased.close()
        try:
            await self.thread.call(lambda: self.store.leave(self.journal.worker, done=whole))
        except Unavailable:
            whole = False
        self.thread.close()
        self.journal.shut(delete=whole)
        self.store.close()

    async def _step(self) -> None:
        def apply(charged: Charged) -> None:
            self.counters.folded(charged.amounts, doubted=charged.doubted)

        async with self.thread.turn:
            await self.thread.call(self.writer.step, apply=apply)

    async def _write(self) -> None:
        """The journal goes into the database, for ever."""
        wait = BEHIND
        while True:
            await asyncio.sleep(wait)
            if self.journal.pending:
                self.journal.retry()
            try:
                while not self.writer.is_done:
                    await self._step()
                if self._failing:
                    logger.info("the ledger's database answers again; all rows are written")
                wait, self._failing = BEHIND, False
            except Unavailable as error:
                if not self._failing:
                    logger.error("rows wait in the spool %s: %s", self.journal.spool, error.message)
                wait, self._failing = min(_SLOWEST, 2 * wait), True
            except Exception:
                logger.exception("the ledger's writer failed; rows wait in the spool %s", self.journal.spool)
                wait, self._failing = _SLOWEST, True

    async def _take_over(self) -> None:
        self._dead |= await self.thread.call(lambda: bury(self.store, self.journal.spool))
        for worker, entries in list(self._dead.items()):
            await self.counters.bury(worker, partial(self._uses, worker, entries))
            del self._dead[worker]

    async def _uses(
        self, worker: str, entries: Sequence[Entry], numbers: Sequence[int]
    ) -> dict[int, dict[Unit, int]]:
        """What requests of a dead worker have used: of its last ones as it was when its journal was read, of
        those before as the ledger has it."""
        found = {entry.number: entry for entry in entries}
        before = [number for number in numbers if number not in found]
        for entry in await self.thread.call(lambda: self.store.entries(worker, before)):
            found[entry.number] = entry
        # who had handed over without the counters having been told holds the reservation of both
        told = set(numbers)
        later = {
            entry.row.escalated_from: entry
            for entry in entries
            if entry.row.escalated_from and entry.number not in told
        }
        uses = {}
        for number in numbers:
            if (first := found.get(number)) is not None:
                uses[number] = _used(first)
                if (other := later.get(first.row.id)) is not None:
                    for unit, amount in _used(other).items():
                        uses[number][unit] = uses[number].get(unit, 0) + amount
        return uses

    async def _bury(self) -> None:
        """Whoever else has died here is taken over."""
        while True:
            await asyncio.sleep(BURY)
            try:
                await self._take_over()
            except Unavailable:
                pass  # the writer says it
            except Exception:
                logger.exception("the journal of a dead worker cannot be taken over")
                await asyncio.sleep(_SLOWEST)


def _used(entry: Entry) -> dict[Unit, int]:
    row = entry.row
    tokens = row.reserved_tokens if row.settlement == "unsettled" else row.input_tokens + row.output_tokens
    return {**{unit_of(id): amount for id, amount in entry.charged.items()}, "tokens": tokens}


def charges(ticket: Ticket, amounts: Amounts) -> dict[str, int]:
    """What a request adds to the accounts that the ledger charges."""
    return {id: amounts.of(unit_of(id)) for id in ticket.charged}
