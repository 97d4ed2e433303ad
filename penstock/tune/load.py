"""One run of load: some clients that ask again as soon as they are answered, or arrivals at a rate; and the
engine's metrics before, meanwhile and after.

The requests are `penstock.bench`'s, streamed, so that TTFT and TPOT are seen, which a load generator for web
pages cannot. Prompts never repeat within a session, unless a file's do: a prefix cache would serve them.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from penstock.bench.client import Outcome, RequestRecord, Target, find_model, send_request
from penstock.bench.errors import BenchError
from penstock.bench.load import Stop, arrival_times, closed_loop, open_loop, stop_after
from penstock.bench.prompts import Prompt, RandomPrompts, read_jsonl
from penstock.bench.serve import tokens_per_word
from penstock.http.reading import read_at_most
from penstock.observe.page import MOST_BYTES, Page

from .run import Engine, Run, measured
from .slo import Slo

_POLL = 0.5
"""Seconds between two looks at the gauges."""
_MOST_REQUESTS = 1_000_000
"""Of one run."""
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is sent, and for how long."""

    clients: int = 20
    """Requests in flight, each followed by the next."""
    rate: float | None = None
    """Requests per second instead, with Poisson arrivals, whatever is in flight."""
    seconds: float = 60.0
    """Length of a run."""
    ramp: float = 0.0
    """Seconds at its beginning that do not count."""
    endpoint: str = COMPLETIONS
    model: str | None = None
    """None takes the first that the server lists."""
    dataset: Path | None = None
    """JSON lines with prompts, in place of random ones."""
    input_len: int = 256
    """Tokens."""
    output_len: int = 64
    """Tokens."""
    range_ratio: float = 0.0
    """Both vary by ± this share."""
    prefix_len: int = 0
    """Tokens that all random prompts begin with."""
    vocab_size: int = 1000
    body: Mapping[str, Any] = field(default_factory=dict)
    """Fields for every request."""
    timeout: float = 600.0
    """Seconds until a request is given up."""
    seed: int = 0


class Loader:
    """Runs load, again and again, over one HTTP session."""

    def __init__(self, session: aiohttp.ClientSession, load: Load, slo: Slo, stop: Stop) -> None:
        self._session, self._load, self._slo, self._stop = session, load, slo, stop
        self._prompts: Iterator[Prompt] | None = None

    async def run(self, url: str, headers: Mapping[str, str], *, clients: int | None = None) -> Run | None:
        """Load the server at `url`; None if it was to stop meanwhile. `clients` in place of the load's.

        Raises BenchError where nothing can be measured: no server, no such model, no answer to the warm-up.
        """
        if self._over():
            return None
        load = self._load
        model = load.model or await find_model(self._session, url, headers)
        target = Target(url, load.endpoint, model, headers, load.body, load.timeout)
        if self._prompts is None:
            self._prompts = await self._endless(target)
        await self._warm_up(target)
        before = await scrape(self._session, url, headers)
        records: list[RequestRecord] = []
        clock, prompts = time.perf_counter, self._prompts

        async def send(index: int, intended: float) -> None:
            record = RequestRecord(index, intended)
            records.append(record)
            await send_request(self._session, target, next(prompts), record, clock)
            if record.outcome is Outcome.FAILED:  # a server that refuses at once must not be asked in a spin
                await asyncio.sleep(0.05)

        start = clock()
        if load.rate is None:
            work = closed_loop(_MOST_REQUESTS, clients or load.clients, send, clock=clock)
        else:
            count = min(_MOST_REQUESTS, max(1, math.ceil(load.rate * load.seconds)))
            arrivals = arrival_times(count, load.rate, seed=load.seed)
            work = open_loop(arrivals, send, start=start, clock=clock)
        gauges = _Gauges()
        watching = asyncio.create_task(self._watch(url, headers, gauges))
        timed = Stop()
        interrupted = asyncio.create_task(_forward(self._stop, timed))
        try:
            async with stop_after(timed, load.seconds):
                await timed.bound(work)
        finally:
            for task in (watching, interrupted):
                task.cancel()
            await asyncio.wait({watching, interrupted})
        end = clock()
        if self._over():
            return None
        after = await scrape(self._session, url, headers)
        engine = account(before, after, gauges)
        return measured(records, start=start + load.ramp, end=end, slo=self._slo, engine=engine)

    def _over(self) -> bool:
        return self._stop.reason is not None

    async def _watch(self, url: str, headers: Mapping[str, str], gauges: _Gauges) -> None:
        while True:
            await asyncio.sleep(min(_POLL, self._load.seconds / 8))
            gauges.look(await scrape(self._session, url, headers))

    async def _warm_up(self, target: Target) -> None:
        assert self._prompts is not None
        for _ in range(2):  # kernels compile, caches of templates fill
            record = RequestRecord(0, time.perf_counter())
            await send_request(self._session, target, next(self._prompts), record)
            if record.outcome is not Outcome.COMPLETED:
                raise BenchError(
                    f"a first request to {target.base_url}{target.endpoint} failed: {record.cause}: "
                    f"{record.message}"
                )

    async def _endless(self, target: Target) -> Iterator[Prompt]:
        load = self._load
        if load.dataset is not None:
            lines = read_jsonl(load.dataset, None, chat=target.chat, output_len=load.output_len)
            return itertools.cycle(lines)
        per_word = await tokens_per_word(self._session, target) if target.chat else 1.0
        return RandomPrompts(
            input_len=load.input_len,
            output_len=load.output_len,
            range_ratio=load.range_ratio,
            prefix_len=load.prefix_len,
            format="text" if target.chat else "token-ids",
            vocab_size=load.vocab_size,
            tokens_per_word=per_word,
        ).stream(load.seed)


