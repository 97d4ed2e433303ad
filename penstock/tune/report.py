"""What was tried and what follows from it: as JSON, and as lines to read and to paste."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from .loop import Result, Step, Verdict


def as_json(
    result: Result, verdict: Verdict, head: Mapping[str, Any], flags: Mapping[str, int]
) -> dict[str, Any]:
    """Everything. Times in ms but where the name says seconds, rates per second."""
    return {
        **head,
        "steps": [_step(step) for step in result.steps],
        "ended": result.ended,
        "interrupted": result.interrupted,
        "value": verdict.value,
        "change": verdict.changed,
        "met": verdict.met,
        "why": list(verdict.why),
        "flags": dict(flags),
    }


def _step(step: Step) -> dict[str, Any]:
    trial = step.trial
    row: dict[str, Any] = {
        "value": trial.value,
        "restart_seconds": step.restart_s,
        "failure": step.failure or None,
    }
    if trial.runs:
        row |= {"goodput": trial.goodput, "spread": trial.spread}
    row |= {"pressure": step.diagnosis.pressure.value, "why": step.diagnosis.why}
    return {**row, "runs": [asdict(run) for run in trial.runs]}


def to_paste(flags: Mapping[str, int], model: str) -> Iterator[str]:
    """The flags, for a command line and for a spec."""
    if not flags:
        return
    yield "On the command line of penstock serve or vllm serve:"
    yield "  " + " ".join(f"--{name} {value}" for name, value in flags.items())
    yield "In penstock.yaml:"
    written = ", ".join(f"{name}: {value}" for name, value in flags.items())
    yield f"  models: {{{model}: {{flags: {{{written}}}}}}}"


def others(result: Result) -> int:
    """Requests that the engine has served meanwhile and that were not ours; 0 where it does not tell."""
    found = 0.0
    for step in result.measured:
        for run in step.trial.runs:
            if run.engine.finished is not None:
                found += max(0.0, run.engine.finished - run.sent)
    return int(found)
