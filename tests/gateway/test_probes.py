"""Health by progress: what probes make of engines, whatever these say."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from penstock.gateway.policy.routes import Kind
from penstock.gateway.probes import Probe, read_metrics
from penstock.gateway.stations import Station

from .upstream import Upstream, Wire


def test_pages_of_metrics_are_read_as_far_as_they_are_wanted() -> None:
    page = """
# HELP vllm:num_requests_running x
vllm:num_requests_running{engine="0",model_name="a }b"} 2.0
vllm:num_requests_running{engine="1",model_name="m"} 3.0 1700000000
vllm:num_requests_waiting 4
vllm:kv_cache_usage_perc{engine="0"} NaN
vllm:generation_tokens_total{engine="0"} 1e3
vllm:prompt_tokens_total{engine="0"
vllm:prompt_tokens_total{engine="0"} x
vllm:something_else 1
python_info 1
"""
    assert read_metrics(page) == {
        "vllm:num_requests_running": 5.0,
        "vllm:num_requests_waiting": 4.0,
        "vllm:generation_tokens_total": 1000.0,
    }


class Engine:
    """What an upstream answers to probes."""

    def __init__(self) -> None:
        self.statuses = {"/readyz": 200, "/livez": 200, "/health": 200}
        self.page = b""

    async def __call__(self, wire: Wire) -> None:
        path = wire.asked.path
        if path == "/metrics":
            await wire.whole(200, self.page)
        else:
            await wire.whole(self.statuses[path], b"{}")


def watched(kind: Kind, steps: Callable[[Engine, Station, Clock, Probe, Upstream], Awaitable[None]]) -> None:
    """Run a probe's looks against an engine."""
    engine, clock = Engine(), Clock()
    upstream = Upstream(default=engine).start()

    async def run() -> None:
        station = Station("e", upstream.url, kind, headers={})
        try:
            await steps(engine, station, clock, Probe(station, clock), upstream)
        finally:
            await station.close()
            await asyncio.sleep(0.01)  # aiohttp closes its transports in the loop's next turns

    try:
        asyncio.run(run())
    finally:
        upstream.stop()


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


METRICS = (
    'vllm:num_requests_running{e="0"} %d\nvllm:num_requests_waiting{e="0"} 7\nvllm:kv_cache_usage_perc 0.5\n'
)
DONE = "vllm:generation_tokens_total %d\n"


@pytest.mark.parametrize("path", ["/readyz", "/livez"])
def test_an_engine_of_ours_says_when_it_is_not_ready_or_stuck(path: str) -> None:
    async def steps(engine: Engine, station: Station, clock: Clock, probe: Probe, upstream: Upstream) -> None:
        engine.page = (METRICS % 3).encode()
        await probe.look()
        assert station.health.weight(clock.now) == 1
        candidate = station.candidate((), clock.now)
        assert (candidate.waiting, candidate.kv_usage) == (7.0, 0.5)
        assert station.candidate((), clock.now + 11).waiting == 0  # an old report says nothing
        engine.statuses[path] = 503
        await probe.look()
        assert station.health.weight(clock.now) == 0
        engine.statuses[path] = 200
        await probe.look()
        assert station.health.weight(clock.now) > 0

    watched("penstock", steps)


def test_a_vllm_that_answers_and_computes_nothing_is_out() -> None:
    async def steps(engine: Engine, station: Station, clock: Clock, probe: Probe, upstream: Upstream) -> None:
        engine.page = (METRICS % 1 + DONE % 100).encode()
        for _ in range(31):
            await probe.look()
            assert station.health.weight(clock.now) == (1 if clock.now < 1030 else 0)
            clock.now += 1
        engine.page = (METRICS % 1 + DONE % 101).encode()
        await probe.look()
        assert station.health.weight(clock.now) > 0
        engine.statuses["/health"] = 500
        await probe.look()
        assert station.health.weight(clock.now) == 0

    watched("vllm", steps)


def test_a_long_page_is_read_to_its_end() -> None:
    """What is wanted stands behind what does not fit into one packet."""

    async def steps(engine: Engine, station: Station, clock: Clock, probe: Probe, upstream: Upstream) -> None:
        engine.page = b'vllm:some_bucket{le="1"} 1\n' * 20_000 + (METRICS % 1).encode()
        await probe.look()
        assert station.candidate((), clock.now).waiting == 7

    watched("vllm", steps)


def test_one_probe_without_an_answer_is_forgiven() -> None:
    async def steps(engine: Engine, station: Station, clock: Clock, probe: Probe, upstream: Upstream) -> None:
        await probe.look()
        await asyncio.to_thread(upstream.stop)
        await probe.look()
        assert station.health.weight(clock.now) == 1
        await probe.look()
        assert station.health.weight(clock.now) == 0

    watched("vllm", steps)


def test_a_page_of_several_segments_is_read_to_its_end() -> None:
    async def steps(engine: Engine, station: Station, clock: Clock, probe: Probe, upstream: Upstream) -> None:
        engine.page = b"vllm:something_else 1\n" * 40_000 + b"vllm:num_requests_waiting 7\n"
        await probe.look()
        assert station.candidate((), clock.now).waiting == 7

    watched("vllm", steps)
