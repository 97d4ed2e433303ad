"""The seam between scheduling and devices: four methods, plain data in and out.

Everything that the scheduler's world knows about a device is here. Contract of every executor
(tests/engine/test_executor_contract.py runs against all of them):

- `submit` takes plans in order of `step`; `collect` gives the result of a ticket exactly once.
- A result has a token for every item with `sample`, or an error for that request, and nothing else.
- Rows live from `Plan.admitted` to `Plan.released`; a released id may be admitted again later.
- A plan may be submitted in parts: plans of the same `step`, each with some of the items, or with some of the
  tokens of an item, in order. Rows are made and dropped by the first part, and a request's blocks are taken
  from its first one. Submitting items again computes them again: keys and values are written to the same
  places. So the engine finds out which request breaks a step, and computes one that does not fit into memory.
- An exception from submit or collect leaves rows as they were, so that a retry is possible. It is
  DeviceOutOfMemory (or MemoryError) where a smaller part may succeed, and keeps nothing of the step alive.
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
