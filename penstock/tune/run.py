"""What one run of load has measured, and several runs of one setting together. Pure.

A run counts the requests that ended in its window, which begins when the first burst is over: in steady state
that is the rate, whatever is under way at either end. Requests that are still under way at the end and have
already missed a target count as having missed it, with the time so far: else the slowest would be hidden.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from penstock.bench.client import Outcome, RequestRecord
from penstock.bench.report import latencies, percentile

from .slo import RANK, Slo


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """The engine's own account of a run, from its metrics; None for what it does not tell."""

    queue: float | None = None
    """Mean seconds of a request in the queue."""
    prefill: float | None = None
    """Mean seconds from the first step to the first token."""
    decode: float | None = None
    """Mean seconds from the first token to the last."""
    running: float | None = None
    """Most requests that were seen in its steps."""
    waiting: float | None = None
    """Most requests that were seen in its queue."""
    cache: float | None = None
    """Highest share of KV blocks in use, 0 to 1."""
    preemptions: float | None = None
    finished: float | None = None
    """Requests that it has ended, whoever sent them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run. Times in ms, rates per second."""

    seconds: float
    """Length of the window."""
    completed: int
    failed: int
    goodput: float
    """Requests that met all targets."""
    throughput: float
    """Requests that were answered."""
    tokens: float
    """Output tokens of those."""
    share: float
    """Of the requests that ended or missed a target, how many met all."""
    p95: Mapping[str, float] = field(default_factory=dict)
    """By metric; none where no request ended."""
    engine: Engine = Engine()
    errors: Mapping[str, int] = field(default_factory=dict)
    """Failures by cause."""
    sent: int = 0
    """Requests that were sent, also outside of the window."""

    def broken(self, slo: Slo) -> list[str]:
        """Metrics whose P95 is over its target. A run without an answer breaks all."""
        if not self.completed:
            return list(slo.bounds)
        return [name for name, bound in slo.bounds.items() if self.p95.get(name, 0.0) > bound]


def measured(records: Sequence[RequestRecord], *, start: float, end: float, slo: Slo, engine: Engine) -> Run:
    """The run of these records between `start` and `end`, seconds of their clock."""
    seconds = max(end - start, 1e-9)
    inside = [record for record in records if record.finished is not None and start <= record.finished <= end]
    completed = [record for record in inside if record.outcome is Outcome.COMPLETED]
    failed = [record for record in inside if record.outcome is Outcome.FAILED]
    values: dict[str, list[float]] = {name: [] for name in ("ttft", "tpot", "e2el")}
    good = 0
    for record in completed:
        found = latencies(record)
        for name in values:
            values[name] += [each * 1000 for each in found[name]]
        good += all(each * 1000 <= bound for name, bound in slo.bounds.items() for each in found[name])
    late = 0
    for record in records:
        if record.finished is None and record.sent is not None:
            over = _already_over(record, end, slo)
            late += bool(over)
            for name, value in over.items():
                values[name].append(value)
    errors: dict[str, int] = {}
    for record in failed:
        errors[record.cause or "?"] = errors.get(record.cause or "?", 0) + 1
    return Run(
        seconds=seconds,
        completed=len(completed),
        failed=len(failed),
        goodput=good / seconds,
        throughput=len(completed) / seconds,
        tokens=sum(record.output_tokens for record in completed) / seconds,
        share=good / max(1, len(completed) + len(failed) + late),
        p95={name: percentile(found, RANK) for name, found in values.items() if found},
        engine=engine,
        errors=errors,
        sent=sum(record.sent is not None for record in records),
    )


def _already_over(record: RequestRecord, end: float, slo: Slo) -> dict[str, float]:
    """What a request that is still under way has missed by now, in ms."""
    assert record.sent is not None
    age = (end - record.sent) * 1000
    bounds = slo.bounds
    over = {}
    if not record.chunk_times and age > bounds.get("ttft", float("inf")):
        over["ttft"] = age
    if age > bounds.get("e2el", float("inf")):
        over["e2el"] = age
    return over


@dataclass(frozen=True, slots=True)
class Trial:
    """One setting: its runs, and their medians."""

    value: int
    runs: tuple[Run, ...]

    @property
    def goodput(self) -> float:
        """Median of the runs."""
        return statistics.median(run.goodput for run in self.runs)

    @property
    def spread(self) -> float:
        """Half of the distance between the best and the worst run; 0 of a single one says nothing."""
        found = [run.goodput for run in self.runs]
        return (max(found) - min(found)) / 2

    @property
    def typical(self) -> Run:
        """The run with the median goodput (the lower of two)."""
        return sorted(self.runs, key=lambda run: (run.goodput, run.share))[(len(self.runs) - 1) // 2]

    def met(self, slo: Slo) -> bool:
        """Whether the typical run kept every target."""
        return not self.typical.broken(slo)


#: Settings whose goodput differs by less than this share are the same to us, however often measured.
LEAST_DIFFERENCE = 0.03


def noise(*trials: Trial) -> float:
    """Requests per second by which these trials may differ without there being a difference: the largest
    spread among them, and 3 % of the largest goodput at least."""
    return max(
        max(trial.spread for trial in trials), LEAST_DIFFERENCE * max(trial.goodput for trial in trials)
    )


def enough(goodputs: Sequence[float], rival: Trial | None, most: int) -> bool:
    """Whether a setting has been measured often enough.

    1. After `most` runs.
    2. After two that agree to within 5 %.
    3. After one that differs from the rival's, which was measured repeatedly, by more than four times its
       spread and by more than a quarter, or in which nothing was good: no repeat would change their order.
    """
    if len(goodputs) >= most:
        return True
    if len(goodputs) >= 2:
        high, low = max(goodputs), min(goodputs)
        return high - low <= 0.05 * high
    if rival is None or not goodputs:
        return False
    if not goodputs[0]:
        return True
    if len(rival.runs) < 2:
        return False
    apart = abs(goodputs[0] - rival.goodput)
    return apart > 4 * rival.spread and apart > 0.25 * max(goodputs[0], rival.goodput)
