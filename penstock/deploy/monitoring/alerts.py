"""Alerts: one PrometheusRule with a group for each subject. monitoring.coreos.com/v1.

    penstock.engines   KV cache, queue, no progress, gone                 S76, S77, S79; T14
    penstock.latency   each percentile of each model's SLO                S79
    penstock.replicas  fewer than asked for: floor, burst on spot nodes; the scaler's own errors
    penstock.gateway   gone, errors, replicas that are out, bills that are lost
    penstock.budgets   what teams spend against their limits              S90 (soft)
    penstock.gpu       temperature, errors of the driver                  S78

Each alert fires above its threshold and is quiet at it: `promtool test rules` holds them to that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Literal

import msgspec

from penstock.deploy import names
from penstock.deploy.objects import Object, Part
from penstock.deploy.workloads import Bundle, Workload
from penstock.observe import gateway_names as gateway
from penstock.observe import names as engine
from penstock.spec.model import Limits, Slo
from penstock.spec.units import NANO

from . import scaling
from .promql import jobs, number, quantile, select, text
from .scrape import metadata

Severity = Literal["info", "warning", "critical"]

KV_HIGH, KV_SOFT = 0.9, 0.85
"""Shares of the KV cache's blocks: S76, and the soft guardrail of S79."""
WAITING = 20
"""Requests that wait at one replica: S77."""
CELSIUS = 85
"""Of a GPU: S78."""
ERRORS = 0.05
"""Share of the gateway's answers that may be 5xx."""
PACE = 4.0
"""How many times faster than evenly a day's budget may be used in an hour: it would be gone in six hours."""
MONTH_PACE = 2.0
"""The same of a month's budget in a day."""

GPU_TEMPERATURE = "DCGM_FI_DEV_GPU_TEMP"
XID = "DCGM_FI_DEV_XID_ERRORS"


class Alert(Part, frozen=True, kw_only=True):
    """One rule."""

    alert: str
    expr: str
    for_: str = msgspec.field(name="for")
    labels: Mapping[str, str]
    annotations: Mapping[str, str]


def _alert(
    name: str, severity: Severity, expr: str, wait: str, summary: str, description: str, **labels: str
) -> Alert:
    return Alert(
        alert=name,
        expr=expr,
        for_=wait,
        labels={"severity": severity, **labels},
        annotations={"summary": summary, "description": description},
    )


def rules(bundle: Bundle) -> list[Object]:
    """The PrometheusRule."""
    groups = {
        "penstock.engines": list(_engines(bundle)),
        "penstock.latency": list(_latency(bundle)),
        "penstock.replicas": list(_replicas(bundle)),
        "penstock.gateway": list(_gateway(bundle)),
        "penstock.budgets": list(_budgets(bundle)),
        "penstock.gpu": list(_gpu(bundle)),
    }
    body = [
        {"name": name, "rules": [alert.to_dict() for alert in alerts]}
        for name, alerts in groups.items()
        if alerts
    ]
    return [
        Object(
            api_version="monitoring.coreos.com/v1",
            kind="PrometheusRule",
            metadata=metadata(bundle, "penstock", found=True),
            body={"spec": {"groups": body}},
        )
    ]


