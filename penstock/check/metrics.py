"""Rules on everything that reads metrics: alerts, dashboards, scalers, adapters, monitors.

metrics_texts   where queries stand
promql          what they mean
metrics_query   names, kinds, labels, percentiles, units
metrics_scale   what scales
metrics         all of it over a document; and whether jobs and objects that queries name are there
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence

from penstock.observe import foreign

from . import metrics_query, metrics_scale, promql
from .finding import Finding, Rule, Severity
from .metrics_texts import Expression, expressions, recorded
from .promql import Query, Selector
from .sources import Document, dig, documents_of

NOTHING = Rule(
    "query-selects-nothing",
    Severity.ERROR,
    "the query names something that is not there",
    "It returns nothing: an alert that never fires (or an absent() that always does), a scaler "
    "that stands still.",
    "Write the name of the object; a job is the name of its Service.",
)
NAMED = Rule(
    "metric-named",
    Severity.WARNING,
    "a text asks for a metric that was renamed or removed",
    "Whoever runs it, or follows it, finds nothing.",
    "Write the name that it has now.",
)
RULES: tuple[Rule, ...] = (*metrics_query.RULES, *metrics_scale.RULES, NOTHING, NAMED)

_OBJECTS = {
    "job": ("Service",),
    "service": ("Service",),
    "deployment": ("Deployment",),
    "scaledObject": ("ScaledObject",),
    "exported_deployment": ("Deployment",),
}
"""Label → kinds of objects whose names are its values."""
_NAME = re.compile(r"\bvllm:[a-z_0-9]+")
_TOLD = re.compile(r"remov|renam|no longer|deprecat|replaced|gone\b|instead of", re.IGNORECASE)
"""A line that tells it itself."""
_CLUSTER = frozenset(
    "apiserver kubelet kube-scheduler kube-controller-manager kube-proxy coredns node-exporter "
    "kube-state-metrics".split()
)
"""Jobs of what every cluster has; their Services are made with the cluster, or with the operator."""
_OF_PODS = re.compile(r"^(vllm:|penstock:|up$|http_re)")
"""Metrics whose job is a Service that a ServiceMonitor selects."""


def rules_of(document: Document, all: Sequence[Document]) -> Iterator[Finding]:
    """What is wrong with a document's queries; `all` are the documents that are checked with it."""
    kind = dig(document.data, "kind")
    if kind in ("ScaledObject", "ScaledJob"):
        yield from metrics_scale.scaled_object(document, all)
    elif kind == "HorizontalPodAutoscaler":
        yield from metrics_scale.autoscaler(document, all)
    found = list(expressions(document))
    if not found:
        return
    if not promql.available():
        line, column = found[0].at()
        yield Finding(
            metrics_query.UNREAD, document.path, line, column, f"{len(found)} queries were not checked."
        )
        return
    made = {name for other in all for name in recorded(other)}
    for each in found:
        try:
            query = promql.parse(each.text)
        except promql.Broken as error:
            yield each.finding(metrics_query.BROKEN, f"It cannot be parsed: {error}.")
            continue
        yield from metrics_query.examine(each, query, made)
        if each.use in ("scaler", "adapter"):
            yield from metrics_scale.expression(each, query)
        if each.use != "variable":
            yield from _there(each, query, document, all)


def named(text: str, path: str, line: int = 1) -> Iterator[Finding]:
    """Names in code and code blocks, as in `curl … | grep vllm:gpu_cache_usage_perc`.

    Args:
        line: the number of the text's first line.
    """
    for number, row in enumerate(text.splitlines(), line):
        if _TOLD.search(row):
            continue
        for match in _NAME.finditer(row):
            if removed := foreign.gone(match[0]):
                fix = f"Use {removed.use}." if removed.use else ""
                yield Finding(
                    NAMED,
                    path,
                    number,
                    match.start() + 1,
                    f"`{match[0]}` was removed. {removed.why}".strip(),
                    fix,
                )


