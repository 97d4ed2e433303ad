"""How the burst of a model follows its load: queries, KEDA's ScaledObject, or an HPA with prometheus-adapter.

Only the burst Deployment is scaled; the floor stays. Three numbers, each a single element, say how many
replicas of the burst are needed; an autoscaler takes the largest:

    waiting    clamp_min(sum(waiting) - floor x Q, 0) / Q                    Q: scale.waiting
    occupancy  clamp_min(min((running + waiting) / (S x U), asked) - floor, 0)
    cache      clamp_min(min(sum(share of KV blocks in use) / U, asked) - floor, 0)
                                       S: --max-num-seqs, U: scale.utilization

`waiting` alone starts replicas: requests that wait, summed over floor and burst. An HPA divides by the
replicas itself, so an average would ask for too few (T7). `occupancy` and `cache` keep replicas and start
none, since they never ask for more than there are (asked: the floor and the burst's own, also those that
still load). One is taken away when running and waiting requests, and the blocks that they hold, fit the
rest at U: waiting alone reads 0 on full replicas, and would flap. `cache` is for engines whose KV cache is
full before S requests run. It is no memory that is allocated, which an engine takes at its start whatever
the load (T6), but blocks that requests hold.

A metric that is absent is no load of 0 (S61): the ScaledObject's fallback keeps what there is, and an HPA
does nothing without its metrics. Nothing is taken away before cooldown or, where it is longer, the time in
which a replica loads: who has just been asked for is not sent away before he has come.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from penstock.deploy.objects import Object, Part
from penstock.deploy.workloads import Bundle, Workload
from penstock.observe import names as engine

from .promql import number, select, text
from .scrape import metadata

OUT_STABILIZATION, OUT_PODS, OUT_PERIOD = 30, 2, 60
"""Seconds, replicas, seconds: S52."""
IN_PODS, IN_PERIOD = 1, 180
"""Replicas, seconds: S52, S58."""
POLLING = 15
"""Seconds: S53."""
LONGEST = 3600
"""Longest window that an HPA takes, in seconds."""
WAITING, OCCUPANCY, CACHE = "waiting", "occupancy", "cache"
"""What the numbers are called."""


class Policy(Part, frozen=True, kw_only=True):
    """So many replicas in so many seconds."""

    type: str
    value: int
    period_seconds: int


class ScalingRules(Part, frozen=True, kw_only=True):
    """One direction."""

    stabilization_window_seconds: int
    policies: tuple[Policy, ...]
    select_policy: str = "Max"


class Behavior(Part, frozen=True, kw_only=True):
    """Of an HPA."""

    scale_up: ScalingRules
    scale_down: ScalingRules


class Target(Part, frozen=True, kw_only=True):
    """What is scaled."""

    api_version: str
    kind: str
    name: str


def scaled(bundle: Bundle) -> list[Workload]:
    """What follows its load."""
    return [each for each in bundle.workloads if each.scaled and each.waiting_target is not None]


def hpa_name(workload: str, *, keda: bool) -> str:
    """Of the HorizontalPodAutoscaler: KEDA makes one itself."""
    return f"keda-hpa-{workload}" if keda else workload


def patience(workload: Workload) -> int:
    """Seconds for which the load must have been lower."""
    return min(LONGEST, math.ceil(max(workload.cooldown or 300.0, workload.load_time)))


def floor(bundle: Bundle, workload: Workload) -> int:
    """Replicas of the model that are not scaled."""
    return sum(each.replicas for each in bundle.of(workload.slug) if each.tier == "floor")


def out_query(bundle: Bundle, workload: Workload) -> str:
    """Waiting requests beyond those that the floor may have; by `waiting_target`: replicas of the burst."""
    assert workload.waiting_target is not None
    waiting = f"sum({select(engine.NUM_REQUESTS_WAITING, *_where(bundle, workload))})"
    return f"clamp_min({waiting} - {floor(bundle, workload) * workload.waiting_target}, 0)"


def occupancy_query(bundle: Bundle, workload: Workload) -> str:
    """Replicas of the burst that running and waiting requests need, at most those that were asked for."""
    where = _where(bundle, workload)
    running = select(engine.NUM_REQUESTS_RUNNING, *where)
    waiting = select(engine.NUM_REQUESTS_WAITING, *where)
    room = workload.max_num_seqs * _utilization(workload)
    return _held(bundle, workload, f"(sum({running}) + sum({waiting})) / {number(room)}")


def cache_query(bundle: Bundle, workload: Workload) -> str:
    """Replicas of the burst that the KV blocks of requests need, at most those that were asked for."""
    usage = select(engine.KV_CACHE_USAGE_PERC, *_where(bundle, workload))
    # of a pod with several engines the fullest
    return _held(bundle, workload, f"sum(max by (pod) ({usage})) / {number(_utilization(workload))}")


def queries(bundle: Bundle, workload: Workload) -> dict[str, tuple[str, float]]:
    """Number → (query, threshold): `ceil(query / threshold)` is replicas of the burst, in total."""
    assert workload.waiting_target is not None
    return {
        WAITING: (out_query(bundle, workload), workload.waiting_target),
        OCCUPANCY: (occupancy_query(bundle, workload), 1),
        CACHE: (cache_query(bundle, workload), 1),
    }


def _held(bundle: Bundle, workload: Workload, needed: str) -> str:
    """Replicas that are needed, as replicas of the burst, and no more than there are."""
    least = floor(bundle, workload)
    present = f"count(count by (pod) ({select(engine.NUM_REQUESTS_RUNNING, *_where(bundle, workload))}))"
    if workload.nodes == 1:  # kube-state-metrics knows no LeaderWorkerSets
        replicas = select(
            "kube_deployment_spec_replicas",
            f"namespace={text(bundle.namespace)}",
            f"deployment={text(workload.name)}",
        )
        present = f"{least} + max({replicas}) or {present}"
    return f"clamp_min(clamp_max({needed}, scalar({present})) - {least}, 0)"


def _utilization(workload: Workload) -> float:
    return workload.utilization_target or 0.8


def scalers(bundle: Bundle) -> list[Object]:
    """One for each workload that is scaled."""
    keda = bundle.spec.cluster.autoscaler == "keda"
    return [(_keda if keda else _hpa)(bundle, each) for each in scaled(bundle)]


def _where(bundle: Bundle, workload: Workload) -> tuple[str, str]:
    return f"namespace={text(bundle.namespace)}", f"job={text(workload.slug)}"


def _target(workload: Workload) -> Target:
    if workload.nodes > 1:
        return Target(api_version="leaderworkerset.x-k8s.io/v1", kind="LeaderWorkerSet", name=workload.name)
    return Target(api_version="apps/v1", kind="Deployment", name=workload.name)


def _behavior(workload: Workload) -> dict[str, Any]:
    return Behavior(
        scale_up=ScalingRules(
            stabilization_window_seconds=OUT_STABILIZATION,
            policies=(Policy(type="Pods", value=OUT_PODS, period_seconds=OUT_PERIOD),),
        ),
        scale_down=ScalingRules(
            stabilization_window_seconds=patience(workload),
            policies=(Policy(type="Pods", value=IN_PODS, period_seconds=IN_PERIOD),),
        ),
    ).to_dict()


def _keda(bundle: Bundle, workload: Workload) -> Object:
    """keda.sh/v1alpha1."""

    def trigger(name: str, query: str, threshold: float) -> dict[str, Any]:
        return {
            "type": "prometheus",
            "name": name,
            "metricType": "AverageValue",
            "metadata": {
                "serverAddress": bundle.spec.cluster.prometheus,
                "query": query,
                "threshold": number(threshold),
                "activationThreshold": "0",
                # KEDA's default takes an absent metric for 0, and would scale in when Prometheus has a gap
                "ignoreNullValues": "false",
            },
        }

    return Object(
        api_version="keda.sh/v1alpha1",
        kind="ScaledObject",
        metadata=metadata(bundle, workload.name, "scaling"),
        body={
            "spec": {
                "scaleTargetRef": _target(workload).to_dict(),
                "pollingInterval": POLLING,
                # then KEDA ends all replicas at once, so the HPA gets the time to have ended all but one
                "cooldownPeriod": patience(workload) + IN_PERIOD * (workload.max_replicas - 1),
                "minReplicaCount": workload.min_replicas,
                "maxReplicaCount": workload.max_replicas,
                # with replicas: 0 here, KEDA would end the last replica while Prometheus does not answer
                "fallback": {"failureThreshold": 3, "replicas": 1, "behavior": "currentReplicas"},
                "advanced": {
                    "restoreToOriginalReplicaCount": False,
                    "horizontalPodAutoscalerConfig": {
                        "name": hpa_name(workload.name, keda=True),
                        "behavior": _behavior(workload),
                    },
                },
                "triggers": [
                    trigger(name, query, threshold)
                    for name, (query, threshold) in queries(bundle, workload).items()
                ],
            }
        },
    )


def external_name(workload: Workload, which: str) -> str:
    """What prometheus-adapter calls one of the two numbers."""
    return f"penstock_{workload.slug.replace('-', '_')}_{which}"


def _hpa(bundle: Bundle, workload: Workload) -> Object:
    """autoscaling/v2, on External metrics, which prometheus-adapter answers."""

    def metric(which: str, average: float) -> dict[str, Any]:
        return {
            "type": "External",
            "external": {
                "metric": {"name": external_name(workload, which)},
                "target": {"type": "AverageValue", "averageValue": number(average)},
            },
        }

    return Object(
        api_version="autoscaling/v2",
        kind="HorizontalPodAutoscaler",
        metadata=metadata(bundle, hpa_name(workload.name, keda=False), "scaling"),
        body={
            "spec": {
                "scaleTargetRef": _target(workload).to_dict(),
                "minReplicas": max(1, workload.min_replicas),
                "maxReplicas": workload.max_replicas,
                "metrics": [
                    metric(name, threshold) for name, (_, threshold) in queries(bundle, workload).items()
                ],
                "behavior": _behavior(workload),
            }
        },
    )


def adapter_values(bundle: Bundle) -> dict[str, Any]:
    """Values of the chart prometheus-adapter; empty where KEDA asks Prometheus itself."""
    if bundle.spec.cluster.autoscaler != "hpa" or not scaled(bundle):
        return {}
    rules: list[Mapping[str, Any]] = []
    for each in scaled(bundle):
        for which, (query, _) in queries(bundle, each).items():
            rules.append(
                {
                    # decides only whether there is such a metric; the query is whole as it stands
                    "seriesQuery": select(engine.NUM_REQUESTS_WAITING, *_where(bundle, each)),
                    "resources": {"overrides": {"namespace": {"resource": "namespace"}}},
                    "name": {"matches": ".*", "as": external_name(each, which)},
                    "metricsQuery": query,
                }
            )
    url, _, port = bundle.spec.cluster.prometheus.rpartition(":")
    server = {"url": url, "port": int(port)} if port.isdigit() else {"url": bundle.spec.cluster.prometheus}
    return {"prometheus": server, "rules": {"default": False, "external": rules}}
