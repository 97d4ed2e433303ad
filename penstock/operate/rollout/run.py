"""A rollout, watched: weights are set, figures are read, the judge is heard, and all of it is written down.

    ┌─▶ read the state ── promoted or aborted by somebody else ─▶ end
    │   weights are not ours any more ─▶ end, and say so
    │   figures of this step ─▶ judge ─┬─ wait ─────────────────┐
    └──────────────────────────────────┴─ go on: next step, or promoted; give up: weights as before

A gateway that does not answer is asked again for `patience` seconds; the weights are in its ledger, and stay.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import msgspec

from penstock.core.errors import StartupError

from .admin import AdminApi, Unreachable
from .judge import Figures, Limits, judge, weights_for
from .state import Event, Phase, Rollout, StateFile

HEARD = 2.0
"""Seconds until all workers have heard of new weights."""

_QUIET = 30.0
"""Seconds between two lines that say no more than that it goes on."""

Say = Callable[[str], None]


class Runner:
    """One rollout, from whatever step it is at."""

    def __init__(
        self,
        file: StateFile,
        api: AdminApi,
        say: Say,
        *,
        poll: float = 5.0,
        patience: float = 300.0,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """
        Args:
            say: what is told to whoever watches, a line each.
            poll: seconds between two looks.
            patience: seconds for which a gateway may not answer.
        """
        self._file, self._api, self._say = file, api, say
        self._poll, self._patience = poll, patience
        self._clock, self._sleep = clock, sleep
        self._last, self._told = "", 0.0

    def run(self) -> Phase:
        """To its end: promoted or aborted. Raises StartupError where neither can be: weights that somebody
        else has changed, a gateway that stays away."""
        silent: float | None = None
        while True:
            try:
                ended = self._look()
                silent = None
            except Unreachable as error:
                silent = silent or self._clock()
                self._tell(f"{error} Weights stay as they are.")
                if self._clock() - silent > self._patience:
                    raise StartupError(
                        f"{error.message} That has been so for {self._patience:g} s.",
                        advice="`penstock rollout start` goes on, `penstock rollout abort` goes back.",
                    ) from None
                ended = None
            if ended is not None:
                return ended
            self._sleep(self._poll)

    def _look(self) -> Phase | None:
        with self._file.alone():
            rollout = self._file.read()
            if rollout is None:
                raise StartupError(f"{self._file.path} has gone.")
            if rollout.phase != "running":
                self._tell(f"{rollout.phase} by somebody else")
                return rollout.phase
            if rollout.step < 0:
                self._step(rollout, 0, "start")
                return None
            self._check(rollout)
            elapsed = self._clock() - rollout.since
            if elapsed < HEARD:
                return None
            limits = Limits(**rollout.limits)
            mine, others = self._figures(rollout, elapsed - HEARD)
            if others.attempts >= limits.min_requests:
                rollout.reference = asdict(others)
                self._file.write(rollout)
            reference = None if rollout.reference is None else Figures(**rollout.reference)
            decision = judge(mine, reference, limits, elapsed)
            figures = {"candidate": asdict(mine), "others": asdict(others), "reference": rollout.reference}
            if decision.kind == "wait":
                if self._clock() - self._told > _QUIET:
                    self._tell(f"{100 * rollout.share:g} %: {decision.reason}")
                return None
            if decision.kind == "give up":
                abort(self._file, self._api, rollout, self._clock(), decision.reason, figures)
                self._tell(f"aborted at {100 * rollout.steps[rollout.step]:g} %: {decision.reason}")
                return "aborted"
            if rollout.step + 1 < len(rollout.steps):
                self._step(rollout, rollout.step + 1, decision.reason, figures)
                return None
            rollout.phase = "promoted"
            rollout.events.append(
                Event(at=self._clock(), share=1.0, what=f"promoted: {decision.reason}", figures=figures)
            )
            self._file.write(rollout)
            self._tell(f"promoted: {decision.reason}")
            return "promoted"

    def _step(self, rollout: Rollout, step: int, why: str, figures: dict[str, Any] | None = None) -> None:
        """To another share. If that cannot be written down, whoever goes on finds it by the weights."""
        share = rollout.steps[step]
        rollout.step = step
        weights = weights_for(share, list(rollout.before), rollout.candidate, rollout.before)
        self._api.weigh(rollout.route, weights, f"rollout of {rollout.candidate}: {100 * share:g} %")
        rollout.since = self._clock()
        rollout.events.append(Event(at=rollout.since, share=share, what=why, figures=figures or {}))
        self._file.write(rollout)
        self._tell(f"{100 * share:g} % of {rollout.route} goes to {rollout.candidate}: {why}")

    def _check(self, rollout: Rollout) -> None:
        """Whether the weights are those of this step."""
        ours = weights_for(rollout.share, list(rollout.before), rollout.candidate, rollout.before)
        found = self._api.weights(rollout.route)
        if set(found) != set(ours) or any(abs(found[name] - ours[name]) > 1e-9 for name in ours):
            # what was set, and could not be written down
            last = rollout.step + 1 < len(rollout.steps) and weights_for(
                rollout.steps[rollout.step + 1], list(rollout.before), rollout.candidate, rollout.before
            )
            if last and found == last:
                self._step(rollout, rollout.step + 1, "go on after a break")
                return
            shown = ", ".join(f"{name} {weight:g}" for name, weight in found.items())
            raise StartupError(
                f"The weights of {rollout.route} are not those of this rollout any more: {shown}.",
                advice="Somebody else, or another spec, has changed them. `penstock rollout abort` puts them "
                "back as they were before; or remove the state file and start again.",
            )

    def _figures(self, rollout: Rollout, seconds: float) -> tuple[Figures, Figures]:
        """The candidate's, and those of the others together."""
        found = self._api.traffic(rollout.route, seconds)
        others = Figures()
        for name, figures in found.items():
            if name != rollout.candidate:
                others = others.plus(figures)
        return found[rollout.candidate], others

    def _tell(self, line: str) -> None:
        if line != self._last:
            self._last, self._told = line, self._clock()
            self._say(line)


