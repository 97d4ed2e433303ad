"""The meter on real stores: rows, limits shared by workers, outages, kill -9."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from penstock.core.errors import StartupError
from penstock.gateway.ledger import journal as journal_module
from penstock.gateway.ledger import report
from penstock.gateway.ledger.journal import SpoolFull
from penstock.gateway.ledger.schema import accounts, leases, ledger, metadata, workers
from penstock.gateway.ledger.store import Entry, Moved, Position, Store, StoreDown
from penstock.gateway.limits.valkey import ValkeyCounters
from penstock.gateway.meter import LimitReached
from penstock.gateway.metering import LedgerMeter
from penstock.gateway.policy.amounts import Amounts, Limit
from penstock.gateway.policy.shares import REMEMBER
from penstock.gateway.records import Row
from penstock.spec.model import Ledger

from . import worker as worker_module
from .stores import postgres, redis

DOLLARS = Limit("team:t", "dollars", "day", 1000)
AT_A_TIME = Limit("team:t", "concurrent", "now", 2)
PER_MINUTE = Limit("key:k", "requests", "minute", 5)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with postgres() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return database(request.param, request, tmp_path)


def database(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty one."""
    if kind == "sqlite":
        return f"sqlite:///{tmp_path / 'ledger.db'}"
    found: str = request.getfixturevalue("server")
    store = Store(found)
    metadata.drop_all(store.engine)
    with store.engine.begin() as connection:
        connection.execute(sa.text("DROP TABLE IF EXISTS alembic_version"))
    store.close()
    return found


@pytest.fixture(scope="module")
def counting() -> Iterator[str]:
    with redis() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql", "redis"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Ledger:
    """Limits as leases in the ledger's database, or in Redis beside it."""
    spool = str(tmp_path / "spool")
    if request.param != "redis":
        return Ledger(url=database(request.param, request, tmp_path), spool=spool)
    url = request.getfixturevalue("counting")
    from redis import Redis as Client

    with Client.from_url(url) as client:
        client.flushall()
    return Ledger(url=database("sqlite", request, tmp_path), spool=spool, counters=url)


async def told(*meters: LedgerMeter) -> None:
    """What has ended is known to whoever counts."""
    for meter in meters:
        if isinstance(meter.counters, ValkeyCounters):
            await meter.counters._idle.wait()
    await asyncio.sleep(REMEMBER)  # for so long a refusal is believed without asking again


def row(id: str = "r", **fields: object) -> Row:
    return Row(id=id, at=time.time_ns(), key_id="k", team="t", **fields)  # type: ignore[arg-type]


def run(body: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(body(), 60))  # type: ignore[arg-type]


def written(url: str) -> list[sa.RowMapping]:
    store = Store(url)
    with store.reading() as connection:
        found = list(connection.execute(sa.select(ledger).order_by(ledger.c.id)).mappings())
    store.close()
    return found


def charged(url: str) -> dict[str, int]:
    """What the accounts of budgets say."""
    store = Store(url)
    with store.reading() as connection:
        budgets = sa.select(accounts.c.scope, accounts.c.used).where(accounts.c.window == "day")
        found = dict(connection.execute(budgets).all())
    store.close()
    return found


def test_a_request_has_one_row_within_a_second(settings: Ledger) -> None:
    async def body() -> None:
        meter = await LedgerMeter.open(settings)
        first = row(tags={"feature": "search", "ä": "\n"}, route="chat", model="demo")
        reservation = await meter.reserve(
            first, [DOLLARS, AT_A_TIME, PER_MINUTE], Amounts(tokens=50, dollars=400)
        )
        left = {each.limit: each.remaining for each in reservation.standings}
        assert left == {DOLLARS: 600, AT_A_TIME: 1, PER_MINUTE: 4}
        first.status, first.end, first.dollars, first.device_seconds = 200, "done", 250, 7
        meter.commit(reservation, Amounts(tokens=30, dollars=250, device_seconds=7))
        meter.commit(reservation, Amounts(dollars=999))  # told in the log, and nothing else
        for _ in range(100):
            if len(written(settings.url)) == 1:
                break
            await asyncio.sleep(0.01)
        [found] = written(settings.url)
        assert (found["id"], found["dollars"], found["device_seconds"]) == ("r", 250, 7)
        assert (found["settlement"], found["feature"], found["tags"]) == ("settled", "search", first.tags)
        assert (found["reserved_tokens"], found["reserved_dollars"]) == (50, 400)
        assert charged(settings.url) == {"team:t": 250}
        await meter.close()

    run(body)
    assert list(Path(settings.spool).iterdir()) == []


