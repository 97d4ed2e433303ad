"""Accounts, leases and shares as pure machines: caps under every interleaving, and nothing left behind."""

from __future__ import annotations

import math
import random
from collections import deque
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from penstock.gateway.policy.accounts import Account, window_end, window_start
from penstock.gateway.policy.amounts import Amounts, Limit
from penstock.gateway.policy.bank import Bank
from penstock.gateway.policy.leases import TTL, Ask, Lease, counts, decide
from penstock.gateway.policy.shares import Shares, Ticket

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC).timestamp()


@given(st.floats(0, 4e9))
def test_windows_contain_their_moment_and_touch_each_other(now: float) -> None:
    for window in ("day", "month"):
        start = window_start(window, now)
        end = window_end(window, start)
        assert start <= now < end
        assert window_start(window, end) == end
        assert window_start(window, end - 1) == start


def test_a_month_is_the_calendars() -> None:
    start = window_start("month", NOON)
    assert datetime.fromtimestamp(start, UTC) == datetime(2026, 1, 1, tzinfo=UTC)
    assert datetime.fromtimestamp(window_end("month", start), UTC) == datetime(2026, 2, 1, tzinfo=UTC)


def test_a_minute_slides() -> None:
    account = Account(Limit("key:a", "tokens", "minute", 100), NOON, granted=100)
    account.reserve(60, NOON)
    assert account.free(NOON) == 40
    account.settle(60, 30, NOON + 10.9)
    assert account.free(NOON + 11) == 70
    assert account.free(NOON + 70.9) == 70  # 60 s after its use it still counts
    assert account.free(NOON + 71) == 100
    account.check()


def test_a_request_counts_when_it_comes_and_is_not_taken_back() -> None:
    account = Account(Limit("key:a", "requests", "minute", 2), NOON, granted=2)
    account.reserve(1, NOON)
    account.settle(1, 0, NOON + 5)
    assert account.free(NOON + 5) == 1
    assert account.frees_in(2, NOON + 5) == 56
    assert account.free(NOON + 61) == 2


def test_a_long_request_holds_its_reservation_and_then_what_it_used() -> None:
    account = Account(Limit("key:a", "tokens", "minute", 100), NOON, granted=100)
    account.reserve(80, NOON)
    assert account.free(NOON + 600) == 20
    assert account.frees_in(50, NOON + 600) is None  # time alone does not free it
    account.settle(80, 70, NOON + 600)
    assert account.free(NOON + 630) == 30
    assert account.frees_in(50, NOON + 630) == 31


def test_concurrency_is_what_is_under_way() -> None:
    account = Account(Limit("team:x", "concurrent", "now", 2), NOON, granted=2)
    account.reserve(1, NOON)
    account.reserve(1, NOON)
    assert account.free(NOON) == 0
    account.settle(1, 1, NOON)
    assert account.free(NOON) == 1


@given(st.lists(st.tuples(st.floats(-200, 200), st.integers(1, 9)), max_size=60))
def test_a_clock_that_goes_backwards_forgets_nothing(steps: list[tuple[float, int]]) -> None:
    """Slots stay ordered and bounded, sums right, and the last use is always counted."""
    account = Account(Limit("key:a", "tokens", "minute", 10**6), NOON, granted=10**6)
    now = NOON
    for step, amount in steps:
        now += step
        account.reserve(amount, now)
        account.settle(amount, amount, now)
        account.check()
        assert account.used >= amount


def test_a_share_is_half_of_the_rest_at_most_when_others_live() -> None:
    limit = Limit("key:a", "dollars", "day", 1000)
    ask = Ask("a", limit, 0, keep=0, need=10, least=10, demand=500)
    other = Lease(0, NOON, alive=True, counts=True)
    assert decide(ask, 0, [], None, NOON)[0].granted == 1000
    assert decide(ask, 0, [other], None, NOON)[0].granted == 10 + 990 // 4
    assert decide(ask, 985, [other], None, NOON)[0].granted == 10 + 5 // 4
    assert decide(ask, 995, [other], None, NOON)[0].granted == 0


