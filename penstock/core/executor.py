"""The seam between scheduling and devices: four methods, plain data in and out.

Everything that the scheduler's world knows about a device is here. Contract of every executor
(tests/engine/test_executor_contract.py runs against all of them):

- `submit` takes plans in order of `step` and starts them; `collect` waits for a step and gives its result,
  once, in the same order. Two steps may be in flight: what a plan changes (tokens, block tables, who is
  admitted) harms none that was submitted before it, and a request may be in both, its token of the first one
  still unknown to whoever plans the second.
- A result has an outcome for every item, in their order: `samples` tokens, or fewer where a draft was wrong
  but at least one; a vector where the item pools; or a failure. A failure is one request's, and once more its
  outcome in a step that was submitted before it was known; neither call raises for it. They raise when the
  device is broken, and then nothing more is asked of it.
- A request is kept from `Plan.admitted` to `Plan.released`; a released id may be admitted again, in the same
  plan, too, and one that is not kept may be released.
- Items of one step may read blocks that another item of it fills: in each layer, all keys and values are
  written before any are read. Steps happen in the order of their submission.
- A plan's copies to the host happen before its copies back, and both before anything of it is computed.
- `seconds` is the device's time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from .cost import Coefficients
from .plan import Outcome, Plan, PlanItem, StepResult

Items = tuple[PlanItem, ...]
"""Of a plan, or a part of them."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a device offers."""

    num_blocks: int
    block_size: int
    vocab_size: int
    prior: Coefficients
    """First guess of what steps cost, from the device's roofline."""
    features: frozenset[str] = frozenset()
    """What it can do of `RequestSpec.needs`."""
    host_blocks: int = 0
    """Blocks that it can keep in the host's memory: numbers of Plan.swap_out and swap_in."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """A step under way."""

    step: int
    payload: object = None


class Executor(Protocol):
    """A device that computes steps."""

    def capacity(self) -> Capacity:
        """Sizes, fixed after construction."""
        ...

    def submit(self, plan: Plan) -> Ticket:
        """Start a step."""
        ...

    def collect(self, ticket: Ticket) -> StepResult:
        """Wait for a step's end."""
        ...

    def close(self) -> None:
        """Free the device. May be called twice."""
        ...


class Failures:
    """Keeps the contract's word on who has failed: it is not computed any more, and its failure is its
    outcome in every later step that still has it."""

    def __init__(self) -> None:
        self._outcomes: dict[str, Outcome] = {}

    def forget(self, request: str) -> None:
        """It is let go; its id may come back with another life."""
        self._outcomes.pop(request, None)

    def run(
        self, items: Items, compute: Callable[[Items], tuple[Sequence[Outcome], bool]]
    ) -> tuple[tuple[Outcome, ...], bool]:
        """(an outcome for each item, whether the step ran as planned), as `compute` says of those that it is
        given; it is called with one at least."""
        sound = items
        if self._outcomes:
            sound = tuple(item for item in items if item.request not in self._outcomes)
        computed, regular = compute(sound) if sound else ((), True)
        for item, outcome in zip(sound, computed, strict=True):
            if outcome.failure is not None:
                self._outcomes[item.request] = outcome
        if len(sound) == len(items):
            return tuple(computed), regular
        fresh = {item.request: outcome for item, outcome in zip(sound, computed, strict=True)}
        return tuple(fresh.get(item.request) or self._outcomes[item.request] for item in items), regular
