"""What one request has reserved, and what it has used: from `reserve` to the one `commit` of its row.

    reserve ─▶ the request runs ─▶ conclude ─▶ commit, at once or with the bill that an engine still owes
                                └▶ hand_over: the row is final, the rest of what was reserved another one's

It knows the request's row, its meter, and bills; who is asked is the request's matter.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec

from penstock.core.errors import brief

from . import bill
from .meter import Reservation
from .policy.amounts import NANO, Amounts
from .records import Asked
from .relay import Exchange
from .usage import Tally

if TYPE_CHECKING:
    from .request import Request


class Charge:
    """Of one request."""

    def __init__(self, request: Request) -> None:
        self.reservation: Reservation | None = None
        self.handed_over = False
        """Whether its row is written, and another request goes on with what it had reserved."""
        self.shared = 0.0
        """Seconds of the last station that processor sharing gives the request."""
        self.reserved = Amounts()
        self._request = request
        self._used: Amounts | None = None

    def worst(self) -> Amounts:
        """The most that the request can use."""
        request = self._request
        context = request.way.route.context
        used = {}
        for place in request.places:
            known = [each for each in (context, place.context) if each is not None]
            used[place] = request.envelope.worst(min(known) if known else None)
        paces = {place: request.door.stations.pace(place) for place in request.places}
        return bill.worst(request.places, used, paces)

    async def reserve(self, later: Amounts | None = None) -> None:
        """Count the worst case, and that of what may follow. Raises LimitReached, Unavailable."""
        request, row = self._request, self._request.row
        door = request.door
        limits = door.entitlements.of(row.key_id, row.team, row.tags, request.caller.principal.limits)
        self.reserved = self.worst()
        if not request.endpoint.metered:
            await door.meter.count([limit for limit in limits if limit.unit == "requests"])
            return
        both = self.reserved if later is None else self.reserved.plus(later)
        self.reservation = await door.meter.reserve(row, limits, both)

    async def nothing(self) -> None:
        """Write a row that counts for nobody."""
        request = self._request
        if request.endpoint.metered:
            self.reservation = await request.door.meter.reserve(request.row, (), Amounts(requests=0))
        self._commit()

    def attempted(self) -> None:
        """Somebody is asked: what is known of earlier attempts counts no more."""
        self._used = None

    def lose(self) -> None:
        """What was asked has come to nothing for the client: the engines' time for it is nobody's, and what a
        cloud takes for it the house's."""
        request, row = self._request, self._request.row
        for part in request.rest.parts:
            self._lost(part.asked, part.tally, part.shared)
            self.wasted(part.asked, Exchange(tally=part.tally, status=200, asked=True))
        if request.exchange.asked and request.asked is not None:
            self._lost(request.asked, request.exchange.tally, self.shared)
            self.wasted(request.asked, request.exchange)
        request.rest.parts.clear()
        request.asked, request.exchange = None, Exchange()
        row.input_tokens = row.output_tokens = row.cached_tokens = 0
        row.dollars = row.comparator_dollars = row.device_seconds = None
        row.device_seconds_estimated, row.pool, row.device = False, "", ""
        self._used = None

    def _lost(self, asked: Asked, tally: Tally, shared: float) -> None:
        row = self._request.row
        if tally.device_seconds is not None and asked.on_devices:
            row.lost_device_seconds += tally.device_seconds * asked.devices
        elif asked.bill:
            row.owed += (msgspec.structs.replace(asked, lost=True),)
        elif asked.on_devices:
            row.lost_device_seconds += round(shared * NANO) * asked.devices

    def wasted(self, asked: Asked, exchange: Exchange) -> None:
        """Note what a cloud takes for an attempt that came to nothing; one that sends bills says it there."""
        if not asked.bill:
            bill.wasted(self._request.row, asked, exchange, self._request.envelope.size)

    def settle(self) -> None:
        """Fill in the row's figures, once for each attempt."""
        request = self._request
        if self._used is None:
            request.rest.count(request.exchange.tally)
            self._used = bill.settle(
                request.row,
                request.way,
                request.place,
                request.exchange,
                reserved=self.reserved,
                prompt_bytes=request.envelope.size,
                shared=self.shared,
                earlier=request.rest.parts,
            )

    def conclude(self) -> None:
        """The request has ended, and its row says how: commit it, once all bills are there."""
        if self._owed():
            self._request.door.behind(self.commit_by_bill())
        else:
            self._commit()

    async def commit_by_bill(self) -> None:
        """Wait for what engines still say of it, and commit."""
        parts = self._owed()
        self._expect(parts)  # should they come later than this waits
        try:
            await asyncio.gather(*(self._fill(part) for part in parts))
        finally:
            self._commit()

    def hand_over(self, later: Request, worst: Amounts) -> None:
        """The request has ended, and its row is written now, whatever bill is still owed; `later` goes on
        with `worst` of what it has reserved. Raises Unavailable, and then everything is as before."""
        row, used = self._request.row, self._used
        assert self.reservation is not None
        before = msgspec.structs.asdict(row)
        try:
            self._expect(self._owed())
            self._complete()
            row.end = "escalated"
            assert self._used is not None
            door = self._request.door
            later.charge.reserved = worst
            later.charge.reservation = door.meter.hand_over(self.reservation, self._used, later.row, worst)
        except BaseException:
            for name, value in before.items():
                setattr(row, name, value)
            self._used = used
            raise
        self.handed_over = True
        if not row.provisional:
            door.metrics.billed(row)

    def _owed(self) -> list[bill.Part]:
        """What engines worked for and have not said how much of it, but will."""
        request = self._request
        exchange, station, asked = request.exchange, request.station, request.asked
        if self.reservation is None:
            return []
        owed = [part for part in request.rest.parts if part.tally.device_seconds is None]
        told = exchange.tally.told and exchange.tally.final
        if told or not exchange.asked or exchange.refused:
            return owed
        if station is not None and asked is not None and asked.bill:
            owed.append(bill.Part(station, asked, exchange.tally, 0, self.shared))
        return owed

    def _expect(self, parts: list[bill.Part]) -> None:
        request = self._request
        request.row.owed += tuple(part.owed if request.rest.parts else part.asked for part in parts)

    async def _fill(self, part: bill.Part) -> None:
        row = self._request.row
        if await self._request.door.bills.fill(part.tally, part.station, part.asked):
            row.owed = tuple(each for each in row.owed if each.bill != part.asked.bill)
            self._used = None

    def _complete(self) -> None:
        """The row's times, note and figures."""
        request, row = self._request, self._request.row
        door, exchange = request.door, request.exchange
        row.total = round((door.monotonic() - request.started) * NANO)
        if exchange.first_byte_at is not None:
            row.first_byte = round((exchange.first_byte_at - request.started) * NANO)
        if request.notes:
            row.note = brief("; ".join(filter(None, (row.note, *request.notes))), 300)
        self.settle()
        if request.place is not None and row.device_seconds is not None and row.settlement == "settled":
            pace = door.stations.pace(request.place)
            pace.seen(row.input_tokens + row.output_tokens, row.device_seconds)

    def _commit(self) -> None:
        self._complete()
        request = self._request
        if self.reservation is not None:
            assert self._used is not None
            request.door.meter.commit(self.reservation, self._used)
        request.door.metrics.ended(request.row)
        if request.span is not None:
            request.span.row(request.row)
