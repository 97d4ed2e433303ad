"""One contract for all who keep limits: leases from memory, SQLite and PostgreSQL, and scripts in Redis."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from penstock.core.errors import StartupError, Unavailable
from penstock.gateway import quota
from penstock.gateway.ledger.schema import metadata
from penstock.gateway.ledger.store import Beat, Store
from penstock.gateway.ledger.thread import StoreThread
from penstock.gateway.limits.counters import Counters, quantity
from penstock.gateway.limits.leased import LeasedCounters
from penstock.gateway.limits.valkey import ValkeyCounters
from penstock.gateway.meter import LimitReached, NotCounted
from penstock.gateway.policy.amounts import Amounts, Limit, Unit
from penstock.gateway.policy.bank import Bank
from penstock.gateway.policy.leases import TTL, Ask, Grant
from penstock.gateway.policy.shares import REMEMBER
from penstock.gateway.tasks import ended
from tests.ports import free_port

from .stores import postgres, redis

NOON = datetime(2040, 1, 31, 12, tzinfo=UTC).timestamp()
REQUESTS = Limit("key:k", "requests", "minute", 3)
TOKENS = Limit("key:k", "tokens", "minute", 100)
AT_A_TIME = Limit("team:t", "concurrent", "now", 2)
PER_DAY = Limit("team:t", "dollars", "day", 1000)
PER_MONTH = Limit("tag:f=x", "device_seconds", "month", 5000)


class MemoryBank:
    """The bank of policy/ as leased.py wants it."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._bank, self._clock = Bank(), clock

    def beat(self, worker: str, *, write: bool = True) -> Beat:
        others, pressed = self._bank.beat(worker, self._clock())
        return Beat(others, pressed, 0)

    def lease(self, worker: str, asks: Sequence[Ask]) -> list[Grant]:
        return self._bank.lease(worker, asks, self._clock())


class House:
    """Workers on one store, with a clock that tests move."""

    def __init__(self, kind: str, url: str) -> None:
        self.kind, self.url = kind, url
        self._ahead = NOON - time.monotonic()
        self.workers: list[Any] = []
        self._threads: list[StoreThread] = []
        self._store: Any = None

    @property
    def silent(self) -> type[Unavailable]:
        """What is said where the rest is held by a worker that nobody hears of: with leases nobody knows what
        it has used of its own, in Redis that is known."""
        return LimitReached if self.kind == "redis" else NotCounted

    @property
    def now(self) -> float:
        """A clock that runs, and that tests set ahead."""
        return self._ahead + time.monotonic()

    @now.setter
    def now(self, now: float) -> None:
        self._ahead = now - time.monotonic()

    async def worker(self) -> Counters[Any]:
        name = f"w{len(self.workers)}"
        if self.kind == "redis":
            counters: Any = ValkeyCounters(self.url, name, clock=lambda: self.now)
        else:
            if self._store is None and self.kind == "memory":
                self._store = MemoryBank(lambda: self.now)
            elif self._store is None:
                self._store = Store(self.url, clock=lambda: self.now)
                self._store.open()
            thread = StoreThread()
            self._threads.append(thread)
            if self.kind != "memory":
                await thread.call(lambda: self._store.register(name))
            clock = lambda: self.now  # noqa: E731
            counters = LeasedCounters(self._store, name, thread, clock=clock, monotonic=clock)
        counters.start()
        self.workers.append(counters)
        for each in [*self.workers, *self.workers]:
            if isinstance(each, LeasedCounters):
                await each._beat(write=True)  # a second later, each knows of the others
        return counters  # type: ignore[no-any-return]

    async def kill(self, counters: Any) -> None:
        """As by kill -9: nothing more is heard of it."""
        self.workers.remove(counters)
        await ended(counters._tasks)
        if self.kind == "redis":
            await counters._client.aclose()

    async def settled(self) -> None:
        """What has ended is known to the store."""
        for counters in self.workers:
            if self.kind == "redis":
                await counters._idle.wait()
        self.now += REMEMBER  # for so long a refusal is believed without asking again

    async def close(self) -> None:
        for counters in self.workers:
            await counters.close()
        for thread in self._threads:
            thread.close()
        if isinstance(self._store, Store):
            self._store.close()


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, str]]:
    """Servers that tests have asked for; one of each kind."""
    found: dict[str, str] = {}
    contexts = []

    class Servers(dict[str, str]):
        def __missing__(self, kind: str) -> str:
            context = {"postgresql": postgres, "redis": redis}[kind]()
            self[kind] = context.__enter__()
            contexts.append(context)
            return self[kind]

    found = Servers()
    yield found
    for context in contexts:
        context.__exit__(None, None, None)