def test_equal_request_ids_are_two_requests(url: str, tmp_path: Path) -> None:
    async def body() -> None:
        meter = await LedgerMeter.open(Ledger(url=url, spool=str(tmp_path / "spool")))
        for _ in range(2):
            meter.commit(await meter.reserve(row("same"), [], Amounts()), Amounts())
        await meter.close()

    run(body)
    assert [each["id"] for each in written(url)] == ["same", "same"]


def test_refusals_say_which_limit_and_when_it_resets(tmp_path: Path) -> None:
    async def body() -> None:
        url = f"sqlite:///{tmp_path / 'ledger.db'}"
        meter = await LedgerMeter.open(Ledger(url=url, spool=str(tmp_path / "spool")))
        for _ in range(5):
            meter.commit(await meter.reserve(row(), [PER_MINUTE], Amounts()), Amounts())
        with pytest.raises(LimitReached, match=r"limit of 5 requests per minute of key:k is reached") as rate:
            await meter.reserve(row(), [DOLLARS, PER_MINUTE], Amounts(dollars=1000))
        assert rate.value.code == "rate_limit_exceeded"
        assert 55 <= (rate.value.retry_after or 0) <= 61
        budget = await meter.reserve(
            row(), [DOLLARS], Amounts(dollars=990)
        )  # nothing was left of the refusal
        with pytest.raises(
            LimitReached, match=r"\$0\.000001 per day of team:t .* needs? \$0\.00000005"
        ) as money:
            await meter.reserve(row(), [DOLLARS], Amounts(dollars=50))
        assert (money.value.code, money.value.remaining) == ("insufficient_quota", 10)
        assert money.value.resets_at % 86_400 == 0
        with pytest.raises(LimitReached, match="can never pass as it is"):
            await meter.reserve(row(), [DOLLARS], Amounts(dollars=1001))
        meter.commit(budget, Amounts(dollars=0))
        again = await meter.reserve(row(), [DOLLARS], Amounts(dollars=1000))  # no phantom
        meter.commit(again, Amounts(dollars=0))
        await meter.close()

    run(body)


def test_a_request_without_a_row_counts_for_its_minute(tmp_path: Path) -> None:
    async def body() -> None:
        url = f"sqlite:///{tmp_path / 'ledger.db'}"
        meter = await LedgerMeter.open(Ledger(url=url, spool=str(tmp_path / "spool")))
        await meter.count([])
        for _ in range(4):
            await meter.count([PER_MINUTE])
        meter.commit(await meter.reserve(row(), [PER_MINUTE], Amounts()), Amounts())
        with pytest.raises(LimitReached, match=r"5 requests per minute"):
            await meter.count([PER_MINUTE])
        await meter.flush()
        assert len(list(report.rows(meter.store, report.Filter()))) == 1
        await meter.close()

    run(body)


def test_workers_share_a_cap_to_the_last_unit(settings: Ledger) -> None:
    """Two workers take a budget together in steps that fit exactly; what one gives back the other gets."""

    async def body() -> None:
        meters = [await LedgerMeter.open(settings) for _ in range(2)]

        async def take(meter: LedgerMeter, amount: int) -> object | None:
            try:
                return await meter.reserve(row(), [DOLLARS], Amounts(dollars=amount))
            except LimitReached:
                return None

        held = [await take(meters[index % 2], 100) for index in range(10)]
        assert all(held)
        assert await take(meters[0], 1) is None
        assert await take(meters[1], 1) is None
        for index, each in enumerate(held):
            meters[index % 2].commit(each, Amounts(dollars=0))  # type: ignore[arg-type]
        await told(*meters)
        whole = await take(meters[1], 1000)  # the other's lease comes back
        assert whole is not None
        assert await take(meters[0], 1) is None
        meters[1].commit(whole, Amounts(dollars=600))  # type: ignore[arg-type]
        await told(*meters)
        rest = await take(meters[0], 400)
        assert rest is not None
        meters[0].commit(rest, Amounts(dollars=400))  # type: ignore[arg-type]
        for meter in meters:
            await meter.close()
        assert charged(settings.url) == {"team:t": 1000}

    run(body)


