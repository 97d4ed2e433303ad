"""The bills of all requests add up to the device's time, whatever fails, and whenever."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.blocks import BlockPool
from penstock.core.cost import Coefficients
from penstock.core.executor import Capacity, Items, Ticket
from penstock.core.plan import Event, Failure, Outcome, StepResult
from penstock.core.request import Request
from penstock.core.request_spec import Prompt, RequestSpec
from penstock.core.sampling_params import Sampling
from penstock.core.scheduler import Scheduler, SchedulerConfig
from penstock.core.simulated import FEATURES, SimulatedExecutor, echo
from penstock.engine.loop import EngineLoop
from penstock.engine.messages import Abort, Add
from tests.engine.fake import VirtualClock


class BrokenDevice(Exception):
    """Ends the engine."""


class Faulty(SimulatedExecutor):
    """Steps of random duration, in which requests fail at random, and which raise on demand."""

    def __init__(self, draws: random.Random, num_blocks: int, failures: float) -> None:
        super().__init__(Capacity(num_blocks, 4, 256, Coefficients(), FEATURES), echo)
        self.measured = 0.0
        self.broken = ""
        self._draws = draws
        self._failures_rate = failures

    def submit(self, plan):  # type: ignore[no-untyped-def]
        if self.broken == "submit":
            raise BrokenDevice
        ticket = super().submit(plan)
        assert isinstance(ticket.payload, StepResult)
        seconds = self._draws.choice((1e-9, self._draws.uniform(1e-5, 1e-2), 30.0))
        return Ticket(plan.step, StepResult(plan.step, seconds, ticket.payload.outcomes))

    def collect(self, ticket: Ticket) -> StepResult:
        if self.broken == "collect":
            raise BrokenDevice
        result = super().collect(ticket)
        self.measured += result.seconds
        return result

    def _run(self, step: int, items: Items) -> tuple[Sequence[Outcome], bool]:
        outcomes = list(self._compute(items))
        for place in range(len(items)):
            if self._draws.random() < self._failures_rate:
                outcomes[place] = Outcome(failure=Failure("broken", tainted=self._draws.random() < 0.5))
        return outcomes, self._draws.random() < 0.8


def guesses(request: Request, most: int) -> list[int]:
    """Right ones and wrong ones."""
    return [request.tokens[request.generated % request.prompt_len] + len(request.tokens) % 2][:most]


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_the_bills_add_up_to_the_devices_time(data: st.DataObject) -> None:
    draw = data.draw
    draws = random.Random(draw(st.integers(0, 2**16), label="seed"))
    executor = Faulty(draws, draw(st.integers(6, 24), label="blocks"), draw(st.sampled_from((0, 0.05, 0.4))))
    config = SchedulerConfig(
        max_num_seqs=4,
        max_num_batched_tokens=12,
        max_model_len=24,
        policy=draw(st.sampled_from(("fcfs", "priority")), label="policy"),
        max_num_queued_reqs=draw(st.sampled_from((None, 0, 2)), label="queue"),
    )
    capacity = executor.capacity()
    drafter = draw(st.sampled_from((None, guesses)), label="drafter")
    pool = BlockPool(capacity.num_blocks, capacity.block_size)
    scheduler = Scheduler(config, pool, drafter=drafter, features=FEATURES)
    clock = VirtualClock(100.0)
    loop = EngineLoop(scheduler, executor, clock, depth=draw(st.sampled_from((1, 2)), label="depth"))
    asked: set[str] = set()
    bills: dict[str, float] = {}
    seen: dict[str, float] = {}

    def take(events: list[Event]) -> None:
        for event in events:
            assert event.request not in bills, "two last events"
            assert event.device_seconds >= seen.get(event.request, 0.0)
            seen[event.request] = event.device_seconds
            if event.finish is not None:
                bills[event.request] = event.device_seconds

    for number in range(draw(st.integers(1, 30), label="actions")):
        action = draws.choice(("add", "add", "abort", "step", "step", "step", "step"))
        if action == "add":
            count = draws.randint(1, 3)
            prompts = tuple(
                Prompt(tuple(range(draws.randint(1, 14))), draws.randint(1, 8)) for _ in range(count)
            )
            spec = RequestSpec(
                id=str(number),
                prompts=prompts,
                sampling=Sampling(stop_token_ids=(3,) if draws.random() < 0.3 else ()),
                n=draws.randint(1, 3),
                priority=draws.randint(0, 2),
            )
            asked.update(spec.ids)
            take(loop.handle(Add(spec)))
        elif action == "abort" and asked:
            take(loop.handle(Abort((draws.choice(sorted(asked)),))))
        else:
            take(loop.step())
        clock.spent(draws.random())
        scheduler.check()
    executor.broken = draw(st.sampled_from(("", "submit", "collect")), label="broken")
    try:
        while loop.has_work:
            take(loop.step())
    except BrokenDevice:
        take(loop.give_up("broken"))
    assert not loop.has_work
    assert bills.keys() == asked
    assert sum(bills.values()) == pytest.approx(executor.measured, rel=1e-12)
    stats = loop.stats()
    assert stats.busy == pytest.approx(executor.measured, rel=1e-12)
    assert stats.busy + stats.idle == pytest.approx(clock.now() - 100.0, rel=1e-12)
