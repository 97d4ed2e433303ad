"""The engine's loop: three lines per step, and the bookkeeping around them.

    plan   = scheduler.schedule(now)
    result = executor.collect(executor.submit(plan))
    events = scheduler.commit(plan, result, now)

A step that raises or does not fit into memory does not end the loop: `runner` computes it in parts, and the
loop raises only if the device is broken. The loop knows no sockets and no processes; it is driven by
engine.process (server) and by penstock.offline (LLM).
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable

import msgspec

from penstock.core.cost import DeviceMeter
from penstock.core.errors import InvalidRequest
from penstock.core.plan import Event, Plan, StepResult
from penstock.core.request import FinishReason, Request
from penstock.core.scheduler import Scheduler

from .clock import Clock
from .executor.base import Executor
from .heartbeat import Heartbeat
from .messages import Abort, Add, StepStats
from .runner import StepRunner
from .trace import StepLog

_MOST_RETRY_AFTER = 60
"""Seconds; max_tokens is an upper bound, so long estimates are usually too long."""


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
        probe: computes something harmless on the executor's device; raises if that is broken.
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
        probe: Callable[[], None] | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self.meter = DeviceMeter(clock.now())
        self.last_plan = Plan(step=-1)
        self._clock = clock
        self._log = log
        self._heartbeat = heartbeat
        self._eos_ids = eos_ids
        self._seeds = random.Random(seed)
        self._runner = StepRunner(executor, clock, scheduler.cost, heartbeat, probe)
        self._last = (0, 0, 0, 0, 0, 0, 0)
        self._seconds = self._predicted = 0.0

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return self.scheduler.has_work

    def handle(self, message: Add | Abort) -> list[Event]:
        """Take in a message; returns the events that it causes at once."""
        now = self._clock.now()
        if isinstance(message, Add):
            message = self._with_seed(message)
        if self._log:
            self._log.arrived(now, message)
        if isinstance(message, Abort):
            events = [self.scheduler.abort(request, now) for request in message.ids]
            return [event for event in events if event is not None]
        try:
            self.scheduler.add(self._request(message), now)
        except InvalidRequest as error:
            return [
                Event(
                    request=message.id,
                    finish=FinishReason.ERROR,
                    error=str(error),
                    error_type=type(error).__name__,
                    at=now,
                )
            ]
        return []

    def step(self) -> list[Event]:
        """One step, if there is anything to do."""
        now = self._clock.now()
        plan = self.scheduler.schedule(now)
        events = [self._with_retry_after(event) for event in self.scheduler.take_events()]
        if not plan.items:
            return events
        self._predicted = self.scheduler.cost.predict(plan)
        try:
            result = self._runner.run(plan, self._predicted)
        except BaseException:
            # interrupted: what this plan promised to compute is not there, so nobody may build on it
            lost = StepResult(plan.step, 0.0, errors={item.request: "interrupted" for item in plan.items})
            self.scheduler.commit(plan, lost, self._clock.now())
            raise
        self._clock.spent(result.seconds)
        end = self._clock.now()
        self._seconds = result.seconds
        self.meter.step(result.seconds)
        events += self.scheduler.commit(plan, result, end)
        if self._heartbeat:
            self._heartbeat.end(end)
        if self._log:
            self._log.stepped(now, plan, result, end)
        self.last_plan = plan
        return events

    def stats(self) -> StepStats:
        """What happened since the last call, and the state now."""
        scheduler, totals = self.scheduler, self.scheduler.totals
        current = (
            totals.prompt_tokens,
            totals.generation_tokens,
            totals.cached_tokens,
            totals.recomputed_tokens,
            totals.prefix_queries,
            totals.prefix_hits,
            totals.preemptions,
        )
        delta = [new - old for new, old in zip(current, self._last, strict=True)]
        self._last = current
        seconds, self._seconds = self._seconds, 0.0
        now = self._clock.now()
        return StepStats(
            step=totals.steps,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            deferred=scheduler.deferred,
            kv_usage=scheduler.pool.usage,
            prompt_tokens=delta[0],
            generation_tokens=delta[1],
            cached_tokens=delta[2],
            recomputed_tokens=delta[3],
            prefix_queries=delta[4],
            prefix_hits=delta[5],
            preemptions=delta[6],
            seconds=seconds,
            predicted=self._predicted,
            busy=self.meter.busy,
            idle=self.meter.idle(now),
            at=now,
        )

    def _with_seed(self, message: Add) -> Add:
        """A seed for a request that samples without one: drawn once, so that it goes on with the same numbers
        after a preemption, and logged, so that a replay is the same."""
        if message.params.seed is not None or message.params.greedy:
            return message
        return msgspec.structs.replace(message, params=message.params.with_(seed=self._seeds.getrandbits(63)))

    def _request(self, message: Add) -> Request:
        return Request(
            id=message.id,
            prompt=message.prompt,
            params=message.params,
            eos_ids=frozenset() if message.params.ignore_eos else self._eos_ids,
            max_tokens=message.max_tokens,
            priority=message.priority,
            cache_salt=message.cache_salt,
            leader=message.leader,
            arrived_at=message.arrived_at,
        )

    def _with_retry_after(self, event: Event) -> Event:
        """When the queue as it is may have been admitted, if the cost model and max_tokens are right."""
        scheduler, costs = self.scheduler, self.scheduler.cost.coefficients
        requests = (*scheduler.running, *scheduler.waiting)
        prompt = sum(max(0, request.prompt_len - request.computed) for request in requests)
        output = sum(request.max_tokens - request.generated for request in requests)
        batch = max(1, len(scheduler.running))
        step = costs.fixed + batch * (costs.per_token + costs.per_sample)
        seconds = prompt * costs.per_token + output / batch * step
        share = len(scheduler.waiting) / max(1, len(requests))
        return dataclasses.replace(
            event, retry_after=min(_MOST_RETRY_AFTER, max(1, math.ceil(seconds * share)))
        )
