"""The step log: what came in, what was planned and what came back, one JSON object per line.

    {"config": {…}, "capacity": {…}, "eos_ids": […]}                      first line
    {"now": s, "in": [{"add": …} | {"abort": id}]}                        whatever arrived before a step
    {"now": s, "plan": {…}, "seconds": s, "tokens": {…}, "errors": {…}, "end": s}

It is the replay format: the inputs, given to a new scheduler in the same order with the same times, and the
recorded tokens, given back by a simulated executor, make the same plans. The last steps are also kept in a
ring, which is written out when the engine crashes.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import msgspec

from penstock.core.blocks import BlockPool
from penstock.core.cost import Coefficients, StepCost
from penstock.core.plan import Plan, StepResult
from penstock.core.scheduler import Scheduler, SchedulerConfig

from .clock import VirtualClock
from .executor.base import Capacity
from .executor.simulated import SimulatedExecutor, scripted
from .messages import Abort, Add


class StepLog:
    """Keeps the last steps in memory, and writes all of them to a file if there is one."""

    def __init__(
        self,
        config: SchedulerConfig,
        capacity: Capacity,
        eos_ids: Collection[int] = (),
        path: str | None = None,
        ring: int = 256,
    ) -> None:
        head = {"config": asdict(config), "capacity": asdict(capacity), "eos_ids": sorted(eos_ids)}
        self._head = json.dumps(head, separators=(",", ":"))
        self._ring: deque[tuple[Any, ...]] = deque(maxlen=ring)
        self._file: TextIO | None = Path(path).open("w", encoding="utf-8") if path else None  # noqa: SIM115
        if self._file:
            self._file.write(self._head + "\n")

    def arrived(self, now: float, message: Add | Abort) -> None:
        """Something came in before the next step."""
        self._keep(("in", now, message))

    def stepped(self, now: float, plan: Plan, result: StepResult, end: float) -> None:
        """A step was planned at `now` and committed at `end`."""
        self._keep(("step", now, plan, result, end))

    def dump(self, path: Path) -> None:
        """Write the ring to a file: after a crash, these are the last steps."""
        with path.open("w", encoding="utf-8") as file:
            file.write(self._head + "\n")
            file.writelines(_line(entry) for entry in self._ring)

    def close(self) -> None:
        """Flush and close the file."""
        if self._file:
            self._file.close()
            self._file = None

    def _keep(self, entry: tuple[Any, ...]) -> None:
        self._ring.append(entry)
        if self._file:
            self._file.write(_line(entry))


def _line(entry: tuple[Any, ...]) -> str:
    if entry[0] == "in":
        _, now, message = entry
        body = msgspec.to_builtins(message, str_keys=True)
        record = {"now": now, "in": body}
    else:
        _, now, plan, result, end = entry
        record = {
            "now": now,
            "plan": json.loads(plan.to_json()),
            "seconds": result.seconds,
            "tokens": dict(result.tokens),
            "errors": dict(result.errors),
            "end": end,
        }
    return json.dumps(record, separators=(",", ":")) + "\n"


def read_log(lines: Iterable[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(head, records) of a step log."""
    entries = [json.loads(line) for line in lines if line.strip()]
    return entries[0], entries[1:]


def replay(lines: Iterable[str]) -> tuple[list[str], list[str]]:
    """Run a recorded log again: (recorded plans, replayed plans), as JSON lines.

    The scheduler is a new one; the device is simulated: it takes the time of the cost model and gives each
    request the tokens that it got. Under a scheduling policy that looks only at requests, the two lists
    are identical.
    """
    from .loop import EngineLoop  # the loop writes logs; only a replay needs it here

    head, records = read_log(lines)
    capacity = Capacity(**{**head["capacity"], "prior": Coefficients(**head["capacity"]["prior"])})
    config = SchedulerConfig(**head["config"])
    outputs: dict[str, list[int]] = {}
    failures: dict[int, dict[str, str]] = {}
    for record in records:
        if "plan" in record:
            for request, token in record["tokens"].items():
                outputs.setdefault(request, []).append(token)
            failures[record["plan"]["step"]] = record["errors"]
    scheduler = Scheduler(
        config, BlockPool(capacity.num_blocks, capacity.block_size), StepCost(capacity.prior)
    )
    executor = _ReplayExecutor(SimulatedExecutor(capacity, scripted(outputs)), failures)
    loop = EngineLoop(scheduler, executor, VirtualClock(), eos_ids=frozenset(head["eos_ids"]))
    recorded, replayed = [], []
    for record in records:
        if "in" in record:
            loop.handle(msgspec.convert(record["in"], Add | Abort, strict=False, str_keys=True))
        else:
            recorded.append(Plan.from_json(json.dumps(record["plan"])).to_json())
            loop.step()
            replayed.append(loop.last_plan.to_json())
    return recorded, replayed


class _ReplayExecutor:
    """A simulated executor in which the recorded requests fail in the recorded steps."""

    def __init__(self, inner: SimulatedExecutor, failures: dict[int, dict[str, str]]) -> None:
        self._inner = inner
        self._failures = failures
        self.capacity, self.submit, self.close = inner.capacity, inner.submit, inner.close

    def collect(self, ticket: Any) -> StepResult:
        """The simulated result, less what failed in the record."""
        errors = self._failures.get(ticket.step, {})
        plan: Plan = ticket.payload
        kept = Plan(plan.step, plan.admitted, tuple(i for i in plan.items if i.request not in errors))
        result = self._inner.collect(type(ticket)(ticket.step, kept))
        return StepResult(
            step=result.step,
            seconds=result.seconds,
            tokens=result.tokens,
            errors=errors,
            logprobs=result.logprobs,
        )