async def _forward(source: Stop, to: Stop) -> None:
    await source.wait()
    to.set(source.reason or "")


class _Gauges:
    """The highest values that were seen."""

    def __init__(self) -> None:
        self.running: float | None = None
        self.waiting: float | None = None
        self.cache: float | None = None

    def look(self, page: Page | None) -> None:
        if page is not None:
            self.running = _higher(self.running, page.total("vllm:num_requests_running"))
            self.waiting = _higher(self.waiting, page.total("vllm:num_requests_waiting"))
            self.cache = _higher(self.cache, page.most("vllm:kv_cache_usage_perc"))


def _higher(known: float | None, seen: float | None) -> float | None:
    found = [value for value in (known, seen) if value is not None]
    return max(found) if found else None


async def scrape(session: aiohttp.ClientSession, url: str, headers: Mapping[str, str]) -> Page | None:
    """The engine's metrics; None where there are none that can be read."""
    try:
        timeout = aiohttp.ClientTimeout(total=10)
        async with session.get(f"{url}/metrics", headers=headers, timeout=timeout) as answer:
            if answer.status != 200:
                return None
            body = await read_at_most(answer, MOST_BYTES)
            if len(body) > MOST_BYTES:
                return None
            return Page(body.decode("utf-8", "replace"))
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
        return None


def account(before: Page | None, after: Page | None, gauges: _Gauges) -> Engine:
    """The engine's account of what lies between two pages."""
    if after is None:
        return Engine(running=gauges.running, waiting=gauges.waiting, cache=gauges.cache)

    def mean(name: str) -> float | None:
        found = after.histogram(f"vllm:request_{name}_time_seconds")
        earlier = before.histogram(f"vllm:request_{name}_time_seconds") if before is not None else None
        return found.since(earlier).mean if found is not None else None

    def added(name: str) -> float | None:
        now = after.total(name)
        return None if now is None else now - ((before.total(name) if before is not None else 0) or 0)

    return Engine(
        queue=mean("queue"),
        prefill=mean("prefill"),
        decode=mean("decode"),
        running=gauges.running,
        waiting=gauges.waiting,
        cache=gauges.cache,
        preemptions=added("vllm:num_preemptions_total"),
        finished=added("vllm:request_success_total"),
    )