def _engines(bundle: Bundle) -> Iterator[Alert]:
    where = (f"namespace={text(bundle.namespace)}", jobs(sorted(set(bundle.slugs.values()))))
    usage = f"max by (namespace, job, pod) ({select(engine.KV_CACHE_USAGE_PERC, *where)})"
    pod = "{{ $labels.pod }} of {{ $labels.job }}"
    yield _alert(
        "EngineKVCacheHigh", "warning", f"{usage} > {number(KV_HIGH)}", "3m",
        "KV cache over 90 %",
        f"The KV cache of {pod} is at {{{{ $value | humanizePercentage }}}}: requests will wait, or "
        f"be put back.",
    )  # fmt: skip
    yield _alert(
        "EngineKVCacheFilling", "info", f"{usage} > {number(KV_SOFT)}", "10m",
        "KV cache over 85 %",
        f"The KV cache of {pod} is at {{{{ $value | humanizePercentage }}}} for ten minutes.",
    )  # fmt: skip
    waiting = f"max by (namespace, job, pod) ({select(engine.NUM_REQUESTS_WAITING, *where)})"
    yield _alert(
        "EngineQueueLong", "critical", f"{waiting} > {WAITING}", "2m",
        f"Over {WAITING} requests wait",
        f"{{{{ $value }}}} requests wait at {pod}. More replicas (models: scale), or fewer requests.",
    )  # fmt: skip
    work = (
        f"(sum by (namespace, job, pod) ({select(engine.NUM_REQUESTS_RUNNING, *where)})"
        f" + sum by (namespace, job, pod) ({select(engine.NUM_REQUESTS_WAITING, *where)}))"
    )
    steps = select(engine.ITERATION_TOKENS, *where, part="count")
    yield _alert(
        "EngineStuck", "critical",
        # running freezes at its last value when the engine hangs, while /health still says 200 (T14)
        f"{work} > 0 and sum by (namespace, job, pod) (increase({steps}[2m])) == 0", "1m",
        "An engine has requests and computes nothing",
        f"{pod} has {{{{ $value }}}} requests, and no step for three minutes. Delete the pod; keep its log.",
    )  # fmt: skip
    for model, slug in bundle.slugs.items():
        up = select("up", f"namespace={text(bundle.namespace)}", f"job={text(slug)}")
        yield _alert(
            "ModelDown", "critical", f"absent({up} == 1)", "2m",
            f"No engine answers for {model}",
            f"Prometheus reaches no pod of the Service {slug}: requests for {model} fail or go elsewhere.",
            model=model,
        )  # fmt: skip


_SLO = (
    ("ttft_p95", 0.95, engine.TIME_TO_FIRST_TOKEN, "time to the first token"),
    ("ttft_p99", 0.99, engine.TIME_TO_FIRST_TOKEN, "time to the first token"),
    ("itl_p95", 0.95, engine.INTER_TOKEN_LATENCY, "time between tokens"),
    ("itl_p99", 0.99, engine.INTER_TOKEN_LATENCY, "time between tokens"),
    ("e2e_p95", 0.95, engine.E2E_LATENCY, "time of a whole answer"),
    ("e2e_p99", 0.99, engine.E2E_LATENCY, "time of a whole answer"),
)
"""Field of an SLO, quantile, histogram, words."""


def _latency(bundle: Bundle) -> Iterator[Alert]:
    for model, slug in bundle.slugs.items():
        slo: Slo | None = bundle.spec.models[model].slo
        for field, q, metric, words in _SLO:
            target: float | None = getattr(slo, field) if slo else None
            if target is None:
                continue
            where = (f"namespace={text(bundle.namespace)}", f"job={text(slug)}")
            yield _alert(
                "LatencyOverSLO", "warning",
                f"{quantile(q, metric, ('namespace', 'job'), *where)} > {number(target)}", "5m",
                f"{model}: {words}, P{q * 100:.0f} over {number(target)} s",
                f"P{q * 100:.0f} of the {words} of {model} is {{{{ $value | humanizeDuration }}}}; "
                f"its SLO ({field}) is {number(target)} s.",
                model=model, slo=field,
            )  # fmt: skip


def _replicas(bundle: Bundle) -> Iterator[Alert]:
    for each in bundle.workloads:
        namespace = f"namespace={text(bundle.namespace)}"
        wait = f"{max(10, math.ceil((each.load_time + 300) / 60))}m"
        if each.nodes > 1:
            yield from _groups(each, namespace, wait)
        else:
            where = (namespace, f"deployment={text(each.name)}")
            missing = (
                f"{select('kube_deployment_spec_replicas', *where)}"
                f" - {select('kube_deployment_status_replicas_available', *where)} > 0"
            )
            yield _missing(each, missing, wait)
        if each.scaled:
            yield from _scaler(bundle, each.name, namespace)


