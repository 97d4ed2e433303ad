"""The step log: what came in, what was planned and what came back, one JSON object per line.

    {"config": {…}, "capacity": {…}, "eos_ids": […]}                      first line
    {"now": s, "in": [{"add": …} | {"abort": id}]}                        whatever arrived before a step
    {"now": s, "plan": {…}, "seconds": s, "tokens": {…}, "errors": {…}, "tainted": […], "end": s}

It is the replay format: the inputs, given to a new scheduler in the same order with the same times, and the
recorded tokens, given back by a simulated executor, make the same plans. The last steps are also kept in a
ring, which is written out when the engine crashes.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import msgspec

from penstock.core.blocks import BlockPool
from penstock.core.cost import Coefficients, StepCost
from penstock.core.errors import StartupError
from penstock.core.plan import Plan, StepResult
from penstock.core.scheduler import Scheduler, SchedulerConfig

from .clock import VirtualClock
from .executor.base import Capacity, Ticket
from .executor.simulated import SimulatedExecutor
from .messages import Abort, Add

logger = logging.getLogger("penstock.engine")


class StepLog:
    """Keeps the last steps in memory, and writes all of them to a file if there is one.

    Args:
        file: from `open_log`, which finds out early whether it can be written.
        ring: number of entries kept in memory.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        capacity: Capacity,
        eos_ids: Collection[int] = (),
        file: TextIO | None = None,
        ring: int = 256,
    ) -> None:
        head = {"config": asdict(config), "capacity": asdict(capacity), "eos_ids": sorted(eos_ids)}
        self._head = json.dumps(head, separators=(",", ":"))
        self._ring: deque[tuple[Any, ...]] = deque(maxlen=ring)
        self._dropped = 0
        self._file = file
        self._write(self._head + "\n")

    def arrived(self, now: float, message: Add | Abort) -> None:
        """Something came in before the next step."""
        self._keep(("in", now, message))

    def stepped(self, now: float, plan: Plan, result: StepResult, end: float) -> None:
        """A step was planned at `now` and committed at `end`."""
        # not the result itself: the logprobs of a long prompt are large, and no part of the log; nor are the
        # classes of errors, which change what a client is told and not what is planned
        self._keep(("step", now, plan, result.seconds, result.tokens, result.errors, result.tainted, end))

    def dump(self, path: Path) -> None:
        """Write the ring to a file: after a crash, these are the last steps."""
        with path.open("w", encoding="utf-8") as file:
            file.write(self._head + "\n")
            if self._dropped:
                file.write(json.dumps({"dropped": self._dropped}) + "\n")
            file.writelines(_line(entry) for entry in self._ring)

    def close(self) -> None:
        """Flush and close the file."""
        if self._file:
            self._file.close()
            self._file = None

    def _keep(self, entry: tuple[Any, ...]) -> None:
        self._dropped += len(self._ring) == self._ring.maxlen
        self._ring.append(entry)
        if self._file:
            self._write(_line(entry))

    def _write(self, line: str) -> None:
        """A log that cannot be written must not end the engine."""
        if self._file is None:
            return
        try:
            self._file.write(line)
        except OSError as error:
            logger.error("the step log ends here: %s", error)
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None


def open_log(path: str | None) -> TextIO | None:
    """The file of --record-steps. Raises StartupError, naming the flag, when it cannot be written."""
    if path is None:
        return None
    try:
        return Path(path).open("w", encoding="utf-8")
    except OSError as error:
        raise StartupError(
            f"--record-steps {path}: {error.strerror}.",
            param="--record-steps",
            advice="Name a writable file.",
        ) from error


def _line(entry: tuple[Any, ...]) -> str:
    record: dict[str, Any]
    if entry[0] == "in":
        _, now, message = entry
        record = {"now": now, "in": msgspec.to_builtins(message, str_keys=True)}
    else:
        _, now, plan, seconds, tokens, errors, tainted, end = entry
        record = {
            "now": now,
            "plan": json.loads(plan.to_json()),
            "seconds": seconds,
            "tokens": dict(tokens),
            "errors": dict(errors),
            "tainted": sorted(tainted),
            "end": end,
        }
    return json.dumps(record, separators=(",", ":")) + "\n"


def read_log(lines: Iterable[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(head, records) of a step log; a last line that was cut off by the end of its process is left out.

    Raises ValueError if it is none, or if it begins in mid-run.
    """
    entries: list[dict[str, Any]] = []
    broken = False
    for line in lines:
        if broken:
            raise ValueError("a line in the middle is not JSON")
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            broken = True
    if not entries or not {"config", "capacity", "eos_ids"} <= entries[0].keys():
        raise ValueError("the first line is not the head of a step log")
    if len(entries) > 1 and "dropped" in entries[1]:
        raise ValueError(
            f"it begins in mid-run, {entries[1]['dropped']} entries are missing (a crash leaves the last "
            "steps only; they can be read, but not replayed)"
        )
    return entries[0], entries[1:]


def replay(lines: Iterable[str]) -> tuple[list[str], list[str]]:
    """Run a recorded log again: (recorded plans, replayed plans), as JSON lines.

    The scheduler is a new one; the device is simulated: it takes the time of the cost model, and gives each
    request the tokens that it got in that step. Under a scheduling policy that looks only at requests, the
    two lists are identical. Ends at the first difference.
    """
    from .loop import EngineLoop  # the loop writes logs; only a replay needs it here

    head, records = read_log(lines)
    capacity = Capacity(**{**head["capacity"], "prior": Coefficients(**head["capacity"]["prior"])})
    config = SchedulerConfig(**head["config"])
    steps = {record["plan"]["step"]: record for record in records if "plan" in record}
    pool = BlockPool(capacity.num_blocks, capacity.block_size)
    scheduler = Scheduler(config, pool, StepCost(capacity.prior))
    executor = _ReplayExecutor(capacity, steps)
    loop = EngineLoop(scheduler, executor, VirtualClock(), eos_ids=frozenset(head["eos_ids"]))
    recorded, replayed = [], []
    for record in records:
        if "in" in record:
            loop.handle(msgspec.convert(record["in"], Add | Abort, strict=False, str_keys=True))
            continue
        recorded.append(Plan.from_json(json.dumps(record["plan"])).to_json())
        loop.step()
        replayed.append(loop.last_plan.to_json())
        if recorded[-1] != replayed[-1]:
            break
    return recorded, replayed


class _ReplayExecutor(SimulatedExecutor):
    """A simulated executor that gives what the recorded steps gave: tokens and errors."""

    def __init__(self, capacity: Capacity, steps: dict[int, dict[str, Any]]) -> None:
        super().__init__(capacity, lambda request, known, generated: 0)
        self._steps = steps

    def collect(self, ticket: Ticket) -> StepResult:
        """The simulated time, the recorded outcome."""
        simulated = super().collect(ticket)
        record = self._steps[ticket.step]
        return StepResult(
            step=ticket.step,
            seconds=simulated.seconds,
            tokens=record["tokens"],
            errors=record["errors"],
            tainted=frozenset(record.get("tainted", ())),
        )
