"""Looking after engines from beside: are they ready, do they make progress, how much stands in their queues.

    penstock   GET /readyz (loading, draining) · /livez (a step that takes too long) · /metrics (queue, cache)
    vllm       GET /health · /metrics: with requests running, its token counters must grow
    clouds     nothing: their answers speak for them (policy.health)

A 200 alone is no health: an engine that is stuck still answers it. A probe that gets no answer counts as "not
ready" the second time in a row. It knows URLs and pages of metrics; what follows from them is policy.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import aiohttp

from penstock.http.reading import read_at_most

from .policy.health import Progress
from .stations import Station, Stations
from .tasks import Repeated

logger = logging.getLogger("penstock.gateway")

_TIMEOUT = aiohttp.ClientTimeout(total=3.0)
_MOST = 1 << 20
"""Bytes of a page of metrics."""
_RUNNING = "vllm:num_requests_running"
_WAITING = "vllm:num_requests_waiting"
_KV_USAGE = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")
_DONE = ("vllm:generation_tokens_total", "vllm:prompt_tokens_total")
_WANTED = frozenset({_RUNNING, _WAITING, *_KV_USAGE, *_DONE})


def read_metrics(page: str) -> dict[str, float]:
    """The few series that are wanted, each summed over its labels, of a page in Prometheus' text format."""
    found: dict[str, float] = {}
    for line in page.splitlines():
        if not line.startswith("vllm:"):
            continue
        name = line.partition("{")[0].partition(" ")[0]
        if name not in _WANTED:
            continue
        try:
            value = float(line.rpartition("}")[2].split()[0] if "}" in line else line.split()[1])
        except (ValueError, IndexError):
            continue
        if value == value and abs(value) != float("inf"):
            found[name] = found.get(name, 0.0) + value
    return found


class Probe:
    """Of one replica."""

    def __init__(self, station: Station, monotonic: Callable[[], float]) -> None:
        self._station = station
        self._monotonic = monotonic
        self._progress = Progress()
        self._silent = 0

    async def look(self) -> None:
        """Ask once; its station knows then."""
        station = self._station
        try:
            ready = await self._ready()
            self._silent = 0
        except (aiohttp.ClientError, OSError, TimeoutError):
            self._silent += 1
            if self._silent < 2:
                return
            ready = False
        was = station.health.ready
        station.health.probed(ready, self._monotonic())
        if was != ready:
            logger.warning("the replica %s is %s", station.id, "ready" if ready else "not ready")

    async def _ready(self) -> bool:
        if self._station.kind == "penstock":
            for path in ("/readyz", "/livez"):
                if await self._status(path) != 200:
                    return False
            await self._load()
            return True
        return await self._status("/health") == 200 and await self._load()

    async def _status(self, path: str) -> int:
        async with self._station.request("GET", path, timeout=_TIMEOUT) as response:
            return int(response.status)

    async def _load(self) -> bool:
        """Take in its metrics; false: it is stuck."""
        async with self._station.request("GET", "/metrics", timeout=_TIMEOUT) as response:
            if response.status != 200:
                return True
            page = (await read_at_most(response, _MOST)).decode("utf-8", "replace")
        found = read_metrics(page)
        if not found:
            return True
        now = self._monotonic()
        kv_usage = max((found.get(name, 0.0) for name in _KV_USAGE), default=0.0)
        self._station.report(found.get(_WAITING, 0.0), kv_usage, now)
        done = sum(found.get(name, 0.0) for name in _DONE)
        return self._progress.seen(found.get(_RUNNING, 0.0), done, now)


class Prober(Repeated):
    """Looks at every replica of an engine, once a second, all at a time."""

    failure = "probing failed"

    def __init__(self, stations: Stations, monotonic: Callable[[], float]) -> None:
        super().__init__()
        self._stations = stations
        self._monotonic = monotonic
        self._probes: dict[Station, Probe] = {}

    async def look(self) -> None:
        """Look at all of them, once."""
        stations = [each for each in self._stations.all() if each.kind in ("penstock", "vllm")]
        self._probes = {each: self._probes.get(each) or Probe(each, self._monotonic) for each in stations}
        await asyncio.gather(*(probe.look() for probe in self._probes.values()))