def test_short_is_final_once_the_others_have_been_heard() -> None:
    limit = Limit("key:a", "dollars", "day", 100)
    ask = Ask("a", limit, 0, keep=0, need=50, least=50)
    silent, heard = Lease(80, 1.0, True, True), Lease(80, 6.0, True, True)
    first, since = decide(ask, 0, [silent], None, 5.0)
    assert (first.granted, first.pending, since) == (0, True, 5.0)
    again, since = decide(ask, 0, [silent], since, 5.5)
    assert again.pending
    assert since == 5.0
    last, since = decide(ask, 0, [heard], since, 6.5)
    assert (last.granted, last.pending, since) == (0, False, None)


def test_a_dead_workers_budget_is_never_given_away_on_suspicion() -> None:
    assert counts("day", gone=None, seen=0, now=1e6)
    assert not counts("now", gone=None, seen=0, now=TTL + 1)
    assert counts("minute", gone=None, seen=0, now=TTL + 60)
    assert not counts("minute", gone=None, seen=0, now=TTL + 61)
    assert not counts("now", gone=None, seen=1e6, now=5)  # by the clock of before a restart


LIMITS = (
    Limit("key:a", "requests", "minute", 6),
    Limit("key:a", "tokens", "minute", 100),
    Limit("team:t", "concurrent", "now", 4),
    Limit("team:t", "dollars", "day", 100),
    Limit("tag:f=x", "device_seconds", "month", 200),
)


def asked(shares: Shares, now: float, used: int = 0) -> list[int]:
    """A round with a bank that has no other workers: what each account needed."""
    asks = shares.asks(now)
    shares.granted(asks, [decide(ask, used, [], None, now)[0] for ask in asks], now)
    return [ask.need for ask in asks]


def test_more_is_asked_for_before_anybody_has_to_wait() -> None:
    """200 a second: only the first request of all waits, and a round comes twice a second or so."""
    shares, limit, rounds = Shares(), Limit("key:a", "requests", "minute", 100_000), 0
    waited = []
    for number in range(200 * 20):
        now = NOON + number / 200
        if number % 200 == 0:
            shares.tick(now)
        if shares.reserve([limit], Amounts(requests=1), now) is None:
            waited.append(number)
            share = shares.share(limit, now)
            share.waiting.append(1)
            asked(shares, now)
            share.waiting.clear()
            assert shares.reserve([limit], Amounts(requests=1), now) is not None
        if shares.low:
            assert asked(shares, now) == [1], "as much as one, and what is used in a second"
            assert not shares.low
            rounds += 1
    assert [number for number in waited if number >= 200] == [], "once it is known how many come"
    assert 19 <= rounds <= 60


def test_nothing_is_asked_for_ahead_where_the_bank_had_no_more() -> None:
    shares, limit = Shares(), Limit("key:a", "requests", "minute", 40)
    share = shares.share(limit, NOON)
    share.waiting.append(40)
    asked(shares, NOON)
    share.waiting.clear()
    for number in range(20):
        assert shares.reserve([limit], Amounts(requests=1), NOON + number / 100) is not None
    shares.tick(NOON + 1)
    for number in range(20):
        assert shares.reserve([limit], Amounts(requests=1), NOON + 1 + number / 100) is not None
        assert not shares.low
    assert shares.reserve([limit], Amounts(requests=1), NOON + 2) is None


@dataclass
class Request:
    """One that was let through, by whom, with what."""

    ticket: Ticket
    worst: Amounts
    since: float


