"""The seam between scheduling and devices: four methods, plain data in and out.

Everything that the scheduler's world knows about a device is here. Contract of every executor
(tests/engine/test_executor_contract.py runs against all of them):

- `submit` takes plans in order of `step`; `collect` gives the result of a ticket exactly once.
- A result has a token for every item with `sample`, or an error for that request, and nothing else.
- Rows live from `Plan.admitted` to `Plan.released`; a released id may be admitted again later.
- Submitting a part of the plan submitted last (same `step`, fewer items) computes those items again: keys and
  values are written to the same places. This is how the loop finds out which request breaks a step.
- An exception from submit or collect leaves rows as they were, so that a retry is possible.
- `seconds` is the device's time; items of one step may share blocks that an earlier item of it fills.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from penstock.core.cost import Coefficients
from penstock.core.plan import Plan, StepResult


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a device offers."""

    num_blocks: int
    block_size: int
    vocab_size: int
    prior: Coefficients
    """First guess of what steps cost, from the device's roofline."""


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
