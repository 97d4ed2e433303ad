"""Beginning and end of pods: probes, drain, rollouts, evictions (T9, T12–T15)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from penstock.fleet import schemes

from .cluster import Container, Keys, Objects, Pod, Thing, integer, items, mapping, share
from .finding import Finding, Rule, Severity
from .scalers import least
from .serving import Engine, engines_of, variables_of

PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
PDB = Rule(
    "pdb-blocks-drain",
    Severity.ERROR,
    "a PodDisruptionBudget that allows no pod to be evicted",
    "Draining a node waits for ever: upgrades of the cluster and of nodes stop (T9).",
    "minAvailable below the least replicas, or maxUnavailable: 1.",
)
PDB_NOTHING = Rule(
    "pdb-selects-nothing",
    Severity.ERROR,
    "a PodDisruptionBudget that selects no pod",
    "It protects nothing: a drain may end all replicas at once.",
    "Write the selector as a part of the pods' labels.",
)
PDB_TWICE = Rule(
    "pdb-overlap",
    Severity.ERROR,
    "two PodDisruptionBudgets for one pod",
    "The API server refuses to evict it at all.",
    "One budget for each set of pods.",
)
PDB_MISSING = Rule(
    "pdb-missing",
    Severity.WARNING,
    "replicas of an engine without a PodDisruptionBudget",
    "Draining nodes may end all of them at once.",
    "A PodDisruptionBudget with maxUnavailable: 1.",
)
ROLLOUT = Rule(
    "rollout-deadlock",
    Severity.WARNING,
    "a rollout that starts a new pod before it ends an old one, and no GPU that is free",
    "The new pod waits for a GPU that the old one holds, and the old one stays until the new one is ready "
    "(T12).",
    "strategy.rollingUpdate: maxSurge: 0, maxUnavailable: 1; or keep a GPU free, and say --free-gpus.",
)
OUTAGE = Rule(
    "rollout-outage",
    Severity.WARNING,
    "a rollout that ends all replicas at once",
    "Nobody serves while new pods load their weights.",
    "maxUnavailable: 1.",
)
GRACE = Rule(
    "grace-short",
    Severity.ERROR,
    "a grace period that ends before preStop and drain do",
    "The kubelet kills the container while requests are under way (T13).",
    "terminationGracePeriodSeconds ≥ preStop + drain time-out + a few seconds.",
)
UNDRAINED = Rule(
    "drain-missing",
    Severity.WARNING,
    "an engine that ends without a drain",
    "Requests that are under way are cut off whenever a pod is replaced, scaled in or evicted (T13).",
    "--shutdown-timeout=SECONDS (vLLM 0.18 and later), and a grace period beyond it.",
)
PRESTOP = Rule(
    "prestop-missing",
    Severity.WARNING,
    "an engine that is told to end while others still send it requests",
    "Endpoints take seconds to be known everywhere; requests of that time are refused.",
    "lifecycle.preStop.sleep.seconds: 15",
)
KILL = Rule(
    "prestop-kill",
    Severity.ERROR,
    "a preStop that kills the engine",
    "It ends the requests that it should wait for (T13); the kubelet sends SIGTERM itself after preStop.",
    "preStop: sleep only; the drain is the engine's, with --shutdown-timeout.",
)
HEALTH = Rule(
    "probe-progress",
    Severity.WARNING,
    "liveness of vLLM by /health, and no alert for its progress",
    "/health answers 200 while the engine hangs: it takes requests and answers none (T14).",
    "Add an alert: requests are running, and generated tokens do not grow.",
)
PATH = Rule(
    "probe-path",
    Severity.ERROR,
    "a probe of a path that the engine does not have",
    "It answers 404: the pod is never ready, or is restarted for ever.",
    "vLLM: /health. Penstock: /readyz for readiness and startup, /livez for liveness.",
)
PROBE_KEY = Rule(
    "probe-key",
    Severity.ERROR,
    "a probe of a path that wants a key",
    "It gets 401: the pod is never ready, or is ended again and again.",
    "Probe /health, which wants none.",
)
PROBE_SCHEME = Rule(
    "probe-scheme",
    Severity.ERROR,
    "a probe with HTTPS of an engine that serves HTTP, or with HTTP of one that serves HTTPS",
    "The probe fails for ever: the pod is never ready, or is restarted again and again.",
    "httpGet.scheme: HTTPS with --ssl-certfile and --ssl-keyfile; HTTP, the default, without.",
)
PROBE_BLIND = Rule(
    "probe-blind",
    Severity.WARNING,
    "a probe of a path that answers whatever the engine does",
    "The server's process gives it; an engine that has died behind it is never found.",
    "Probe /health (our engine: /livez, and /readyz for readiness).",
)
READINESS = Rule(
    "readiness-missing",
    Severity.ERROR,
    "an engine behind a Service without a readiness probe",
    "Requests reach it while it loads its weights, for minutes, and fail.",
    "readinessProbe: httpGet, the engine's health path and port.",
)
LIVENESS = Rule(
    "liveness-missing",
    Severity.WARNING,
    "an engine without a liveness probe",
    "One that has died within stays in its place for ever.",
    "livenessProbe: httpGet, the engine's health path and port.",
)
STARTUP = Rule(
    "startup-missing",
    Severity.WARNING,
    "an engine without a startup probe",
    "Either liveness waits longer than any load takes, and finds a death as late; or it kills an "
    "engine that loads.",
    "startupProbe with a short period and failureThreshold × periodSeconds beyond the longest load (T15).",
)
SHORT = Rule(
    "startup-short",
    Severity.ERROR,
    "probes that end an engine while it loads its weights",
    "The kubelet kills it, it begins anew, for ever.",
    "startupProbe: failureThreshold × periodSeconds beyond the load time: 30 s (7B) to 3 min (70B) from "
    "NVMe, 10 min from a network.",
)
DELAY = Rule(
    "readiness-delay",
    Severity.WARNING,
    "a readiness probe that waits a fixed time",
    "A pod that is ready gets no requests before the delay is over: scaling out takes minutes longer (T15).",
    "startupProbe with a short period, and no initialDelaySeconds.",
)
RULES = (
    PDB, PDB_NOTHING, PDB_TWICE, PDB_MISSING, ROLLOUT, OUTAGE, GRACE, UNDRAINED, PRESTOP, KILL, HEALTH, PATH,
    PROBE_KEY, PROBE_SCHEME, PROBE_BLIND, READINESS, LIVENESS, STARTUP, SHORT, DELAY,
)  # fmt: skip

_PATHS = {
    "vllm": frozenset(("/health", "/ping", "/version", "/metrics", "/load", "/v1/models", "/is_sleeping")),
    "penstock": frozenset(
        ("/health", "/ping", "/livez", "/readyz", "/version", "/metrics", "/load", "/v1/models")
    ),
}
_KEYS = {"VLLM_API_KEY", "PENSTOCK_API_KEY"}
_BLIND = frozenset(("/metrics", "/version", "/load"))
_GRACE = 30
"""Seconds that Kubernetes gives if nobody says."""
_KILL = re.compile(r"\bkill\b[^|;&]*\b1\b|\bpkill\b|\bkillall\b")
_SLEEP = re.compile(r"\bsleep\s+(\d{1,5})(?:\.\d+)?([smh]?)\b")
_PROGRESS = re.compile(
    r"(generation_tokens|iteration_tokens|request_success|engine_steps|progress|prompt_tokens)\w*"
)
_LOAD = 2.0e9
"""Bytes a second at which no disk of the usual kind gives weights: what is faster is too short for sure."""


def examine(objects: Objects, free_gpus: int | None = None) -> Iterator[Finding]:
    """What is wrong with how pods begin, end, are replaced and evicted."""
    engines = engines_of(objects)
    alert = _watches_progress(objects)
    seen: set[int] = set()
    for engine in engines:
        yield from _probes(engine, objects, alert)
        yield from _end(engine)
        owner = engine.container.pod.owner
        if id(owner) not in seen:
            seen.add(id(owner))
            yield from _rollout(engine, free_gpus)
            yield from _unprotected(engine, objects)
    for pod in objects.pods:
        for container in pod.containers:
            yield from _grace(pod, container, None)
    yield from _budgets(objects)


def _probe(container: Container, name: str) -> dict[str, Any] | None:
    found = container.data.get(name)
    return found if isinstance(found, dict) else None


def _number(probe: Mapping[str, Any], name: str, default: int) -> int:
    found = integer(probe.get(name))
    return default if found is None else found


def budget(probe: Mapping[str, Any]) -> int:
    """Seconds before a probe that always fails has failed for good."""
    tries = _number(probe, "failureThreshold", 3)
    return _number(probe, "initialDelaySeconds", 0) + tries * _number(probe, "periodSeconds", 10)


def _probes(engine: Engine, objects: Objects, alert: bool) -> Iterator[Finding]:
    container = engine.container
    if container.pod.owner.kind in ("Job", "CronJob") or container.pod.role == "worker":
        return
    start = _probe(container, "startupProbe")
    ready = _probe(container, "readinessProbe")
    live = _probe(container, "livenessProbe")
    for name in PROBES:
        path = container.get(name, "httpGet", "path")
        if isinstance(path, str) and path.partition("?")[0] not in _PATHS[engine.kind]:
            yield container.finding(PATH, f"{engine.kind} has no {path}.", name, "httpGet", "path")
        elif isinstance(path, str):
            yield from _probe_path(engine, objects, name, path.partition("?")[0])
        scheme = container.get(name, "httpGet", "scheme", default="HTTP")
        wanted = {True: "HTTPS", False: "HTTP", None: scheme}[engine.is_secured]
        if isinstance(path, str) and scheme in ("HTTP", "HTTPS") and scheme != wanted:
            at = (name, "httpGet", *(("scheme",) if "scheme" in container.data[name]["httpGet"] else ()))
            what = f"{container.name} serves {wanted}, and is asked with {scheme}."
            yield container.finding(PROBE_SCHEME, what, *at, fix=f"scheme: {wanted}")
    if ready is None:
        if objects.services_of(container.pod):
            yield container.finding(READINESS, f"{container.name} has no readinessProbe.")
    elif start is None and (delay := _number(ready, "initialDelaySeconds", 0)) >= 60:
        what = f"No request for {delay} s, whenever it is ready."
        yield container.finding(DELAY, what, "readinessProbe", "initialDelaySeconds")
    elif start is not None and (delay := _number(ready, "initialDelaySeconds", 0)) >= 30:
        what = f"{delay} s beside the startup probe."
        yield container.finding(DELAY, what, "readinessProbe", "initialDelaySeconds")
    if live is None:
        yield container.finding(LIVENESS, f"{container.name} has no livenessProbe.")
    name = "readinessProbe" if live is None else "livenessProbe"
    path = container.get(name, "httpGet", "path")
    if engine.kind == "vllm" and path == "/health" and not alert:
        yield container.finding(HEALTH, "/health is 200 when the engine hangs.", name, "httpGet", "path")
    if start is None:
        yield container.finding(STARTUP, f"{container.name} has no startupProbe.")
    killer, name = (start, "startupProbe") if start is not None else (live, "livenessProbe")
    needed = _load_floor(engine)
    if killer is not None and budget(killer) < needed:
        what = f"It is ended after {budget(killer)} s; loading takes at least {needed:.0f} s."
        yield container.finding(SHORT, what, name)


def _probe_path(engine: Engine, objects: Objects, name: str, path: str) -> Iterator[Finding]:
    container = engine.container
    headers = items(container.get(name, "httpGet", "httpHeaders"))
    carries = any(str(mapping(each).get("name")).lower() == "authorization" for each in headers)
    keyed = engine.flag("--api-key") is not None or _KEYS & set(variables_of(container, objects))
    if path.startswith("/v1/") and keyed and not carries:
        yield container.finding(PROBE_KEY, f"{path} wants the key.", name, "httpGet", "path", fix="/health")
    elif path in _BLIND and name != "startupProbe":
        yield container.finding(
            PROBE_BLIND, f"{path} says nothing of the engine.", name, "httpGet", "path", fix="/health"
        )


def _load_floor(engine: Engine) -> float:
    """Seconds below which an engine cannot have loaded: 60 with a GPU (its graphs alone), 10 without,
    more for what its name says it weighs."""
    base = 60.0 if engine.devices else 10.0
    size = (engine.billions or 0.0) * 2e9
    size *= schemes.bits(engine.flag("--quantization", "-q") or "none") / 16
    return base + size / _LOAD


def _watches_progress(objects: Objects) -> bool:
    """Whether some alert asks for tokens that do not grow."""
    for rule_file in objects.of("PrometheusRule"):
        for group in items(rule_file.get("spec", "groups")):
            for rule in items(mapping(group).get("rules")):
                text = str(mapping(rule).get("expr"))
                grows = re.search(r"\b(rate|irate|increase|delta|changes|deriv)\s*\(", text)
                if "alert" in mapping(rule) and grows and _PROGRESS.search(text) and re.search(r"==|<", text):
                    return True
    return False


def pre_stop(container: Container) -> float:
    """Seconds that preStop takes, as far as it says."""
    handler = mapping(container.get("lifecycle", "preStop"))
    seconds = mapping(handler.get("sleep")).get("seconds")
    if isinstance(seconds, int):
        return float(seconds)
    words = [str(each) for each in items(mapping(handler.get("exec")).get("command"))]
    text = " ".join(words)
    scale = {"": 1, "s": 1, "m": 60, "h": 3600}
    return float(sum(int(match[1]) * scale[match[2]] for match in _SLEEP.finditer(text)))


def _end(engine: Engine) -> Iterator[Finding]:
    container, pod = engine.container, engine.container.pod
    if pod.owner.kind in ("Job", "CronJob"):
        return
    handler = container.get("lifecycle", "preStop")
    words = " ".join(str(each) for each in items(container.get("lifecycle", "preStop", "exec", "command")))
    if _KILL.search(words):
        yield container.finding(KILL, f"`{words}` does not wait for requests.", "lifecycle", "preStop")
    if not isinstance(handler, dict) and pod.role != "worker":
        yield container.finding(PRESTOP, f"{container.name} has no preStop.", "lifecycle")
    drain = engine.seconds("--shutdown-timeout")
    if drain is None and engine.flag("--shutdown-timeout") is None and pod.role != "worker":
        if engine.kind == "vllm":
            key = "args" if container.get("args") else "command"
            yield container.finding(UNDRAINED, f"{container.name} has no --shutdown-timeout.", key)
    elif drain is not None:
        yield from _grace(pod, container, drain)


def _grace(pod: Pod, container: Container, drain: float | None) -> Iterator[Finding]:
    """`drain` is None for what is no engine: then preStop alone must fit."""
    said = integer(pod.spec.get("terminationGracePeriodSeconds"))
    grace = _GRACE if said is None else said
    before = pre_stop(container)
    if drain is None and before == 0:
        return
    if drain is None and before < grace:
        return
    need = before + (drain or 0.0)
    if grace < need or (drain is None and grace <= need):
        parts = f"preStop {before:g} s" + (f" + drain {drain:g} s" if drain is not None else "")
        default = "" if said is not None else " (the default)"
        yield pod.finding(
            GRACE, f"{grace} s{default} for {parts}.", "spec", "terminationGracePeriodSeconds",
            fix=f"terminationGracePeriodSeconds: {math.ceil(need) + 15}",
        )  # fmt: skip


def _rollout(engine: Engine, free_gpus: int | None) -> Iterator[Finding]:
    pod = engine.container.pod
    owner = pod.owner
    if not engine.devices:
        return
    devices = engine.devices
    if owner.kind == "Deployment":
        keys: Keys = ("spec", "strategy", "rollingUpdate")
        default: tuple[Any, Any] = ("25%", "25%")
        if (owner.get("spec", "strategy", "type") or "RollingUpdate") != "RollingUpdate":
            return  # Recreate, or a word that is none, which `schema` tells
    elif owner.kind == "LeaderWorkerSet":
        keys = ("spec", "rolloutStrategy", "rollingUpdateConfiguration")
        default = (0, 1)
        devices *= integer(owner.get("spec", "leaderWorkerTemplate", "size")) or 1
    else:
        return
    rolling = mapping(owner.get(*keys))
    total = max(pod.replicas, 1)
    surge = share(rolling.get("maxSurge", default[0]), total, up=True)
    away = share(rolling.get("maxUnavailable", default[1]), total, up=False)
    if surge is None or away is None:
        return
    free = free_gpus if free_gpus is not None else integer_of(owner.annotations.get(FREE))
    if away == 0 and surge > 0 and (free is None or free < devices):
        have = "how many are free is not said" if free is None else f"{free} are free"
        what = f"maxUnavailable is 0, maxSurge {surge}: a new pod needs {devices} GPUs, {have}."
        yield owner.finding(ROLLOUT, what, *keys)
    if away >= total > 1:
        yield owner.finding(OUTAGE, f"maxUnavailable is {away} of {total}.", *keys)


FREE = "penstock.dev/free-devices"
"""Annotation of a Deployment: devices of its pool that are free while a new version comes."""


def integer_of(value: Any) -> int | None:
    """A whole number, as such or as text."""
    return int(value) if isinstance(value, str) and value.isdigit() else integer(value)


def _budgets(objects: Objects) -> Iterator[Finding]:
    taken: dict[int, Thing] = {}
    for budget in objects.of("PodDisruptionBudget"):
        pods = objects.selected(budget, budget.get("spec", "selector"))
        if not pods:
            if objects.pods_near(budget):
                yield budget.finding(PDB_NOTHING, f"{budget.title} selects no pod.", "spec", "selector")
            continue
        for pod in pods:
            first = taken.setdefault(id(pod), budget)
            if first is not budget:
                yield budget.finding(
                    PDB_TWICE, f"{pod.owner.title} is under {first.title}, too.", "spec", "selector"
                )
        fewest = sum(least(objects, pod) for pod in {id(each.owner): each for each in pods}.values())
        available, away = budget.get("spec", "minAvailable"), budget.get("spec", "maxUnavailable")
        if available is not None:
            kept = share(available, fewest, up=True)
            if kept is not None and fewest > 0 and kept >= fewest:
                yield budget.finding(
                    PDB, f"minAvailable: {available} of {fewest} replicas at the least.",
                    "spec", "minAvailable", fix="maxUnavailable: 1",
                )  # fmt: skip
        elif away is not None and share(away, max(fewest, 1), up=True) == 0:
            yield budget.finding(PDB, f"maxUnavailable: {away}.", "spec", "maxUnavailable")


def _unprotected(engine: Engine, objects: Objects) -> Iterator[Finding]:
    pod = engine.container.pod
    if pod.owner.kind not in ("Deployment", "StatefulSet", "LeaderWorkerSet") or least(objects, pod) < 2:
        return
    for budget in objects.of("PodDisruptionBudget"):
        if pod in objects.selected(budget, budget.get("spec", "selector")):
            return
    yield pod.owner.finding(PDB_MISSING, f"No PodDisruptionBudget selects the pods of {pod.owner.title}.")
