"""Idle hours: idle + used = paid, over any span, whoever claims, whatever the rows say."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from itertools import count, pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.cli.main import main
from penstock.gateway.ledger.idle import BRIDGE, PoolUse, claim, idle
from penstock.gateway.ledger.schema import ledger, rollups
from penstock.gateway.ledger.schema import paid as table
from penstock.gateway.ledger.store import Entry, Position, Store
from penstock.gateway.metering import LedgerMeter
from penstock.gateway.paid import PaidHours, terms
from penstock.gateway.policy.amounts import NANO
from penstock.gateway.policy.idle import HOUR, Spell, Terms, paid, prices, together
from penstock.gateway.records import Row
from penstock.spec.load import loads

from .stores import postgres

MOMENT = st.integers(0, 12)
TERMS = st.builds(Terms, st.integers(1, 3), st.one_of(st.none(), st.integers(0, 3)), st.integers(0, 4))
SPELLS = st.lists(st.builds(Spell, MOMENT, MOMENT, TERMS), max_size=6)
SPAN = st.one_of(st.none(), MOMENT)
NEW_YEAR = 1_767_225_600 * NANO
"""2026, in Unix nanoseconds."""
ONE = Terms(1, 3_600_000_000, 1, "L4")


def at(claims: list[Spell], moment: int) -> Terms | None:
    """The claim that holds in [moment, moment + 1)."""
    held = [each.terms for each in claims if each.begin <= moment < each.until]
    return max(held, key=lambda terms: terms.rank, default=None)


@given(SPELLS)
def test_at_each_moment_the_largest_claim_holds_once(claims: list[Spell]) -> None:
    found = together(claims)
    for moment in range(-1, 14):
        now = [each.terms for each in found if each.begin <= moment < each.until]
        assert now == ([] if (held := at(claims, moment)) is None else [held])
    assert found == sorted(found, key=lambda each: each.begin)
    assert all(each.begin < each.until for each in found)


@given(SPELLS, SPAN, SPAN)
def test_paid_is_the_time_and_the_money_of_each_moment(
    claims: list[Spell], since: int | None, until: int | None
) -> None:
    moments = [at(claims, each) for each in range(since or 0, 13 if until is None else until)]
    held = [each for each in moments if each is not None]
    time, money = paid(together(claims), since, until)
    assert time == sum(each.devices for each in held)
    if any(each.price is None for each in held):
        assert money is None
    else:
        assert money == sum(each.devices * (each.price or 0) for each in held)


@given(SPELLS, SPAN, SPAN)
def test_every_moment_has_one_price(claims: list[Spell], since: int | None, until: int | None) -> None:
    spells = together(claims)
    parts = list(prices(spells, since, until))
    assert parts[0][0] == since
    assert parts[-1][1] == until
    assert all(before[1] == after[0] for before, after in pairwise(parts))
    for moment in range(since or 0, 13 if until is None else until):
        before = [each.terms.price for each in spells if each.begin <= moment]
        expected = before[-1] if before else (spells[0].terms.price if spells else None)
        [price] = [
            price
            for begin, end, price in parts
            if (begin is None or begin <= moment) and (end is None or moment < end)
        ]
        assert price == expected


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(f"sqlite:///{tmp_path / 'ledger.db'}")
    store.open()
    yield store
    store.close()


def row(at: int, seconds: int | None, **fields: object) -> Row:
    row = Row(id="r", at=at, key_id="k", pool="box", settlement="settled", device_seconds=seconds)
    for name, value in fields.items():
        setattr(row, name, value)
    return row


@pytest.fixture(scope="module")
def emptied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """One for many examples, each of which empties it."""
    store = Store(f"sqlite:///{tmp_path_factory.mktemp('ledger') / 'ledger.db'}")
    store.open()
    yield store
    store.close()


_workers = count()


def written(store: Store, *rows: Row) -> None:
    entries = [Entry(number, each, {}) for number, each in enumerate(rows)]
    worker = f"writer{next(_workers)}"
    store.register(worker)
    store.apply(worker, entries, Position(), Position(0, 1))


def one(found: list[PoolUse]) -> PoolUse:
    [only] = found
    return only


@settings(max_examples=25, deadline=None)
@given(
    claims=st.lists(
        st.tuples(MOMENT, st.integers(1, 6), st.integers(1, 3), st.integers(0, 3)), min_size=1, max_size=5
    ),
    rows=st.lists(st.tuples(MOMENT, st.integers(0, 40), st.integers(0, 5)), max_size=8),
    cuts=st.lists(MOMENT, max_size=3),
)
def test_idle_and_used_are_what_was_paid_in_any_spans(
    emptied: Store,
    claims: list[tuple[int, int, int, int]],
    rows: list[tuple[int, int, int]],
    cuts: list[int],
) -> None:
    """And spans that follow one another add up to the whole."""
    store = emptied
    with store.writing() as connection:
        for each in (rollups, ledger, table):
            connection.execute(each.delete())
    for number, (begin, length, devices, price) in enumerate(claims):
        said = Terms(devices, price, devices, "L4")
        claim(store, f"w{number}", {"box": said}, {"box": begin}, begin + length)
    written(store, *(row(at, seconds, lost_device_seconds=lost) for at, seconds, lost in rows))
    whole = idle(store)
    spans = [None, *sorted(cuts), None]
    parts = [use for since, until in pairwise(spans) for use in idle(store, since, until)]
    for use in (*whole, *parts):
        assert use.idle + use.used == use.paid
        assert use.idle_money is not None
        assert use.idle_money + (use.used_money or 0) == use.paid_money
    for name in ("paid", "used", "idle", "paid_money", "used_money"):
        assert sum(getattr(use, name) for use in whole) == sum(getattr(use, name) for use in parts)
    assert sum(use.used for use in whole) == sum(seconds + lost for _, seconds, lost in rows)


def test_what_is_paid_used_and_idle(store: Store) -> None:
    begun = claim(store, "w", {"box": ONE}, {}, 0)
    claim(store, "w", {"box": ONE}, begun, 2 * HOUR)
    written(store, row(5, HOUR // 2), row(7, HOUR // 4, lost_device_seconds=HOUR // 4), row(HOUR, None))
    record = one(idle(store)).record()
    assert {name: float(value) for name, value in record.items() if name not in ("pool", "device")} == {
        "paid_hours": 2.0,
        "used_hours": 1.0,
        "idle_hours": 1.0,
        "utilization": 0.5,
        "paid_dollars": 7.2,
        "used_dollars": 3.6,
        "idle_dollars": 3.6,
        "unsettled_rows": 0.0,
        "unsettled_hours": 0.0,
    }
    assert (record["pool"], record["device"]) == ("box", "L4")


def test_postgresql_counts_the_same() -> None:
    with postgres() as url:
        store = Store(url)
        store.open()
        begun = claim(store, "w", {"box": ONE, "idle": Terms(2, None, 0)}, {}, 0)
        claim(store, "w", {"box": ONE, "idle": Terms(2, None, 0)}, begun, 2 * HOUR)
        claim(store, "v", {"box": ONE}, {}, 2 * HOUR + 1)
        claim(store, "w", {"box": ONE}, begun, HOUR)
        written(store, row(5, HOUR // 2, lost_device_seconds=1), row(7, 9, settlement="unsettled"))
        box, other = idle(store, 0, 2 * HOUR)
        assert (box.paid, box.used, box.unsettled, box.unsettled_reserved) == (2 * HOUR, HOUR // 2 + 1, 1, 9)
        assert box.used_money == (HOUR // 2 + 1) * (ONE.price or 0)
        assert (other.pool, other.paid, other.used, other.paid_money) == ("idle", 4 * HOUR, 0, None)
        store.close()


def test_a_request_belongs_to_the_moment_of_its_arrival(store: Store) -> None:
    claim(store, "w", {"box": ONE}, {"box": 0}, 100)
    written(store, row(49, 30), row(50, 7))
    before, after = one(idle(store, 0, 50)), one(idle(store, 50, 100))
    assert (before.used, before.idle, after.used, after.idle) == (30, 20, 7, 43)


def test_rows_that_nobody_knows_the_end_of_are_told_apart(store: Store) -> None:
    claim(store, "w", {"box": ONE}, {"box": 0}, 100)
    written(store, row(1, 30), row(2, 90, settlement="unsettled", lost_device_seconds=5))
    use = one(idle(store))
    assert (use.used, use.unsettled, use.unsettled_reserved) == (35, 1, 90)


def test_gateways_that_overlap_pay_once(store: Store) -> None:
    for worker in ("a", "b"):
        claim(store, worker, {"box": ONE}, {"box": 0}, HOUR)
    assert one(idle(store)).paid == HOUR


def test_a_gateway_that_is_started_again_soon_has_been_paid_for_meanwhile(store: Store) -> None:
    claim(store, "a", {"box": ONE}, {"box": 0}, 100)
    begun = claim(store, "b", {"box": ONE}, {}, 100 + BRIDGE)
    assert begun == {"box": 100}
    assert one(idle(store)).paid == 100 + BRIDGE
    later = 102 + 2 * BRIDGE
    assert claim(store, "c", {"box": ONE}, {}, later) == {"box": later}


def test_a_clock_that_goes_back_takes_nothing_back(store: Store) -> None:
    claim(store, "a", {"box": ONE}, {"box": 0}, 100)
    claim(store, "a", {"box": ONE}, {"box": 0}, 60)
    assert one(idle(store)).paid == 100


def test_a_pool_without_a_price_has_hours_and_no_dollars(store: Store) -> None:
    claim(store, "a", {"box": Terms(2, None, 2)}, {"box": 0}, HOUR)
    written(store, row(1, HOUR))
    record = one(idle(store)).record()
    assert (record["paid_hours"], record["used_hours"]) == (2, 1)
    assert record["paid_dollars"] is record["used_dollars"] is record["idle_dollars"] is None


def test_what_engines_take_of_a_pool() -> None:
    spec = loads(
        """
