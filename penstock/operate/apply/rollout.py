"""Whether what was applied is ready, by its status. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .bundle import Object, title

WATCHED = ("Deployment", "StatefulSet", "DaemonSet", "LeaderWorkerSet", "Job")
"""Kinds that pods come from; all others are there as soon as they are applied. CronJobs run later."""


@dataclass(frozen=True, slots=True)
class Standing:
    """Of one object."""

    object: str
    ready: bool
    failed: bool
    """It will not become ready by waiting."""
    value: str
    """`1 of 2 ready`."""


def standing(it: Object) -> Standing:
    """How an object is that comes from the API server."""
    status: Mapping[str, Any] = it.get("status") or {}
    spec: Mapping[str, Any] = it.get("spec") or {}
    seen = status.get("observedGeneration")
    current = seen is None or seen >= it["metadata"].get("generation", 0)
    match it["kind"]:
        case "Deployment":
            return _deployment(it, spec, status, current and seen is not None)
        case "StatefulSet":
            wanted = spec.get("replicas", 1)
            done = min(status.get("readyReplicas", 0), _updated(spec, status, wanted))
            return _counted(it, done, wanted, current and seen is not None)
        case "DaemonSet":
            wanted = status.get("desiredNumberScheduled", 0)
            done = min(status.get("numberAvailable", 0), status.get("updatedNumberScheduled", 0))
            return _counted(it, done, wanted, current and seen is not None)
        case "LeaderWorkerSet":
            wanted = spec.get("replicas", 1)
            done = min(status.get("readyReplicas", 0), status.get("updatedReplicas", 0))
            return _counted(it, done, wanted, bool(status) or wanted == 0)
        case "Job":
            return _job(it, spec, status)
    return Standing(title(it), True, False, "there")


def _deployment(it: Object, spec: Mapping[str, Any], status: Mapping[str, Any], current: bool) -> Standing:
    wanted = spec.get("replicas", 1)
    updated, total = status.get("updatedReplicas", 0), status.get("replicas", 0)
    done = min(updated, status.get("availableReplicas", 0))
    progressing = condition(status, "Progressing")
    if current and progressing.get("reason") == "ProgressDeadlineExceeded":
        return Standing(
            title(it), False, True, f"{done} of {wanted} ready; its progressDeadlineSeconds are over"
        )
    found = _counted(it, done, wanted, current)
    if found.ready and total > wanted:
        return Standing(title(it), False, False, f"{total - wanted} old pods still end")
    return found


def _job(it: Object, spec: Mapping[str, Any], status: Mapping[str, Any]) -> Standing:
    failed = condition(status, "Failed")
    if failed.get("status") == "True":
        reason = ": ".join(filter(None, (failed.get("reason"), failed.get("message"))))
        return Standing(title(it), False, True, f"failed: {reason}")
    if condition(status, "Complete").get("status") == "True":
        return Standing(title(it), True, False, "complete")
    if spec.get("suspend"):
        return Standing(title(it), True, False, "suspended")
    return Standing(title(it), False, False, f"{status.get('active', 0)} running")


def _counted(it: Object, done: int, wanted: int, current: bool) -> Standing:
    return Standing(title(it), current and done >= wanted, False, f"{done} of {wanted} ready")


def _updated(spec: Mapping[str, Any], status: Mapping[str, Any], wanted: int) -> int:
    partition = ((spec.get("updateStrategy") or {}).get("rollingUpdate") or {}).get("partition", 0)
    if status.get("currentRevision") == status.get("updateRevision") or partition:
        return wanted
    updated: int = status.get("updatedReplicas", 0)
    return updated


def condition(status: Mapping[str, Any], type: str) -> Mapping[str, Any]:
    """A condition; empty where it is not there."""
    return next((each for each in status.get("conditions") or () if each.get("type") == type), {})
