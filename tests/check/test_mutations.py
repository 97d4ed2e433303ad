"""Compiled bundles are right; broken at one place, the rule that names the fault finds it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from penstock.check import check_sources, rules
from penstock.check.finding import Severity
from penstock.check.sources import read_text
from penstock.deploy import formats

from .bundle import SPECS, Bundle, files, found, new_findings, options, shared, unbroken

Mutation = Callable[[Bundle], object]

_FOREIGN = frozenset(("object-external",))
"""Notes that are right: Secrets are nobody's to write into files."""
_UNDEFINED = "There is no definition of GCPBackendPolicy, HealthCheckPolicy."
"""A note that is right, too: nobody gives out definitions of Google's kinds."""


def put(value: Any, *keys: str | int) -> Callable[[Any], None]:
    """Set a value at a path."""

    def apply(data: Any) -> None:
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = value

    return apply


def drop(*keys: str | int) -> Callable[[Any], None]:
    """Take away what stands at a path."""

    def apply(data: Any) -> None:
        for key in keys[:-1]:
            data = data[key]
        del data[keys[-1]]

    return apply


def on(kind: str, name: str | None, change: Callable[[Any], object]) -> Mutation:
    return lambda bundle: change(bundle.get(kind, name))


def in_pod(name: str, change: Callable[[Any], object], kind: str = "Deployment") -> Mutation:
    return lambda bundle: change(bundle.pod(name, kind))


def in_container(name: str, change: Callable[[Any], object], kind: str = "Deployment") -> Mutation:
    return lambda bundle: change(bundle.container(name, kind))


def argument(name: str, old: str, new: str, kind: str = "Deployment") -> Mutation:
    """Replace a part of the command line."""

    def change(container: Any) -> None:
        container["args"] = [word.replace(old, new) for word in container["args"] if word.replace(old, new)]

    return in_container(name, change, kind)


def gateway_file(old: str, new: str) -> Mutation:
    def change(bundle: Bundle) -> None:
        data = bundle.get("ConfigMap", "gateway")["data"]
        data["penstock.yaml"] = data["penstock.yaml"].replace(old, new)

    return change


def alert(name: str, old: str, new: str) -> Mutation:
    """Replace a part of an alert's expression."""

    def change(bundle: Bundle) -> None:
        for group in bundle.get("PrometheusRule")["spec"]["groups"]:
            for rule in group["rules"]:
                if rule.get("alert") == name:
                    rule["expr"] = rule["expr"].replace(old, new)

    return change


def trigger(old: str, new: str, index: int = 0) -> Mutation:
    """Replace a part of a query of KEDA's."""

    def change(bundle: Bundle) -> None:
        metadata = bundle.get("ScaledObject")["spec"]["triggers"][index]["metadata"]
        metadata["query"] = metadata["query"].replace(old, new)

    return change


def twice(bundle: Bundle) -> None:
    bundle.objects.append({**bundle.get("Service", "chat"), "spec": {"ports": [{"port": 1}]}})


SELECTOR = ("spec", "selector", "matchLabels")
CONTAINER_PORT = ("ports", 0, "name")