@pytest.fixture(params=["memory", "sqlite", "postgresql", "redis"])
def house(request: pytest.FixtureRequest, tmp_path: Path, servers: dict[str, str]) -> Callable[[], Any]:
    kind: str = request.param
    url = (
        f"sqlite:///{tmp_path / 'ledger.db'}"
        if kind == "sqlite"
        else ""
        if kind == "memory"
        else servers[kind]
    )
    if kind == "postgresql":
        store = Store(url)
        metadata.drop_all(store.engine)
        with store.engine.begin() as connection:
            connection.execute(sa.text("DROP TABLE IF EXISTS alembic_version"))
        store.close()

    @asynccontextmanager
    async def build() -> AsyncIterator[House]:
        if kind == "redis":
            from redis.asyncio import Redis

            client = Redis.from_url(url)
            await client.flushall()
            await client.aclose()
        made = House(kind, url)
        try:
            yield made
        finally:
            await made.close()

    return build


def run(body: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(body(), 60))  # type: ignore[arg-type]


async def take(counters: Counters[Any], limits: Sequence[Limit], **worst: int) -> Any:
    """A ticket, or None where a limit refuses."""
    try:
        amounts = Amounts(**worst)
        return counters.reserve_now(limits, amounts) or await counters.reserve(limits, amounts)
    except LimitReached:
        return None


def test_all_limits_or_none(house: Callable[[], Any]) -> None:
    async def body() -> None:
        async with house() as here:
            one = await here.worker()
            ticket = await take(one, [PER_DAY, TOKENS, AT_A_TIME], tokens=60, dollars=900)
            assert [each.remaining for each in one.standings(ticket)] == [100, 40, 1]
            assert await take(one, [AT_A_TIME, PER_DAY, TOKENS], tokens=10, dollars=101) is None
            assert await take(one, [AT_A_TIME, PER_DAY, TOKENS], tokens=41, dollars=100) is None
            rest = await take(one, [AT_A_TIME, PER_DAY, TOKENS], tokens=40, dollars=100)
            assert rest is not None
            one.settle(ticket, Amounts(tokens=10, dollars=0))
            await here.settled()
            assert await take(one, [TOKENS, PER_DAY], tokens=51, dollars=900) is None
            assert await take(one, [TOKENS, PER_DAY], tokens=50, dollars=900) is not None

    run(body)


def test_requests_of_a_minute(house: Callable[[], Any]) -> None:
    async def body() -> None:
        async with house() as here:
            one = await here.worker()
            begun = here.now
            for _ in range(3):
                one.settle(await take(one, [REQUESTS]), Amounts())
                here.now += 10
            here.now = begun + 30
            with pytest.raises(LimitReached) as refused:
                await one.reserve([REQUESTS], Amounts())
            assert 25 <= (refused.value.retry_after or 0) <= 31
            assert refused.value.code == "rate_limit_exceeded"
            here.now = begun + 59.5
            assert await take(one, [REQUESTS]) is None
            here.now = begun + 63
            assert await take(one, [REQUESTS]) is not None
            await here.settled()
            assert await take(one, [REQUESTS]) is None

    run(body)


def test_what_is_more_than_a_whole_rate_never_passes(house: Callable[[], Any]) -> None:
    """Nobody is asked to wait for that; what only has to wait is."""

    async def body() -> None:
        async with house() as here:
            one = await here.worker()
            for limit, amounts in (
                (TOKENS, Amounts(tokens=TOKENS.cap + 1)),
                (Limit("key:k", "concurrent", "now", 0), Amounts()),
            ):
                with pytest.raises(LimitReached) as refused:
                    await one.reserve([limit], amounts)
                error = refused.value
                assert (error.status, error.code, error.retry_after) == (429, "rate_limit_exceeded", None)
                assert quota.refusal(error, 0)["x-should-retry"] == "false"
                assert ("Request too large" in error.message) == (limit.cap > 0)
            assert await take(one, [TOKENS], tokens=TOKENS.cap) is not None
            with pytest.raises(LimitReached) as refused:
                await one.reserve([TOKENS], Amounts(tokens=1))
            assert refused.value.retry_after is not None
            assert quota.refusal(refused.value, 0)["x-should-retry"] == "true"

    run(body)


def test_days_and_months_begin_anew(house: Callable[[], Any]) -> None:
    async def body() -> None:
        async with house() as here:
            one = await here.worker()
            both = [PER_DAY, PER_MONTH]
            old = await take(one, both, dollars=1000, device_seconds=5000)
            assert await take(one, [PER_DAY], dollars=1) is None
            here.now += 86_400  # the 31st is over, and so is January
            assert await take(one, both, dollars=1000, device_seconds=4000) is not None
            one.settle(old, Amounts(dollars=0, device_seconds=0))  # of yesterday's budget
            await here.settled()
            assert await take(one, [PER_DAY], dollars=1) is None
            assert await take(one, [PER_MONTH], device_seconds=1000) is not None

    run(body)


