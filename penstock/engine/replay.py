"""A recorded run, scheduled again: the proof that plans follow from what came in and nothing else.

The inputs of a step log are given to a new scheduler in the same order, with the same times, and so are the
results; whatever it plans must be what was planned then. No device and no clock take part.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable
from typing import Any

import msgspec

from penstock.core.blocks import BlockPool
from penstock.core.cost import StepCost
from penstock.core.errors import InvalidRequest
from penstock.core.executor import Capacity
from penstock.core.plan import Failure, Outcome, Plan, StepResult
from penstock.core.pooling import Vectors
from penstock.core.scheduler import Scheduler, SchedulerConfig

from .messages import Abort, Add
from .trace import read_log


def replay(lines: Iterable[str]) -> tuple[list[str], list[str]]:
    """(recorded plans, replayed plans) of a step log, as JSON lines. Ends at the first difference.

    Raises ValueError, KeyError, IndexError or TypeError if it is none.
    """
    head, records = read_log(lines)
    capacity = msgspec.convert(head["capacity"], Capacity)
    pool = BlockPool(capacity.num_blocks, capacity.block_size)
    config, cost = SchedulerConfig(**head["config"]), StepCost(capacity.prior)
    scheduler = Scheduler(config, pool, cost, features=capacity.features, host_blocks=capacity.host_blocks)
    recorded: list[str] = []
    replayed: list[str] = []
    under_way: deque[Plan] = deque()
    for record in records:
        now = record["now"]
        if "in" in record:
            message = msgspec.convert(record["in"], Add | Abort, strict=False, str_keys=True)
            _arrive(scheduler, message, now)
        elif "reset" in record:
            scheduler.reset(tuple(record["reset"]))
            under_way.clear()
        elif "plan" in record:
            plan = scheduler.schedule(now)
            recorded.append(json.dumps(record["plan"], separators=(",", ":"), sort_keys=True))
            replayed.append(plan.to_json())
            if recorded[-1] != replayed[-1]:
                break
            if plan.items:
                under_way.append(plan)
        else:
            plan = under_way.popleft()
            scheduler.commit(plan, _result(plan, record), now)
    return recorded, replayed


def _arrive(scheduler: Scheduler, message: Add | Abort, now: float) -> None:
    if isinstance(message, Abort):
        for request in message.ids:
            scheduler.abort(request, now)
        return
    try:
        scheduler.add(message.spec, now)
    except InvalidRequest:
        pass  # it was refused then, too


def _result(plan: Plan, record: dict[str, Any]) -> StepResult:
    failures = {
        int(place): Failure(entry["cause"], tainted=entry["tainted"])
        for place, entry in record.get("failures", {}).items()
    }
    pooled = set(record.get("pooled", ()))
    outcomes = tuple(
        Outcome(
            tuple(tokens), pooled=Vectors(0, b"") if place in pooled else None, failure=failures.get(place)
        )
        for place, tokens in enumerate(record["tokens"])
    )
    return StepResult(plan.step, record["seconds"], outcomes, record.get("regular", True))
