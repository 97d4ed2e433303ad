"""Replicas that are found by a name with several addresses, as of a headless Service."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import aiohttp
import pytest
from aiohttp import web

from penstock.gateway.discovery import Discovery, addresses
from penstock.gateway.metrics import Metrics
from penstock.gateway.policy.routes import Place
from penstock.gateway.stations import Stations
from penstock.spec import SpecError, loads

SPEC = """
pools: {gpu: {hardware: L4, count: 4}}
upstreams:
  chat:
    url: http://chat.llm-serving.svc:PORT/v1
    discover: true
    kind: penstock
    api_key_env: KEY
    trusts_gateway: true
    pool: gpu
    models: {chat: {}}
routes: {chat: {targets: [{model: chat, upstream: chat}]}}
"""
PLACE = Place(
    name="chat",
    local=False,
    model="chat",
    kind="penstock",
    in_house=True,
    context=None,
    devices=1,
    pool="gpu",
    device="L4",
    device_price=None,
    price=None,
)


class Names:
    """A resolver that says what it is told."""

    def __init__(self) -> None:
        self.found: Sequence[str] | OSError = ()
        self.asked: list[tuple[str, int]] = []

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append((host, port))
        if isinstance(self.found, OSError):
            raise self.found
        return self.found


def place_of(stations: Stations) -> list[str]:
    return [each.id for each in stations.of(PLACE)]


def test_replicas_come_and_go_and_keep_what_is_theirs() -> None:
    async def inside() -> None:
        stations = Stations(loads(SPEC.replace("PORT", "8000")), None, {"KEY": "k" * 20})
        names, gone = Names(), list[str]()
        discovery = Discovery(stations, gone.append, names)
        assert place_of(stations) == [], "nobody before the first look"
        names.found = ["10.0.0.2", "10.0.0.1", "fd00::1"]
        await discovery.look()
        assert names.asked == [("chat.llm-serving.svc", 8000)]
        assert place_of(stations) == ["chat/10.0.0.1", "chat/10.0.0.2", "chat/fd00::1"]
        first, second, third = stations.of(PLACE)
        assert (first.url, third.url) == ("http://10.0.0.1:8000", "http://[fd00::1]:8000")
        assert first.trusted
        first.in_flight = 1
        names.found = ["10.0.0.2", "10.0.0.3"]
        await discovery.look()
        assert place_of(stations) == ["chat/10.0.0.2", "chat/10.0.0.3"]
        assert stations.of(PLACE)[0] is second, "its health and its prefixes stay"
        assert gone == ["chat/10.0.0.1", "chat/fd00::1"]
        assert first in stations._gone, "a request is under way there"
        assert third not in stations._gone
        first.in_flight = 0
        await discovery.look()
        assert stations._gone == []
        await stations.close()

    asyncio.run(inside())


def test_a_name_that_is_not_answered_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def inside() -> None:
        stations = Stations(loads(SPEC.replace("PORT", "8000")), None, {"KEY": "k" * 20})
        names = Names()
        discovery = Discovery(stations, lambda _: None, names)
        names.found = ["10.0.0.1"]
        await discovery.look()
        names.found = OSError(-3, "Temporary failure in name resolution")
        for _ in range(3):
            await discovery.look()
        assert place_of(stations) == ["chat/10.0.0.1"]
        names.found = []
        await discovery.look()
        assert place_of(stations) == []
        await stations.close()

    with caplog.at_level(logging.WARNING, "penstock.gateway"):
        asyncio.run(inside())
    assert len([each for each in caplog.records if "cannot be looked up" in each.message]) == 1


def test_requests_go_to_every_address() -> None:
    async def inside() -> None:
        asked: list[str] = []

        async def answer(request: web.Request) -> web.Response:
            asked.append(request.host)
            return web.json_response({})

        app = web.Application()
        app.router.add_get("/readyz", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        port = runner.addresses[0][1]
        await web.TCPSite(runner, "127.0.0.2", port).start()
        stations = Stations(loads(SPEC.replace("PORT", str(port))), None, {"KEY": "k" * 20})
        names = Names()
        names.found = ["127.0.0.1", "127.0.0.2"]
        await Discovery(stations, lambda _: None, names).look()
        for station in stations.of(PLACE):
            async with station.request("GET", "/readyz", timeout=aiohttp.ClientTimeout(5)) as response:
                assert response.status == 200
        assert asked == [f"127.0.0.1:{port}", f"127.0.0.2:{port}"]
        await stations.close()
        await runner.cleanup()

    asyncio.run(inside())


def test_the_resolver_of_this_machine() -> None:
    assert "127.0.0.1" in asyncio.run(addresses("127.0.0.1", 80))


def test_series_of_a_replica_that_is_gone_go() -> None:
    metrics = Metrics()
    metrics.station("chat/10.0.0.1", 1, 1.0)
    assert b"chat/10.0.0.1" in metrics.page()
    metrics.forget("chat/10.0.0.1")
    metrics.forget("chat/10.0.0.1")
    assert b"chat/10.0.0.1" not in metrics.page()


@pytest.mark.parametrize(
    "change", [("http://chat", "https://chat"), ("discover: true", "discover: true\n    urls: ['http://x']")]
)
def test_what_cannot_be_discovered_is_refused(change: tuple[str, str]) -> None:
    with pytest.raises(SpecError, match=r"upstreams\.chat\.discover"):
        loads(SPEC.replace("PORT", "8000").replace(*change))
