"""Whoever leaves pays what was used: our own server behind the gateway, its final bills in the rows."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import random
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.gateway import bills
from penstock.gateway.bill import give_up, late
from penstock.gateway.ledger.writer import unsettled
from penstock.gateway.metrics import Metrics
from penstock.gateway.records import Asked, Principal, Row
from penstock.gateway.stations import Stations
from penstock.gateway.usage import Tally
from penstock.spec.load import loads
from tests.server.conftest import LiveServer, running
from tests.server.fake_engine import FakeEngine
from tests.server.tiny import make_tokenizer

from .conftest import KEY, Gateway
from .upstream import Upstream, Wire

SPEC = """
pools: {{box: {{hardware: L4, price_per_hour: 3.60}}}}
upstreams:
  ours:
    url: {url}/v1
    kind: penstock
    pool: box
    trusts_gateway: true
    api_key_env: CLOUD_KEY
    models: {{tiny: {{}}}}
routes: {{small: {{targets: [{{model: tiny, upstream: ours}}], retries: 0}}}}
teams: {{search: {{}}}}
tags: {{feature: {{nightly: {{service_class: background}}}}}}
"""
BODY = {"model": "small", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 60}
MICROSECOND = 1_000


@pytest.fixture
def engine() -> FakeEngine:
    """Each token takes a millisecond of the device; it says fifty."""
    return FakeEngine(lambda asked: [65] * 50)


@pytest.fixture
def server(engine: FakeEngine) -> Iterator[LiveServer]:
    with running(make_tokenizer(), engine.reply, engine=engine, gateway_key="sk-cloud") as server:
        yield server


def gateway_before(server: LiveServer) -> Gateway:
    return Gateway(loads(SPEC.format(url=server.url)), [], {KEY: Principal(key_id="k1", team="search")})


def started(gateway: Gateway) -> None:
    async def start() -> None:
        gateway.door.start()

    gateway.live.start()
    gateway.wait_for(lambda: gateway.live.loop is not None)
    gateway.live.do(start())


@pytest.fixture
def gateway(server: LiveServer) -> Iterator[Gateway]:
    gateway = gateway_before(server)
    started(gateway)
    yield gateway
    gateway.live.stop()


def test_a_team_is_a_tenant(gateway: Gateway, engine: FakeEngine) -> None:
    assert gateway.post(BODY).status == 200
    assert engine.adds[0].spec.tenant == "team:search"
    assert gateway.row().settlement == "settled"


def test_a_class_is_the_gateways_word(gateway: Gateway, engine: FakeEngine) -> None:
    """A client may lower its own, and raises none; whose it is, it does not say."""
    gateway.post(BODY, X_Penstock_Tenant="team:other")
    gateway.post(BODY, X_Penstock_Class="background", X_Penstock_Tenant="team:other")
    gateway.post(BODY, X_Penstock_Feature="nightly", X_Penstock_Class="realtime")
    told = [(each.spec.tenant, each.spec.service_class.value) for each in engine.adds]
    assert told == [("team:search", each) for each in ("realtime", "background", "background")]


@pytest.mark.parametrize("streams", [False, True], ids=["plain", "stream"])
def test_who_leaves_pays_what_was_used(gateway: Gateway, engine: FakeEngine, streams: bool) -> None:
    engine.pause_at = 7
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        if streams:
            connection, response = gateway.open({**BODY, "stream": True})
            assert response.readline().startswith(b"data: ")
            response.close()
            connection.close()
        else:
            asking = pool.submit(gateway.post, BODY)
            gateway.wait_for(lambda: bool(engine.adds))
            gateway.live.do(leave(gateway))
            asking.exception(20)
        row = gateway.row()
    assert row.end in ("client_gone", "killed")
    assert row.settlement == "settled"
    assert 0 < row.output_tokens <= 8
    assert row.device_seconds is not None
    assert row.device_seconds == pytest.approx(row.output_tokens * 1_000_000, abs=1_000_000 + MICROSECOND)
    assert row.dollars == row.device_seconds // 1000  # 3.60 an hour: a nanodollar for each microsecond


async def leave(gateway: Gateway) -> None:
    """End the requests under way, as a client that leaves does."""
    for task in list(gateway.door._running):
        task.cancel()


def test_the_rows_of_a_crowd_that_leaves_are_what_the_engine_used(
    gateway: Gateway, engine: FakeEngine
) -> None:
    """Half of them read to the end; the others leave somewhere."""
    draw = random.Random(7)
    counts = [draw.randint(0, 30) if number % 2 else None for number in range(60)]

    def ask(lines: int | None) -> None:
        connection, response = gateway.open({**BODY, "stream": True})
        if lines is None:
            assert response.read().endswith(b"data: [DONE]\n\n")
        else:
            for _ in range(2 * lines):
                response.readline()
        response.close()
        connection.close()

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, counts))
    rows = gateway.rows(len(counts))
    assert {row.settlement for row in rows} == {"settled"}
    billed = sum(row.device_seconds or 0 for row in rows)
    assert billed == pytest.approx(sum(busy_of(gateway)), rel=1e-3)


def busy_of(gateway: Gateway) -> list[float]:
    """Nanoseconds of each bill in the engine's own feed."""
    (station,) = gateway.stations.all()
    request = urllib.request.Request(f"{station.url}/v1/bills", headers={"Authorization": "Bearer sk-cloud"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return [bill["device_seconds"] * 1e9 for bill in json.load(answer)["data"]]


def test_a_bill_that_does_not_come_leaves_the_row_at_its_reservation(
    gateway: Gateway, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bills, "PATIENCE", 0.1)
    monkeypatch.setattr(bills.Bills, "_tell", lambda *_: True)
    engine.pause_at = 3
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asking = pool.submit(gateway.post, BODY)
        gateway.wait_for(lambda: bool(engine.adds))
        gateway.live.do(leave(gateway))
        asking.exception(20)
    row = gateway.row()
    assert (row.settlement, row.dollars) == ("unsettled", row.reserved_dollars)


def test_a_long_page_of_bills_is_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page does not fit into one packet: what came first is no page."""
    names = [f"request-{number}-{'x' * 500}" for number in range(999)]
    page = {"data": [{"request_id": name, "device_seconds": 1.0} for name in names], "next": "start:999"}

    async def feed(wire: Wire) -> None:
        start: dict[str, Any] = {"data": [], "next": "start:0"}
        await wire.whole(200, page if "after=" in wire.asked.path else start)

    monkeypatch.setattr("tests.gateway.upstream.no_bills", feed)
    monkeypatch.setattr(bills, "PATIENCE", 0.1)
    upstream = Upstream().start()
    stations = Stations(loads(SPEC.format(url=upstream.url)), None, {"CLOUD_KEY": "sk-cloud"})
    feeds = bills.Bills(stations, Metrics())

    async def read() -> tuple[bool, int | None]:
        (station,) = stations.all()
        for _ in range(2):  # where the feed ends, and what is behind that
            await feeds.look()
        tally = Tally()
        asked = Asked(replica="ours", upstream="ours", model="tiny", bill=names[-1])
        found = await feeds.fill(tally, station, asked)
        await station.close()
        await asyncio.sleep(0.01)  # aiohttp closes its transports in the loop's next turns
        return found, tally.device_seconds

    assert asyncio.run(read()) == (True, 1_000_000_000)
    upstream.stop()


def test_a_key_that_is_no_gateways_is_said_and_the_rest_goes_on(
    engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    with running(make_tokenizer(), engine.reply, engine=engine, api_key="sk-cloud") as server:
        gateway = gateway_before(server)
        started(gateway)
        (station,) = gateway.stations.all()
        gateway.wait_for(lambda: not station.trusted)
        assert gateway.post(BODY).status == 200
        assert gateway.row().settlement == "settled"
        gateway.live.stop()
    assert "its key is none of --gateway-key" in caplog.text


def test_an_engine_that_refuses_its_bills_is_asked_again_after_a_while(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Less and less often; said once. From the moment that it gives them it is trusted again."""
    statuses = [403, 401, 404, 200]

    async def feed(wire: Wire) -> None:
        await wire.whole(statuses.pop(0) if statuses else 200, {"data": [], "next": "start:0"})

    monkeypatch.setattr("tests.gateway.upstream.no_bills", feed)
    upstream = Upstream().start()
    stations = Stations(loads(SPEC.format(url=upstream.url)), None, {"CLOUD_KEY": "sk-cloud"})
    feeds = bills.Bills(stations, Metrics())

    async def look() -> None:
        (station,) = stations.all()
        now = asyncio.get_running_loop().time()
        pauses = []
        for left in (3, 2, 1):
            await feeds.look()
            assert (len(statuses), station.trusted) == (left, False)
            await feeds.look()  # not yet
            assert len(statuses) == left
            refused = feeds._refused[station]
            pauses.append(refused.pause)
            assert refused.at >= now + refused.pause
            feeds._refused[station] = refused._replace(at=now)  # so long have we waited
        assert pauses == [5.0, 10.0, 20.0]
        await feeds.look()
        assert (station.trusted, await feeds.cursor(station)) == (True, "start:0")
        await station.close()
        await asyncio.sleep(0.01)  # aiohttp closes its transports in the loop's next turns

    asyncio.run(look())
    upstream.stop()
    said = [record.getMessage() for record in caplog.records if record.name == "penstock.gateway"]
    assert [text for text in said if "does not give its bills (status 403)" in text] == said[:1]
    assert said[1:] == ["ours gives its bills again"]


def test_a_row_with_a_part_whose_bill_is_lost_stays_an_estimate() -> None:
    priced: dict[str, Any] = {"model": "m", "pool": "box", "device": "L4", "upstream": "a"}
    one = Asked(replica="a/0", bill="x", part=400, **priced)
    two = Asked(replica="a/1", bill="y", part=1000, **priced)
    row = Row(id="r", at=0, key_id="k", owed=(one, two), settlement="estimated")
    row.device_seconds, row.device_seconds_estimated = 1400, True
    give_up(row, one)
    assert late(row, row.owed[0], Tally(device_seconds=600, told=True, final=True)) is not None
    assert (row.settlement, row.device_seconds, row.device_seconds_estimated) == ("estimated", 1000, True)
    assert row.owed == ()


PRICED: dict[str, Any] = {"model": "m", "pool": "box", "device": "L4", "upstream": "a", "devices": 2}


def killed(*behind: int) -> Row:
    """The row of a worker that died when so many tokens had come before each attempt."""
    attempts = [
        Asked(replica=f"a/{at}", bill=f"b{at}", behind=count, device_price=3600, **PRICED)
        for at, count in enumerate(behind)
    ]
    row = Row(id="r", at=0, key_id="k", reserved_dollars=999, reserved_device_seconds=999)
    return unsettled(row, attempts)


def test_of_a_killed_worker_whoever_gave_something_is_a_part() -> None:
    row = killed(0, 0, 12, 12, 30)
    assert [(each.gave, each.lost) for each in row.owed] == [
        (None, True),  # failed before there was an answer
        (12, False),
        (None, True),  # went on, and gave nothing
        (18, False),
        (None, False),
    ]
    assert (row.settlement, row.replica, row.attempts, row.dollars) == ("unsettled", "a/4", 5, 999)
    assert [(each.gave, each.lost) for each in killed(0, 0).owed] == [(None, True), (None, False)]


@given(
    order=st.permutations(range(4)),
    seconds=st.lists(st.integers(0, 10**9), min_size=4, max_size=4),
    repeated=st.booleans(),
)
def test_a_killed_row_is_settled_by_all_its_engines_once_in_any_order(
    order: list[int], seconds: list[int], repeated: bool
) -> None:
    """Prompt of 7 tokens; 12 and 18 of the answer from the first two parts, and 5 as the last engine says."""
    row = killed(0, 0, 12, 30)
    charged = []
    for at in order:
        tally = Tally(input=7, output=5 if at == 3 else 40, cached=at, device_seconds=seconds[at])
        asked = next(each for each in row.owed if each.bill == f"b{at}")
        charged.append(late(row, asked, tally))
        if repeated:
            assert late(row, asked, tally) is None
    (used,) = [each for each in charged if each is not None]
    assert (row.settlement, row.owed, row.device_seconds_estimated) == ("settled", (), False)
    assert (row.input_tokens, row.output_tokens, row.cached_tokens) == (7, 12 + 18 + 5, 1)
    assert row.device_seconds == used.device_seconds == 2 * sum(seconds[1:])
    assert row.lost_device_seconds == 2 * seconds[0]
    assert (row.dollars, used.tokens) == (used.dollars, 42)


@given(order=st.permutations(range(3)), lost=st.sets(st.integers(0, 2), min_size=1))
def test_the_time_of_an_engine_that_cannot_say_it_is_as_the_others(order: list[int], lost: set[int]) -> None:
    """A microsecond for each token that is read or written; 10, 20 and (where it says so) 30 are written."""
    row = killed(0, 10, 30)
    charged = []
    for at in order:
        asked = next(each for each in row.owed if each.bill == f"b{at}")
        written = 10 * (at + 1)
        tally = Tally(input=5, output=written, cached=0, device_seconds=1000 * (5 + written))
        charged.append(give_up(row, asked) if at in lost else late(row, asked, tally))
    assert row.owed == ()
    if len(lost) == 3:
        assert (row.settlement, row.device_seconds, set(charged)) == ("unsettled", 999, {None})
        return
    output = 30 if 2 in lost else 60
    assert (row.settlement, row.device_seconds_estimated) == ("estimated", True)
    assert (row.input_tokens, row.output_tokens) == (5, output)
    assert row.device_seconds == 2 * 1000 * (3 * 5 + output)
    assert sum(each is not None for each in charged) == 1


def test_a_late_bill_of_a_part_replaces_its_estimate_and_nothing_else() -> None:
    """Two engines made the answer, and both bills come late."""
    priced: dict[str, Any] = {
        "model": "m",
        "pool": "box",
        "device": "L4",
        "devices": 2,
        "device_price": 3_600_000_000,
    }
    one = Asked(replica="a/0", upstream="a", bill="x", part=400, **priced)
    two = Asked(replica="a/1", upstream="a", bill="y", part=1000, **priced)
    row = Row(id="r", at=0, key_id="k", input_tokens=7, output_tokens=9, cached_tokens=2, owed=(one, two))
    row.device_seconds, row.device_seconds_estimated, row.settlement = 1400, True, "estimated"
    used = late(row, one, Tally(input=7, output=5, device_seconds=150, told=True, final=True))
    assert used is not None
    assert (used.tokens, used.device_seconds) == (16, 1300)
    assert (row.settlement, row.device_seconds, row.owed) == ("estimated", 1300, (two,))
    used = late(row, two, Tally(input=7, output=6, device_seconds=600, told=True, final=True))
    assert used is not None
    assert (row.settlement, row.device_seconds, row.device_seconds_estimated) == ("settled", 1500, False)
    assert (row.input_tokens, row.output_tokens, row.cached_tokens) == (7, 9, 2)
    assert (row.dollars, used.dollars) == (2, 2)  # 3.60 an hour
    assert late(row, two, Tally(device_seconds=600)) is None
