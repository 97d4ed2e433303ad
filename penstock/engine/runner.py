"""Runs one plan on an executor: whole if it can be, in parts if it must be.

    plan ─▶ parts within the limits ─▶ executor ─┬─ ok ───────────────────────────────▶ merged StepResult
                      ▲                           ├─ out of memory: lower the limits ──┐
                      └───────────────────────────┼────────────────────────────────────┘
                                                  └─ anything else: its requests one by one

A step that raises does not end the engine. Requests that raise when they are computed alone fail with their
cause, the others go on. When none gets through, a probe tells whether the device still works; if not, `run`
raises.

Memory. Where a step does not fit, it is computed in smaller parts, and for a while all steps are (see
`memory_limits`). This happens here and not in the scheduler: its plans, and so the step log and every replay,
are the same whatever memory the device happens to have. Nothing is lost by it: a plan in parts computes what
the whole plan does, in its order, so that no token waits longer than for the step that was planned, plus the
fixed cost of each part. A step in parts teaches the cost model nothing (`StepResult.regular`), and the blocks
of a request that fails leave the prefix index as they do for every failure.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from penstock.core.cost import StepCost
from penstock.core.errors import DeviceOutOfMemory, cause
from penstock.core.plan import Plan, PlanItem, StepResult, TokenLogprob

from .clock import Clock
from .executor.base import Executor
from .heartbeat import Heartbeat
from .memory_limits import Items, StepLimits

logger = logging.getLogger("penstock.engine")

_FIRST_WAIT, _MOST_WAIT = 1.0, 60.0
"""Seconds before limits are raised: a shortage that passes is over soon, and one that lasts costs a failed
attempt now and then."""

_QUIET = 120.0
"""Seconds without a shortage after which the next one is a new one."""

_MOST_STARVED = 60.0
"""Seconds for which a device may be without any memory at all."""

_ADVICE = "Lower --max-num-batched-tokens, --max-num-seqs or --kv-cache-memory-bytes."


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why a part was not computed. Not the exception: its traceback would keep the part's tensors alive."""

    cause: str
    memory: bool