@dataclass
class Worker:
    """A worker's shares and its line to the bank: operations and answers come in order, some late."""

    name: str
    offset: float
    shares: Shares = field(default_factory=Shares)
    beaten: float = -math.inf
    lapsed: float = -math.inf
    """When it was last heard of after a silence in which others took its leases for void."""
    open: list[Request] = field(default_factory=list)
    unwritten: dict[str, int] = field(default_factory=dict)
    """Ended, in the journal, not in the bank."""
    calls: deque[tuple[str, Any]] = field(default_factory=deque)
    answers: deque[tuple[str, Any]] = field(default_factory=deque)
    asking: bool = False
    doubted: dict[str, int] | None = None
    """Charged by the bank, whose answer was lost."""

    @property
    def charging(self) -> bool:
        """Whether nothing may be asked: answers of the two would cross."""
        return any(kind != "lease" for kind, _ in self.calls) or any(
            kind in ("charge", "again") for kind, _ in self.answers
        )


class Workers(RuleBasedStateMachine):
    """Up to three workers on one bank. Messages are late or lost, workers die, clocks are set."""

    @initialize()
    def begin(self) -> None:
        self.bank = Bank()
        self.mono = 1000.0
        self.wall = NOON - 1000.0  # wall clock minus monotonic
        self.born = 0
        self.workers: list[Worker] = []
        self.dead: list[Worker] = []
        # what really happened, by account: budgets and requests under way, and uses with their moments
        self.spent: dict[str, int] = {}
        self.uses: dict[str, list[tuple[float, int]]] = {}
        for _ in range(2):
            self.arrive()

    @precondition(lambda self: len(self.workers) < 3)
    @rule()
    def arrive(self) -> None:
        self.born += 1
        worker = Worker(f"w{self.born}", self.wall)
        self.workers.append(worker)
        self.beat(worker)

    def beat(self, worker: Worker) -> None:
        others, pressed = self.bank.beat(worker.name, self.mono)
        if self.mono >= worker.beaten + TTL:
            worker.lapsed = self.mono
        worker.beaten = self.mono
        worker.shares.alone = others == 0
        worker.shares.pressed(pressed, self.now(worker))

    def now(self, worker: Worker) -> float:
        return worker.offset + self.mono

    def pick(self, which: int) -> Worker:
        return self.workers[which % len(self.workers)]

    @rule(
        which=st.integers(0, 2),
        tokens=st.integers(0, 40),
        dollars=st.integers(0, 40),
        device=st.integers(0, 90),
        subset=st.integers(1, 31),
        manner=st.sampled_from(["round", "round", "round", "others", "wait", "give up"]),
    )
    def request(self, which: int, tokens: int, dollars: int, device: int, subset: int, manner: str) -> None:
        """One request: let through within the lease, or after a round, or after the others have answered."""
        if not self.workers:
            return
        worker = self.pick(which)
        limits = [limit for bit, limit in enumerate(LIMITS) if subset >> bit & 1]
        worst = Amounts(tokens=tokens, dollars=dollars, device_seconds=device)
        if self.reserve(worker, limits, worst):
            return
        waiting = []
        for share, amount in worker.shares.short(limits, worst, self.now(worker)):
            share.waiting.append(amount)
            waiting.append((share, amount))
        if manner == "wait":  # until some other rule brings a round; asks of a later one are then for both
            return
        if manner != "give up":
            self.beat(worker)
            self.round(self.workers.index(worker))
        if manner == "others":
            for each in self.workers:
                self.beat(each)
                self.round(self.workers.index(each))
            self.round(self.workers.index(worker))
        for share, amount in waiting:
            share.waiting.remove(amount)
            share.returning = share.returning or share.pending
        self.reserve(worker, limits, worst)

    def reserve(self, worker: Worker, limits: list[Limit], worst: Amounts) -> bool:
        valid = self.mono < worker.beaten + TTL - 1
        ticket = worker.shares.reserve(limits, worst, self.now(worker), valid=valid)
        if ticket is None:
            return False
        worker.open.append(Request(ticket, worst, self.mono))
        for share, amount in zip(ticket.shares, ticket.amounts, strict=True):
            if share.limit.unit == "requests":
                self.uses.setdefault(share.id, []).append((self.mono, amount))
            if share.is_budget or share.limit.unit == "concurrent":
                self.spent[share.id] = self.spent.get(share.id, 0) + amount
        return True

    @rule(which=st.integers(0, 2), index=st.integers(0, 20), part=st.sampled_from([0, 1, 2, 3]))
    def settle(self, which: int, index: int, part: int) -> None:
        if self.workers and (worker := self.pick(which)).open:
            request = worker.open.pop(index % len(worker.open))
            worst = request.worst
            used = Amounts(
                requests=1,
                tokens=worst.tokens * part // 3,
                dollars=worst.dollars * part // 3,
                device_seconds=worst.device_seconds * part // 3,
            )
            worker.shares.settle(request.ticket, used, self.now(worker))
            self.end(worker, request, used)

    def end(self, worker: Worker, request: Request, used: Amounts) -> None:
        for share, amount in zip(request.ticket.shares, request.ticket.amounts, strict=True):
            actual = used.of(share.limit.unit)
            if share.is_budget:
                self.spent[share.id] += actual - amount
                worker.unwritten[share.id] = worker.unwritten.get(share.id, 0) + actual
            elif share.limit.unit == "concurrent":
                self.spent[share.id] -= 1
            elif share.limit.unit == "tokens" and request.since > worker.lapsed:
                self.uses.setdefault(share.id, []).append((self.mono, actual))

    @rule(which=st.integers(0, 2))
    def ask(self, which: int) -> None:
        if self.workers and not ((worker := self.pick(which)).asking or worker.charging):
            worker.asking = True
            worker.calls.append(("lease", worker.shares.asks(self.now(worker))))

    @rule(which=st.integers(0, 2))
    def write(self, which: int) -> None:
        if not self.workers or (worker := self.pick(which)).asking or worker.charging:
            return
        if worker.doubted is not None:
            worker.calls.append(("again", worker.doubted))
            worker.doubted = None
        elif worker.unwritten:
            worker.calls.append(("charge", worker.unwritten))
            worker.unwritten = {}

    @rule(which=st.integers(0, 2), lost=st.sampled_from([None, None, None, "call", "answer"]))
    def arrives(self, which: int, lost: str | None) -> None:
        """The first call of a worker reaches the bank; leases may be lost on the way, rows are not."""
        if not self.workers or not (worker := self.pick(which)).calls:
            return
        kind, what = worker.calls.popleft()
        if kind == "again":
            worker.answers.append((kind, what))
        elif kind == "charge":
            self.bank.charge(worker.name, what)
            if lost:  # it is tried again, and found to be done
                worker.doubted = what
            else:
                worker.answers.append((kind, what))
        elif lost == "call":
            worker.answers.append(("failed", what))
        else:
            grants = self.bank.lease(worker.name, what, self.mono)
            worker.answers.append(("failed", what) if lost else (kind, (what, grants)))

    @rule(which=st.integers(0, 2))
    def answered(self, which: int) -> None:
        if not self.workers or not (worker := self.pick(which)).answers:
            return
        kind, what = worker.answers.popleft()
        if kind in ("charge", "again"):
            worker.shares.folded(what, doubted=kind == "again")
        else:
            worker.asking = False
            if kind == "lease":
                worker.shares.granted(*what)
            else:
                worker.shares.lost(what)

    @rule(which=st.integers(0, 2))
    def round(self, which: int) -> None:
        """A whole round without a hitch."""
        if not self.workers:
            return
        worker = self.pick(which)
        self.drain(worker)
        self.ask(self.workers.index(worker))
        self.drain(worker)

    @rule(which=st.integers(0, 2))
    def flush(self, which: int) -> None:
        if self.workers:
            self.write(which)
            self.drain(self.pick(which))

    def drain(self, worker: Worker) -> None:
        index = self.workers.index(worker)
        while worker.calls:
            self.arrives(index, None)
        while worker.answers:
            self.answered(index)

    @rule(which=st.integers(0, 2), writes=st.booleans())
    def pulse(self, which: int, writes: bool) -> None:
        if not self.workers:
            return
        worker = self.pick(which)
        ahead = self.wall - worker.offset
        if abs(ahead) >= 1:
            worker.offset = self.wall
            worker.shares.shift(math.ceil(ahead))
        if writes:
            self.beat(worker)
        worker.shares.tick(self.now(worker))

    @rule(seconds=st.sampled_from([0.3, 1.0, 5.0, 30.0, 57.0]), silent=st.sampled_from([False] * 5 + [True]))
    def wait(self, seconds: float, silent: bool) -> None:
        """Time passes; unless the workers are suspended, they say every now and then that they live."""
        while seconds > 0:
            step = min(seconds, 4.0)
            self.mono += step
            seconds -= step
            for index in range(0 if silent else len(self.workers)):
                self.pulse(index, True)

    @rule(hours=st.sampled_from([1, 12, 400]))
    def sleep(self, hours: int) -> None:
        self.mono += hours * 3600.0

    @rule(seconds=st.sampled_from([-7200.0, -2.5, -0.4, 0.4, 3.0, 3600.0, 86_400.0]))
    def set_clock(self, seconds: float) -> None:
        self.wall += seconds

    @precondition(lambda self: self.workers)
    @rule(which=st.integers(0, 2))
    def die(self, which: int) -> None:
        worker = self.pick(which)
        self.workers.remove(worker)
        self.dead.append(worker)
        # what it had under way goes on without anybody to count it, until it is found dead

    @precondition(lambda self: self.dead)
    @rule()
    def bury(self) -> None:
        worker = self.dead.pop()
        for kind, what in worker.calls:  # in its journal, not in the bank
            if kind == "charge":
                for id, amount in what.items():
                    worker.unwritten[id] = worker.unwritten.get(id, 0) + amount
        for request in worker.open:
            self.end(worker, request, request.worst)
        ended = [share.id for share in worker.shares if share.limit.window != "minute"]
        self.bank.bury(worker.name, worker.unwritten, ended, self.mono)

    @invariant()
    def no_cap_is_exceeded(self) -> None:
        if not hasattr(self, "bank"):
            return
        caps = {(limit.scope, limit.unit, limit.window): limit for limit in LIMITS}
        alive = {worker.name for worker in self.workers if self.mono < worker.beaten + TTL}
        for id, spent in self.spent.items():
            scope, unit, window, _ = id.split("|")
            if unit == "concurrent":
                # who was silent for too long, as a suspended machine is, is not counted by others
                spent = sum(
                    share.id == id
                    for worker in self.workers
                    if worker.name in alive
                    for request in worker.open
                    if request.since > worker.lapsed
                    for share in request.ticket.shares
                )
            assert spent <= caps[scope, unit, window].cap, id
        for id, uses in self.uses.items():
            scope, unit, window, _ = id.split("|")
            recent = sum(amount for at, amount in uses if at > self.mono - 60)
            assert recent <= caps[scope, unit, window].cap, id
        for worker in self.workers:
            for share in worker.shares:
                share.check()

    @invariant()
    def no_budget_is_given_twice(self) -> None:
        """What is charged and what may still be, by leases as the workers hold them."""
        for limit in LIMITS if hasattr(self, "bank") else ():
            if limit.window in ("day", "month"):
                held: dict[str, int] = {}
                for worker in self.workers:
                    for share in worker.shares:
                        if share.limit == limit:
                            # what is written and not folded is in both
                            free = max(0, share.granted - share.used - share.reserved)
                            held[share.id] = held.get(share.id, 0) + free
                for id, free in held.items():
                    assert free + self.spent.get(id, 0) <= limit.cap, id

    @invariant()
    def no_worker_has_more_than_the_bank_gave_it(self) -> None:
        for worker in getattr(self, "workers", []):
            if not (worker.calls or worker.answers or worker.doubted):
                for share in worker.shares:
                    assert share.granted <= self.bank.granted(share.id, worker.name)

    def teardown(self) -> None:
        """When all is quiet, everything that was not used can be had, by any worker: no phantom is left."""
        if not hasattr(self, "bank"):
            return
        while self.dead:
            self.bury()
        if not self.workers:
            self.arrive()
        for worker in self.workers:
            self.drain(worker)
            while worker.open:
                self.settle(self.workers.index(worker), 0, 1)
            for share in worker.shares:
                share.waiting.clear()
                share.returning = True
            self.write(self.workers.index(worker))
            self.round(self.workers.index(worker))
        self.mono += 2 * TTL + 62
        for _ in range(2):
            for worker in self.workers:
                self.pulse(self.workers.index(worker), True)
                self.round(self.workers.index(worker))
        for worker in self.workers:
            for limit in LIMITS:
                rest = limit.cap
                share = worker.shares.share(limit, self.now(worker))
                if share.is_budget:
                    rest -= self.spent.get(share.id, 0)
                amounts = {"requests": 1} | ({} if limit.unit == "concurrent" else {limit.unit: rest})
                worst = Amounts(**amounts)
                if limit.unit == "concurrent":
                    rest = 1
                share.waiting = [rest]
                for _ in range(3):
                    self.round(self.workers.index(worker))
                    for each in self.workers:
                        self.beat(each)
                        if each is not worker:
                            self.round(self.workers.index(each))
                share.waiting = []
                ticket = worker.shares.reserve([limit], worst, self.now(worker))
                assert ticket is not None, (limit, rest, share.free(self.now(worker)))
                worker.shares.settle(ticket, Amounts(requests=0), self.now(worker))
                if limit.unit == "requests":
                    self.mono += 62
                    self.beat(worker)
                share.returning = True
                self.round(self.workers.index(worker))


