"""Limits within leases when the bank is slow, busy or down, and workers fall silent: in virtual time.

What must hold of every request: nobody is told that a limit is reached which was not at any moment while he
waited; nobody is let through over a cap; everybody is told something in time.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pytest

from penstock.core.errors import Unavailable
from penstock.gateway.ledger.store import Beat
from penstock.gateway.limits.leased import PATIENCE, SLOWEST, LeasedCounters
from penstock.gateway.meter import LimitReached, NotCounted
from penstock.gateway.policy.amounts import Amounts, Limit
from penstock.gateway.policy.bank import Bank
from penstock.gateway.policy.leases import TTL, Ask, Grant
from penstock.gateway.policy.shares import REMEMBER, Ticket
from penstock.gateway.tasks import ended

from .virtual import Line, run

NOON = datetime(2040, 1, 31, 12, tzinfo=UTC).timestamp()
AT_A_TIME = Limit("team:t", "concurrent", "now", 3)
TOKENS = Limit("key:k", "tokens", "minute", 200)
PER_DAY = Limit("team:t", "dollars", "day", 2000)
LIMITS = (AT_A_TIME, TOKENS, PER_DAY)
QUICK = (0.0005, 0.0005, "")
EPSILON = 0.05


class Shared:
    """The bank that all workers share, by the loop's clock."""

    def __init__(self) -> None:
        self.bank = Bank()
        self.heard: dict[str, float] = {}
        self.lapsed: dict[str, float] = {}
        """Worker → when it was heard of again after others had taken it for dead."""
        self._loop = asyncio.get_running_loop()
        self.looked = lambda: None

    def beat(self, worker: str, *, write: bool = True) -> Beat:
        now = self._loop.time()
        if now - self.heard.get(worker, now) >= TTL:
            self.lapsed[worker] = now
        self.heard[worker] = now
        others, pressed = self.bank.beat(worker, now)
        return Beat(others, pressed, 0)

    def lease(self, worker: str, asks: list[Ask]) -> list[Grant]:
        self.looked()
        return self.bank.lease(worker, asks, self._loop.time())


@dataclass
class Worker:
    """One, with what it has under way and what it has charged that the bank does not know."""

    name: str
    counters: LeasedCounters
    line: Line
    open: dict[Ticket, tuple[float, Amounts]] = field(default_factory=dict)
    unwritten: dict[str, int] = field(default_factory=dict)
    writing: asyncio.Task[None] | None = None
    dead: bool = False


