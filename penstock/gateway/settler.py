"""Rows that were written without the bills of their engines, settled as soon as these are found.

    ledger: rows with `owed` ─▶ their stations: bills of these ids? ─▶ Store.resettle, rows and accounts

Such rows are left by workers that were killed, by bills that came too late, and by attempts that failed
before another one answered. Whichever gateway has the station finds them, whoever wrote them: each row is
settled in a transaction that sees whether it has been already. What an engine does not know any more stays as
it is.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from . import bill
from .bills import NOTHING, Bills, Verdict
from .metrics import Metrics
from .policy.amounts import NANO, Amounts
from .records import Asked, Row
from .stations import Station, Stations
from .tasks import Repeated
from .usage import Tally

logger = logging.getLogger("penstock.gateway")

_MOST = 500
"""Rows of one look."""
_DOUBT = 2.0
"""Seconds that a request may be on its way to the engine after the row was seen."""
_FORGET = 600.0
"""Seconds after which a bill that nobody has looked for again has come."""
_DAY = 86_400 * NANO
"""Nanoseconds after which a bill is not looked for any more: no engine keeps them for so long."""

Places = Collection[tuple[str, int]]


class Rows(Protocol):
    """The ledger, as far as it is needed here."""

    async def owed(self, since: int, most: int) -> list[tuple[str, int, Row]]:
        """See Store.owed."""
        ...

    async def resettle(self, places: Places, settle: Callable[[Row], Amounts | None]) -> None:
        """See Store.resettle."""
        ...


class Settler(Repeated):
    """Settles what it can, once a second."""

    failure = "settling rows by late bills failed"

    def __init__(
        self, rows: Rows, bills: Bills, stations: Stations, metrics: Metrics, wall: Callable[[], int]
    ) -> None:
        """`wall`: Unix time in nanoseconds."""
        super().__init__()
        self._rows = rows
        self._bills = bills
        self._stations = stations
        self._metrics = metrics
        self._wall = wall
        self._seen: dict[str, tuple[float, float]] = {}
        """Bill → when it was looked for first, and last."""
        self._from = 0

    async def look(self) -> None:
        """Settle all rows of one look. Raises Unavailable."""
        since = max(self._from, self._wall() - _DAY)
        waiting = await self._rows.owed(since, _MOST)
        # the rows of an engine that is away stand in nobody's way
        self._from = waiting[-1][2].at if len(waiting) == _MOST else 0
        said = await self._ask([asked for _, _, row in waiting for asked in row.owed if asked.told is None])
        if not said:
            return
        places = [
            (worker, number)
            for worker, number, row in waiting
            if any(asked.bill in said for asked in row.owed)
        ]
        final: list[Row] = []

        def settle(row: Row) -> Amounts | None:
            was = row.provisional
            used = _settle(row, said)
            if was and not row.provisional:
                final.append(row)
            return used

        await self._rows.resettle(places, settle)
        for row in final:  # which nobody else has settled meanwhile
            self._metrics.billed(row)
        for _, _, row in waiting:
            for asked in row.owed:
                if asked.bill in said:
                    self._tell(row, asked, said[asked.bill])

    async def _ask(self, owed: Sequence[Asked]) -> dict[str, Tally | Verdict]:
        """What is known of the bills by now, by their ids."""
        trusted = {station.id: station for station in self._stations.all() if station.trusted}
        wanted: dict[Station, list[Asked]] = {}
        for asked in owed:
            if asked.replica in trusted:
                wanted.setdefault(trusted[asked.replica], []).append(asked)
        now = asyncio.get_running_loop().time()
        # not only those of this look: where many rows wait, the next one is at others
        self._seen = {id: times for id, times in self._seen.items() if now - times[1] < _FORGET}
        for asked in owed:
            self._seen[asked.bill] = self._seen.get(asked.bill, (now,))[0], now
        found: dict[str, Tally | Verdict] = {}
        for station, some in wanted.items():
            for id, verdict in (await self._bills.find(station, some)).items():
                if isinstance(verdict, Tally):
                    found[id] = verdict
                elif now - self._seen[id][0] >= _DOUBT:
                    found[id] = NOTHING if verdict is Verdict.NEVER_CAME else verdict
        return found

    def _tell(self, row: Row, asked: Asked, said: Tally | Verdict) -> None:
        lost = isinstance(said, Verdict)
        self._metrics.bill(asked.upstream, "lost" if lost else "late")
        if lost:
            logger.warning(
                "request %s: %s does not know the bill %s any more; its row stays %s",
                row.id,
                asked.replica,
                asked.bill,
                row.settlement,
            )
        else:
            logger.info("request %s: settled by the bill %s of %s", row.id, asked.bill, asked.replica)


def _settle(row: Row, said: dict[str, Tally | Verdict]) -> Amounts | None:
    """Put into a row what is known; returns what it is charged instead, if that changes."""
    used: Amounts | None = None
    for asked in row.owed:
        verdict = said.get(asked.bill)
        if isinstance(verdict, Tally) and asked.told is None:
            used = bill.late(row, asked, verdict) or used
    for asked in row.owed:
        if asked.bill in said and asked.told is None:
            used = bill.give_up(row, asked) or used
    return used