class StepRunner:
    """Executes plans.

    Args:
        executor: computes.
        clock: says what time it is.
        cost: predicts how long a part should take.
        heartbeat: where progress is shown to whoever watches.
        probe: computes something harmless on the executor's device; raises if that is broken.
    """

    def __init__(
        self,
        executor: Executor,
        clock: Clock,
        cost: StepCost,
        heartbeat: Heartbeat | None = None,
        probe: Callable[[], None] | None = None,
    ) -> None:
        self.limits = StepLimits()
        self._executor = executor
        self._clock = clock
        self._cost = cost
        self._heartbeat = heartbeat
        self._probe = probe
        self._wait = _FIRST_WAIT
        self._lowered_at = -math.inf
        self._changed_at = -math.inf
        self._starved_since: float | None = None
        """Since when nothing at all could be computed for want of memory."""

    def run(self, plan: Plan, predicted: float) -> StepResult:
        """The result of the plan; requests that failed are in its errors.

        Args:
            plan: has items.
            predicted: seconds that the whole plan should take.

        Raises:
            Exception: the device is broken, says the probe.
            DeviceOutOfMemory: nothing, not even the probe, could be computed for a minute.
        """
        started = self._clock.now()
        if self.limits.active:
            self._recover(started)
        queue = deque(self.limits.split(plan.items))
        if len(queue) == 1:
            outcome = self._attempt(plan, predicted)
            if isinstance(outcome, StepResult):
                self._starved_since = None
                return outcome
            done, failed = self._in_parts(plan, queue, outcome)
        else:
            done, failed = self._in_parts(plan, queue)
        if done:
            self._starved_since = None
        elif self._probe:
            self._check_device(self._probe)
        return _merge(plan, done, failed, self._clock.now() - started)

    def _in_parts(
        self, plan: Plan, queue: deque[Items], outcome: StepResult | _Failure | None = None
    ) -> tuple[list[StepResult], dict[str, _Failure]]:
        """Compute the parts in the queue, splitting those that fail: (results, requests that failed).

        `outcome` is that of the first part, if it was tried already.
        """
        before = self.limits
        done: list[StepResult] = []
        failed: dict[str, _Failure] = {}
        shortage = ""
        while queue:
            items = tuple(item for item in queue.popleft() if item.request not in failed)
            if not items:
                continue
            if outcome is None:
                part = dataclasses.replace(plan, items=items)
                outcome = self._attempt(part, self._cost.predict(part))
            if isinstance(outcome, StepResult):
                done.append(outcome)
            elif outcome.memory and not _is_smallest(items):
                shortage = shortage or f"{_size(items)} ({outcome.cause})"
                self.limits = self.limits.lowered(items)
                queue.extendleft(reversed(self.limits.split(items)))
            elif len(items) == 1:
                failed[items[0].request] = outcome
            else:
                queue.extendleft((item,) for item in reversed(items))
            outcome = None
        if shortage:
            self._settle(plan, shortage, before, [name for name in failed if failed[name].memory])
        return done, failed

    def _attempt(self, part: Plan, predicted: float) -> StepResult | _Failure:
        if self._heartbeat:
            self._heartbeat.begin(self._clock.now(), predicted)
        try:
            return self._executor.collect(self._executor.submit(part))
        except (DeviceOutOfMemory, MemoryError) as error:
            if _is_smallest(part.items):
                logger.error("request %s failed in step %d: %s", part.items[0].request, part.step, error)
            return _Failure(error.message if isinstance(error, DeviceOutOfMemory) else cause(error), True)
        except Exception as error:
            if len(part.items) == 1:
                logger.exception("request %s failed in step %d", part.items[0].request, part.step)
            else:
                logger.exception(
                    "step %d failed; computing its %d requests one by one", part.step, len(part.items)
                )
            return _Failure(cause(error), False)

    def _settle(self, plan: Plan, shortage: str, before: StepLimits, victims: list[str]) -> None:
        """Keep the limits under which the step fitted, or, if a request is too large by itself, those from
        before: it is gone, and the others are not to be slowed down for it."""
        if victims:
            self.limits = before
            logger.warning(
                "out of memory in step %d with %s; not even one token could be computed of: %s. %s",
                plan.step,
                shortage,
                ", ".join(victims),
                _ADVICE,
            )
            return
        now = self._clock.now()
        again = now - self._lowered_at < _QUIET
        self._wait = min(_MOST_WAIT, 4 * self._wait) if again else _FIRST_WAIT
        self._lowered_at = self._changed_at = now
        logger.warning(
            "out of memory in step %d with %s; steps are computed in parts of %s for the next %.0f s. %s",
            plan.step,
            shortage,
            self.limits,
            self._wait,
            _ADVICE,
        )

    def _recover(self, now: float) -> None:
        if now - self._changed_at < self._wait:
            return
        self._changed_at = now
        self.limits = self.limits.raised()
        logger.info("steps are computed in parts of %s", self.limits)

    def _check_device(self, probe: Callable[[], None]) -> None:
        """Nobody got through: raises if this was not the requests' fault."""
        try:
            probe()
        except (DeviceOutOfMemory, MemoryError) as error:
            now = self._clock.now()
            if self._starved_since is None:
                self._starved_since = now
            if now - self._starved_since >= _MOST_STARVED:
                raise
            # somebody else may be using the memory, and give it back
            logger.error("not even a probe of a few tokens fits into memory: %s", cause(error))
        else:
            self._starved_since = None


def _is_smallest(items: Iterable[PlanItem]) -> bool:
    """One token of one request: nothing less can be computed."""
    return sum(item.tokens for item in items) == 1


def _size(items: Sequence[PlanItem]) -> str:
    requests = "1 request" if len(items) == 1 else f"{len(items)} requests"
    return f"{sum(item.tokens for item in items)} tokens of {requests}"


def _merge(plan: Plan, parts: list[StepResult], failed: dict[str, _Failure], seconds: float) -> StepResult:
    tokens: dict[str, int] = {}
    logprobs: dict[str, TokenLogprob] = {}
    prompt_logprobs: dict[str, tuple[TokenLogprob, ...]] = {}
    errors: dict[str, str] = {}
    error_types: dict[str, str] = {}
    tainted: set[str] = set()
    for part in parts:
        tokens.update(part.tokens)
        logprobs.update(part.logprobs)
        errors.update(part.errors)
        error_types.update(part.error_types)
        tainted.update(part.tainted)
        for request, entries in part.prompt_logprobs.items():  # a prompt may lie in several parts
            prompt_logprobs[request] = prompt_logprobs.get(request, ()) + entries
    for request, failure in failed.items():
        errors[request] = failure.cause
        if failure.memory:
            errors[request] = (
                f"the device ran out of memory, and not even one token of this request fits, computed alone: "
                f"{failure.cause}. {_ADVICE}"
            )
            error_types[request] = DeviceOutOfMemory.__name__
    return StepResult(
        step=plan.step,
        # under a virtual clock nothing passes here
        seconds=max(seconds, sum(part.seconds for part in parts)),
        tokens=tokens,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        errors=errors,
        error_types=error_types,
        tainted=frozenset(tainted),
        regular=False,
    )
