"""What engines say afterwards of requests whose client has gone: their final bills.

    GET /v1/bills?after=CURSOR ─▶ bill, bill, …     of each station that trusts the gateway
             └─▶ whoever waits for one, by the id that the request had upstream

Those that nobody waits for are kept for a moment: a bill may be read before it is known that a client has
gone. It knows the feed of Penstock's server (server/bills.py), and no row.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict

import aiohttp
import msgspec

from .policy.amounts import NANO
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
_KEPT = 4096
"""Bills that nobody has asked for yet."""
_PAGE = 1000
_MOST_BYTES = 1 << 23
"""Of a page: some 300 bytes a bill."""
_TIMEOUT = aiohttp.ClientTimeout(total=5.0)


class _Bill(msgspec.Struct):
    request_id: str
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    device_seconds: float = 0.0


class _Page(msgspec.Struct):
    data: list[_Bill]
    next: str
    lost: int | None = 0


_decode = msgspec.json.Decoder(_Page).decode


class Bills(Beside):
    """Reads the feeds of all stations that trust the gateway; once stopped, nobody gets a bill."""

    def __init__(self, stations: Stations) -> None:
        super().__init__()
        self._stations = stations
        self._cursors: dict[Station, str] = {}
        self._waiting: dict[tuple[Station, str], asyncio.Future[_Bill]] = {}
        self._kept: OrderedDict[tuple[Station, str], _Bill] = OrderedDict()
        self._wanted = asyncio.Event()

    async def fill(self, tally: Tally, station: Station, request_id: str) -> bool:
        """Wait for a request's bill, and put it into `tally`; false if it does not come."""
        key = (station, request_id)
        bill = self._kept.pop(key, None)
        if bill is None:
            future = self._waiting.setdefault(key, asyncio.get_running_loop().create_future())
            self._wanted.set()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PATIENCE):
                    bill = await future
            self._waiting.pop(key, None)
        if bill is None:
            return False
        tally.input, tally.output = bill.prompt_tokens, bill.completion_tokens
        tally.cached = min(bill.cached_tokens, bill.prompt_tokens)
        tally.device_seconds = round(bill.device_seconds * NANO)
        tally.told = tally.final = True
        return True

    async def look(self) -> None:
        """Read what is new, everywhere."""
        stations = [each for each in self._stations.all() if each.trusted]
        for gone in self._cursors.keys() - stations:
            del self._cursors[gone]
        await asyncio.gather(*(self._read(station) for station in stations))

    async def _run(self) -> None:
        while True:
            try:
                await self.look()
            except Exception:
                logger.exception("reading the bills failed")
            if self._waiting:
                await asyncio.sleep(_SOON)
                continue
            self._wanted.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wanted.wait(), _INTERVAL)

    async def _read(self, station: Station) -> None:
        """All that is new at one station. One that does not answer is asked again the next time."""
        with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError, msgspec.MsgspecError):
            while True:
                page = await self._page(station)
                if page is None:
                    return
                if page.lost and station in self._cursors:
                    logger.warning("%s: %d bills are lost; their rows stay unsettled", station.id, page.lost)
                self._cursors[station] = page.next
                for bill in page.data:
                    self._take(station, bill)
                if len(page.data) < _PAGE:
                    return

    async def _page(self, station: Station) -> _Page | None:
        cursor = self._cursors.get(station)
        query = f"?limit={_PAGE}" + ("" if cursor is None else f"&after={cursor}")
        async with station.request("GET", "/v1/bills" + query, once=True, timeout=_TIMEOUT) as response:
            if response.status != 200:
                station.trusted = False
                logger.error(
                    "%s does not give its bills (status %d): its key is none of --gateway-key",
                    station.id,
                    response.status,
                )
                return None
            return _decode(await response.content.read(_MOST_BYTES))

    def _take(self, station: Station, bill: _Bill) -> None:
        key = (station, bill.request_id)
        waiting = self._waiting.get(key)
        if waiting is not None and not waiting.done():
            waiting.set_result(bill)
            return
        self._kept[key] = bill
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