MUTATIONS: list[tuple[str, str, Mutation, str]] = [
    # what selects what
    (
        "hub",
        "a Service's selector",
        on("Service", "chat", put("x", "spec", "selector", "penstock.dev/model")),
        "service-selects-nothing",
    ),
    (
        "hub",
        "the gateway's selector",
        on("Service", "gateway", put("x", "spec", "selector", "app.kubernetes.io/instance")),
        "service-selects-nothing",
    ),
    (
        "hub",
        "a Deployment's selector",
        on("Deployment", "chat", put("x", *SELECTOR, "app.kubernetes.io/instance")),
        "selector-mismatch",
    ),
    (
        "hub",
        "a Deployment without selector",
        on("Deployment", "vision", drop("spec", "selector")),
        "selector-mismatch",
    ),
    (
        "hub",
        "a pod's label",
        on(
            "Deployment",
            "vision",
            put("x", "spec", "template", "metadata", "labels", "app.kubernetes.io/instance"),
        ),
        "selector-mismatch",
    ),
    (
        "hub",
        "a budget's selector",
        on("PodDisruptionBudget", "chat", put("x", *SELECTOR, "penstock.dev/model")),
        "pdb-selects-nothing",
    ),
    (
        "hub",
        "two budgets",
        on("PodDisruptionBudget", "chat", put("vision", *SELECTOR, "penstock.dev/model")),
        "pdb-overlap",
    ),
    ("hub", "no budget", lambda bundle: bundle.remove("PodDisruptionBudget", "vision"), "pdb-missing"),
    (
        "hub",
        "an anti-affinity of others",
        in_pod(
            "vision",
            put(
                "x",
                "affinity",
                "podAntiAffinity",
                "preferredDuringSchedulingIgnoredDuringExecution",
                0,
                "podAffinityTerm",
                "labelSelector",
                "matchLabels",
                "penstock.dev/model",
            ),
        ),
        "spread-selects-nothing",
    ),
    (
        "hub",
        "a spread of others",
        in_pod(
            "vision",
            put("x", "topologySpreadConstraints", 0, "labelSelector", "matchLabels", "penstock.dev/model"),
        ),
        "spread-selects-nothing",
    ),
    (
        "hub",
        "no spread",
        in_pod("vision", lambda pod: (pod.pop("affinity"), pod.pop("topologySpreadConstraints"))),
        "spread-missing",
    ),
    (
        "hub",
        "a policy of nobody",
        on(
            "NetworkPolicy",
            "gateway",
            put("x", "spec", "podSelector", "matchLabels", "app.kubernetes.io/instance"),
        ),
        "policy-selects-nothing",
    ),
    # the way of a request
    (
        "hub",
        "a policy without the gateway",
        on(
            "NetworkPolicy",
            "engines",
            put(
                "x",
                "spec",
                "ingress",
                0,
                "from",
                0,
                "podSelector",
                "matchLabels",
                "app.kubernetes.io/component",
            ),
        ),
        "policy-blocks",
    ),
    (
        "hub",
        "a policy of another port",
        on("NetworkPolicy", "engines", put(9000, "spec", "ingress", 0, "ports", 0, "port")),
        "policy-blocks",
    ),
    (
        "hub",
        "a policy that admits nobody",
        on("NetworkPolicy", "engines", put([], "spec", "ingress")),
        "policy-blocks",
    ),
    (
        "hub",
        "an engine for all",
        on("Service", "vision", put("LoadBalancer", "spec", "type")),
        "engine-exposed",
    ),
    ("hub", "an engine at nodes", on("Service", "chat", put("NodePort", "spec", "type")), "engine-exposed"),
    (
        "hub",
        "a Service's target port by name",
        on("Service", "chat", put("htp", "spec", "ports", 0, "targetPort")),
        "service-port",
    ),
    (
        "hub",
        "a Service's target port by number",
        on("Service", "chat", put(8001, "spec", "ports", 0, "targetPort")),
        "service-port",
    ),
    ("hub", "a container port's name", in_container("vision", put("web", *CONTAINER_PORT)), "service-port"),
    (
        "hub",
        "an Ingress to another Service",
        on(
            "Ingress",
            None,
            put("gatway", "spec", "rules", 0, "http", "paths", 0, "backend", "service", "name"),
        ),
        "backend-missing",
    ),
    (
        "hub",
        "an Ingress to another port",
        on(
            "Ingress",
            None,
            put({"number": 81}, "spec", "rules", 0, "http", "paths", 0, "backend", "service", "port"),
        ),
        "backend-missing",
    ),
    (
        "hub",
        "an Ingress's time-out",
        on(
            "Ingress",
            None,
            put("30", "metadata", "annotations", "nginx.ingress.kubernetes.io/proxy-read-timeout"),
        ),
        "entry-timeout",
    ),
    (
        "hub",
        "a time-out with a unit",
        on(
            "Ingress",
            None,
            put("900s", "metadata", "annotations", "nginx.ingress.kubernetes.io/proxy-read-timeout"),
        ),
        "entry-timeout",
    ),
    (
        "hub",
        "no time-out",
        on(
            "Ingress", None, drop("metadata", "annotations", "nginx.ingress.kubernetes.io/proxy-read-timeout")
        ),
        "entry-timeout",
    ),
    (
        "hub",
        "an Ingress that buffers",
        on(
            "Ingress",
            None,
            put("on", "metadata", "annotations", "nginx.ingress.kubernetes.io/proxy-buffering"),
        ),
        "ingress-buffering",
    ),
    (
        "tp4",
        "a route to another Service",
        on("HTTPRoute", None, put("gatway", "spec", "rules", 0, "backendRefs", 0, "name")),
        "backend-missing",
    ),
    (
        "tp4",
        "a route to another port",
        on("HTTPRoute", None, put(81, "spec", "rules", 0, "backendRefs", 0, "port")),
        "backend-missing",
    ),
    (
        "tp4",
        "a route's time-out",
        on("HTTPRoute", None, put({"request": "15s"}, "spec", "rules", 0, "timeouts")),
        "entry-timeout",
    ),
    ("hub", "the gateway's upstream", gateway_file("http://chat.", "http://chad."), "url-service"),
    ("hub", "the upstream's port", gateway_file(".svc:8000", ".svc:8001"), "url-service"),
    ("hub", "a Service renamed", on("Service", "vision", put("vizion", "metadata", "name")), "url-service"),
    # names
    (
        "hub",
        "a ConfigMap's name",
        in_container("chat", put("chat-argument", "envFrom", 0, "configMapRef", "name")),
        "reference-missing",
    ),
    (
        "hub",
        "no ConfigMap",
        lambda bundle: bundle.remove("ConfigMap", "vision-arguments"),
        "reference-missing",
    ),
    (
        "hub",
        "a claim's name",
        lambda bundle: [
            volume["persistentVolumeClaim"].update(claimName="weight")
            for volume in bundle.pod("vision")["volumes"]
            if "persistentVolumeClaim" in volume
        ],
        "reference-missing",
    ),
    ("hub", "an account's name", in_pod("vision", put("engin", "serviceAccountName")), "reference-missing"),
    (
        "hub",
        "an entry of the arguments",
        lambda bundle: bundle.get("ConfigMap", "chat-arguments")["data"].pop("ENGINE_MAX_MODEL_LEN"),
        "variable-undefined",
    ),
    (
        "hub",
        "a volume's name",
        in_pod(
            "chat",
            lambda pod: next(each for each in pod["volumes"] if each["name"] == "shm").update(name="sham"),
        ),
        "volume-missing",
    ),
    (
        "hub",
        "a volume that nobody mounts",
        in_container(
            "chat",
            lambda container: container["volumeMounts"].remove(
                next(each for each in container["volumeMounts"] if each["name"] == "tmp")
            ),
        ),
        "volume-unused",
    ),
    (
        "hub",
        "two mounts at one path",
        in_container(
            "chat",
            lambda container: container["volumeMounts"].append({"name": "tmp", "mountPath": "/dev/shm/"}),
        ),
        "mount-twice",
    ),
    ("hub", "the same object twice", twice, "object-duplicate"),
    (
        "hub",
        "a claim of one node",
        on("PersistentVolumeClaim", "weights", put(["ReadWriteOnce"], "spec", "accessModes")),
        "volume-access",
    ),
    # probes and the end
    (
        "hub",
        "a probe's port by name",
        in_container("chat", put("web", "readinessProbe", "httpGet", "port")),
        "probe-port",
    ),
    (
        "hub",
        "a probe's port by number",
        in_container("vision", put(80, "livenessProbe", "httpGet", "port")),
        "probe-port",
    ),
    (
        "hub",
        "a probe's path",
        in_container("chat", put("/ready", "readinessProbe", "httpGet", "path")),
        "probe-path",
    ),
    (
        "hub",
        "vLLM with our path",
        in_container("vision", put("/livez", "livenessProbe", "httpGet", "path")),
        "probe-path",
    ),
    (
        "hub",
        "a probe that has no key",
        in_container(
            "vision",
            lambda each: (
                each["env"].append({"name": "VLLM_API_KEY", "valueFrom": {"secretKeyRef": {"name": "a"}}}),
                each["readinessProbe"]["httpGet"].update(path="/v1/models"),
            ),
        ),
        "probe-key",
    ),
    (
        "hub",
        "a liveness of metrics",
        in_container("vision", put("/metrics", "livenessProbe", "httpGet", "path")),
        "probe-blind",
    ),
    ("hub", "no readiness probe", in_container("vision", drop("readinessProbe")), "readiness-missing"),
    ("hub", "no liveness probe", in_container("vision", drop("livenessProbe")), "liveness-missing"),
    ("hub", "no startup probe", in_container("vision", drop("startupProbe")), "startup-missing"),
    (
        "hub",
        "a startup that is short",
        in_container("vision", put(3, "startupProbe", "failureThreshold")),
        "startup-short",
    ),
    (
        "tp4",
        "a startup of 55 s",
        in_container("large", put(11, "startupProbe", "failureThreshold")),
        "startup-short",
    ),
    (
        "hub",
        "a readiness that waits",
        in_container("vision", put(120, "readinessProbe", "initialDelaySeconds")),
        "readiness-delay",
    ),
    ("hub", "a grace that is short", in_pod("chat", put(60, "terminationGracePeriodSeconds")), "grace-short"),
    ("hub", "the default grace", in_pod("vision", drop("terminationGracePeriodSeconds")), "grace-short"),
    (
        "hub",
        "a preStop that is longer",
        in_container("chat", put(200, "lifecycle", "preStop", "sleep", "seconds")),
        "grace-short",
    ),
    (
        "hub",
        "a gateway's preStop",
        in_container("gateway", put(900, "lifecycle", "preStop", "sleep", "seconds")),
        "grace-short",
    ),
    (
        "hub",
        "a preStop that kills",
        in_container(
            "vision", put({"exec": {"command": ["sh", "-c", "sleep 15 && kill 1"]}}, "lifecycle", "preStop")
        ),
        "prestop-kill",
    ),
    ("hub", "no preStop", in_container("vision", drop("lifecycle")), "prestop-missing"),
    (
        "hub",
        "no drain",
        argument("vision", "--shutdown-timeout=$(ENGINE_SHUTDOWN_TIMEOUT)", ""),
        "drain-missing",
    ),
    (
        "hub",
        "a drain that is longer",
        lambda bundle: bundle.get("ConfigMap", "vision-arguments")["data"].update(
            ENGINE_SHUTDOWN_TIMEOUT="3600"
        ),
        "grace-short",
    ),
    (
        "hub",
        "a spot drain that is longer",
        lambda bundle: bundle.get("ConfigMap", "chat-burst-arguments")["data"].update(
            ENGINE_SHUTDOWN_TIMEOUT="300"
        ),
        "spot-grace",
    ),
    # replicas and rollouts
    (
        "hub",
        "a budget of all",
        on(
            "PodDisruptionBudget",
            "vision",
            lambda each: (each["spec"].pop("maxUnavailable"), each["spec"].update(minAvailable=2)),
        ),
        "pdb-blocks-drain",
    ),
    (
        "hub",
        "a budget of 100%",
        on(
            "PodDisruptionBudget",
            "vision",
            lambda each: (each["spec"].pop("maxUnavailable"), each["spec"].update(minAvailable="100%")),
        ),
        "pdb-blocks-drain",
    ),
    (
        "hub",
        "a budget of none",
        on("PodDisruptionBudget", "vision", put(0, "spec", "maxUnavailable")),
        "pdb-blocks-drain",
    ),
    (
        "tp4",
        "a surge without GPUs",
        on(
            "Deployment",
            "large-burst",
            lambda each: (
                each["metadata"].get("annotations", {}).pop("penstock.dev/free-devices", None),
                each["spec"].update(
                    strategy={"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
                ),
            ),
        ),
        "rollout-deadlock",
    ),
    (
        "mig",
        "the default strategy",
        on(
            "Deployment",
            "text",
            lambda each: (each["spec"].pop("strategy"), each["metadata"].pop("annotations")),
        ),
        "rollout-deadlock",
    ),
    (
        "hub",
        "all away at once",
        on(
            "Deployment",
            "vision",
            put(
                {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": "100%"}},
                "spec",
                "strategy",
            ),
        ),
        "rollout-outage",
    ),
    ("hub", "one replica", on("Deployment", "vision", put(1, "spec", "replicas")), "single-replica"),
    ("nodes", "one group", on("LeaderWorkerSet", "huge-nodes", put(1, "spec", "replicas")), "single-replica"),
    (
        "hub",
        "a scaler of nobody",
        on("ScaledObject", None, put("chat-brust", "spec", "scaleTargetRef", "name")),
        "scale-target-missing",
    ),
    (
        "tp4",
        "a scaler of another kind",
        on("HorizontalPodAutoscaler", None, put("StatefulSet", "spec", "scaleTargetRef", "kind")),
        "scale-target-missing",
    ),
    # metrics
    (
        "hub",
        "a monitor of nobody",
        on("ServiceMonitor", "engines", put("x", *SELECTOR, "app.kubernetes.io/component")),
        "monitor-selects-nothing",
    ),
    (
        "hub",
        "a monitor's port",
        on("ServiceMonitor", "engines", put("metrics", "spec", "endpoints", 0, "port")),
        "monitor-port",
    ),
    (
        "hub",
        "a Service's port without its name",
        on("Service", "vision", drop("spec", "ports", 0, "name")),
        "monitor-port",
    ),
    (
        "hub",
        "a metric that was removed",
        alert("EngineKVCacheHigh", "kv_cache_usage_perc", "gpu_cache_usage_perc"),
        "metric-removed",
    ),
    (
        "hub",
        "a metric that is none",
        alert("EngineQueueLong", "num_requests_waiting", "num_request_waiting"),
        "metric-unknown",
    ),
    ("hub", "a threshold of another unit", alert("EngineKVCacheHigh", "> 0.9", "> 90"), "threshold-unit"),
    (
        "hub",
        "a rate of a gauge",
        alert("EngineQueueLong", "max by (namespace, job, pod) (", "max by (pod) (rate("),
        "promql-broken",
    ),
    (
        "hub",
        "a job that is none",
        alert("LatencyOverSLO", 'job="chat"', 'job="chad"'),
        "query-selects-nothing",
    ),
    (
        "hub",
        "a quantile without le",
        alert("LatencyOverSLO", "(namespace, job, le)", "(namespace, job)"),
        "quantile-without-le",
    ),
    ("hub", "an average over pods", trigger("sum(", "avg("), "scaler-average"),
    (
        "hub",
        "no progress alert",
        lambda bundle: bundle.remove("PrometheusRule", "penstock"),
        "probe-progress",
    ),
    (
        "hub",
        "two scalers",
        lambda bundle: bundle.objects.append(
            {
                "apiVersion": "autoscaling/v2",
                "kind": "HorizontalPodAutoscaler",
                "metadata": {"name": "second", "namespace": "llm-serving"},
                "spec": {**bundle.get("ScaledObject")["spec"], "maxReplicas": 3},
            }
        ),
        "scaled-twice",
    ),
    (
        "hub",
        "a scaler's least above its most",
        on("ScaledObject", None, put(9, "spec", "minReplicaCount")),
        "scaler-bounds",
    ),
    (
        "tp4",
        "a HorizontalPodAutoscaler's least above its most",
        on(
            "HorizontalPodAutoscaler",
            None,
            lambda each: each["spec"].update(minReplicas=5, maxReplicas=2),
        ),
        "scaler-bounds",
    ),
    (
        "hub",
        "an idle count that is the least",
        on("ScaledObject", None, lambda each: each["spec"].update(minReplicaCount=1, idleReplicaCount=1)),
        "scaler-bounds",
    ),
    (
        "hub",
        "a threshold of none",
        on("ScaledObject", None, put("0", "spec", "triggers", 0, "metadata", "threshold")),
        "scaler-threshold",
    ),
    (
        "tp4",
        "a target of none",
        on(
            "HorizontalPodAutoscaler",
            None,
            lambda each: [
                part["target"].update(averageValue="0")
                for metric in each["spec"]["metrics"]
                for part in metric.values()
                if isinstance(part, dict)
            ],
        ),
        "scaler-threshold",
    ),
    ("hub", "a quantile of 9", alert("LatencyOverSLO", "quantile(0.9", "quantile(9"), "quantile-range"),
    (
        "hub",
        "a quantile of percent",
        alert("LatencyOverSLO", "quantile(0.95", "quantile(95"),
        "quantile-range",
    ),
    (
        "hub",
        "the CPU of an engine on GPUs",
        on(
            "ScaledObject",
            None,
            lambda each: each["spec"]["triggers"].append(
                {"type": "cpu", "metricType": "Utilization", "metadata": {"value": "80"}}
            ),
        ),
        "scaler-on-cpu",
    ),
    # devices and memory
    (
        "tp4",
        "fewer GPUs than ranks",
        in_container(
            "large",
            lambda container: (
                container["resources"]["limits"].update({"nvidia.com/gpu": "2"}),
                container["resources"]["requests"].update({"nvidia.com/gpu": "2"}),
            ),
        ),
        "gpu-count",
    ),
    (
        "tp4",
        "more ranks than GPUs",
        lambda bundle: bundle.get("ConfigMap", "large-arguments")["data"].update(
            ENGINE_TENSOR_PARALLEL_SIZE="8"
        ),
        "gpu-count",
    ),
    (
        "nodes",
        "a replica of fewer nodes",
        on("LeaderWorkerSet", "huge-nodes", put(1, "spec", "leaderWorkerTemplate", "size")),
        "gpu-count",
    ),
    (
        "tp4",
        "GPUs requested and limited unlike",
        in_container("large", put("2", "resources", "requests", "nvidia.com/gpu")),
        "device-requests",
    ),
    (
        "mig",
        "a profile that is none",
        in_container(
            "text",
            lambda container: [
                part.update({"nvidia.com/mig-3g.41gb": part.pop("nvidia.com/mig-3g.40gb")})
                for part in container["resources"].values()
            ],
        ),
        "mig-resource",
    ),
    (
        "mig",
        "two slices",
        in_container(
            "text",
            lambda container: [
                part.update({"nvidia.com/mig-3g.40gb": "2"}) for part in container["resources"].values()
            ],
        ),
        "mig-parallel",
    ),
    (
        "mig",
        "a whole GPU on sliced nodes",
        in_pod(
            "text",
            lambda pod: (
                [
                    part.update({"nvidia.com/gpu": part.pop("nvidia.com/mig-3g.40gb")})
                    for part in pod["containers"][0]["resources"].values()
                ],
                pod.setdefault("nodeSelector", {}).update({"nvidia.com/mig.config": "all-3g.40gb"}),
            ),
        ),
        "mig-resource",
    ),
    (
        "hub",
        "a unit that is none",
        in_container("vision", put("20GB", "resources", "limits", "memory")),
        "quantity-invalid",
    ),
    (
        "hub",
        "a unit of bytes",
        in_container("vision", put("24", "resources", "limits", "memory")),
        "quantity-invalid",
    ),
    (
        "hub",
        "thousandths of a byte",
        in_container("vision", put("24m", "resources", "requests", "memory")),
        "quantity-invalid",
    ),
    (
        "hub",
        "thousands of CPUs",
        in_container("vision", put("4000", "resources", "requests", "cpu")),
        "quantity-invalid",
    ),
    (
        "hub",
        "a request above its limit",
        in_container("vision", put("900Gi", "resources", "requests", "memory")),
        "requests-over-limits",
    ),
    (
        "hub",
        "no memory asked for",
        in_container(
            "vision", lambda container: [part.pop("memory") for part in container["resources"].values()]
        ),
        "resources-missing",
    ),
    (
        "hub",
        "8 GiB for 32 billion parameters",
        in_container(
            "vision",
            lambda each: (
                each.update(args=[*each["args"], "--model=Qwen/Qwen3-32B"]),
                each["resources"].update(
                    limits={**each["resources"]["limits"], "memory": "8Gi"},
                    requests={**each["resources"]["requests"], "memory": "8Gi"},
                ),
            ),
        ),
        "memory-small",
    ),
    (
        "tp4",
        "no /dev/shm",
        in_container(
            "large",
            lambda container: container["volumeMounts"].remove(
                next(each for each in container["volumeMounts"] if each["name"] == "shm")
            ),
        ),
        "shm-missing",
    ),
    (
        "tp4",
        "a /dev/shm on a disk",
        in_pod(
            "large",
            lambda pod: next(each for each in pod["volumes"] if each["name"] == "shm")["emptyDir"].pop(
                "medium"
            ),
        ),
        "shm-memory",
    ),
    (
        "tp4",
        "a /dev/shm beyond memory",
        in_pod(
            "large",
            lambda pod: next(each for each in pod["volumes"] if each["name"] == "shm")["emptyDir"].update(
                sizeLimit="4Ti"
            ),
        ),
        "shm-memory",
    ),
    (
        "hub",
        "a /dev/shm of almost nothing",
        in_pod(
            "vision",
            lambda pod: next(each for each in pod["volumes"] if each["name"] == "shm")["emptyDir"].update(
                sizeLimit="8Mi"
            ),
        ),
        "shm-missing",
    ),
    (
        "hub",
        "weights from the hub",
        argument("vision", "/models/vision/current", "Qwen/Qwen3-VL-8B-Instruct"),
        "weights-uncached",
    ),
    (
        "hub",
        "a shared GPU",
        in_pod(
            "vision",
            lambda pod: [
                part.update({"nvidia.com/gpu.shared": part.pop("nvidia.com/gpu")})
                for part in pod["containers"][0]["resources"].values()
            ],
        ),
        "time-slicing",
    ),
    # what runs
    (
        "hub",
        "an image without a version",
        in_container("vision", put("vllm/vllm-openai:latest", "image")),
        "image-latest",
    ),
    (
        "hub",
        "a flag that is none",
        argument("vision", "--max-num-seqs", "--max-num-sequences"),
        "flag-unknown",
    ),
    (
        "hub",
        "a number that is negative, in a ConfigMap",
        lambda bundle: bundle.get("ConfigMap", "vision-arguments")["data"].update(ENGINE_MAX_NUM_SEQS="-4"),
        "flag-value",
    ),
    (
        "hub",
        "a type of the cache that vLLM does not have",
        in_container("vision", lambda each: each["args"].append("--kv-cache-dtype=int2")),
        "flag-value",
    ),
    (
        "hub",
        "a scheme that our engine does not have",
        in_container("chat", lambda each: each["args"].append("--quantization=int9")),
        "flag-value",
    ),
    (
        "hub",
        "spans that the gateway's policies do not let out",
        lambda bundle: (
            bundle.container("gateway")["env"].append(
                {"name": "OTEL_EXPORTER_OTLP_ENDPOINT", "value": "http://otel-collector.tracing.svc:4318"}
            ),
            put(["Ingress", "Egress"], "spec", "policyTypes")(bundle.get("NetworkPolicy", "gateway")),
            put(
                [{"ports": [{"port": 53, "protocol": "UDP"}, {"port": 443}, {"port": 5432}]}],
                "spec",
                "egress",
            )(bundle.get("NetworkPolicy", "gateway")),
        ),
        "policy-blocks",
    ),
    (
        "hub",
        "a scheme that is none, in the ConfigMap of arguments",
        lambda bundle: (
            bundle.container("vision")["args"].append("--quantization=$(ENGINE_QUANTIZATION)"),
            put("int9", "data", "ENGINE_QUANTIZATION")(bundle.get("ConfigMap", "vision-arguments")),
        ),
        "flag-value",
    ),
    (
        "hub",
        "a type that is none, in a variable",
        in_container(
            "vision",
            lambda each: (
                each["env"].append({"name": "TYPE", "value": "bfloat15"}),
                each["args"].append("--dtype=$(TYPE)"),
            ),
        ),
        "flag-value",
    ),
    (
        "hub",
        "code of strangers",
        in_container("vision", lambda each: each["args"].append("--trust-remote-code")),
        "trust-remote-code",
    ),
    (
        "hub",
        "a setting that is not read",
        in_container("vision", lambda each: each["env"].append({"name": "MAX_NUM_SEQS", "value": "32"})),
        "env-not-read",
    ),
    (
        "hub",
        "a key in plain text",
        in_container(
            "vision",
            lambda each: each["env"].append({"name": "HF_TOKEN", "value": "hf_" + "aZ4kPq9LmX2vBn7RtY5w"}),
        ),
        "key-in-text",
    ),
    # what it may
    (
        "hub",
        "a privileged container",
        in_container("vision", put(True, "securityContext", "privileged")),
        "privileged",
    ),
    (
        "hub",
        "a container of root's",
        in_pod("vision", put(False, "securityContext", "runAsNonRoot")),
        "pod-security",
    ),
    (
        "hub",
        "capabilities that stay",
        in_container("vision", drop("securityContext", "capabilities")),
        "pod-security",
    ),
    (
        "hub",
        "a folder of the node",
        in_pod(
            "vision",
            lambda pod: pod["volumes"].__setitem__(
                next(index for index, each in enumerate(pod["volumes"]) if each["name"] == "tmp"),
                {"name": "tmp", "hostPath": {"path": "/tmp"}},
            ),
        ),
        "host-access",
    ),
    ("hub", "the node's network", in_pod("chat", put(True, "hostNetwork")), "host-access"),
    (
        "hub",
        "a spot pod that tolerates nothing",
        in_pod("chat-burst", put([], "tolerations")),
        "spot-toleration",
    ),
    (
        "hub",
        "all on spot nodes",
        lambda bundle: bundle.pod("chat").update(
            {
                key: value
                for key, value in bundle.pod("chat-burst").items()
                if key in ("nodeSelector", "affinity", "tolerations")
            }
        ),
        "spot-only",
    ),
    # schemas
    (
        "hub",
        "a field that is none",
        in_container("vision", lambda each: each.update(imagePullPolcy="Always")),
        "schema",
    ),
    ("hub", "a field of another type", on("Deployment", "vision", put("two", "spec", "replicas")), "schema"),
    ("hub", "a field that must be there", on("Service", "chat", drop("spec", "ports", 0, "port")), "schema"),
    (
        "tp4",
        "a route's field",
        on("HTTPRoute", None, lambda each: each["spec"].update(hostname="a")),
        "schema",
    ),
    (
        "hub",
        "an API of old",
        on("PodDisruptionBudget", "chat", put("policy/v1beta1", "apiVersion")),
        "api-removed",
    ),
    ("hub", "a kind that is none", on("Deployment", "vision", put("Deploymnt", "kind")), "kind-unknown"),
    (
        "hub",
        "a name that is none",
        on("ConfigMap", "gateway", put("Gateway_File", "metadata", "name")),
        "name-invalid",
    ),
    (
        "hub",
        "a label's value",
        on("Service", "chat", put("a b", "metadata", "labels", "penstock.dev/model")),
        "name-invalid",
    ),
]


@pytest.mark.parametrize(
    ("spec", "mutate", "rule"), [pytest.param(a, c, d, id=f"{a}: {b}") for a, b, c, d in MUTATIONS]
)
def test_a_mutation_is_found(spec: str, mutate: Mutation, rule: str) -> None:
    if spec == "tp4" and rule == "schema" and shared("crds") is None:
        pytest.skip("the definitions of custom resources are not here")
    new = list(new_findings(spec, mutate))
    assert rule in {each.rule.id for each in new}, [f"{each.rule.id}: {each.what}" for each in new]


def test_there_are_enough_and_they_ask_different_rules() -> None:
    assert len(MUTATIONS) >= 60
    assert len({rule for *_, rule in MUTATIONS}) >= 40
    assert {rule for *_, rule in MUTATIONS} <= {each.id for each in rules()}


@pytest.mark.parametrize("spec", SPECS)
def test_nothing_is_found_in_what_is_compiled(spec: str) -> None:
    # what makes the metrics of a HorizontalPodAutoscaler is a file beside the objects
    told = {rule for rule, what in unbroken(spec) if what != _UNDEFINED}
    assert told <= _FOREIGN | {"hpa-metric-unseen"}, unbroken(spec)


@pytest.mark.parametrize("format", ["plain", "kustomize", "helm"])
@pytest.mark.parametrize("spec", SPECS)
def test_nothing_is_found_in_its_files(spec: str, format: formats.Format) -> None:
    texts = [read_text(text, path) for path, text in files(spec, format).items()]
    allowed = _FOREIGN | ({"helm-template"} if format == "helm" else set())
    if not any("EngineStuck" in text for text in files(spec, format).values()):
        allowed |= {"probe-progress"}  # until the compiler writes its alerts
    told = [each for each in check_sources(texts, options()) if each.what != _UNDEFINED]
    rest = [each for each in told if each.rule.id not in allowed]
    assert not rest, [f"{each.path}:{each.line} {each.rule.id}: {each.what}" for each in rest]


def test_nothing_is_found_in_what_kustomize_makes(tmp_path: Path) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    for name, text in files("hub", "kustomize").items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    command = [kubectl, "kustomize", str(tmp_path / "overlays" / "production")]
    made = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert made.count("\nkind: Deployment\n") >= 3
    assert {each.rule.id for each in found(made)} <= _FOREIGN


def test_findings_have_places() -> None:
    bundle = Bundle("hub")
    bundle.container("vision")["image"] = "vllm/vllm-openai:latest"
    text = bundle.text()
    (finding,) = [each for each in found(text) if each.rule.id == "image-latest"]
    assert "vllm/vllm-openai:latest" in text.split("\n")[finding.line - 1]
    assert finding.rule.severity is Severity.WARNING