pools: {box: {hardware: L4, count: 3, price_per_hour: 0.5}, cpu: {}}
models:
  a: {weights: demo, pool: cpu, replicas: 2}
  b: {weights: demo, pool: box, devices: 2}
upstreams:
  ours: {url: "http://a", urls: ["http://b"], kind: vllm, pool: box, models: {m: {}}}
  cloud: {url: "http://c", models: {m: {}}}
"""
    )
    assert terms(spec) == {"box": Terms(3, 500_000_000, 4, "L4"), "cpu": Terms(1, None, 2, "cpu")}


SPEC = "pools: {cpu: {count: 1, price_per_hour: 2}}\nmodels: {a: {weights: demo, pool: cpu, replicas: 2}}\n"


def test_a_gateway_says_what_is_paid_while_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the command tells what became of it, and why more may be used than there is."""
    (tmp_path / "penstock.yaml").write_text(SPEC)
    monkeypatch.chdir(tmp_path)
    spec, now = loads(SPEC), NEW_YEAR

    async def body() -> None:
        nonlocal now
        meter = await LedgerMeter.open(spec.ledger)
        hours = PaidHours(meter, spec, lambda: now)
        await hours.look()
        now += HOUR
        await hours.look()
        now += HOUR
        await hours.stop()  # with what has passed since
        await meter.close()

    asyncio.run(body())
    store = Store(spec.ledger.url)
    written(
        store, row(NEW_YEAR, 3 * HOUR, pool="cpu"), row(NEW_YEAR, NANO, pool="cpu", settlement="unsettled")
    )
    store.close()
    assert main(["ledger", "idle", "--json"]) == 0
    said = capsys.readouterr()
    record = json.loads(said.out)
    assert (record["pool"], record["device"], record["paid_hours"], record["used_hours"]) == (
        "cpu",
        "cpu",
        2,
        3,
    )
    assert (record["utilization"], record["idle_dollars"]) == (1.5, -2)
    assert "engines that take 2 devices share 1, and each counts the whole time" in said.err
    assert "unsettled rows are not in it: 1, which used at most" in said.err
    assert main(["ledger", "idle", "--pool", "cpu", "--until", "2026-01-01T01:00"]) == 0
    table = capsys.readouterr().out.split()
    assert table[:3] == ["pool", "device", "paid_hours"]
    assert table[9:] == ["cpu", "cpu", "1", "3", "-2", "3", "2", "6", "-4"]
    assert main(["ledger", "idle", "--pool", "other", "--json"]) == 0
    assert capsys.readouterr().out == ""


def test_more_than_was_paid_is_said(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    claim(store, "a", {"box": ONE}, {"box": 0}, 10)
    written(store, row(1, 20))
    assert main(["ledger", "idle", "--ledger", str(store.engine.url)]) == 0
    assert "pool box: more was used than was paid for" in capsys.readouterr().err


def test_a_span_that_ends_before_it_begins_is_refused(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--since", "2026-01-02", "--until", "2026-01-01", "--ledger", str(store.engine.url)]
    assert main(["ledger", "idle", *args]) == 2
    assert "--since 2026-01-02 is after --until 2026-01-01" in capsys.readouterr().err
