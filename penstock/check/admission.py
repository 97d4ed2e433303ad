"""What the API server refuses, or the kubelet cannot start, though the object is as its schema has it.

The conditions are those of Kubernetes' own validation (pkg/apis/*/validation), which its published schemas
do not carry: names that must differ, fields that exclude one another, bounds of numbers; and KEDA's of a
trigger.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from penstock.core.near import nearest

from .cluster import Container, Keys, Objects, Pod, Thing, integer, items, mapping, share
from .finding import Finding, Rule, Severity
from .lifecycle import PROBES, budget
from .serving import engines_of
from .words import is_unknown

REFUSED = Rule(
    "object-refused",
    Severity.ERROR,
    "an object that the API server refuses, though every field of it is there",
    "Its validation asks more than the schema: kubectl apply ends with `is invalid`, and nothing changes.",
    "Write what the message names.",
)
TWICE = Rule(
    "variable-twice",
    Severity.WARNING,
    "a variable of a container that is given twice",
    "The last one wins in silence; whoever reads the first is misled.",
    "Keep one of them.",
)
IMAGE = Rule(
    "image-invalid",
    Severity.ERROR,
    "an image whose name no registry can have",
    "The pod stays in InvalidImageName.",
    "Write registry/path:tag in small letters, without blanks.",
)
DEADLINE = Rule(
    "progress-deadline",
    Severity.WARNING,
    "a rollout that is given up before its pods may be ready",
    "The Deployment says ProgressDeadlineExceeded while engines still load; pipelines take that for a "
    "failure and roll back.",
    "progressDeadlineSeconds: more than failureThreshold × periodSeconds of the startupProbe.",
)
TMP = Rule(
    "tmp-missing",
    Severity.WARNING,
    "an engine whose root file system is read-only, without a /tmp or a HOME to write to",
    "It writes caches and sockets there, and ends at its start: Read-only file system.",
    "Mount an emptyDir at each.",
)
TRIGGER = Rule(
    "scaler-trigger",
    Severity.ERROR,
    "a trigger that KEDA cannot build a scaler of",
    "The ScaledObject is not ready (ScaledObjectCheckFailed), and nothing is ever scaled.",
    "type: prometheus wants serverAddress, query and threshold under metadata.",
)
RULES = (REFUSED, TWICE, IMAGE, DEADLINE, TMP, TRIGGER)

_IMAGE = re.compile(
    r"(?:(?:[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+(?::\d{1,5})?|[A-Za-z0-9-]+:\d{1,5})/)?[a-z0-9]+(?:[._/-]+[a-z0-9]+)*(?::[\w][\w.-]{0,127})?"
    r"(?:@sha256:[0-9a-f]{64})?"
)
_HANDLERS = frozenset(("httpGet", "tcpSocket", "exec", "grpc"))
_RESTARTS = {
    "Deployment": ("Always",), "StatefulSet": ("Always",), "DaemonSet": ("Always",),
    "ReplicaSet": ("Always",), "Job": ("OnFailure", "Never"), "CronJob": ("OnFailure", "Never"),
}  # fmt: skip
"""Kind → the restart policies that its pods may have. The default is Always."""
_CACHES = frozenset(("XDG_CACHE_HOME", "VLLM_CACHE_ROOT", "PENSTOCK_CACHE"))
"""Variables that say where an engine's caches are, in place of its HOME."""
_WINDOW, _PERIOD = 3600, 1800
"""Seconds: the most of stabilizationWindowSeconds and of a policy's periodSeconds."""
_TRIGGERS = (
    "prometheus", "cpu", "memory", "cron", "kafka", "rabbitmq", "redis", "postgresql", "metrics-api",
    "external", "kubernetes-workload", "datadog", "graphite", "influxdb", "new-relic", "aws-cloudwatch",
    "azure-monitor", "gcp-stackdriver", "external-push", "mysql", "nats-jetstream", "loki",
)  # fmt: skip
"""Types of KEDA's triggers, so far as a slip in one is to be told."""