def test_many_at_once_never_exceed_and_are_all_answered(settings: Ledger) -> None:
    async def body() -> None:
        meters = [await LedgerMeter.open(settings) for _ in range(2)]
        busy = most = 0

        async def one(index: int) -> bool:
            nonlocal busy, most
            meter = meters[index % 2]
            try:
                mine = await meter.reserve(row(), [AT_A_TIME, DOLLARS], Amounts(dollars=50))
            except LimitReached:
                return False
            busy += 1
            most = max(most, busy)
            await asyncio.sleep(0)
            busy -= 1
            meter.commit(mine, Amounts(dollars=50))
            return True

        let = sum(await asyncio.gather(*(one(index) for index in range(60))))
        assert 1 <= most <= 2
        assert 2 <= let <= 20
        for meter in meters:
            await meter.close()
        assert charged(settings.url) == {"team:t": 50 * let}
        assert len(written(settings.url)) == let

    run(body)


def test_a_store_that_is_down_loses_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        url = f"sqlite:///{tmp_path / 'ledger.db'}"
        meter = await LedgerMeter.open(Ledger(url=url, spool=str(tmp_path / "spool")))
        meter.commit(await meter.reserve(row(), [DOLLARS], Amounts(dollars=1)), Amounts(dollars=1))

        def down(*_: object, **__: object) -> None:
            raise StoreDown("The ledger's database does not answer: it is down.")

        with monkeypatch.context() as patch:
            for name in ("apply", "lease"):
                patch.setattr(meter.store, name, down)
            # within the lease all goes on; rows wait in the spool
            for _ in range(20):
                meter.commit(await meter.reserve(row(), [DOLLARS], Amounts(dollars=1)), Amounts(dollars=1))
            with pytest.raises(StoreDown):
                await meter.flush()
            with pytest.raises(Exception, match="does not answer") as refused:
                await meter.reserve(row(), [Limit("key:new", "dollars", "day", 5)], Amounts(dollars=1))
            assert refused.value.status == 503  # type: ignore[attr-defined]
        await meter.flush()
        assert len(written(url)) == 21
        assert charged(url) == {"team:t": 21}
        await meter.close()

    run(body)


def test_rows_that_could_not_be_written_are_there_after_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    settings = Ledger(url=url, spool=str(tmp_path / "spool"))

    async def first() -> None:
        meter = await LedgerMeter.open(settings)

        def down(*_: object, **__: object) -> None:
            raise StoreDown("The ledger's database does not answer: it is down.")

        monkeypatch.setattr(meter.store, "apply", down)
        monkeypatch.setattr(meter.store, "leave", down)
        meter.commit(await meter.reserve(row("a"), [DOLLARS], Amounts(dollars=9)), Amounts(dollars=4))
        await meter.reserve(row("b"), [DOLLARS], Amounts(dollars=9))  # never ends
        await meter.close()

    async def second() -> None:
        meter = await LedgerMeter.open(settings)
        await meter.close()

    run(first)
    run(second)
    assert [(each["id"], each["settlement"], each["dollars"]) for each in written(url)] == [
        ("a", "settled", None),
        ("b", "unsettled", 9),
    ]
    assert charged(url) == {"team:t": 13}


def test_a_full_spool_refuses_and_reserves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        url = f"sqlite:///{tmp_path / 'ledger.db'}"
        meter = await LedgerMeter.open(Ledger(url=url, spool=str(tmp_path / "spool")))
        with monkeypatch.context() as patch:
            patch.setattr(journal_module.os, "write", lambda *_: 0)
            with pytest.raises(SpoolFull):
                await meter.reserve(row(), [AT_A_TIME, DOLLARS], Amounts(dollars=1000))
        whole = await meter.reserve(row(), [AT_A_TIME, DOLLARS], Amounts(dollars=1000))
        meter.commit(whole, Amounts(dollars=1000))
        await meter.close()

    run(body)


def test_a_batch_whose_answer_was_lost_counts_once(url: str) -> None:
    store = Store(url)
    store.open()
    store.register("w")
    batch = [Entry(0, row("a"), {"team:t|dollars|day|0": 5})]
    end = Position(0, 100)
    store.apply("w", batch, Position(), end)
    with pytest.raises(Moved) as moved:
        store.apply("w", batch, Position(), end)
    assert moved.value.position == end
    assert charged(url) == {"team:t": 5}
    store.close()


