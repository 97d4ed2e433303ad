"""Rows without bills, and what their engines say of them later."""

from __future__ import annotations

import http.client
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import msgspec
import pytest

from penstock.gateway import bill, bills, settler
from penstock.gateway.bills import Verdict
from penstock.gateway.policy.amounts import NANO, Amounts
from penstock.gateway.records import Asked, Principal, Row
from penstock.gateway.settler import Settler
from penstock.gateway.usage import Tally
from penstock.spec.load import loads
from tests.server.conftest import LiveServer, running
from tests.server.fake_engine import FakeEngine
from tests.server.tiny import make_tokenizer

from .conftest import KEY, Gateway
from .test_bills import BODY, SPEC, started

WALL = 1_800_000_000_000_000_000
MILLISECOND = 1_000_000


class MemoryRows:
    """Rows that were written without their bills."""

    def __init__(self, *rows: Row) -> None:
        self.rows = {("w", number): row for number, row in enumerate(rows)}
        self.used: list[Amounts] = []

    async def owed(self, since: int, most: int) -> list[tuple[str, int, Row]]:
        waiting = [(*place, row) for place, row in self.rows.items() if row.owed and row.at >= since]
        return msgspec.convert(msgspec.to_builtins(waiting[:most]), list[tuple[str, int, Row]])

    async def resettle(self, places: settler.Places, settle: Callable[[Row], Amounts | None]) -> None:
        for place in places:
            used = settle(self.rows[place])
            self.used += [] if used is None else [used]


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(lambda asked: [65] * 50)


@pytest.fixture
def gateway(engine: FakeEngine) -> Iterator[Gateway]:
    with running(make_tokenizer(), engine.reply, engine=engine, gateway_key="sk-cloud") as server:
        gateway = before(server)
        yield gateway
        gateway.live.stop()


def before(*servers: LiveServer, retries: int = 0) -> Gateway:
    text = SPEC.format(url=servers[0].url).replace("retries: 0", f"retries: {retries}")
    if len(servers) > 1:
        text = text.replace(
            "kind: penstock", f"urls: {[each.url for each in servers[1:]]}\n    kind: penstock"
        )
    gateway = Gateway(loads(text), [], {KEY: Principal(key_id="k1", team="search")})
    started(gateway)
    return gateway


def unsettled(*owed: Asked, **fields: Any) -> Row:
    row = Row(
        id="r", at=WALL, key_id="k1", settlement="unsettled", dollars=999, device_seconds=999, owed=owed
    )
    return msgspec.structs.replace(row, **fields)


def look(gateway: Gateway, *rows: Row, doubt: float = 0.0) -> MemoryRows:
    """One look of a settler at these rows."""
    memory = MemoryRows(*rows)
    door = gateway.door
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settler, "_DOUBT", doubt)
        looks = Settler(memory, door.bills, gateway.stations, door.metrics, door.wall)
        gateway.live.do(looks.look())
    return memory


def asked_now(gateway: Gateway, **fields: Any) -> Asked:
    """An attempt as of the last request, under another name."""
    return msgspec.structs.replace(gateway.meter.attempts[-1], **fields)


def outcomes(gateway: Gateway) -> dict[str, float]:
    found = {}
    for line in gateway.door.metrics.page().decode().splitlines():
        if line.startswith("penstock:gateway_bills_total{"):
            found[line.partition('outcome="')[2].partition('"')[0]] = float(line.rpartition(" ")[2])
    return found


def billed(gateway: Gateway) -> float:
    """Device-seconds that the metrics have counted."""
    for line in gateway.door.metrics.page().decode().splitlines():
        if line.startswith("penstock:gateway_device_seconds_total{"):
            return float(line.rpartition(" ")[2])
    return 0.0