def queries(text: str, path: str, line: int = 1) -> Iterator[Finding]:
    """A block of PromQL: a query on each line. Lines that are no query by themselves are passed by."""
    if not promql.available():
        return
    for number, row in enumerate(text.splitlines(), line):
        if not row.strip() or row.lstrip().startswith("#"):
            continue
        for document in documents_of(f"- {json.dumps(row)}", path, line=number)[0]:
            each = Expression(row, "panel", "", document, (0,))
            try:
                query = promql.parse(row)
            except promql.Broken:
                continue
            yield from metrics_query.examine(each, query, ())


def _there(
    expression: Expression, query: Query, document: Document, all: Sequence[Document]
) -> Iterator[Finding]:
    """Whether what the query names is among the objects, where objects of that kind are checked with it."""
    for selector in query.selectors:
        space = selector.value("namespace")
        if space is not None and (space[0] != "=" or "$" in space[1]):
            continue
        for label, kinds in _OBJECTS.items():
            if label in ("job", "service") and not _OF_PODS.match(selector.name):
                continue
            asked = selector.value(label)
            if asked is None or asked[0] not in ("=", "=~") or "$" in asked[1]:
                continue
            yield from _named(expression, selector, label, asked, kinds, space[1] if space else None, all)
        yield from _hpa(expression, selector, space[1] if space else None, all)


def _named(
    expression: Expression,
    selector: Selector,
    label: str,
    asked: tuple[str, str],
    kinds: tuple[str, ...],
    space: str | None,
    all: Sequence[Document],
) -> Iterator[Finding]:
    names = {
        str(dig(other.data, "metadata", "name"))
        for other in all
        if dig(other.data, "kind") in kinds and _within(other, space)
    }
    monitored = any(dig(other.data, "kind") in ("ServiceMonitor", "PodMonitor") for other in all)
    if not names or (label in ("job", "service") and not monitored):
        return
    if label == "job":
        names |= _CLUSTER
    missing = [each for each in _alternatives(asked) if not _matches(each, asked[0], names)]
    for each in missing:
        what = f"There is no {kinds[0]} `{each}`" + (f" in {space}" if space else "") + f": {_some(names)}."
        yield expression.finding(NOTHING, what, label, after=selector.name)


def _hpa(
    expression: Expression, selector: Selector, space: str | None, all: Sequence[Document]
) -> Iterator[Finding]:
    asked = selector.value("horizontalpodautoscaler")
    if asked is None or asked[0] != "=" or "$" in asked[1]:
        return
    names = set()
    for other in all:
        if dig(other.data, "kind") == "HorizontalPodAutoscaler" and _within(other, space):
            names.add(str(dig(other.data, "metadata", "name")))
        elif dig(other.data, "kind") == "ScaledObject" and _within(other, space):
            given = dig(other.data, "spec", "advanced", "horizontalPodAutoscalerConfig", "name")
            names.add(str(given or f"keda-hpa-{dig(other.data, 'metadata', 'name')}"))
    if names and asked[1] not in names:
        what = f"There is no HorizontalPodAutoscaler `{asked[1]}`: {_some(names)}."
        yield expression.finding(NOTHING, what, "horizontalpodautoscaler", after=selector.name)


def _within(document: Document, space: str | None) -> bool:
    own = dig(document.data, "metadata", "namespace")
    return space is None or own is None or own == space


def _alternatives(asked: tuple[str, str]) -> list[str]:
    """The values of a matcher: `a|b` are two."""
    operator, value = asked
    plain = operator == "=" or not re.search(r"[()\[\]]", value)
    return value.split("|") if operator == "=~" and plain else [value]


def _matches(value: str, operator: str, names: set[str]) -> bool:
    if operator == "=":
        return value in names
    try:
        pattern = re.compile(value[:500])
    except re.error:
        return True
    return any(pattern.fullmatch(name) for name in names)


def _some(names: set[str]) -> str:
    listed = sorted(names)
    return "there is " + ", ".join(listed[:5]) + (", …" if len(listed) > 5 else "")
