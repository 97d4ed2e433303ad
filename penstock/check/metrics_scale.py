"""Rules on what scales: KEDA's triggers, HPAs, prometheus-adapter's rules; T6, T7, T8 and S61.

An HPA with an AverageValue asks for `ceil(value / threshold)` replicas in total. So the value is a sum, a
single element, and of something that more replicas make less.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from penstock.observe import foreign

from . import metrics_query, promql
from .cluster import quantity
from .finding import Finding, Rule, Severity
from .metrics_texts import Expression, adapted
from .promql import Query
from .sources import Document, dig
from .words import is_unknown

AVERAGE = Rule(
    "scaler-average",
    Severity.ERROR,
    "a scaler is given an average",
    "The HPA divides by the threshold and takes that for the replicas in total: an average of 20 "
    "at 4 replicas "
    "and a threshold of 10 asks for 2, while 80 requests wait.",
    "Give it the sum: `sum(…)`.",
)
MANY = Rule(
    "scaler-many-elements",
    Severity.ERROR,
    "a scaler's query returns several elements",
    "KEDA wants a single one and fails with several, which is as soon as there are two pods.",
    "Aggregate without by: `sum(…)`.",
)
MEMORY = Rule(
    "scaler-on-memory",
    Severity.ERROR,
    "memory as a signal to scale",
    "An engine takes its share of the memory at its start, whatever the load: it is always over "
    "the threshold, "
    "and there are always as many replicas as may be.",
    "Scale on the sum of waiting requests.",
)
GPU_UTIL = Rule(
    "scaler-on-gpu-util",
    Severity.ERROR,
    "GPU utilisation as a signal to scale",
    "It says that a kernel ran, not how much room there is: one request has it near 100 %. MIG "
    "slices have none.",
    "Scale on the sum of waiting requests; to look at work use DCGM_FI_PROF_GR_ENGINE_ACTIVE.",
)
CPU = Rule(
    "scaler-on-cpu",
    Severity.ERROR,
    "CPU as a signal to scale an engine on GPUs",
    "Its processes spin or wait for the GPU; neither says how many requests wait.",
    "Scale on the sum of waiting requests.",
)
ZERO = Rule(
    "scaler-absent-is-zero",
    Severity.WARNING,
    "an absent metric counts as no load",
    "While engines load, or Prometheus has a gap, replicas are taken away that are needed.",
    'No `or vector(0)`; in KEDA `ignoreNullValues: "false"` and a `fallback`.',
)
FALLBACK = Rule(
    "scaler-no-fallback",
    Severity.NOTE,
    "there is no fallback while Prometheus does not answer",
    "With minReplicaCount: 0, KEDA ends the last replica when all triggers fail.",
    "Add `fallback: {failureThreshold: 3, replicas: 1, behavior: currentReplicas}`.",
)
WAITING_ONLY = Rule(
    "scaler-flaps",
    Severity.WARNING,
    "only waiting requests are scaled on",
    "They are 0 on replicas that are full: one is taken away, requests wait again, it comes back.",
    "Add a number that holds replicas: running and waiting requests over what a replica takes at 80 %.",
)
VALUE = Rule(
    "scaler-value-type",
    Severity.ERROR,
    "a sum is compared with a target of type Value",
    "With Value the HPA multiplies the replicas that there are by value / target: a sum grows without end.",
    "Use AverageValue.",
)
TARGET = Rule(
    "scaler-threshold",
    Severity.ERROR,
    "a scaler's threshold that is no number above 0",
    "The number of replicas is the value divided by it: the HorizontalPodAutoscaler is refused, and nothing "
    "is ever scaled.",
    'Write what one replica takes, as threshold: "10".',
)
PROVIDED = Rule(
    "hpa-metric-unknown",
    Severity.ERROR,
    "nothing provides the HPA's metric",
    "The HPA says FailedGetPodsMetric or FailedGetExternalMetric, and never scales.",
    "Add a rule of prometheus-adapter that makes it, or write the name that it makes.",
)
UNSEEN = Rule(
    "hpa-metric-unseen",
    Severity.WARNING,
    "what provides the HPA's metric is not among the files",
    "Whether there is such a metric was not checked.",
    "Check the adapter's configuration together with the HPA.",
)
ADAPTER_AVERAGE = Rule(
    "adapter-average",
    Severity.WARNING,
    "the adapter takes an average of a pod's series",
    "A pod with several engines or API processes has several series; its queue is understated.",
    "sum(<<.Series>>{<<.LabelMatchers>>}) by (<<.GroupBy>>)",
)
ADAPTER_MATCHERS = Rule(
    "adapter-without-matchers",
    Severity.ERROR,
    "the adapter's query leaves out <<.LabelMatchers>>",
    "It sums over all namespaces and pods there are, and not over those of the HPA's target.",
    "sum(<<.Series>>{<<.LabelMatchers>>}) by (<<.GroupBy>>)",
)
RULES = (
    *(AVERAGE, MANY, MEMORY, GPU_UTIL, CPU, ZERO, FALLBACK, WAITING_ONLY, VALUE, TARGET),
    *(PROVIDED, UNSEEN, ADAPTER_AVERAGE, ADAPTER_MATCHERS),
)

_MEMORY = re.compile(
    r"^(DCGM_FI_DEV_FB_\w+|DCGM_FI_DEV_MEM_COPY_UTIL|container_memory_\w+|node_memory_\w+|"
    r"process_(resident|virtual)_memory_bytes|nvidia_\w*memory\w*|gpu_memory\w*)$"
)
_UTILIZATION = re.compile(r"^(DCGM_FI_DEV_GPU_UTIL|nvidia_smi_utilization_gpu\w*|gpu_util\w*)$", re.I)


def expression(each: Expression, query: Query) -> Iterator[Finding]:
    """A KEDA trigger, or a rule of prometheus-adapter."""
    for metric in dict.fromkeys(selector.name for selector in query.selectors):
        yield from _signal(each, metric)
    if each.use == "scaler":
        yield from _trigger(each, query)
    elif each.settings.get("external"):
        if (average := _average(query)) is not None:
            yield each.finding(AVERAGE, "An external metric is averaged.", average, fix="sum(…)")
        yield from _absent(each, query)
    else:
        if (average := _average(query)) is not None:
            yield each.finding(ADAPTER_AVERAGE, "It averages the series of a pod.", average)
        raw = str(each.settings.get("metricsQuery", ""))
        if "<<" in raw and ".LabelMatchers" not in raw:
            yield each.finding(ADAPTER_MATCHERS, "It has no <<.LabelMatchers>>.")


def _signal(each: Expression, metric: str) -> Iterator[Finding]:
    if _MEMORY.match(metric):
        yield each.finding(MEMORY, f"`{metric}` is memory.", metric)
    elif _UTILIZATION.match(metric):
        yield each.finding(GPU_UTIL, f"`{metric}` is near 100 with one request.", metric)


def _trigger(each: Expression, query: Query) -> Iterator[Finding]:
    average = _average(query)
    value_type = each.settings.get("metricType") == "Value"
    if average is not None and not value_type:
        replica = f"{average}(…)"
        yield each.finding(
            AVERAGE, f"{replica} with an AverageValue is divided twice.", average, fix="Write sum(…)."
        )
    if value_type and average is None and promql.unit(query.node) is None and _sums(query):
        document, keys = each.document, each.keys[:-2]
        yield document.finding(VALUE, "metricType: Value with a sum.", *keys, "metricType")
    if not query.single:
        names = ", ".join(dict.fromkeys(f"`{selector.name}`" for selector in query.selectors))
        yield each.finding(MANY, f"It may return an element for each series of {names}.")
    if _number(dig(each.settings, "metadata", "threshold")) is not None:
        yield from metrics_query.threshold(
            each, query.node, _number(dig(each.settings, "metadata", "threshold")) or 0.0
        )
    yield from _absent(each, query)
    if str(dig(each.settings, "metadata", "ignoreNullValues", default="true")).lower() not in (
        "false",
        "f",
        "0",
    ):
        yield each.finding(
            ZERO, "KEDA takes an absent metric for 0 (ignoreNullValues is true).",
            fix='Add `ignoreNullValues: "false"`.',
        )  # fmt: skip


def _absent(each: Expression, query: Query) -> Iterator[Finding]:
    for node, _ in query.nodes():
        if promql.kind(node) == "BinaryExpr" and promql.operator(node) == "or":
            right = promql.bare(node.rhs)
            if (
                promql.kind(right) == "Call"
                and right.func.name == "vector"
                and right.args[0].prettify() == "0"
            ):
                yield each.finding(ZERO, "`or vector(0)` makes an absent metric 0.", "vector")


def _average(query: Query) -> str | None:
    """The outermost aggregation that is an average, if the result is one."""
    node = promql.bare(query.node)
    while True:
        if promql.kind(node) == "AggregateExpr":
            name = promql.operator(node)
            return name if name in ("avg", "quantile", "min", "max") and _load(node) else None
        if promql.kind(node) == "Call" and node.args and node.func.name in promql.SAME_UNIT:
            node = promql.bare(node.args[-1] if node.func.name == "quantile_over_time" else node.args[0])
        elif promql.kind(node) in ("SubqueryExpr", "UnaryExpr"):
            node = promql.bare(node.expr)
        elif promql.kind(node) == "BinaryExpr":
            node = promql.bare(node.lhs)
        else:
            return None


def _load(node: Any) -> bool:
    """Whether it is about load that replicas share: requests; not a percentile of latencies."""
    names = [selector.name for selector in Query("", node).selectors]
    return all(promql.unit(node) != "seconds" and not each.endswith("_bucket") for each in names)


def _sums(query: Query) -> bool:
    return any(
        promql.kind(node) == "AggregateExpr" and promql.operator(node) in ("sum", "count")
        for node, _ in query.nodes()
    ) and not any(
        promql.kind(node) == "BinaryExpr" and promql.operator(node) == "/" for node, _ in query.nodes()
    )


def _number(value: Any) -> float | None:
    try:
        return float(str(value))
    except ValueError:
        return None


def _is_no_target(value: Any) -> bool:
    """Whether it stands there and is 0, negative or no number. `$NAME` and templates may be anything."""
    if value is None or isinstance(value, dict | list) or is_unknown(str(value)):
        return False
    amount = quantity(value)
    return amount is None or amount <= 0


def scaled_object(document: Document, all: Sequence[Document]) -> Iterator[Finding]:
    """A ScaledObject as a whole."""
    triggers = dig(document.data, "spec", "triggers")
    if not isinstance(triggers, list):
        return
    for index, trigger in enumerate(triggers):
        if dig(trigger, "type") == "memory":
            yield document.finding(MEMORY, "A trigger of type memory.", "spec", "triggers", index, "type")
        elif dig(trigger, "type") == "cpu":
            yield from _resource(document, all, "cpu", ("spec", "triggers", index, "type"))
        for name in ("threshold", "value") if dig(trigger, "type") != "cron" else ():
            given = dig(trigger, "metadata", name)
            if _is_no_target(given):
                what = f"{name} is {given}."
                yield document.finding(TARGET, what, "spec", "triggers", index, "metadata", name)
    asked = [dig(each, "metadata", "query") for each in triggers if dig(each, "type") == "prometheus"]
    queries = [each for each in asked if isinstance(each, str)]
    if not queries:
        return
    if dig(document.data, "spec", "fallback") is None and dig(document.data, "kind") == "ScaledObject":
        yield document.finding(FALLBACK, "spec.fallback is missing.", "spec")
    elif dig(document.data, "spec", "fallback", "replicas") == 0:
        what = "fallback.replicas is 0: the last replica ends while Prometheus does not answer."
        yield document.finding(FALLBACK, what, "spec", "fallback", "replicas")
    if len(queries) == len(triggers):
        yield from _holds(document, queries, ("spec", "triggers"))


def _holds(document: Document, queries: Sequence[str], keys: tuple[str, ...]) -> Iterator[Finding]:
    """Whether something keeps replicas that are full."""
    names: set[str] = set()
    for text in queries if promql.available() else ():
        try:
            names |= {selector.name for selector in promql.parse(text).selectors}
        except promql.Broken:
            return
    load = {each for each in names if not _MEMORY.match(each) and not _UTILIZATION.match(each)}
    if load and all(re.search("waiting|queue", each) and "time" not in each for each in load):
        yield document.finding(WAITING_ONLY, f"It scales on {', '.join(sorted(load))} only.", *keys)


def autoscaler(document: Document, all: Sequence[Document]) -> Iterator[Finding]:
    """A HorizontalPodAutoscaler."""
    metrics = dig(document.data, "spec", "metrics")
    provided: dict[str, Expression] = {}
    for other in all:
        if dig(other.data, "kind") != "HorizontalPodAutoscaler":
            provided.update(adapted(other))
    read: list[str] = []
    for index, metric in enumerate(metrics if isinstance(metrics, list) else ()):
        where = ("spec", "metrics", index)
        kind = str(dig(metric, "type", default=""))
        if kind in ("Resource", "ContainerResource"):
            part = "resource" if kind == "Resource" else "containerResource"
            yield from _resource(
                document, all, str(dig(metric, part, "name", default="")), (*where, part, "name")
            )
            continue
        part = {"Pods": "pods", "External": "external", "Object": "object"}.get(kind, "")
        for amount in ("value", "averageValue", "averageUtilization"):
            given = dig(metric, part, "target", amount)
            if _is_no_target(given):
                yield document.finding(TARGET, f"{amount} is {given}.", *where, part, "target", amount)
        name = dig(metric, part, "metric", "name")
        if not isinstance(name, str):
            continue
        keys = (*where, part, "metric", "name")
        source = provided.get(name)
        read.append(source.text if source is not None else name)
        if source is not None:
            yield from _target(document, metric, part, source, (*where, part, "target"))
        elif _MEMORY.match(name):
            yield document.finding(MEMORY, f"`{name}` is memory.", *keys)
        elif _UTILIZATION.match(name):
            yield document.finding(GPU_UTIL, f"`{name}` is near 100 with one request.", *keys)
        else:
            yield from _provided(document, name, provided, keys)
    if read and len(read) == len(metrics if isinstance(metrics, list) else ()):
        yield from _holds(document, [_plain(each) for each in read], ("spec", "metrics"))


def _plain(name: str) -> str:
    """A metric's name as a query, where it is no query itself."""
    return name if promql.available() and re.search(r"[({]", name) else re.sub(r"[^\w:]", "_", name)