def test_what_is_billed_is_counted_once_when_it_is_known(
    gateway: Gateway, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not as it is estimated, and by whoever settles the row: a counter cannot go down again."""
    assert gateway.post(BODY).status == 200
    (known,) = gateway.rows(1)
    assert billed(gateway) == (known.device_seconds or 0) / NANO > 0
    monkeypatch.setattr(bills, "PATIENCE", 0.05)
    monkeypatch.setattr(bills.Bills, "_tell", lambda *_: True)
    engine.pause_at = 7
    connection, response = gateway.open({**BODY, "stream": True})
    response.close()
    connection.close()
    row = gateway.rows(2)[-1]
    assert (row.settlement, row.device_seconds is not None) == ("estimated", True)
    assert billed(gateway) == (known.device_seconds or 0) / NANO
    gone = asked_now(gateway, bill="gone", after="")
    rows = look(gateway, row, unsettled(gone, route="small", upstream="ours"))
    # of what will never be known, the reservation stays
    wanted = [known.device_seconds, row.device_seconds, 999]
    assert len(rows.used) == 1
    assert billed(gateway) == pytest.approx(sum(each or 0 for each in wanted) / NANO, rel=1e-12)
    look(gateway, row)
    assert billed(gateway) == pytest.approx(sum(each or 0 for each in wanted) / NANO, rel=1e-12)


def test_an_attempt_is_noted_before_it_is_made_with_all_that_prices_it(gateway: Gateway) -> None:
    assert gateway.post(BODY).status == 200
    [asked] = gateway.meter.attempts
    row = gateway.row()
    assert asked == Asked(
        replica="ours",
        upstream="ours",
        model="tiny",
        pool="box",
        device="L4",
        device_price=3_600_000_000,
        bill=asked.bill,
        after=asked.after,
    )
    assert asked.bill.startswith(f"{row.id}.")
    assert asked.after.endswith(":0")
    assert (row.pool, row.owed, row.settlement) == ("box", (), "settled")


def test_a_bill_settles_its_row_later_as_it_would_have_at_once(gateway: Gateway) -> None:
    assert gateway.post(BODY).status == 200
    at_once = gateway.row()
    row = unsettled(gateway.meter.attempts[0], upstream="ours")
    memory = look(gateway, row)
    for name in ("input_tokens", "output_tokens", "device_seconds", "dollars", "pool", "device"):
        assert getattr(row, name) == getattr(at_once, name)
    assert (row.settlement, row.owed) == ("settled", ())
    [used] = memory.used
    assert (used.dollars, used.device_seconds) == (row.dollars, row.device_seconds)
    assert outcomes(gateway) == {"late": 1.0}
    assert look(gateway, row).used == []


def test_what_the_engine_never_had_costs_nothing_once_it_cannot_be_on_its_way(gateway: Gateway) -> None:
    assert gateway.post(BODY).status == 200
    row = unsettled(asked_now(gateway, bill="never"))
    assert look(gateway, row, doubt=1.0).used == []
    assert (row.settlement, row.dollars) == ("unsettled", 999)
    assert look(gateway, row).used == [Amounts()]
    assert (row.settlement, row.dollars, row.device_seconds) == ("settled", 0, 0)


def test_rows_of_more_than_one_look_are_settled_at_their_second_sight(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settler, "_MOST", 3)
    monkeypatch.setattr(settler, "_DOUBT", 1e-9)
    assert gateway.post(BODY).status == 200
    rows = [unsettled(asked_now(gateway, bill=f"never {at}"), at=WALL + at) for at in range(6)]
    door = gateway.door
    looks = Settler(MemoryRows(*rows), door.bills, gateway.stations, door.metrics, door.wall)
    for _ in range(6):  # three for all of them, twice
        gateway.live.do(looks.look())
    assert [row.settlement for row in rows] == ["settled"] * 6


def test_what_is_under_way_is_waited_for(gateway: Gateway, engine: FakeEngine) -> None:
    engine.pause_at = 3
    connection, response = gateway.open({**BODY, "stream": True})
    row = unsettled(gateway.meter.attempts[0])
    assert look(gateway, row).used == []
    assert len(row.owed) == 1
    engine.resume()
    response.read()
    connection.close()
    assert len(look(gateway, row).used) == 1


@pytest.mark.parametrize("after", ["", "0123456789ab:7"], ids=["unknown", "earlier start"])
def test_what_the_engine_has_lost_stays_as_it_was(
    gateway: Gateway, after: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert gateway.post(BODY).status == 200
    row = unsettled(asked_now(gateway, bill="gone", after=after))
    assert look(gateway, row).used == []
    assert (row.settlement, row.dollars, row.owed) == ("unsettled", 999, ())
    assert "ours does not know the bill gone any more; its row stays unsettled" in caplog.text
    assert outcomes(gateway) == {"lost": 1.0}


def test_a_bill_of_an_earlier_start_that_is_there_all_the_same_is_taken(gateway: Gateway) -> None:
    """The gateway had not read yet that the engine has started anew."""
    assert gateway.post(BODY).status == 200
    row = unsettled(asked_now(gateway, after="0123456789ab:7"))
    assert len(look(gateway, row).used) == 1
    assert row.settlement == "settled"


def test_an_engine_that_is_away_is_asked_again(engine: FakeEngine) -> None:
    with running(make_tokenizer(), engine.reply, engine=engine, gateway_key="sk-cloud") as server:
        gateway = before(server)
        assert gateway.post(BODY).status == 200
    elsewhere = asked_now(gateway, replica="ours/7")
    row = unsettled(gateway.meter.attempts[0], elsewhere)
    assert look(gateway, row).used == []
    assert row.owed == (gateway.meter.attempts[0], elsewhere)
    gateway.live.stop()


def test_bills_that_the_feed_has_dropped_are_lost_and_those_behind_are_not() -> None:
    page = bills._Page([], "s:20", lost=3, under_way=["c"])
    at = [Asked(replica="r", upstream="u", model="m", bill=name, after=f"s:{place}") for name, place in
          (("a", 5), ("b", 7), ("c", 7), ("d", 8))]  # fmt: skip
    assert bills._verdicts(page, at) == {"a": Verdict.LOST, "b": Verdict.LOST, "d": Verdict.NEVER_CAME}


def test_an_engine_that_cannot_look_for_some_says_nothing_of_them() -> None:
    asked = Asked(replica="r", upstream="u", model="m", bill="a", after="s:1")
    assert bills._verdicts(bills._Page([bills._Bill("b")], "s:2"), [asked]) == {}


def test_the_time_of_a_failed_attempt_is_in_the_row_and_charged_to_nobody() -> None:
    asked = Asked(
        replica="r", upstream="u", model="m", device="L4", devices=2, device_price=1, bill="a", lost=True
    )
    row = unsettled(asked, settlement="settled")
    tally = Tally(input=5, output=5, device_seconds=30, told=True, final=True)
    assert bill.late(row, asked, tally) is None
    assert bill.late(row, asked, tally) is None, "the second time it is not owed"
    assert (row.lost_device_seconds, row.device_seconds, row.dollars) == (60, 999, 999)


@pytest.mark.parametrize("streams", [False, True], ids=["plain", "stream"])
def test_the_ledger_has_what_an_engine_did_before_it_failed(streams: bool) -> None:
    """One engine fails after three tokens; the other answers."""
    broken, well = (FakeEngine(lambda asked: [65] * 50) for _ in range(2))
    broken.fail_at = 3
    with ExitStack() as stack:
        servers = [
            stack.enter_context(running(make_tokenizer(), each.reply, engine=each, gateway_key="sk-cloud"))
            for each in (broken, well)
        ]
        gateway = before(*servers, retries=3)
        wanted = 0
        while not broken.adds:  # which one is asked first is drawn
            wanted += 1
            assert wanted < 30
            assert gateway.post({**BODY, "stream": False} if not streams else BODY).status == 200
        row = gateway.rows(wanted)[-1]
        assert (row.attempts, row.settlement, row.end) == (2, "settled", "done")
        assert [asked.lost for asked in row.owed] == [True]
        assert row.device_seconds == gateway.rows(wanted)[0].device_seconds
        memory = look(gateway, row)
        assert memory.used == []
        assert (row.lost_device_seconds, row.owed) == (3 * MILLISECOND, ())
        gateway.live.stop()


def test_all_engines_fail_and_nobody_is_charged(gateway: Gateway, engine: FakeEngine) -> None:
    engine.fail_at = 3
    assert gateway.post(BODY).status == 502
    row = gateway.row()
    assert (row.settlement, row.dollars, row.device_seconds) == ("settled", None, None)
    look(gateway, row)
    assert (row.lost_device_seconds, row.dollars, row.owed) == (3 * MILLISECOND, None, ())


def test_a_bill_that_does_not_come_is_said_and_counted(
    gateway: Gateway, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(bills, "PATIENCE", 0.05)
    monkeypatch.setattr(bills.Bills, "_tell", lambda *_: True)
    engine.pause_at = 7
    connection, response = gateway.open({**BODY, "stream": True})
    assert isinstance(response, http.client.HTTPResponse)
    response.close()
    connection.close()
    row = gateway.row()
    assert (row.settlement, len(row.owed)) == ("estimated", 1)
    assert f"the bill {row.owed[0].bill} of ours has not come within 0.05 s" in caplog.text
    assert outcomes(gateway) == {"overdue": 1.0}
    assert len(look(gateway, row).used) == 1
    assert (row.settlement, row.owed) == ("settled", ())


def test_a_client_that_leaves_before_the_engine_knew_of_it_pays_nothing_at_once(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bill never comes; the engine is asked, and has never had it."""
    monkeypatch.setattr(bills, "_DOUBT", 0.0)
    assert gateway.post(BODY).status == 200
    asked, tally = asked_now(gateway, bill="never"), Tally()
    (station,) = gateway.stations.all()
    filled = []

    async def fill() -> None:
        filled.append(await gateway.door.bills.fill(tally, station, asked))

    gateway.live.do(fill())
    assert filled == [True]
    assert tally == Tally(device_seconds=0, told=True, final=True)
