"""The engine's loop: three lines per step, and the bookkeeping around them.

    plan   = scheduler.schedule(now)
    result = executor.collect(executor.submit(plan))
    events = scheduler.commit(plan, result, now)

A step that raises does not end the loop: its requests are computed one by one, those that raise again fail
with their cause, the others go on. The loop knows no sockets and no processes; it is driven by
engine.process (server) and by penstock.offline (LLM).
"""

from __future__ import annotations

import logging
import math

from penstock.core.cost import DeviceMeter
from penstock.core.errors import InvalidRequest
from penstock.core.plan import Event, Plan, StepResult
from penstock.core.request import FinishReason, Request
from penstock.core.scheduler import Scheduler

from .clock import Clock
from .executor.base import Executor
from .heartbeat import Heartbeat
from .messages import Abort, Add, StepStats
from .trace import StepLog

logger = logging.getLogger("penstock.engine")


class EngineLoop:
    """Steps one scheduler on one executor.

    Args:
        scheduler: decides.
        executor: computes.
        clock: says what time it is.
        log: keeps the steps.
        heartbeat: where progress is shown to whoever watches.
        eos_ids: the model's end-of-sequence ids.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        clock: Clock,
        log: StepLog | None = None,
        heartbeat: Heartbeat | None = None,
        eos_ids: frozenset[int] = frozenset(),
    ) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self.meter = DeviceMeter(clock.now())
        self.last_plan = Plan(step=-1)
        self._clock = clock
        self._log = log
        self._heartbeat = heartbeat
        self._eos_ids = eos_ids
        self._last = (0, 0, 0, 0, 0, 0, 0)
        self._seconds = self._predicted = 0.0

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return self.scheduler.has_work

    def handle(self, message: Add | Abort) -> list[Event]:
        """Take in a message; returns the events that it causes at once."""
        now = self._clock.now()
        if self._log:
            self._log.arrived(now, message)
        if isinstance(message, Abort):
            events = [self.scheduler.abort(request, now) for request in message.ids]
            return self._settle([event for event in events if event is not None])
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
            return self._settle(events)
        self._predicted = self.scheduler.cost.predict(plan)
        if self._heartbeat:
            self._heartbeat.begin(now, self._predicted)
        result = self._execute(plan)
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
        return self._settle(events)

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

    def _execute(self, plan: Plan) -> StepResult:
        started = self._clock.now()
        try:
            return self.executor.collect(self.executor.submit(plan))
        except Exception as error:
            if len(plan.items) == 1:
                return self._failed(plan, error, self._clock.now() - started)
            logger.exception(
                "step %d failed; computing its %d requests one by one", plan.step, len(plan.items)
            )
        # one request may have broken the step for all: find out which, keep the others
        parts = []
        for item in plan.items:
            part = Plan(step=plan.step, items=(item,))
            try:
                parts.append(self.executor.collect(self.executor.submit(part)))
            except Exception as error:
                parts.append(self._failed(part, error, 0.0))
        return _merge(plan, parts, self._clock.now() - started)

    @staticmethod
    def _failed(plan: Plan, error: Exception, seconds: float) -> StepResult:
        request = plan.items[0].request
        logger.error("request %s failed in step %d", request, plan.step, exc_info=error)
        cause = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return StepResult(step=plan.step, seconds=seconds, errors={request: cause})

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
        """When the queue as it is will have been computed, by the cost model."""
        seconds = self.scheduler.queued_tokens * self.scheduler.cost.coefficients.per_token
        fields = {name: getattr(event, name) for name in event.__dataclass_fields__}
        return Event(**{**fields, "retry_after": max(1, math.ceil(seconds))})

    def _settle(self, events: list[Event]) -> list[Event]:
        for event in events:
            if event.finish is not None:
                self.meter.close(event.device_seconds)
        return events


def _merge(plan: Plan, parts: list[StepResult], seconds: float) -> StepResult:
    merged: dict[str, dict[str, object]] = {
        name: {} for name in ("tokens", "logprobs", "prompt_logprobs", "errors")
    }
    for part in parts:
        for name, values in merged.items():
            values.update(getattr(part, name))
    return StepResult(step=plan.step, seconds=seconds, **merged)  # type: ignore[arg-type]
