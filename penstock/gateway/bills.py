"""What engines say afterwards of requests whose client has gone: their final bills.

    GET /v1/bills?after=CURSOR ─▶ bill, bill, …     of each station that trusts the gateway
             └─▶ whoever waits for one, by the id that the request had upstream
    GET /v1/bills?after=CURSOR&id=A&id=B …          of those that have waited for a while, and of rows that
                                                    were written without their bills (settler.py)

Those that nobody waits for are kept for a moment: a bill may be read before it is known that a client has
gone. It knows the feed of Penstock's server (server/bills.py), and no row.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import urlencode

import aiohttp
import msgspec

from penstock.http.reading import read_at_most

from .metrics import Metrics
from .policy.amounts import NANO
from .records import Asked
from .stations import Station, Stations
from .tasks import Beside
from .usage import Tally

logger = logging.getLogger("penstock.gateway")

PATIENCE = 10.0
"""Seconds that a row waits for its bill."""
_INTERVAL = 1.0
"""Seconds between two looks at a feed, while nobody waits."""
_SOON = 0.2
"""The same while somebody does."""
_FIRST = 1.0
"""Seconds that the first request to a station waits at most until that says where its feed is."""
_DOUBT = 1.0
"""Seconds that somebody waits until the engine is asked whether it knows of the request at all."""
_IDS = 50
"""Bills that are looked for at a time."""
_KEPT = 4096
"""Bills that nobody has asked for yet."""
_PAGE = 1000
_MOST_BYTES = 1 << 23
"""Of a page: some 300 bytes a bill."""
_TIMEOUT = aiohttp.ClientTimeout(total=5.0)
_REFUSALS = (401, 403, 404)
"""Statuses with which an engine says that it takes the gateway for nobody special, or has no feed."""
_AGAIN = 5.0
"""Seconds until it is asked again whether that is still so; twice as long each time."""
_AGAIN_MOST = 300.0


class _Bill(msgspec.Struct):
    request_id: str
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    device_seconds: float = 0.0

    def tally(self) -> Tally:
        """In the gateway's terms."""
        return Tally(
            input=self.prompt_tokens,
            output=self.completion_tokens,
            cached=min(self.cached_tokens, self.prompt_tokens),
            device_seconds=round(self.device_seconds * NANO),
            told=True,
            final=True,
        )


class _Page(msgspec.Struct):
    data: list[_Bill]
    next: str
    lost: int | None = 0
    under_way: list[str] | None = None


class Verdict(enum.Enum):
    """What else there is to say of a bill that is not there."""

    NEVER_CAME = 0
    """The engine has not worked for it, and will not, unless it is on its way there still."""
    LOST = 1
    """The engine has started anew since, or has dropped it, or cannot know."""


class _Refused(NamedTuple):
    at: float
    """When it is asked again, in the loop's seconds."""
    pause: float


class _Waiting(NamedTuple):
    asked: Asked
    since: float
    future: asyncio.Future[Tally | None]


NOTHING = Tally(device_seconds=0, told=True, final=True)
"""What an engine has used that never worked for a request."""
_decode = msgspec.json.Decoder(_Page).decode


