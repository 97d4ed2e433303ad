"""Computes the items of a step: whole if it can be, in parts if it must be. What stands behind an executor's
word that a failure is one request's.

    items ─▶ parts within the limits ─▶ compute ─┬─ ok ───────────────────────────────▶ outcomes
                      ▲                           ├─ out of memory: lower the limits ──┐
                      └───────────────────────────┼────────────────────────────────────┘
                                                  └─ anything else: its requests one by one

Requests that raise when they are computed alone fail with their cause, the others go on. When none gets
through, a probe tells whether the device still works; if not, `run` raises.

Memory. Where a step does not fit, it is computed in smaller parts, and for a while all steps are (see
`memory_limits`). This happens beneath the seam: the scheduler's plans, and so the step log and every replay,
are the same whatever memory the device happens to have. Nothing is lost by it: a plan in parts computes what
the whole plan does, in its order, so that no token waits longer than for the step that was planned, plus the
fixed cost of each part. A step in parts teaches the cost model nothing (`StepResult.regular`).
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Sequence

from penstock.core.errors import DeviceLost, DeviceOutOfMemory, cause
from penstock.core.executor import Items
from penstock.core.plan import Failure, Outcome, PlanItem
from penstock.engine.clock import Clock

from .memory_limits import StepLimits

logger = logging.getLogger("penstock.engine")

Compute = Callable[[Items], Sequence[Outcome]]
"""Outcomes of some items, in their order. It may be called again with items that it was called with before:
then they are computed again, into the same places. If it raises, it has changed nothing that it keeps. It
raises DeviceOutOfMemory or MemoryError where fewer items may succeed, and keeps nothing of the step alive."""

_FIRST_WAIT, _MOST_WAIT = 1.0, 60.0
"""Seconds before limits are raised: a shortage that passes is over soon, and one that lasts costs a failed
attempt now and then."""

_QUIET = 120.0
"""Seconds without a shortage after which the next one is a new one."""

_MOST_STARVED = 60.0
"""Seconds for which a device may be without any memory at all."""

_ADVICE = "Lower --max-num-batched-tokens, --max-num-seqs or --kv-cache-memory-bytes."


class Recovery:
    """Computes steps.

    Args:
        compute: the device's own way.
        clock: says what time it is.
        probe: computes something harmless on the device; raises if that is broken.
        progress: told before each part of a step that is not computed whole.
    """

    def __init__(
        self,
        compute: Compute,
        clock: Clock,
        probe: Callable[[], None] | None = None,
        progress: Callable[[Items], None] | None = None,
    ) -> None:
        self.limits = StepLimits()
        self._compute = compute
        self._clock = clock
        self._probe = probe
        self._progress = progress
        self._wait = _FIRST_WAIT
        self._lowered_at = -math.inf
        self._changed_at = -math.inf
        self._starved_since: float | None = None
        """Since when nothing at all could be computed for want of memory."""

    def run(self, step: int, items: Items) -> tuple[Sequence[Outcome], bool]:
        """(an outcome for each item, whether the step was computed whole).

        Raises:
            DeviceLost: as `compute` raises it.
            Exception: the device is broken, says the probe.
            DeviceOutOfMemory: nothing, not even the probe, could be computed for a minute.
        """
        if self.limits.active:
            self._recover(self._clock.now())
        queue = deque(self.limits.split(items))
        first: Sequence[Outcome] | Failure | None = None
        if len(queue) == 1:
            first = self._attempt(step, items)
            if not isinstance(first, Failure):
                self._starved_since = None
                return first, True
        pieces, some = self._in_parts(step, queue, first)
        if some:
            self._starved_since = None
        elif self._probe:
            self._check_device(self._probe)
        return [_join(pieces[item.request]) for item in items], False

    def _in_parts(
        self, step: int, queue: deque[Items], outcome: Sequence[Outcome] | Failure | None
    ) -> tuple[dict[str, list[Outcome]], bool]:
        """Compute the parts in the queue, splitting those that fail: (outcomes of each request's pieces,
        whether anything was computed).

        `outcome` is that of the first part, if it was tried already.
        """
        before = self.limits
        pieces: dict[str, list[Outcome]] = {item.request: [] for part in queue for item in part}
        failed: dict[str, Failure] = {}
        shortage, some = "", False
        while queue:
            items = tuple(item for item in queue.popleft() if item.request not in failed)
            if not items:
                continue
            if outcome is None:
                if self._progress:
                    self._progress(items)
                outcome = self._attempt(step, items)
            if not isinstance(outcome, Failure):
                some = True
                for item, each in zip(items, outcome, strict=True):
                    pieces[item.request].append(each)
            elif outcome.type == DeviceOutOfMemory.__name__ and not self.limits.smallest(items):
                shortage = shortage or f"{_size(items)} ({outcome.cause})"
                self.limits = self.limits.lowered(items)
                queue.extendleft(reversed(self.limits.split(items)))
            elif len(items) == 1:
                failed[items[0].request] = outcome
                pieces[items[0].request].append(Outcome(failure=_explained(outcome)))
            else:
                queue.extendleft((item,) for item in reversed(items))
            outcome = None
        if shortage:
            starved = [name for name in failed if failed[name].type == DeviceOutOfMemory.__name__]
            self._settle(step, shortage, before, starved)
        return pieces, some

    def _attempt(self, step: int, items: Items) -> Sequence[Outcome] | Failure:
        """Not the exception: its traceback would keep the part's tensors alive."""
        try:
            return self._compute(items)
        except (DeviceOutOfMemory, MemoryError) as error:
            if self.limits.smallest(items):
                logger.error("request %s failed in step %d: %s", items[0].request, step, error)
            what = error.message if isinstance(error, DeviceOutOfMemory) else cause(error)
            return Failure(what, type=DeviceOutOfMemory.__name__)
        except DeviceLost:  # nothing else can be computed, and no probe is needed to know
            raise
        except Exception as error:
            if len(items) == 1:
                logger.exception("request %s failed in step %d", items[0].request, step)
            else:
                logger.exception("step %d failed; computing its %d requests one by one", step, len(items))
            return Failure(cause(error))

    def _settle(self, step: int, shortage: str, before: StepLimits, starved: list[str]) -> None:
        """Keep the limits under which the step fitted, or, if a request is too large by itself, those from
        before: it is gone, and the others are not to be slowed down for it."""
        if starved:
            self.limits = before
            logger.warning(
                "out of memory in step %d with %s; not even one token could be computed of: %s. %s",
                step,
                shortage,
                ", ".join(starved),
                _ADVICE,
            )
            return
        now = self._clock.now()
        again = now - self._lowered_at < _QUIET
        self._wait = min(_MOST_WAIT, 4 * self._wait) if again else _FIRST_WAIT
        self._lowered_at = self._changed_at = now
        logger.warning(
            "out of memory in step %d with %s; steps are computed in parts of %s for the next %.0f s. %s",
            step,
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


def _size(items: Sequence[PlanItem]) -> str:
    requests = "1 request" if len(items) == 1 else f"{len(items)} requests"
    return f"{sum(item.tokens for item in items)} tokens of {requests}"


def _explained(failure: Failure) -> Failure:
    if failure.type != DeviceOutOfMemory.__name__:
        return failure
    return Failure(
        f"the device ran out of memory, and not even one token of this request fits, computed alone: "
        f"{failure.cause}.",
        type=failure.type,
        advice=_ADVICE,
    )


def _join(pieces: Sequence[Outcome]) -> Outcome:
    """One item's outcome from those of its pieces: the last one is sampled, a prompt may lie in several."""
    broken = next((piece for piece in pieces if piece.failure is not None), None)
    if broken is not None:
        return broken
    about_prompt = tuple(entry for piece in pieces for entry in piece.prompt_logprobs)
    return pieces[-1]._replace(prompt_logprobs=about_prompt)
