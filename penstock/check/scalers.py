"""Who sets the number of replicas: HorizontalPodAutoscalers and KEDA's ScaledObjects."""

from __future__ import annotations

from collections.abc import Iterator

from penstock.core.near import nearest

from .cluster import Objects, Pod, Thing, integer, mapping
from .finding import Finding, Rule, Severity

TARGET = Rule(
    "scale-target-missing",
    Severity.ERROR,
    "a scaler whose target is not there",
    "Nothing is ever scaled.",
    "Write kind and name of the workload.",
)
TWICE = Rule(
    "scaled-twice",
    Severity.ERROR,
    "two scalers of one workload",
    "Each sets the number of replicas back to its own; KEDA's admission webhook refuses the second.",
    "Keep one; a ScaledObject may have several triggers.",
)
BOUNDS = Rule(
    "scaler-bounds",
    Severity.ERROR,
    "bounds of a scaler that contradict one another",
    "The API server or KEDA's admission webhook refuses it; where there is no webhook, nothing is scaled.",
    "The least below or at the most, and at least one at the most; with KEDA, idleReplicaCount below "
    "minReplicaCount.",
)
RULES = (TARGET, TWICE, BOUNDS)

_WORKLOADS = ("Deployment", "StatefulSet", "ReplicaSet", "LeaderWorkerSet", "Rollout")


def examine(objects: Objects) -> Iterator[Finding]:
    """Scalers without a target, and targets with two."""
    yield from _scalers(objects)
    for scaler in objects.of("HorizontalPodAutoscaler", "ScaledObject"):
        yield from _bounds(scaler)


def scaled(objects: Objects) -> Iterator[tuple[Thing, Thing | None]]:
    """(scaler, workload) of HorizontalPodAutoscalers and KEDA's ScaledObjects; None where it is not there."""
    for scaler in objects.of("HorizontalPodAutoscaler", "ScaledObject"):
        target = mapping(scaler.get("spec", "scaleTargetRef"))
        kind = str(target.get("kind") or "Deployment")
        yield scaler, objects.find(kind, str(target.get("name")), scaler.namespace)


def _scalers(objects: Objects) -> Iterator[Finding]:
    by_target: dict[int, Thing] = {}
    for scaler, workload in scaled(objects):
        target = mapping(scaler.get("spec", "scaleTargetRef"))
        if workload is None:
            kind, name = str(target.get("kind") or "Deployment"), str(target.get("name"))
            names = [each.name for each in objects.of(*_WORKLOADS) if each.near(scaler)]
            if names:
                near = nearest(name, names, 0.5)
                fix = f"name: {near}" if near else ""
                yield scaler.finding(
                    TARGET, f"There is no {kind} {name}.", "spec", "scaleTargetRef", "name", fix=fix
                )
            continue
        first = by_target.setdefault(id(workload), scaler)
        # the same scaler in two files is told as such
        if first is not scaler and (first.kind, first.name) != (scaler.kind, scaler.name):
            yield scaler.finding(
                TWICE,
                f"{workload.title} is scaled by {first.title} and {scaler.title}.",
                "spec",
                "scaleTargetRef",
            )


def _bounds(scaler: Thing) -> Iterator[Finding]:
    # an HPA has at least 1 unless it says so, and must say its most; KEDA has 0 and 100
    hpa = scaler.kind == "HorizontalPodAutoscaler"
    lower, upper = ("minReplicas", "maxReplicas") if hpa else ("minReplicaCount", "maxReplicaCount")
    low = integer(scaler.get("spec", lower, default=1 if hpa else 0))
    high = integer(scaler.get("spec", upper, default=None if hpa else 100))
    if low is not None and low < 0:
        yield scaler.finding(BOUNDS, f"{lower} is {low}.", "spec", lower)
    if high is not None and high < 1:
        yield scaler.finding(BOUNDS, f"{upper} is {high}.", "spec", upper)
    elif low is not None and high is not None and low > high:
        key = lower if scaler.get("spec", lower) is not None else upper
        yield scaler.finding(BOUNDS, f"{lower} is {low}, and {upper} {high}.", "spec", key)
    idle = None if hpa else integer(scaler.get("spec", "idleReplicaCount"))
    # KEDA counts a minReplicaCount of 0 as 1 here, but not one that is not given (CheckReplicaCountBounds…)
    floor = 0 if scaler.get("spec", lower) is None else max(low or 0, 1)
    if idle is not None and idle >= floor:
        what = f"idleReplicaCount is {idle}, and {lower} {low if low is not None else 'unknown'}."
        yield scaler.finding(BOUNDS, what, "spec", "idleReplicaCount")


def least(objects: Objects, pod: Pod) -> int:
    """The fewest replicas that a workload's scaler, or it itself, keeps."""
    for scaler, workload in scaled(objects):
        if workload is pod.owner:
            found = integer(scaler.get("spec", "minReplicas", default=scaler.get("spec", "minReplicaCount")))
            if found is not None:
                return found
            return 1 if scaler.kind == "HorizontalPodAutoscaler" else 0
    return pod.replicas


def most(objects: Objects, pod: Pod) -> int:
    """The most replicas that it may have. KEDA's default is 100."""
    found = pod.replicas
    for scaler, workload in scaled(objects):
        if workload is pod.owner:
            value = scaler.get("spec", "maxReplicas", default=scaler.get("spec", "maxReplicaCount"))
            found = max(found, integer(value) or 100)
    return found
