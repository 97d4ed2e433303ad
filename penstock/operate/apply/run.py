"""Apply, then watch until all of it is ready, or the deadline: what is seen is said once, and again as it
changes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .bundle import Object, name, namespace, stages, title
from .kubectl import Kubectl, Refused
from .reasons import Reason, World, lines, why
from .rollout import WATCHED, Standing, standing

Say = Callable[[str], None]
Explain = Callable[[str], str | None]
"""What a log says is wrong; None where it says nothing that is known."""

_KINDS = {
    "Deployment": "deployments.apps",
    "StatefulSet": "statefulsets.apps",
    "DaemonSet": "daemonsets.apps",
    "Job": "jobs.batch",
    "LeaderWorkerSet": "leaderworkersets.leaderworkerset.x-k8s.io",
}


@dataclass(slots=True)
class Outcome:
    """What has come of it."""

    applied: list[str] = field(default_factory=list)
    standings: list[Standing] = field(default_factory=list)
    reasons: list[Reason] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ready(self) -> bool:
        """All that was watched."""
        return all(each.ready for each in self.standings)


def apply(
    kubectl: Kubectl, objects: Sequence[Object], *, manager: str, force: bool, dry_run: str = "none"
) -> list[str]:
    """Everything, in order. Raises Refused, with what was applied before said in its advice."""
    done: list[str] = []
    for part in stages(objects):
        try:
            done += kubectl.apply(part, manager=manager, force=force, dry_run=dry_run)
        except Refused as error:
            done += error.done
            if done:
                error.advice += f" Applied, and kept: {', '.join(each.split()[0] for each in done)}."
            raise
    return done


class Watch:
    """Of all workloads among the objects."""

    def __init__(
        self,
        kubectl: Kubectl,
        objects: Sequence[Object],
        say: Say,
        *,
        default_namespace: str | None = None,
        timeout: float = 900.0,
        poll: float = 3.0,
        explain: Explain = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """
        Args:
            default_namespace: of objects that name none; None is the context's.
            timeout: seconds until it gives up; what was applied stays.
            explain: reads the log of a container that has ended.
        """
        self._kubectl, self._say, self._explain = kubectl, say, explain
        self._timeout, self._poll = timeout, poll
        self._clock, self._sleep = clock, sleep
        self._by_namespace: dict[str | None, set[tuple[str, str]]] = {}
        for each in objects:
            if each["kind"] in WATCHED:
                place = namespace(each) or default_namespace
                self._by_namespace.setdefault(place, set()).add((each["kind"], name(each)))
        self._said: dict[str, str] = {}
        self._logs: dict[str, str | None] = {}

    def run(self) -> Outcome:
        """Until all are ready, one of them has failed for good, or the time is over."""
        begun = self._clock()
        failures = 0
        while True:
            try:
                outcome = self._look()
                failures = 0
            except Refused as error:  # an API server that is busy, or being upgraded
                failures += 1
                if failures > 5:
                    raise
                self._once("kubectl", str(error))
                self._sleep(self._poll)
                continue
            outcome.seconds = self._clock() - begun
            over = outcome.ready or any(each.failed for each in outcome.standings)
            if over or outcome.seconds >= self._timeout:
                return outcome
            self._sleep(self._poll)

    def _look(self) -> Outcome:
        outcome = Outcome()
        for place, wanted in self._by_namespace.items():
            kinds = ",".join(sorted({_KINDS[kind] for kind, _ in wanted}))
            found = self._kubectl.get(kinds, place)
            there = {(each["kind"], name(each)): each for each in found}
            waiting = []
            for key in sorted(wanted):
                it = there.get(key)
                state = Standing(f"{key[0]} {key[1]}", False, True, "is gone") if it is None else standing(it)
                outcome.standings.append(state)
                self._once(state.object, state.value)
                if it is not None and not state.ready:
                    waiting.append(it)
            if waiting:
                outcome.reasons += self._reasons(place, waiting)
        return outcome

    def _reasons(self, place: str | None, waiting: Sequence[Object]) -> list[Reason]:
        everything = self._kubectl.get(
            "pods,replicasets.apps,events,persistentvolumeclaims,statefulsets.apps", place
        )
        kinds: dict[str, list[Object]] = {}
        for each in everything:
            kinds.setdefault(each["kind"], []).append(each)
        world = World(
            pods=kinds.get("Pod", []),
            events=kinds.get("Event", []),
            claims=kinds.get("PersistentVolumeClaim", []),
            owners=kinds.get("ReplicaSet", []) + kinds.get("StatefulSet", []),
        )
        found: list[Reason] = []
        for it in waiting:
            mine = [self._with_log(reason, world) for reason in why(it, world)]
            if mine:
                self._once(f"{title(it)} why", "\n".join(lines(mine)), bare=True)
            found += mine
        return found

    def _with_log(self, reason: Reason, world: World) -> Reason:
        """What a container that has ended has said, where that is known to mean something."""
        if reason.id not in ("crash", "oom"):
            return reason
        pod = next((each for each in world.pods if title(each) == reason.object), None)
        if pod is None:
            return reason
        container, uid = reason.what.split()[0].rstrip(":"), str(pod["metadata"].get("uid"))
        states: list[dict[str, Any]] = (pod.get("status") or {}).get("containerStatuses") or []
        restarts = next((each.get("restartCount", 0) for each in states if each["name"] == container), 0)
        key = f"{uid}/{container}/{restarts}"
        if key not in self._logs:
            place = namespace(pod) or "default"
            text = self._kubectl.log(name(pod), container, place, previous=bool(restarts))
            self._logs[key] = self._explain(text) if text else None
        said = self._logs[key]
        return reason if said is None else Reason(reason.object, reason.id, reason.what, said, reason.pods)

    def _once(self, about: str, what: str, *, bare: bool = False) -> None:
        if self._said.get(about) != what:
            self._said[about] = what
            self._say(what if bare else f"{about}: {what}")
