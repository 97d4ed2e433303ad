"""The engine's loop: three lines per step, and the bookkeeping around them.

    plan   = scheduler.schedule(now)
    result = executor.collect(executor.submit(plan))
    events = scheduler.commit(plan, result, now)

With a depth of 2 the next step is planned and submitted before the last one is collected, so that a device
never waits for the scheduler. The loop knows no sockets and no processes; it is driven by engine.process
(server) and by penstock.offline (LLM).
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections import deque
from dataclasses import dataclass

from penstock.core.cost import DeviceMeter
from penstock.core.errors import EngineDead, InvalidRequest
from penstock.core.executor import Executor, Ticket
from penstock.core.plan import Event, Failure, Plan
from penstock.core.request_spec import FinishReason, RequestSpec
from penstock.core.scheduler import Scheduler
from penstock.core.stats import EngineStats

from .clock import Clock
from .heartbeat import Heartbeat
from .held import Held
from .messages import Abort, Add
from .trace import StepLog

_MOST_RETRY_AFTER = 60
"""Seconds; max_tokens is an upper bound, so long estimates are usually too long."""


@dataclass(slots=True)
class _Flight:
    """A step under way."""

    plan: Plan
    predicted: float
    """Seconds."""
    ticket: Ticket | None = None
    """None while it is being submitted."""


class EngineLoop:
    """Steps one scheduler on one executor.

    Args:
        scheduler: decides.
        executor: computes.
        clock: says what time it is.
        log: keeps the steps.
        heartbeat: where progress is shown to whoever watches.
        eos_ids: the model's end-of-sequence ids.
        seed: makes the draws of requests without a seed of their own repeatable, in order of arrival; None is
            truly random.
        depth: steps in flight, 1 or 2.
        held: where requests wait for their grammars; without, those that have one are refused.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        clock: Clock,
        log: StepLog | None = None,
        heartbeat: Heartbeat | None = None,
        eos_ids: frozenset[int] = frozenset(),
        seed: int | None = None,
        depth: int = 1,
        held: Held | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self.meter = DeviceMeter(clock.now())
        self.last_plan = Plan(step=-1)
        """The one committed last."""
        self._clock = clock
        self._log = log
        self._heartbeat = heartbeat
        self._eos_ids = tuple(sorted(eos_ids))
        self._seeds = random.Random(seed)
        self._depth = depth
        self.held = held
        self._flights: deque[_Flight] = deque()
        self._seconds = self._predicted = 0.0
        self._lost: list[Event] = []
        """Last events of those whom the last reset has ended."""

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return self.scheduler.has_work or bool(self.held)

    @property
    def can_step(self) -> bool:
        """Whether a step has something to do: else all who are here wait for their grammars, if anybody
        is."""
        return self.scheduler.has_work

    @property
    def unfinished(self) -> tuple[str, ...]:
        """Ids of all sequences that are here."""
        return self.scheduler.unfinished + (self.held.ids if self.held else ())

    def admit_held(self) -> list[Event]:
        """Let those go on whose grammars are ready; returns the events that this causes at once."""
        events: list[Event] = []
        for spec, failure, aborted in self.held.ready() if self.held else ():
            if failure is None:
                told = self._add(spec)
                told += self._abort(tuple(aborted)) if aborted else []
                events += [event for event in told if event.request not in aborted]
            else:
                now = self._clock.now()
                events += [
                    Event(id, finish=FinishReason.ERROR, failure=failure, at=now)
                    for id in spec.ids
                    if id not in aborted
                ]
        return self._ended(events)

    def handle(self, message: Add | Abort) -> list[Event]:
        """Take in a message; returns the events that it causes at once."""
        if isinstance(message, Abort):
            return self._ended(self._abort(message.ids))
        spec = message.spec
        if self.held is not None and spec.needs <= self.scheduler.features:
            if any(id in self.held for id in spec.ids):
                return []  # the id is in use: whoever has it is not to be told
            if self.held.hold(spec):
                return []
        return self._ended(self._add(spec))

    def _abort(self, ids: tuple[str, ...]) -> list[Event]:
        now = self._clock.now()
        gone = [id for id in ids if self.held.abort(id)] if self.held else []
        events: list[Event | None] = [Event(id, finish=FinishReason.ABORT, at=now) for id in gone]
        if rest := tuple(id for id in ids if id not in gone):
            if self._log:
                self._log.arrived(now, Abort(rest))
            events += [self.scheduler.abort(id, now) for id in rest]
        return [event for event in events if event is not None]

    def _ended(self, events: list[Event]) -> list[Event]:
        if self.held is not None:
            self.held.ended(events)
        return events

    def _add(self, spec: RequestSpec) -> list[Event]:
        now = self._clock.now()
        spec = self._complete(spec)
        if self._log:
            self._log.arrived(now, Add(spec))
        try:
            self.scheduler.add(spec, now)
        except InvalidRequest as error:
            failure = Failure(error.message, type(error).__name__, param=error.param, advice=error.advice)
            # if an id is in use, whoever has it is not to be told
            ids = [id for id in spec.ids if id not in self.scheduler]
            return [Event(id, finish=FinishReason.ERROR, failure=failure, at=now) for id in ids]
        return []

    def step(self) -> list[Event]:
        """One step, if there is anything to do: keep the device busy, then take in the oldest result."""
        events: list[Event] = self.admit_held() if self.held else []
        try:
            while len(self._flights) < self._depth and self._submit(events):
                pass
            if self._flights:
                events += self._collect()
        except BaseException:
            self.reset()
            self._lost = events + self._lost
            raise
        return self._ended(events)

    def reset(self) -> None:
        """Forget all requests: wherever an interruption came, nobody may build on what was planned."""
        self._flights.clear()
        self._lost = self.scheduler.reset()
        if self.held is not None:
            now = self._clock.now()
            self._lost += [Event(id, finish=FinishReason.ABORT, at=now) for id in self.held.clear()]
        if self._log:
            self._log.reset(self._clock.now(), self.scheduler.numbers)

    def give_up(self, cause: str) -> list[Event]:
        """The engine is about to end: everybody's last event, with the bill of what was computed for him.

        To be called after a step or a message that raised.
        """
        if self.has_work:
            self.reset()
        failure = Failure(cause, EngineDead.__name__)
        lost, self._lost = self._lost, []
        return [
            event._replace(finish=FinishReason.ERROR, failure=failure)
            if event.finish is FinishReason.ABORT
            else event
            for event in lost
        ]

    def stats(self) -> EngineStats:
        """Totals since the start, and how things stand."""
        scheduler = self.scheduler
        seconds, self._seconds = self._seconds, 0.0
        now = self._clock.now()
        return EngineStats(
            totals=dataclasses.replace(scheduler.totals),
            running=len(scheduler.running),
            waiting=scheduler.waiting + (len(self.held) if self.held else 0),
            deferred=scheduler.deferred,
            kv_usage=scheduler.pool.usage,
            host_usage=scheduler.swaps.usage,
            seconds=seconds,
            predicted=self._predicted,
            busy=self.meter.busy,
            idle=self.meter.idle(now),
            at=now,
        )

    def _submit(self, events: list[Event]) -> bool:
        """Plan and start a step; False if there is nothing to do."""
        now = self._clock.now()
        plan = self.scheduler.schedule(now)
        refused = self.scheduler.take_events()
        if refused:
            events += self._with_retry_after(refused)
        if self._log and (plan.items or refused or self._flights):
            self._log.planned(now, plan)  # what it did to the queue counts, even if it plans nothing
        if not plan.items:
            return False
        flight = _Flight(plan, self.scheduler.cost.predict(plan))
        self._flights.append(flight)
        if self._heartbeat and len(self._flights) == 1:
            self._heartbeat.begin(now, flight.predicted)
        flight.ticket = self.executor.submit(plan)
        return True

    def _collect(self) -> list[Event]:
        """Wait for the oldest step, and commit it."""
        flight = self._flights[0]
        plan = flight.plan
        assert flight.ticket is not None  # a submission that raised has ended the step
        result = self.executor.collect(flight.ticket)
        self._clock.spent(result.seconds)
        now = self._clock.now()
        self._seconds, self._predicted = result.seconds, flight.predicted
        self.meter.step(result.seconds)
        events = self.scheduler.commit(plan, result, now)
        self._flights.popleft()
        if self._heartbeat:
            self._heartbeat.end(now)
            if self._flights:
                self._heartbeat.begin(now, self._flights[0].predicted)
        if self._log:
            self._log.stepped(now, plan, result)
        self.last_plan = plan
        return events

    def _complete(self, spec: RequestSpec) -> RequestSpec:
        """What only the engine knows: the model's ends, and a seed for a request that samples without one."""
        drawn = None
        if spec.sampling is not None and spec.sampling.seed is None and not spec.sampling.greedy:
            drawn = self._seeds.getrandbits(63)
        return dataclasses.replace(spec, eos_ids=self._eos_ids, drawn_seed=drawn)

    def _with_retry_after(self, events: list[Event]) -> list[Event]:
        """When the queue as it is may have been admitted, if the cost model and max_tokens are right."""
        scheduler, costs = self.scheduler, self.scheduler.cost.coefficients
        prompt, output = scheduler.backlog()
        running, waiting = len(scheduler.running), scheduler.waiting
        batch = max(1, running)
        step = costs.fixed + batch * (costs.per_token + costs.per_sample)
        seconds = prompt * costs.per_token + output / batch * step
        share = waiting / max(1, running + waiting)
        wait = min(_MOST_RETRY_AFTER, max(1, math.ceil(seconds * share)))
        return [
            event._replace(failure=dataclasses.replace(event.failure, retry_after=wait))
            if event.failure is not None
            else event
            for event in events
        ]