def examine(objects: Objects) -> Iterator[Finding]:
    """What is refused, or cannot start."""
    engines = {id(each.container.data) for each in engines_of(objects)}
    for pod in objects.pods:
        yield from _pod(pod)
        for container in pod.all_containers:
            yield from _container(container)
            if id(container.data) in engines:
                yield from _tmp(container)
    for thing in objects.of("Deployment"):
        yield from _rollout(thing)
    for thing in objects.of("Service"):
        kind = thing.get("spec", "type")
        if kind in ("NodePort", "LoadBalancer") and thing.get("spec", "clusterIP") == "None":
            yield thing.finding(REFUSED, f"A {kind} has no clusterIP: None.", "spec", "clusterIP")
    for thing in objects.of("HorizontalPodAutoscaler"):
        yield from _behavior(thing, ("spec", "behavior"))
    for thing in objects.of("ScaledObject", "ScaledJob"):
        yield from _behavior(thing, ("spec", "advanced", "horizontalPodAutoscalerConfig", "behavior"))
        yield from _triggers(thing)


def _repeated(entries: Sequence[Any], key: str) -> Iterator[tuple[int, str]]:
    """(index, name) of entries whose name stands before."""
    seen: set[str] = set()
    for index, each in enumerate(entries):
        name = mapping(each).get(key)
        if isinstance(name, str):
            if name in seen:
                yield index, name
            seen.add(name)


def _pod(pod: Pod) -> Iterator[Finding]:
    containers = [*items(pod.spec.get("initContainers")), *items(pod.spec.get("containers"))]
    for _, name in _repeated(containers, "name"):
        yield pod.finding(REFUSED, f"Two containers are called {name}.", "spec", "containers")
    for index, name in _repeated(items(pod.spec.get("volumes")), "name"):
        yield pod.finding(REFUSED, f"Two volumes are called {name}.", "spec", "volumes", index)
    allowed = _RESTARTS.get(pod.owner.kind)
    policy = pod.spec.get("restartPolicy", "Always")
    if allowed and policy not in allowed and not is_unknown(str(policy)):
        what = f"restartPolicy of a {pod.owner.kind} is {' or '.join(allowed)}, not {policy}."
        yield pod.finding(REFUSED, what, "spec", "restartPolicy")


def _container(container: Container) -> Iterator[Finding]:
    for index, name in _repeated(items(container.data.get("ports")), "name"):
        yield container.finding(REFUSED, f"Two ports are called {name}.", "ports", index, "name")
    for index, name in _repeated(items(container.data.get("env")), "name"):
        yield container.finding(TWICE, f"{name} is given twice.", "env", index, "name")
    image = container.image
    if image and not is_unknown(image) and not _IMAGE.fullmatch(image):
        yield container.finding(IMAGE, f"`{image}` is no name of an image.", "image")
    for name in PROBES:
        probe = container.data.get(name)
        if not isinstance(probe, dict):
            continue
        handlers = sorted(_HANDLERS & set(probe))
        if len(handlers) != 1:
            has = " and ".join(handlers) or "none"
            what = f"A probe has one of {', '.join(sorted(_HANDLERS))}; this one has {has}."
            yield container.finding(REFUSED, what, name)
        once = integer(probe.get("successThreshold"))
        if name != "readinessProbe" and once is not None and once > 1:
            what = f"successThreshold of a {name} is 1."
            yield container.finding(REFUSED, what, name, "successThreshold")
        for field in ("periodSeconds", "timeoutSeconds", "failureThreshold", "initialDelaySeconds"):
            if (value := integer(probe.get(field))) is not None and value < 0:
                yield container.finding(REFUSED, f"{field} is {value}.", name, field)