def promote(file: StateFile, api: AdminApi, now: float) -> Rollout:
    """All requests to the candidate, at once. Raises StartupError, Unreachable."""
    with file.alone():
        rollout = existing(file)
        _running(rollout)
        weights = weights_for(1.0, list(rollout.before), rollout.candidate, rollout.before)
        api.weigh(rollout.route, weights, f"rollout of {rollout.candidate}: promoted by hand")
        rollout.phase = "promoted"
        rollout.events.append(Event(at=now, share=1.0, what="promoted by hand"))
        file.write(rollout)
        return rollout


def abort_by_hand(file: StateFile, api: AdminApi, now: float, reason: str) -> Rollout:
    """Weights as before the start; also after a promotion. Raises StartupError, Unreachable."""
    with file.alone():
        rollout = existing(file)
        if rollout.phase == "aborted":
            raise StartupError(f"The rollout of {rollout.candidate} is aborted already.")
        abort(file, api, rollout, now, reason, {})
        return rollout


def abort(
    file: StateFile, api: AdminApi, rollout: Rollout, now: float, reason: str, figures: dict[str, Any]
) -> None:
    """Weights as before the start, and write that down. Whoever calls it holds the file."""
    total = sum(rollout.before.values())
    api.weigh(rollout.route, rollout.before, f"rollout of {rollout.candidate}: aborted")
    rollout.phase = "aborted"
    share = rollout.before[rollout.candidate] / total
    rollout.events.append(Event(at=now, share=share, what=f"aborted: {reason}", figures=figures))
    file.write(rollout)


def existing(file: StateFile) -> Rollout:
    """Raises StartupError where there is none."""
    rollout = file.read()
    if rollout is None:
        raise StartupError(
            f"There is no rollout in {file.path}.", advice="`penstock rollout start` begins one."
        )
    return rollout


def as_json(rollout: Rollout) -> dict[str, Any]:
    """All of it, for `status --json`."""
    found: dict[str, Any] = msgspec.to_builtins(rollout)
    return found


def _running(rollout: Rollout) -> None:
    if rollout.phase != "running":
        raise StartupError(f"The rollout of {rollout.candidate} is {rollout.phase} already.")
