"""Settings tried one after another, each as often as the noise asks for; and what comes out of it.

propose ─▶ restart, or fewer clients ─▶ run, again while it is not settled ─▶ diagnose ─▶ record ─▶ …
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from penstock.core.errors import StartupError

from .diagnosis import Diagnosis, Pressure, diagnose
from .run import Run, Trial, enough, noise
from .search import Search
from .slo import Slo

Start = Callable[[int], Awaitable[float | None]]
"""Makes an engine with a setting; the seconds that its restart took. Raises StartupError if it cannot be."""
Measure = Callable[[int], Awaitable[Run | None]]
"""One run with a setting; None if everything is to end."""


FEW = 0.05
"""Share of good requests below which a setting counts as one without any: how many slip through when nearly
all miss their targets says nothing of where it would be better."""


class Tell(Protocol):
    """Says what goes on, a line at a time."""

    def __call__(self, line: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Step:
    """One setting that was tried."""

    trial: Trial
    diagnosis: Diagnosis
    restart_s: float | None = None
    failure: str = ""
    """Why the engine did not start with it; then it has no runs."""


@dataclass(slots=True)
class Result:
    """All of it."""

    steps: list[Step] = field(default_factory=list)
    ended: str = ""
    interrupted: bool = False

    @property
    def measured(self) -> list[Step]:
        """Without those that did not start."""
        return [step for step in self.steps if step.trial.runs]


async def tune(
    search: Search,
    start: Start,
    measure: Measure,
    slo: Slo,
    *,
    repeats: int,
    tell: Tell,
    translate: Callable[[Pressure], Pressure] = lambda pressure: pressure,
    restarts: bool = True,
) -> Result:
    """Try what the search proposes until it has seen enough.

    Args:
        repeats: runs of a setting at most.
        translate: what a pressure means for this search, where it does not vary the engine.
        restarts: whether a setting makes another engine: then fewer places were at work than there are only
            because nobody wanted more.
    """
    result = Result()
    while (value := search.propose()) is not None:
        try:
            seconds = await start(value)
        except StartupError as error:
            step = Step(Trial(value, ()), Diagnosis(Pressure.COMPUTE, str(error)), failure=str(error))
            result.steps.append(step)
            tell(f"{value:>6}  the engine does not start: {error}")
            search.record(value, 0.0, Pressure.COMPUTE)
            continue
        rival = max((s.trial for s in result.measured), key=lambda trial: trial.goodput, default=None)
        runs: list[Run] = []
        while not enough([run.goodput for run in runs], rival, repeats):
            run = await measure(value)
            if run is None:
                result.interrupted, result.ended = True, "it was interrupted"
                return result
            runs.append(run)
        trial = Trial(value, tuple(runs))
        diagnosis = diagnose(trial.typical, slo, value if restarts else None)
        step = Step(trial, diagnosis, seconds)
        result.steps.append(step)
        tell(line(step, slo))
        search.record(
            value,
            trial.goodput if trial.typical.share >= FEW else 0.0,
            translate(diagnosis.pressure),
            met=trial.met(slo),
            same_from=_same_from(trial) if restarts else None,
        )
    result.ended = search.ended
    return result


def _same_from(trial: Trial) -> int | None:
    """From which setting on nothing changes: the most requests that were ever at work, if that is fewer than
    there were places for."""
    seen = [run.engine.running for run in trial.runs if run.engine.running is not None]
    most = int(max(seen, default=0))
    return most if 0 < most < trial.value else None


def line(step: Step, slo: Slo) -> str:
    """One setting in a line."""
    run, trial = step.trial.typical, step.trial
    p95 = "  ".join(f"{name} {run.p95[name]:,.0f} ms" for name in slo.bounds if name in run.p95)
    spread = f" ± {trial.spread:.2f}" if len(trial.runs) > 1 else ""
    return (
        f"{trial.value:>6}  {trial.goodput:6.2f}{spread} good requests/s ({run.share:.0%}), "
        f"P95: {p95 or 'none'}"
        f"\n        {step.diagnosis.why}"
    )


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do."""

    value: int | None
    """The setting to use; None where none serves a single request within the targets."""
    changed: bool
    """Whether that is another one than before."""
    why: Sequence[str]
    """In sentences."""
    met: bool = False
    """Whether the best that was measured keeps all targets."""