class House:
    """Workers, and the truth about what they let through."""

    def __init__(self, dice: random.Random) -> None:
        self.dice = dice
        self.loop = asyncio.get_running_loop()
        self.shared = Shared()
        self.workers: list[Worker] = []
        self.all: list[Worker] = []
        self.spent: dict[str, int] = {}
        """Account → reserved and used, of everybody."""
        self.uses: list[tuple[float, int]] = []
        """Tokens that were used, and when."""
        self.history: dict[str, list[tuple[float, int]]] = {limit.unit: [] for limit in LIMITS}
        """Unit → moments, and what counted from then on."""
        self.answers: dict[str, int] = {}
        self.slow: Callable[[], tuple[float, float, str]] = lambda: QUICK
        self.born = 0
        self.shared.looked = self.note

    async def arrive(self) -> Worker:
        self.born += 1
        name = f"w{self.born}"
        line = Line(lambda: self.slow())
        clock = lambda: NOON + self.loop.time()  # noqa: E731
        counters = LeasedCounters(self.shared, name, line, clock=clock, monotonic=self.loop.time)
        worker = Worker(name, counters, line)
        self.shared.beat(name)
        counters.start()
        self.all.append(worker)
        worker.writing = asyncio.ensure_future(self.write(worker))
        self.workers.append(worker)
        return worker

    async def kill(self, worker: Worker, found_in: float) -> None:
        """Nothing more is heard of it; after so many seconds somebody reads its journal."""
        self.workers.remove(worker)
        worker.dead = True
        await self._stop(worker)
        self.loop.call_later(found_in, self._bury, worker)

    async def _stop(self, worker: Worker) -> None:
        assert worker.writing is not None
        await ended([*worker.counters._tasks, worker.writing])
        await worker.line.close()

    def _bury(self, worker: Worker) -> None:
        for ticket, (_, worst) in worker.open.items():
            self._end(worker, ticket, worst, worst)
        self.shared.bank.charge(worker.name, worker.unwritten)
        ended_ = [share.id for share in worker.counters.shares if share.limit.window != "minute"]
        self.shared.bank.bury(worker.name, {}, ended_, self.loop.time())
        worker.open.clear()

    def note(self) -> None:
        """Remember what counts now."""
        now = self.loop.time()
        for limit in LIMITS:
            moments = self.history[limit.unit]
            counted = self.counts(limit, now)
            if not moments or moments[-1][1] != counted:
                moments.append((now, counted))

    def counts(self, limit: Limit, now: float) -> int:
        """What really counts against a limit, and what others wait for who came before."""
        total = self.spent.get(limit.unit, 0)
        for worker in self.workers:
            total += sum(sum(share.waiting) for share in worker.counters.shares if share.limit == limit)
        if limit.window == "minute":
            total += sum(amount for at, amount in self.uses if at > now - 61)
        return total

    def most(self, limit: Limit, since: float) -> int:
        """The most that counted at any moment since then."""
        moments = self.history[limit.unit]
        before = [counted for at, counted in moments if at < since][-1:]
        return max([*before, *(counted for at, counted in moments if at >= since), 0])

    async def request(self, worker: Worker, limits: list[Limit], worst: Amounts, seconds: float) -> str:
        """From the first to the last moment; what was said."""
        begun = self.loop.time()
        self.note()
        said = "let through"
        try:
            ticket = worker.counters.reserve_now(limits, worst)
            ticket = ticket or await worker.counters.reserve(limits, worst)
        except LimitReached as error:
            said = "limit"
            self.note()
            limit = error.limit
            most = self.most(limit, begun - REMEMBER - EPSILON)
            assert most + worst.of(limit.unit) > limit.cap, f"{most} of {limit}, and {worst}"
        except NotCounted as error:
            refused = (error.status, error.code, error.retry_after is not None)
            said = "not counted" if refused == (503, "ledger_unavailable", True) else str(refused)
        assert self.loop.time() - begun <= SLOWEST + EPSILON
        self.answers[said] = self.answers.get(said, 0) + 1
        if said != "let through":
            return said
        self._begin(worker, ticket, worst)
        await asyncio.sleep(seconds)
        if not worker.dead:
            part = self.dice.choice([0, 1, 2, 2])
            used = Amounts(tokens=worst.tokens * part // 2, dollars=worst.dollars * part // 2)
            worker.counters.settle(ticket, used)
            self._end(worker, ticket, worst, used)
            del worker.open[ticket]
        return said

    def _begin(self, worker: Worker, ticket: Ticket, worst: Amounts) -> None:
        worker.open[ticket] = (self.loop.time(), worst)
        for share in ticket.shares:
            unit = share.limit.unit
            self.spent[unit] = self.spent.get(unit, 0) + worst.of(unit)
            counted = self.spent[unit] if share.is_budget else self._known(share.limit)
            assert counted <= share.limit.cap, f"{counted} of {share.limit}"
        self.note()

    def _known(self, limit: Limit) -> int:
        """What counts against a rate: less what others had taken over from a worker that was silent."""
        now, heard, lapsed = self.loop.time(), self.shared.heard, self.shared.lapsed
        total = sum(amount for at, amount in self.uses if at > now - 60) if limit is TOKENS else 0
        for worker in self.all:
            for ticket, (begun, worst) in worker.open.items():
                if now < heard[worker.name] + TTL and begun > lapsed.get(worker.name, 0):
                    total += sum(worst.of(limit.unit) for share in ticket.shares if share.limit == limit)
        return total

    def _end(self, worker: Worker, ticket: Ticket, worst: Amounts, used: Amounts) -> None:
        for share in ticket.shares:
            unit = share.limit.unit
            self.spent[unit] -= worst.of(unit)
            if share.is_budget:
                self.spent[unit] += used.of(unit)
                worker.unwritten[share.id] = worker.unwritten.get(share.id, 0) + used.of(unit)
            elif unit == "tokens" and worker.open[ticket][0] > self.shared.lapsed.get(worker.name, 0):
                self.uses.append((self.loop.time(), used.tokens))
        self.note()

    async def write(self, worker: Worker) -> None:
        """Rows go into the bank, for ever: late perhaps, and never lost."""

        def work() -> dict[str, int]:
            charged, worker.unwritten = worker.unwritten, {}
            self.shared.bank.charge(worker.name, charged)
            return charged

        while True:
            await asyncio.sleep(0.1)
            async with worker.line.turn:
                with contextlib.suppress(Unavailable):
                    await worker.line.call(work, apply=worker.counters.folded, lost=("", "call"))

    async def close(self) -> None:
        for worker in self.workers:
            await self._stop(worker)


MOODS = {"quick": 0.002, "late": 0.3, "slow": 2.5, "hangs": 11.0, "call": 0.1, "answer": 0.1}
"""Of a bank → seconds that it takes at most; the last two fail, before and after the work is done."""


def moody(dice: random.Random) -> Callable[[], tuple[float, float, str]]:
    """Every now and then the bank is slow, or hangs, or fails."""
    mood, left = "quick", 0

    def draw() -> tuple[float, float, str]:
        nonlocal mood, left
        if left == 0:
            mood = dice.choice([*MOODS, "quick", "late"])
            left = {"quick": 60, "hangs": 1}.get(mood, 8)
        left -= 1
        top = MOODS[mood]
        return dice.uniform(0, top), dice.uniform(0, top / 4), mood if mood in ("call", "answer") else ""

    return draw


@pytest.mark.parametrize("seed", range(4))
def test_no_phantom_and_nothing_over_a_cap(seed: int) -> None:
    async def body() -> dict[str, int]:
        dice = random.Random(seed)
        house = House(dice)
        house.slow = moody(dice) if seed % 3 else lambda: QUICK
        for _ in range(3):
            await house.arrive()
        running: set[asyncio.Task[Any]] = set()
        failed: list[BaseException] = []

        def done(task: asyncio.Task[Any]) -> None:
            running.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                failed.append(error)

        for _ in range(100):
            await asyncio.sleep(dice.choice([0.0, 0.01, 0.1, 0.5, 2.0]))
            if len(house.workers) > 1 and dice.random() < 0.01:
                await house.kill(dice.choice(house.workers), dice.choice([0.5, 1.5, 3.0, 40.0]))
            if len(house.workers) < 3 and dice.random() < 0.05:
                await house.arrive()
            for _ in range(dice.choice([1, 1, 1, 4])):
                worker = dice.choice(house.workers)
                worst = Amounts(tokens=dice.randrange(1, 40), dollars=dice.randrange(1, 100))
                limits = dice.choice([[AT_A_TIME], [TOKENS], [PER_DAY], [AT_A_TIME, PER_DAY], list(LIMITS)])
                seconds = dice.choice([0.01, 0.3, 2.0])
                task = asyncio.ensure_future(house.request(worker, limits, worst, seconds))
                running.add(task)
                task.add_done_callback(done)
            if dice.random() < 0.05:
                task.cancel()
            if failed:
                raise failed[0]
        await asyncio.gather(*running, return_exceptions=True)
        if failed:
            raise failed[0]
        await asyncio.sleep(1)
        # the bank is quick again, and the dead are found: all that was not used can be had at once
        house.slow = lambda: QUICK
        await asyncio.sleep(TTL + 80)
        for worker in house.workers:
            for limit in (AT_A_TIME, PER_DAY):
                rest = Amounts(dollars=limit.cap - house.counts(limit, house.loop.time()))
                ticket = await worker.counters.reserve([limit], rest)
                worker.counters.settle(ticket, Amounts())
        await house.close()
        return house.answers

    answers = run(body())
    assert answers["let through"] > 30, answers
    assert seed % 3 or answers["limit"] > 20, answers


def test_a_bank_that_takes_three_seconds_gives_what_there_is() -> None:
    async def body() -> None:
        house = House(random.Random(0))
        one, _two = await house.arrive(), await house.arrive()
        await asyncio.sleep(1)
        house.slow = lambda: (1.5, 1.5, "")
        many = [house.request(one, [AT_A_TIME, PER_DAY], Amounts(dollars=10), 60) for _ in range(3)]
        assert await asyncio.gather(*many) == ["let through"] * 3
        assert await house.request(one, [AT_A_TIME], Amounts(), 0) == "let through"  # they have ended
        await house.close()

    run(body())


def test_a_bank_that_hangs_is_not_a_limit() -> None:
    async def body() -> None:
        house = House(random.Random(0))
        one = await house.arrive()
        await asyncio.sleep(1)
        house.slow = lambda: (60.0, 0.0, "")
        begun = house.loop.time()
        with pytest.raises(NotCounted, match="has not answered for 10 s"):
            await one.counters.reserve([PER_DAY], Amounts(dollars=1))
        assert house.loop.time() - begun == pytest.approx(SLOWEST)
        house.slow = lambda: QUICK
        await asyncio.sleep(70)
        assert await house.request(one, [PER_DAY], Amounts(dollars=PER_DAY.cap), 0) == "let through"
        await house.close()

    run(body())


def test_what_a_silent_worker_holds_is_neither_there_nor_used() -> None:
    async def body() -> None:
        house = House(random.Random(0))
        one, two = await house.arrive(), await house.arrive()
        await asyncio.sleep(1)
        assert await house.request(one, [PER_DAY], Amounts(dollars=1000), 0) == "let through"
        await house.kill(one, 30)
        begun = house.loop.time()
        with pytest.raises(NotCounted, match="leased to a worker of the gateway that is not heard of"):
            await two.counters.reserve([PER_DAY], Amounts(dollars=1500))
        assert house.loop.time() - begun == pytest.approx(PATIENCE, abs=0.2)
        with pytest.raises(LimitReached):  # whatever it has used
            await two.counters.reserve([PER_DAY], Amounts(dollars=2001))
        await asyncio.sleep(TTL)
        with pytest.raises(NotCounted):
            await two.counters.reserve([PER_DAY], Amounts(dollars=1500))
        await asyncio.sleep(15)
        used = house.spent["dollars"]
        assert await house.request(two, [PER_DAY], Amounts(dollars=2000 - used), 0) == "let through"
        await house.close()

    run(body())
