"""Whether requests were slow because they waited or because they were computed: pure, from one run.

The engine's own histograms tell how long a request was in its queue and how long in its steps; the client's
P95 is divided in that proportion, with no more for computing than its mean allows. Then the question for each
target that is missed is whether the computing part alone misses it: if so, fewer at once; if not, it was the
queue, and more at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from .run import Run
from .slo import TITLES, Slo


class Pressure(Enum):
    """What holds a setting back, and with it where a better one lies."""

    QUEUE = "queueing"
    """Requests wait for a place in a step, and those that have one are fast enough: more at once."""
    COMPUTE = "computing"
    """Requests in the steps slow each other down: fewer at once."""
    BOTH = "queueing and computing"
    """Each is too much by itself: this load is more than the engine can do within the targets."""
    MEMORY = "the KV cache"
    """Requests wait for blocks, not for a place: more at once changes nothing."""
    NONE = "nothing"
    """Nobody waits and all targets are met: more at once changes nothing either."""
    UNKNOWN = "unknown"
    """The engine does not tell."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The verdict on a run, and its reason in a sentence."""

    pressure: Pressure
    why: str


_FULL = 0.95
"""Share of KV blocks in use from which on requests wait for blocks."""
_NOTICEABLE = 0.05
"""Share of a request's time in the queue from which on it is worth a word."""

_TAIL = 1.5
"""How far computing's 95th percentile is over its mean, at most: steps are shared, and alike."""


def diagnose(run: Run, slo: Slo, places: int | None = None) -> Diagnosis:
    """What holds this run back. `places`: max-num-seqs as it was, if that is known."""
    engine, broken = run.engine, run.broken(slo)
    if not run.completed:
        causes = ", ".join(f"{count} × {cause}" for cause, count in run.errors.items())
        return Diagnosis(
            Pressure.UNKNOWN, f"no request was answered in the window ({causes or 'none ended'})"
        )
    if engine.queue is None or engine.prefill is None or engine.decode is None:
        return Diagnosis(Pressure.UNKNOWN, _missed(run, slo, broken) + "; its metrics do not tell why")
    account = f"in the queue {engine.queue * 1000:,.0f} ms, prefill {engine.prefill * 1000:,.0f} ms, decode "
    account += f"{engine.decode * 1000:,.0f} ms on average"
    whole = engine.queue + engine.prefill + engine.decode
    waited = engine.queue > _NOTICEABLE * whole and (engine.waiting or 0) > 0
    if waited and _out_of_blocks(run, places):
        why = f"requests wait for KV blocks ({engine.cache or 0:.0%} in use, {engine.running or 0:g} run)"
        return Diagnosis(Pressure.MEMORY, f"{why}; {account}")
    if not broken:
        if waited:
            return Diagnosis(Pressure.QUEUE, f"targets are met and requests wait: {account}")
        return Diagnosis(Pressure.NONE, f"targets are met and nobody waits: {account}")
    causes_found = {_cause(name, run, slo.bounds[name]) for name in broken}
    (pressure,) = causes_found if len(causes_found) == 1 else (Pressure.BOTH,)
    return Diagnosis(pressure, f"{_missed(run, slo, broken)}: {pressure.value}; {account}")


def _cause(metric: str, run: Run, bound: float) -> Pressure:
    """Why this target is missed."""
    engine = run.engine
    queue, prefill, decode = engine.queue or 0.0, engine.prefill or 0.0, engine.decode or 0.0
    if metric == "tpot":  # begins with the first token: nobody waits there, except after a preemption
        return Pressure.COMPUTE
    computing = prefill + (decode if metric == "e2el" else 0.0)
    share = computing / max(queue + computing, 1e-9)
    computed = run.p95[metric] * share
    if engine.waiting:  # those that have not ended count in the client's P95 only
        computed = min(computed, _TAIL * computing * 1000)
    queued = run.p95[metric] - computed
    if computed <= bound:
        return Pressure.QUEUE
    return Pressure.BOTH if queued > bound else Pressure.COMPUTE


def _out_of_blocks(run: Run, places: int | None) -> bool:
    engine = run.engine
    if engine.cache is None or engine.cache < _FULL:
        return False
    return places is None or engine.running is None or engine.running < places


def _missed(run: Run, slo: Slo, broken: list[str]) -> str:
    if not broken:
        return "targets are met"
    return ", ".join(
        f"P95 {TITLES[name]} {run.p95.get(name, 0.0):,.0f} ms over {slo.bounds[name]:g}" for name in broken
    )