class Bills(Beside):
    """Reads the feeds of all stations that trust the gateway; once stopped, nobody gets a bill."""

    def __init__(self, stations: Stations, metrics: Metrics) -> None:
        super().__init__()
        self._stations = stations
        self._metrics = metrics
        self._cursors: dict[Station, str] = {}
        self._waiting: dict[tuple[Station, str], _Waiting] = {}
        self._kept: OrderedDict[tuple[Station, str], _Bill] = OrderedDict()
        self._refused: dict[Station, _Refused] = {}
        """Who would not give its bills: until it does it is not trusted, or its requests would be refused."""
        self._wanted = asyncio.Event()

    async def cursor(self, station: Station) -> str:
        """The end of a station's feed, as far as it is known: bills of what it is asked now are behind it.
        Only who asks a station first waits for it to say; empty where it does not, or sends no bills."""
        cursor = self._cursors.get(station)
        if cursor is None and station.trusted:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_FIRST):
                    await self._learn(station)
            cursor = self._cursors.setdefault(station, "")
        return cursor or ""

    async def fill(self, tally: Tally, station: Station, asked: Asked) -> bool:
        """Wait for a request's bill, and put it into `tally`; false if it does not come."""
        key = (station, asked.bill)
        kept = self._kept.pop(key, None)
        found = None if kept is None else kept.tally()
        if found is None:
            loop = asyncio.get_running_loop()
            waiting = self._waiting.setdefault(key, _Waiting(asked, loop.time(), loop.create_future()))
            self._wanted.set()
            try:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(PATIENCE):
                        found = await waiting.future
            finally:
                self._waiting.pop(key, None)
        if found is None:
            self._metrics.bill(asked.upstream, "overdue")
            logger.warning(
                "the bill %s of %s has not come within %g s; its row is not settled until it does",
                asked.bill,
                station.id,
                PATIENCE,
            )
            return False
        tally.input, tally.output, tally.cached = found.input, found.output, found.cached
        tally.device_seconds = found.device_seconds
        tally.told = tally.final = True
        return True

    async def find(self, station: Station, wanted: Sequence[Asked]) -> dict[str, Tally | Verdict]:
        """What a station says of bills, by their ids. Those that are still to come, and those of a station
        that does not answer, are not in it."""
        found: dict[str, Tally | Verdict] = {}
        by_start: dict[str, list[Asked]] = {}
        for asked in wanted:
            by_start.setdefault(asked.after.partition(":")[0], []).append(asked)
        with _unanswered():
            for group in by_start.values():
                group.sort(key=_position)
                for first in range(0, len(group), _IDS):
                    some = group[first : first + _IDS]
                    after = some[0].after
                    query = urlencode(
                        [*([("after", after)] if after else []), *(("id", x.bill) for x in some)]
                    )
                    page = await self._page(station, query)
                    if page is None:
                        return found
                    found |= _verdicts(page, some)
        return found

    async def look(self) -> None:
        """Read what is new, everywhere."""
        known = self._stations.all()
        now = asyncio.get_running_loop().time()
        for gone in self._refused.keys() - known:
            del self._refused[gone]
        again = [each for each, refused in self._refused.items() if now >= refused.at]
        stations = [each for each in known if each.trusted or each in again]
        for gone in self._cursors.keys() - stations:
            del self._cursors[gone]
        await asyncio.gather(*(self._read(station) for station in stations))

    async def _run(self) -> None:
        while True:
            try:
                await self.look()
                await self._doubt()
            except Exception:
                logger.exception("reading the bills failed")
            if self._waiting:
                await asyncio.sleep(_SOON)
                continue
            self._wanted.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wanted.wait(), _INTERVAL)

    async def _doubt(self) -> None:
        """Ask after those that have been waited for in vain for a while."""
        now = asyncio.get_running_loop().time()
        late: dict[Station, list[Asked]] = {}
        for (station, _), waiting in self._waiting.items():
            if now - waiting.since > _DOUBT and station.trusted:
                late.setdefault(station, []).append(waiting.asked)
        for station, wanted in late.items():
            for id, said in (await self.find(station, wanted)).items():
                answer = said if isinstance(said, Tally) else None
                if said is Verdict.NEVER_CAME:
                    answer = NOTHING
                self._tell(station, id, answer)

    async def _learn(self, station: Station) -> None:
        """Where its feed ends. What is before that is of nobody who could ask here."""
        with _unanswered():
            page = await self._page(station, "id=-")
            if page is not None and not self._cursors.get(station):
                self._cursors[station] = page.next

    async def _read(self, station: Station) -> None:
        """All that is new at one station. One that does not answer is asked again the next time."""
        if not self._cursors.get(station):
            await self._learn(station)
            return
        with _unanswered():
            while True:
                page = await self._page(station, f"limit={_PAGE}&after={self._cursors[station]}")
                if page is None:
                    return
                if page.lost:
                    logger.warning("%s: %d bills are lost; their rows stay unsettled", station.id, page.lost)
                self._cursors[station] = page.next
                for bill in page.data:
                    if not self._tell(station, bill.request_id, bill.tally()):
                        self._kept[station, bill.request_id] = bill
                while len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
                if len(page.data) < _PAGE:
                    return

    async def _page(self, station: Station, query: str) -> _Page | None:
        async with station.request("GET", f"/v1/bills?{query}", once=True, timeout=_TIMEOUT) as response:
            if response.status in _REFUSALS:
                self._refuse(station, response.status)
            if response.status != 200:
                return None
            page = _decode(await read_at_most(response, _MOST_BYTES))
        if self._refused.pop(station, None) is not None:
            station.trusted = True
            logger.warning("%s gives its bills again", station.id)
        return page

    def _refuse(self, station: Station, status: int) -> None:
        """It is asked again after a while: it may have been started with another key for a moment."""
        before = self._refused.get(station)
        pause = _AGAIN if before is None else min(_AGAIN_MOST, 2 * before.pause)
        self._refused[station] = _Refused(asyncio.get_running_loop().time() + pause, pause)
        station.trusted = False
        if before is None:
            logger.error(
                "%s does not give its bills (status %d): its key is none of --gateway-key; until it does, "
                "its rows are settled by what its answers say",
                station.id,
                status,
            )

    def _tell(self, station: Station, id: str, tally: Tally | None) -> bool:
        """Whether somebody has waited for it."""
        waiting = self._waiting.get((station, id))
        if waiting is None or waiting.future.done():
            return False
        waiting.future.set_result(tally)
        return True


def _unanswered() -> contextlib.AbstractContextManager[None]:
    return contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError, msgspec.MsgspecError)


def _verdicts(page: _Page, wanted: Sequence[Asked]) -> dict[str, Tally | Verdict]:
    """What a page says of those that it was asked for. They had cursors of one start, in their order."""
    found: dict[str, Tally | Verdict] = {bill.request_id: bill.tally() for bill in page.data}
    if page.under_way is None:  # an engine that cannot look for some
        return {}
    for asked in wanted:
        if asked.bill in found or asked.bill in page.under_way:
            continue
        known = asked.after and page.lost is not None
        dropped = _position(wanted[0]) + (page.lost or 0) > _position(asked)
        found[asked.bill] = Verdict.NEVER_CAME if known and not dropped else Verdict.LOST
    return found


def _position(asked: Asked) -> int:
    number = asked.after.partition(":")[2]
    return int(number) if number.isdecimal() else 0