def test_a_later_versions_tables_are_refused(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    store = Store(url)
    store.open()
    with store.engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(StartupError, match="later version"):
        store.open()
    store.close()


@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("mysql://x/y", "no database that a ledger can be in"),
        ("sqlite://", "in memory"),
        ("sqlite:////nowhere/at/all.db", "no folder"),
        ("nonsense", "URL cannot be used"),
        ("postgresql://nobody@127.0.0.1:1/x", "cannot be opened"),
    ],
)
def test_urls_that_cannot_be(url: str, what: str) -> None:
    if url.startswith("postgresql"):
        pytest.importorskip("psycopg", reason="the driver of the extra `pg` is not installed")
    with pytest.raises(StartupError, match=what):
        Store(url).open()


def test_the_migrations_make_the_schema(url: str) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    store = Store(url)
    store.open()
    with store.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    store.close()


def test_the_ledger_has_every_field_of_a_row() -> None:
    own = {"worker", "number", "feature", "charged"}
    assert {column.name for column in ledger.columns} - own == set(Row.__struct_fields__)


@pytest.mark.parametrize("kills", [3])
def test_kill_9_leaves_one_row_for_each_request(settings: Ledger, tmp_path: Path, kills: int) -> None:
    """Two workers, of which one is killed in the middle of its traffic, several times; then the books."""
    url, spool = settings.url, Path(settings.spool)
    stop = tmp_path / "stop"
    log = [tmp_path / f"log{seed}" for seed in range(kills + 1)]

    def start(seed: int) -> subprocess.Popen[bytes]:
        arguments = [
            "-m",
            "tests.gateway.worker",
            url,
            settings.counters or "",
            str(spool),
            str(log[seed]),
            str(stop),
            str(seed),
        ]
        return subprocess.Popen([sys.executable, *arguments], cwd=Path(__file__).parents[2])

    def lines(seed: int) -> list[list[str]]:
        return [line.split() for line in log[seed].read_text().splitlines()] if log[seed].exists() else []

    def await_lines(process: subprocess.Popen[bytes], seed: int, count: int) -> None:
        for _ in range(3000):
            if len(lines(seed)) >= count or process.poll() is not None:
                return
            time.sleep(0.01)
        raise AssertionError(f"worker {seed} did nothing")

    steady = start(0)
    try:
        for seed in range(1, kills + 1):
            victim = start(seed)
            await_lines(victim, seed, 40 * seed)
            victim.send_signal(signal.SIGKILL)
            victim.wait(10)
        for _ in range(3000):  # the steady one finds the dead
            if len(list(spool.glob("*.lock"))) == 1:
                break
            time.sleep(0.01)
        stop.touch()
        assert steady.wait(60) == 0  # it ends when the budget does
    finally:
        steady.kill()
        steady.wait(10)

    store = Store(url)
    assert list(spool.iterdir()) == []
    said = [line for seed in range(kills + 1) for line in lines(seed)]
    opened = {line[1]: {int(line[2]), int(line[3])} for line in said if line[0] == "open"}
    ended = {line[1]: int(line[2]) for line in said if line[0] == "end"}
    found = written(url)
    ids = [each["id"] for each in found]
    assert len(ids) == len(set(ids))  # none doubled
    rows = {each["id"]: each for each in found}
    assert set(opened) <= set(rows)  # none lost
    assert len(set(rows) - set(opened)) <= 12 * kills  # let through, and killed before it could say so
    for name, dollars in ended.items():
        assert (rows[name]["settlement"], rows[name]["dollars"]) == ("settled", dollars)
    for name in set(opened) - set(ended):
        if rows[name]["settlement"] == "unsettled":
            assert (rows[name]["dollars"] or 0) in opened[name]
    for name, each in rows.items():  # of a request that went on in parts, both have a row, or only the first
        if name.endswith(".attempt"):
            assert rows[name.removesuffix(".attempt")]["escalated_from"] == name
            assert (each["end"], each["settlement"]) == ("escalated", "settled")
        elif each["escalated_from"]:
            assert each["escalated_from"] in rows
    assert any(each["escalated_from"] for each in found)
    assert any(each["settlement"] == "unsettled" for each in found)
    cap = worker_module.LIMITS[-1].cap
    total = sum(each["dollars"] or 0 for each in found)
    assert charged(url) == {"team:t": total}  # the account is the sum of the rows
    assert total <= cap
    assert cap - total < 20  # and nothing of the budget was lost: less is left than a request may need
    with store.reading() as connection:
        left = connection.execute(
            sa.select(sa.func.count())
            .select_from(leases.join(accounts))
            .where(leases.c.granted > 0, accounts.c.window != "minute")
        ).scalar_one()
        assert left == 0
        assert all(connection.execute(sa.select(workers.c.done)).scalars())
    store.close()
