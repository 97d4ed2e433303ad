"""A gateway on a real socket, in front of fake upstreams."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import textwrap
import time
from collections.abc import Callable, Coroutine, Iterator
from itertools import chain
from typing import Any

import pytest

from penstock.gateway.app import create_app
from penstock.gateway.door import Door
from penstock.gateway.records import Principal, Row
from penstock.gateway.stations import Stations
from penstock.http.config import HttpConfig
from penstock.spec.load import loads
from penstock.spec.model import Spec
from tests.http.live import PATIENCE, Live, Response, exchange

from .memory import MemoryKeys, MemoryMeter
from .upstream import Behaviour, Upstream, answer, hang, hang_after_headers, stall

KEY = "sk-ps-test"
CHAT = "/v1/chat/completions"
BODY = {"model": "small", "messages": [{"role": "user", "content": "Hi!"}], "max_tokens": 16}
STREAM = {**BODY, "stream": True}


class LiveDoor(Live):
    """A gateway's server, which ends its connections, too."""

    def __init__(self, door: Door, config: HttpConfig) -> None:
        super().__init__(create_app(door, config), config)
        self._door = door
        self.loop: asyncio.AbstractEventLoop | None = None

    def do(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something in the gateway's loop, to its end."""
        assert self.loop is not None
        asyncio.run_coroutine_threadsafe(work, self.loop).result(PATIENCE)

    def _run(self) -> None:
        async def serve() -> None:
            self.loop = asyncio.get_running_loop()
            await self._server.serve(sockets=[self._socket])
            await self._door.close()
            await asyncio.sleep(0)  # transports close in the loop's next turn

        asyncio.run(serve())


class Gateway:
    """One, and what it counts."""

    def __init__(self, spec: Spec, upstreams: list[Upstream], keys: dict[str, Principal]) -> None:
        self.meter = MemoryMeter()
        self.keys = MemoryKeys(keys)
        self.upstreams = upstreams
        self.stations = Stations(spec, None, {"CLOUD_KEY": "sk-cloud"})
        self.door = Door(spec, self.keys, self.meter, self.stations, wall=lambda: 1_800_000_000_000_000_000)
        config = HttpConfig(host="127.0.0.1", port=0)
        self.live = LiveDoor(self.door, config)

    @property
    def upstream(self) -> Upstream:
        (only,) = self.upstreams
        return only

    def post(self, body: Any = BODY, path: str = CHAT, key: str = KEY, **headers: str) -> Response:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        if key:
            given["Authorization"] = f"Bearer {key}"
        return exchange(self.live.port, "POST", path, body, given)

    def get(self, path: str, key: str = KEY) -> Response:
        given = {"Authorization": f"Bearer {key}"} if key else {}
        return exchange(self.live.port, "GET", path, None, given)

    def open(self, body: Any = STREAM, path: str = CHAT) -> tuple[http.client.HTTPConnection, Any]:
        """A request whose answer is read by the caller."""
        connection = http.client.HTTPConnection("127.0.0.1", self.live.port, timeout=PATIENCE)
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
        connection.request("POST", path, json.dumps(body).encode(), headers)
        return connection, connection.getresponse()

    def rows(self, count: int) -> list[Row]:
        """The requests so far, once they have ended; checks that nothing is reserved any more."""
        while len(self.meter.rows) < count:
            assert self.meter.ended.acquire(timeout=PATIENCE), "a request has no end"
        assert len(self.meter.rows) == count
        self.settled()
        return self.meter.rows

    def row(self) -> Row:
        """The only one."""
        return self.rows(1)[0]

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Until something is so, in another thread."""
        end = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.005)

    def settled(self) -> None:
        """Every reservation has ended."""
        assert not self.meter.open
        assert not any(self.meter.reserved.values())


SPEC = """
pools:
  box: {{hardware: L4, price_per_hour: 3.60}}
upstreams:
  ours:
    url: {url}/v1
    {urls}
    kind: penstock
    pool: box
    timeout_connect: 0.3
    timeout_headers: 0.3
    timeout_idle: 0.4
    models: {{tiny: {{name: tiny-1, context: 4096}}}}
routes:
  small:
    targets: [{{model: tiny, upstream: ours}}]
    retries: 0
    aliases: [classify-intent]
limits:
  requests_per_minute: 1000
  tokens_per_minute: 1000000
  dollars_per_day: 100
  concurrent_requests: 100
"""

Make = Callable[..., Gateway]
_WAITING = {hang, hang_after_headers, stall}
"""Behaviours that a gateway waits for in vain."""
_BRIEF = re.compile(r"\b(timeout_(?:connect|headers|idle)): 0\.[34]\b")


@pytest.fixture
def make() -> Iterator[Make]:
    """Start gateways: `make(behaviours…)` has one upstream for each, which behaves so."""
    started: list[Gateway] = []

    def start(
        *behaviours: Behaviour,
        spec: str = SPEC,
        retries: int = 0,
        scripts: list[list[Behaviour]] | None = None,
        keys: dict[str, Principal] | None = None,
        replace: dict[str, str] | None = None,
    ) -> Gateway:
        upstreams = [Upstream(default=each).start() for each in behaviours or (answer,)]
        for upstream, script in zip(upstreams, scripts or [], strict=False):
            upstream.script = list(script)
        more = [f"{each.url}/v1" for each in upstreams[1:]]
        urls = {f"url{number}": each.url for number, each in enumerate(upstreams)}
        text = spec.format(url=upstreams[0].url, urls=f"urls: {json.dumps(more)}" if more else "", **urls)
        text = text.replace("retries: 0", f"retries: {retries}")
        for old, new in (replace or {}).items():
            assert old in text
            text = text.replace(old, new)
        if _WAITING.isdisjoint((*behaviours, *chain(*(scripts or ())))):
            text = _BRIEF.sub(r"\1: 10", text)  # nobody is late but by the machine's fault
        principal = Principal(key_id="k1", key_name="test", team="")
        gateway = Gateway(loads(textwrap.dedent(text)), upstreams, keys or {KEY: principal})
        gateway.live.start()
        started.append(gateway)
        return gateway

    yield start
    for gateway in started:
        gateway.live.stop()
        for upstream in gateway.upstreams:
            upstream.stop()


@pytest.fixture
def gateway(make: Make) -> Gateway:
    """One in front of an upstream that works."""
    return make()