def test_workers_share_to_the_last_unit(house: Callable[[], Any]) -> None:
    async def body() -> None:
        async with house() as here:
            one, two = await here.worker(), await here.worker()
            tickets = [await take([one, two][index % 2], [PER_DAY], dollars=100) for index in range(10)]
            assert all(tickets)
            assert await take(one, [PER_DAY], dollars=1) is None
            assert await take(two, [PER_DAY], dollars=1) is None
            for index, ticket in enumerate(tickets):
                [one, two][index % 2].settle(ticket, Amounts(dollars=10))
            await here.settled()
            assert await take(two, [PER_DAY], dollars=901) is None
            await here.settled()
            assert await take(one, [PER_DAY], dollars=900) is not None

    run(body)


def test_who_is_silent_no_longer_counts_as_under_way_but_its_money_does(house: Callable[[], Any]) -> None:
    async def body() -> None:
        async with house() as here:
            one, two = await here.worker(), await here.worker()
            for _ in range(2):
                assert await take(one, [AT_A_TIME, PER_DAY], dollars=300) is not None
            await here.kill(one)
            with pytest.raises(here.silent):
                await two.reserve([AT_A_TIME], Amounts())
            here.now += TTL + 1
            assert await take(two, [AT_A_TIME]) is not None
            with pytest.raises(here.silent):
                await two.reserve([PER_DAY], Amounts(dollars=401))
            with pytest.raises(LimitReached):  # whatever the silent one has used
                await two.reserve([PER_DAY], Amounts(dollars=1001))

    run(body)


def test_a_dead_workers_minute_counts_to_its_end(house: Callable[[], Any]) -> None:
    async def body() -> None:
        async with house() as here:
            one, two = await here.worker(), await here.worker()
            assert await take(one, [TOKENS], tokens=90) is not None
            await here.kill(one)
            here.now += TTL + 1
            with pytest.raises(here.silent):
                await two.reserve([TOKENS], Amounts(tokens=11))
            here.now += 61
            assert await take(two, [TOKENS], tokens=100) is not None

    run(body)


def test_a_part_of_a_reservation_goes_on(house: Callable[[], Any]) -> None:
    """The accounts never see more than was reserved, and what is counted once is counted once."""

    async def body() -> None:
        async with house() as here:
            one = await here.worker()
            limits = [REQUESTS, TOKENS, AT_A_TIME, PER_DAY, PER_MONTH]
            first = await take(one, limits, tokens=90, dollars=900, device_seconds=10)
            later = one.split(first, Amounts(tokens=40, dollars=500))
            await here.settled()
            assert await take(one, [PER_DAY], dollars=101) is None
            assert await take(one, [TOKENS], tokens=11) is None
            one.settle(first, Amounts(tokens=20, dollars=100, device_seconds=7))
            await here.settled()
            assert await take(one, [PER_DAY], dollars=401) is None
            assert await take(one, [TOKENS], tokens=41) is None
            assert await take(one, [PER_MONTH], device_seconds=4994) is None
            other = await take(one, [AT_A_TIME])
            assert other is not None
            assert await take(one, [AT_A_TIME]) is None  # it is still under way
            one.settle(later, Amounts(tokens=30, dollars=50))
            await here.settled()
            assert await take(one, [TOKENS], tokens=51) is None
            assert await take(one, [PER_DAY], dollars=851) is None
            assert await take(one, [AT_A_TIME, TOKENS, PER_DAY], tokens=50, dollars=850) is not None
            for _ in range(2):  # with the first one, three in this minute
                assert await take(one, [REQUESTS]) is not None
            assert await take(one, [REQUESTS]) is None

    run(body)


def test_many_at_once(house: Callable[[], Any]) -> None:
    async def body() -> None:
        async with house() as here:
            both = [await here.worker(), await here.worker()]
            busy = most = 0

            async def one(index: int) -> bool:
                nonlocal busy, most
                counters = both[index % 2]
                ticket = await take(counters, [AT_A_TIME, PER_DAY], dollars=50)
                if ticket is None:
                    return False
                busy += 1
                most = max(most, busy)
                await asyncio.sleep(0)
                busy -= 1
                counters.settle(ticket, Amounts(dollars=50))
                return True

            let = sum(await asyncio.gather(*(one(index) for index in range(40))))
            assert 1 <= most <= 2
            assert 2 <= let <= 20

    run(body)