def _missing(each: Workload, missing: str, wait: str) -> Alert:
    if each.tier == "burst":
        return _alert(
            "BurstReplicasMissing", "warning", missing, wait,
            f"{each.name} has fewer replicas than its load asks for",
            f"{{{{ $value }}}} replicas of {each.name} are not available: the pool "
            f"{each.pool_name} has no "
            "free nodes" + (" (spot capacity is gone)" if each.spot else "") + ", or they do not start.",
            model=each.model_name,
        )  # fmt: skip
    return _alert(
        "ReplicasMissing", "critical", missing, wait,
        f"{each.name} has fewer replicas than it should",
        f"{{{{ $value }}}} replicas of {each.name} are not available: look at the events of "
        f"its pods.",
        model=each.model_name,
    )  # fmt: skip


def _groups(each: Workload, namespace: str, wait: str) -> Iterator[Alert]:
    """kube-state-metrics knows no LeaderWorkerSets, but the StatefulSets that they are made of: one of all
    leaders, by the set's name, and one of the workers of each group, with the group's number behind it."""

    def short(matcher: str) -> str:
        where = (namespace, matcher)
        return (
            f"{select('kube_statefulset_replicas', *where)}"
            f" - {select('kube_statefulset_status_replicas_ready', *where)} > 0"
        )

    yield _missing(each, short(f"statefulset={text(each.name)}"), wait)
    yield _alert(
        "GroupIncomplete", "critical", short(f"statefulset=~{text(f'{each.name}-[0-9]+')}"), wait,
        f"A replica of {each.name} is short of nodes",
        f"{{{{ $value }}}} of the {each.nodes - 1} workers of {{{{ $labels.statefulset }}}} are not there: "
        "the replica computes nothing without them. Look at the events of its pods.",
        model=each.model_name,
    )  # fmt: skip


def _scaler(bundle: Bundle, name: str, namespace: str) -> Iterator[Alert]:
    keda = bundle.spec.cluster.autoscaler == "keda"
    hpa = f"horizontalpodautoscaler={text(scaling.hpa_name(name, keda=keda))}"
    most = select("kube_horizontalpodautoscaler_spec_max_replicas", namespace, hpa)
    now = select("kube_horizontalpodautoscaler_status_desired_replicas", namespace, hpa)
    yield _alert(
        "BurstAtItsMost", "warning", f"{now} >= {most}", "15m",
        f"{name} is at its most replicas",
        f"{name} has {{{{ $value }}}} replicas, which is scale.max: what waits now is not helped by more.",
    )  # fmt: skip
    if keda:
        errors = select("keda_scaled_object_errors_total", f"scaledObject={text(name)}")
        yield _alert(
            "ScalerFails", "warning", f"sum(increase({errors}[10m])) > 0", "10m",
            f"KEDA cannot read the load of {name}",
            f"KEDA had {{{{ $value }}}} errors with {name} in ten minutes; its replicas stay as they are.",
        )  # fmt: skip


def _gateway(bundle: Bundle) -> Iterator[Alert]:
    where = (f"namespace={text(bundle.namespace)}", f"job={text(names.GATEWAY)}")
    yield _alert(
        "GatewayDown", "critical", f"absent({select('up', *where)} == 1)", "2m",
        "No gateway answers",
        "Prometheus reaches no pod of the Service gateway: nobody is served.",
    )  # fmt: skip
    every = select(gateway.REQUESTS, *where)
    failed = select(gateway.REQUESTS, *where, 'code=~"5.."')
    yield _alert(
        "GatewayErrors", "critical",
        f"sum(rate({failed}[5m])) / sum(rate({every}[5m])) > {number(ERRORS)}", "5m",
        "Over 5 % of requests fail",
        "{{ $value | humanizePercentage }} of the gateway's answers are 5xx: look at "
        "gateway_attempts_failed.",
    )  # fmt: skip
    yield _alert(
        "UpstreamOut", "warning",
        f"max by (replica) ({select(gateway.STATION_WEIGHT, *where)}) == 0", "5m",
        "A replica gets no requests",
        "The gateway sends nothing to {{ $labels.replica }}: it fails, or makes no progress.",
    )  # fmt: skip
    lost = select(gateway.BILLS, *where, 'outcome="lost"')
    yield _alert(
        "BillsLost", "warning", f"sum by (upstream) (increase({lost}[1h])) > 0", "0m",
        "Bills of engines are lost",
        "{{ $value }} requests at {{ $labels.upstream }} in an hour have no bill: the ledger is "
        "short of them.",
    )  # fmt: skip