def _resource(
    document: Document, all: Sequence[Document], name: str, keys: tuple[str | int, ...]
) -> Iterator[Finding]:
    target = dig(document.data, "spec", "scaleTargetRef", "name")
    space = dig(document.data, "metadata", "namespace")
    for other in all:
        same = (
            dig(other.data, "metadata", "name") == target
            and dig(other.data, "metadata", "namespace") == space
        )
        if not same or dig(other.data, "kind") not in ("Deployment", "StatefulSet", "LeaderWorkerSet"):
            continue
        containers = dig(other.data, "spec", "template", "spec", "containers", default=[])
        gpus = [
            resource
            for container in (containers if isinstance(containers, list) else ())
            for resource in (dig(container, "resources", "limits", default=None) or {})
            if re.match(r"(nvidia|amd)\.com/(gpu|mig-)", str(resource))
        ]
        if gpus and name == "memory":
            yield document.finding(MEMORY, "The memory of an engine's pods.", *keys)
        elif gpus and name == "cpu":
            yield document.finding(CPU, "The CPU of an engine's pods.", *keys)


def _target(
    document: Document, metric: Any, part: str, source: Expression, keys: tuple[str | int, ...]
) -> Iterator[Finding]:
    kind = dig(metric, part, "target", "type")
    if kind == "Value" and part in ("external", "object") and re.search(r"\bsum\b", source.text):
        yield document.finding(VALUE, f"`{source.name}` is a sum.", *keys)


def _provided(
    document: Document, name: str, provided: dict[str, Expression], keys: tuple[str | int, ...]
) -> Iterator[Finding]:
    spelt = name.replace("_", ":", 1)
    managed = re.match(r"prometheus\.googleapis\.com[|/]([^|/]+)", name)
    for known in (managed[1],) if managed else (name, spelt):
        if (removed := foreign.gone(known)) is not None:
            yield document.finding(
                metrics_query.REMOVED, f"`{known}` was removed. {removed.why}".strip(), *keys,
                fix=f"Use {removed.use}.",
            )  # fmt: skip
            return
    if provided:
        makes = ", ".join(sorted(provided))
        yield document.finding(PROVIDED, f"No rule of the adapter makes `{name}`; they make {makes}.", *keys)
    elif ".googleapis.com|" not in name:  # Google's adapter serves those of its own service
        yield document.finding(UNSEEN, f"Nothing here makes `{name}`.", *keys)