Workers.TestCase.settings = settings(max_examples=25, stateful_step_count=40)
TestWorkers = Workers.TestCase


def walk(seed: int, steps: int) -> None:
    """The same machine by weighted dice: more traffic for each accident than hypothesis would draw."""
    dice = random.Random(seed)
    machine = Workers()
    machine.begin()

    def request() -> None:
        machine.request(
            dice.randrange(3),
            tokens=dice.randrange(30),
            dollars=dice.randrange(12),
            device=dice.randrange(20),
            subset=dice.choice([8, 9, 12, 16, 24, 2, 6, 31]),
            manner=dice.choice(["round", "round", "others", "wait", "give up"]),
        )

    actions = {
        request: 30,
        lambda: machine.settle(dice.randrange(3), dice.randrange(20), dice.choice([0, 1, 2, 3, 3, 3])): 25,
        lambda: machine.ask(dice.randrange(3)): 8,
        lambda: machine.write(dice.randrange(3)): 8,
        lambda: machine.arrives(
            dice.randrange(3), dice.choice([None, None, None, None, "call", "answer"])
        ): 16,
        lambda: machine.answered(dice.randrange(3)): 16,
        lambda: machine.flush(dice.randrange(3)): 4,
        lambda: machine.pulse(dice.randrange(3), dice.random() < 0.8): 6,
        lambda: machine.wait(dice.choice([0.3, 1.0, 5.0, 30.0]), dice.random() < 0.1): 6,
        lambda: machine.set_clock(dice.choice([-7200.0, -0.4, 0.4, 3.0, 3600.0])): 1,
        lambda: machine.sleep(12) if dice.random() < 0.2 else None: 1,
        lambda: machine.workers and machine.die(dice.randrange(3)): 1,
        lambda: machine.dead and machine.bury(): 2,
        lambda: len(machine.workers) < 3 and machine.arrive(): 2,
    }
    for action in dice.choices(list(actions), list(actions.values()), k=steps):
        action()
        machine.no_cap_is_exceeded()
        machine.no_budget_is_given_twice()
        machine.no_worker_has_more_than_the_bank_gave_it()
    machine.teardown()


@pytest.mark.parametrize("seed", range(12))
def test_a_long_walk(seed: int) -> None:
    walk(seed, 500)