def _budgets(bundle: Bundle) -> Iterator[Alert]:
    where = (f"namespace={text(bundle.namespace)}", f"job={text(names.GATEWAY)}")
    limited = False
    for team, settings in bundle.spec.teams.items():
        for words, metric, day, month in _limits(settings.limits):
            limited = True
            spent = select(metric, *where, f"team={text(team)}")
            for budget, window, share, name in (
                (day, "1h", PACE / 24, "day"),
                (month, "1d", MONTH_PACE / 30, "month"),
            ):
                if budget is None:
                    continue
                yield _alert(
                    "BudgetBurnsFast", "warning",
                    f"sum(increase({spent}[{window}])) > {number(budget * share)}", "5m",
                    f"{team} uses its {words} of the {name} too fast",
                    f"{team} has used {{{{ $value }}}} {words} in {window}. Its budget for a {name} is "
                    f"{number(budget)}, which lasts {number(1 / share)} times as long at most.",
                    team=team, budget=f"{words}_per_{name}",
                )  # fmt: skip
    if limited:
        refused = select(gateway.REFUSALS, *where, 'code="insufficient_quota"')
        yield _alert(
            "BudgetExhausted", "warning", f"sum(increase({refused}[5m])) > 0", "0m",
            "A budget is used up",
            "{{ $value }} requests were refused in five minutes because a budget is used up.",
        )  # fmt: skip


def _limits(limits: Limits) -> Iterator[tuple[str, engine.Metric, float | None, float | None]]:
    """(unit, counter, a day's, a month's), each in the counter's unit."""
    if limits.dollars_per_day is not None or limits.dollars_per_month is not None:
        yield (
            "dollars",
            gateway.TEAM_DOLLARS,
            _dollars(limits.dollars_per_day),
            _dollars(limits.dollars_per_month),
        )
    days = [limits.device_seconds_per_day, _hours(limits.gpu_hours_per_day)]
    day = min((each for each in days if each is not None), default=None)
    month = _hours(limits.gpu_hours_per_month)
    if day is not None or month is not None:
        yield "device_seconds", gateway.TEAM_DEVICE_SECONDS, day, month


def _dollars(nanodollars: int | None) -> float | None:
    """As the gateway's counter has them."""
    return None if nanodollars is None else nanodollars / NANO


def _hours(value: float | None) -> float | None:
    return None if value is None else value * 3600


def _gpu(bundle: Bundle) -> Iterator[Alert]:
    if not any(each.device.vendor == "nvidia" for each in bundle.workloads):
        return
    gpu = "GPU {{ $labels.gpu }} of {{ $labels.Hostname }}"
    yield _alert(
        "GPUTemperatureHigh", "warning",
        f"max by (Hostname, gpu, UUID) ({GPU_TEMPERATURE}) > {CELSIUS}", "5m",
        f"A GPU is hotter than {CELSIUS} °C",
        f"{gpu} has {{{{ $value }}}} °C: it will slow down.",
    )  # fmt: skip
    yield _alert(
        "GPUXidError", "warning", f"max by (Hostname, gpu, UUID) ({XID}) > 0", "1m",
        "The driver reports an error of a GPU",
        f"{gpu}: the last was XID {{{{ $value }}}}. NVIDIA's table says what it is; many need a reset.",
    )  # fmt: skip