def _tmp(container: Container) -> Iterator[Finding]:
    mounts = [str(mapping(each).get("mountPath")) for each in items(container.data.get("volumeMounts"))]
    closed = container.get("securityContext", "readOnlyRootFilesystem") is True
    at = ("securityContext", "readOnlyRootFilesystem")
    if closed and not any(each.rstrip("/") == "/tmp" for each in mounts):
        yield container.finding(TMP, f"{container.name} has nothing at /tmp.", *at)
    env = {
        str(mapping(each).get("name")): mapping(each).get("value")
        for each in items(container.data.get("env"))
    }
    home = env.get("HOME")
    if not closed or not isinstance(home, str) or not home.startswith("/") or env.keys() & _CACHES:
        return
    if not any(f"{home}/".startswith(f"{each.rstrip('/')}/") for each in mounts):
        yield container.finding(TMP, f"{container.name} has nothing at its HOME, {home}.", *at)


def _rollout(thing: Thing) -> Iterator[Finding]:
    rolling = mapping(thing.get("spec", "strategy", "rollingUpdate"))
    if [share(rolling.get(key), 100, up=True) for key in ("maxSurge", "maxUnavailable")] == [0, 0]:
        what = "maxSurge and maxUnavailable are both 0: no pod could ever be replaced."
        yield thing.finding(REFUSED, what, "spec", "strategy", "rollingUpdate")
    deadline = integer(thing.get("spec", "progressDeadlineSeconds"))
    ready = integer(thing.get("spec", "minReadySeconds")) or 0
    if ready >= (600 if deadline is None else deadline):
        what = f"minReadySeconds is {ready}, and progressDeadlineSeconds {deadline or '600 by default'}."
        yield thing.finding(REFUSED, what, "spec", "minReadySeconds")
    elif deadline is not None and (longest := _longest_start(thing)) > deadline:
        what = f"progressDeadlineSeconds is {deadline}; the startup probe waits {longest} s."
        yield thing.finding(DEADLINE, what, "spec", "progressDeadlineSeconds")


def _longest_start(thing: Thing) -> int:
    """Seconds that the startup probes of a workload's containers allow."""
    containers = items(thing.get("spec", "template", "spec", "containers"))
    probes = [mapping(mapping(each).get("startupProbe")) for each in containers]
    # Kubernetes takes 0 for a default that is left out
    given = [{name: value for name, value in probe.items() if value != 0} for probe in probes if probe]
    return max(map(budget, given), default=0)


def _behavior(thing: Thing, where: Keys) -> Iterator[Finding]:
    for side in ("scaleUp", "scaleDown"):
        rules = mapping(thing.get(*where, side))
        window = integer(rules.get("stabilizationWindowSeconds"))
        if window is not None and not 0 <= window <= _WINDOW:
            what = f"stabilizationWindowSeconds is {window}; it is 0 to {_WINDOW}."
            yield thing.finding(REFUSED, what, *where, side, "stabilizationWindowSeconds")
        for index, policy in enumerate(items(rules.get("policies"))):
            at = (*where, side, "policies", index)
            period, value = (integer(mapping(policy).get(key)) for key in ("periodSeconds", "value"))
            if period is not None and not 1 <= period <= _PERIOD:
                what = f"periodSeconds is {period}; it is 1 to {_PERIOD}."
                yield thing.finding(REFUSED, what, *at, "periodSeconds")
            if value is not None and value < 1:
                yield thing.finding(REFUSED, f"A policy's value is {value}.", *at, "value")


def _triggers(thing: Thing) -> Iterator[Finding]:
    for index, each in enumerate(items(thing.get("spec", "triggers"))):
        trigger = mapping(each)
        kind, metadata = str(trigger.get("type")), mapping(trigger.get("metadata"))
        at = ("spec", "triggers", index)
        if kind not in _TRIGGERS and (near := nearest(kind, _TRIGGERS, 0.8)):
            yield thing.finding(TRIGGER, f"KEDA has no {kind}.", *at, "type", fix=f"type: {near}")
        if kind == "prometheus":
            for name in ("serverAddress", "query", "threshold"):
                if not metadata.get(name) and f"{name}FromEnv" not in metadata:
                    yield thing.finding(TRIGGER, f"The trigger has no {name}.", *at, "metadata")