def decide(result: Result, slo: Slo, *, start: int, flag: str) -> Verdict:
    """The best setting, and whether it is worth a change: what differs within the noise does not."""
    tried = result.measured
    if not tried:
        return Verdict(None, False, ["Nothing was measured."])
    best = max(tried, key=lambda step: step.trial.goodput)
    before = next((step for step in tried if step.trial.value == start), None)
    why: list[str] = []
    if best.trial.goodput == 0:
        causes = {step.diagnosis.pressure for step in tried}
        why.append(f"No setting of --{flag} that was tried serves a request within the targets ({slo}).")
        if causes == {Pressure.COMPUTE}:
            why.append(
                "Computing alone takes longer: shorter prompts or answers, a smaller or quantised model, a "
                "faster device, or wider targets."
            )
        elif Pressure.BOTH in causes:
            why.append(
                "Requests wait, and those that do not are slow: this load is more than the engine can do. "
                "More replicas, or fewer requests at a time (limits at the gateway)."
            )
        return Verdict(None, False, why)
    chosen = best
    if before is not None and before is not best:
        margin = noise(best.trial, before.trial)
        gain = best.trial.goodput - before.trial.goodput
        if gain <= margin:
            why.append(
                f"--{flag} {best.trial.value} and {start} differ by {gain:.2f} good requests/s, and runs of "
                f"one setting by up to {margin:.2f}: within the noise, so {start} stays."
            )
            chosen = before
        else:
            more = f" ({gain / before.trial.goodput:+.0%})" if before.trial.goodput else ""
            why.append(
                f"--{flag} {start} → {best.trial.value}: {before.trial.goodput:.2f} → "
                f"{best.trial.goodput:.2f} good requests/s{more}; runs of one setting differ by {margin:.2f}."
            )
    why.append(f"At {start}: {before.diagnosis.why}." if before is not None else "")
    if chosen is not before:
        why.append(f"At {chosen.trial.value}: {chosen.diagnosis.why}.")
    if not chosen.trial.met(slo):
        broken = ", ".join(chosen.trial.typical.broken(slo))
        why.append(
            f"The best setting still misses {broken} at P95 under this load: it serves "
            f"{chosen.trial.goodput:.2f} requests/s within the targets, and more than that needs another "
            "replica or a faster engine; limit what is let in (--max-num-queued-reqs, or at the gateway)."
        )
    value, met = chosen.trial.value, chosen.trial.met(slo)
    return Verdict(value, value != start, [sentence for sentence in why if sentence], met)


def advise(result: Result, slo: Slo, *, seqs: int | None) -> Verdict:
    """What the load alone tells of an engine that cannot be started again: it has no more requests in a step
    than there are clients, so `n` clients show how it would do with --max-num-seqs n.

    seqs: its max-num-seqs, if it tells.
    """
    tried = result.measured
    best = max(tried, key=lambda step: step.trial.goodput, default=None)
    if best is None or best.trial.goodput == 0:
        what = f"No number of clients that was tried gets an answer within the targets ({slo})."
        return Verdict(None, False, [what, best.diagnosis.why + "." if best is not None else ""])
    clients, pressure = best.trial.value, best.diagnosis.pressure
    met = best.trial.met(slo)
    more = [step for step in tried if step.trial.value > clients]
    why = [
        f"Most is served within the targets with {clients} requests at a time: {best.trial.goodput:.2f} good "
        f"requests/s. {best.diagnosis.why}."
    ]
    if more:
        after = min(more, key=lambda step: step.trial.value)
        margin = noise(best.trial, after.trial)
        loss = best.trial.goodput - after.trial.goodput
        told = f"{after.trial.value} at a time: {after.trial.goodput:.2f} good requests/s"
        why.append(
            told + (f", within the noise of {margin:.2f}." if loss <= margin else f". {after.diagnosis.why}.")
        )
        pressure = after.diagnosis.pressure if loss > margin else pressure
    if pressure is Pressure.QUEUE:
        why.append(
            "Requests wait while those in the steps are fast enough: raise --max-num-seqs, and measure again."
        )
        return Verdict(None if seqs is None else 2 * seqs, seqs is not None, why, met)
    if pressure is Pressure.MEMORY:
        why.append("The KV cache is what is short: more memory for it, or a smaller --max-model-len.")
        return Verdict(None, False, why, met)
    if seqs is not None and clients >= seqs:
        why.append(f"Its --max-num-seqs is {seqs}; no more than that run at once already.")
        return Verdict(seqs, False, why, met)
    return Verdict(clients, clients != seqs, why, met)