def test_without_its_server_redis_closes_or_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("redis", reason="the client of the extra `redis` is not installed")

    async def body() -> None:
        url = f"redis://127.0.0.1:{free_port()}/0"
        closed = ValkeyCounters(url, "w", failure="closed")
        with pytest.raises(Unavailable, match="cannot be counted"):
            await closed.reserve([PER_DAY], Amounts(dollars=1))
        opened = ValkeyCounters(url, "w", failure="open")
        ticket = await opened.reserve([PER_DAY], Amounts(dollars=1))
        assert opened.standings(ticket) == []
        assert len(ticket.charged) == 1  # the ledger charges it all the same
        opened.settle(ticket, Amounts())
        for counters in (closed, opened):
            await counters.close()

    monkeypatch.setattr("penstock.gateway.limits.valkey.TIMEOUT", 0.05)
    run(body)


def test_redis_that_lost_its_memory_begins_with_the_ledgers_sums(servers: dict[str, str]) -> None:
    async def body() -> None:
        from redis.asyncio import Redis

        async def known(_: str) -> int:
            return 970

        client = Redis.from_url(servers["redis"])
        await client.flushall()
        await client.aclose()
        counters = ValkeyCounters(servers["redis"], "w", known=lambda id: asyncio.ensure_future(known(id)))
        counters.start()
        assert await take(counters, [PER_DAY], dollars=31) is None
        assert await take(counters, [PER_DAY], dollars=30) is not None
        await counters.close()

    run(body)


def test_redis_learns_of_rows_that_were_settled_later(servers: dict[str, str]) -> None:
    """A budget that it does not know is not made of a correction: it begins with the ledger's sum."""

    async def body() -> None:
        from redis.asyncio import Redis

        async def known(_: str) -> int:
            return 100

        client = Redis.from_url(servers["redis"])
        await client.flushall()
        await client.aclose()
        counters = ValkeyCounters(servers["redis"], "w", known=lambda id: asyncio.ensure_future(known(id)))
        ticket = await counters.reserve([PER_DAY], Amounts(dollars=1))
        [id] = ticket.charged
        await counters.corrected({id: -70, id.replace("t", "x", 1): 5})
        assert await take(counters, [PER_DAY], dollars=970) is None
        assert await take(counters, [PER_DAY], dollars=969) is not None
        other = dataclasses.replace(PER_DAY, scope=PER_DAY.scope.replace("t", "x", 1))
        assert await take(counters, [other], dollars=901) is None
        assert await take(counters, [other], dollars=900) is not None
        await counters.close()
        nobody = ValkeyCounters(f"redis://127.0.0.1:{free_port()}/0", "w")
        await nobody.corrected({id: 1})  # told in the log, and nothing else
        await nobody.close()

    run(body)


def test_redis_settles_what_the_dead_had_open_once(servers: dict[str, str]) -> None:
    async def body() -> None:
        from redis.asyncio import Redis

        client = Redis.from_url(servers["redis"])
        await client.flushall()
        await client.aclose()

        async def ledger(numbers: Sequence[int]) -> dict[int, dict[Unit, int]]:
            assert sorted(numbers) == [0, 1, 2]  # and the last was never in the journal
            return {0: {"dollars": 100}, 1: {"dollars": 0}, 7: {"dollars": 9}}

        dead, alive = (ValkeyCounters(servers["redis"], name) for name in ("dead", "alive"))
        for _ in range(3):
            await dead.reserve([PER_DAY], Amounts(dollars=300))
        for _ in range(2):  # the second time changes nothing
            await alive.bury("dead", ledger)
        assert await take(alive, [PER_DAY], dollars=901) is None
        assert await take(alive, [PER_DAY], dollars=900) is not None
        for counters in (dead, alive):
            await counters.close()

    run(body)


def test_a_url_that_is_none() -> None:
    pytest.importorskip("redis", reason="the client of the extra `redis` is not installed")

    async def body() -> None:
        with pytest.raises(StartupError, match="URL cannot be used"):
            ValkeyCounters("http://x", "w")

    run(body)


@pytest.mark.parametrize(
    ("unit", "amount", "text"),
    [
        ("dollars", 12_500_000_000, "$12.50"),
        ("dollars", 1, "$0.000000001"),
        ("dollars", 0, "$0.00"),
        ("device_seconds", 90_500_000_000, "90.5 device-seconds"),
        ("tokens", 1000, "1000 tokens"),
        ("concurrent", 2, "2 requests at a time"),
    ],
)
def test_amounts_in_words(unit: Any, amount: int, text: str) -> None:
    assert quantity(unit, amount) == text
