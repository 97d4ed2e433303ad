"""Rules on single queries: names, kinds, labels, percentiles, units; T2, T3, T4, T6."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

from penstock.observe import foreign
from penstock.observe.names import Kind

from . import promql
from .finding import Finding, Rule, Severity
from .metrics_texts import Expression
from .promql import Query, Selector

BROKEN = Rule(
    "promql-broken",
    Severity.ERROR,
    "the query is no PromQL",
    "Prometheus refuses the rule file, and everything in it; a panel or a scaler shows an error.",
    "Correct the syntax.",
)
UNREAD = Rule(
    "promql-unread",
    Severity.WARNING,
    "queries were not checked",
    "The package that parses PromQL is not installed.",
    "pip install 'penstock[check]'",
)
UNKNOWN = Rule(
    "metric-unknown",
    Severity.ERROR,
    "nobody exports a metric of this name",
    "The query returns nothing, for ever: an alert that never fires, a scaler that never scales, "
    "an empty panel.",
    "Write a name that the engine, the gateway or the exporter has at /metrics.",
)
UNLISTED = Rule(
    "metric-unlisted",
    Severity.WARNING,
    "the metric is in no table",
    "It is of a program whose names Penstock does not know: whether it is exported was not checked.",
    "Look for it at the program's /metrics.",
)
ANOTHERS = Rule(
    "metric-of-aibrix",
    Severity.NOTE,
    "AIBrix's gateway has a metric of this name; an engine's begins with vllm:",
    "Where AIBrix does not run, the query returns nothing, for ever.",
    "Write vllm: before it for what the engine itself shows.",
)
REMOVED = Rule(
    "metric-removed",
    Severity.ERROR,
    "the metric was renamed or removed",
    "Dashboards show no data, alerts never fire and scalers never scale: no error tells of it.",
    "Write the name that it has now.",
)
RATE_OF_GAUGE = Rule(
    "rate-of-gauge",
    Severity.ERROR,
    "the rate of a gauge",
    "rate() takes every fall of the value for a restart of a counter; what comes out means nothing.",
    "Take the rate of a counter (`…_total`); of a gauge use avg_over_time(), deriv() or delta().",
)
COUNTER_AS_LEVEL = Rule(
    "counter-as-level",
    Severity.ERROR,
    "a counter is compared with a threshold",
    "A counter only grows until its process restarts: the alert fires one day, and stays.",
    "Compare its rate or increase over a window.",
)
NO_LE = Rule(
    "quantile-without-le",
    Severity.ERROR,
    "a percentile of buckets whose le is gone",
    "histogram_quantile() needs the label le of each bucket; without it it returns nothing.",
    "Keep le: `histogram_quantile(0.95, sum by (le) (rate(NAME_bucket[5m])))`.",
)
NO_BUCKETS = Rule(
    "quantile-of-no-buckets",
    Severity.ERROR,
    "a percentile of what has no buckets",
    "histogram_quantile() is about the rates of a histogram's `_bucket` series.",
    "Write the `_bucket` series of a histogram, and take its rate.",
)
QUANTILE = Rule(
    "quantile-range",
    Severity.ERROR,
    "a quantile outside 0 to 1",
    "It is +Inf above 1 and -Inf below 0, whatever the values: an alert on it fires always, or never.",
    "Write a share, as 0.95 for the 95th percentile.",
)
UNIT = Rule(
    "threshold-unit",
    Severity.ERROR,
    "the threshold is in another unit than the metric",
    "It is never reached, or always.",
    "Shares go from 0 to 1 (also `…_perc`), DCGM's utilisation from 0 to 100, latencies are seconds.",
)
USED_OVER_FREE = Rule(
    "used-over-free",
    Severity.ERROR,
    "used memory is divided by free memory",
    "It is no share: 0.85 is reached at 46 % of the memory, and a full device has infinity.",
    "Write used / (used + free).",
)
LABEL = Rule(
    "label-unknown",
    Severity.ERROR,
    "the metric does not have this label",
    "A matcher on it matches nothing, and grouping by it loses what it should tell apart.",
    "Write one of its labels, or one that scraping gives (job, namespace, pod, instance, …).",
)
LABEL_LOST = Rule(
    "alert-label-lost",
    Severity.WARNING,
    "an alert's text asks for a label that its query has aggregated away",
    "It is empty in the message: nobody knows which pod or GPU it is about.",
    "Keep the label: `max by (pod) (…)`.",
)
RULES = (
    *(BROKEN, UNREAD, UNKNOWN, UNLISTED, ANOTHERS, REMOVED, RATE_OF_GAUGE, COUNTER_AS_LEVEL),
    *(NO_LE, NO_BUCKETS, QUANTILE, UNIT, USED_OVER_FREE, LABEL, LABEL_LOST),
)

_MILLISECONDS = 100.0
"""Latencies of tokens above that many seconds are milliseconds, surely."""
_MILLISECONDS_ANSWER = 1_000.0
"""The same of whole answers, and of their parts."""
_MILLISECONDS_LONG = 10_000.0
"""The same of other times."""
_ANSWER = re.compile(r"request_(latency|\w+_time|duration)|e2e|queue_time|ttft|time_to")
_GROUPS = frozenset("by without on ignoring".split())


def examine(expression: Expression, query: Query, recorded: Collection[str]) -> Iterator[Finding]:
    """What is wrong with a query by itself. recorded: names that recording rules make."""
    seen: set[str] = set()
    for selector in query.selectors:
        if selector.name and selector.name not in seen and selector.name not in recorded:
            seen.add(selector.name)
            yield from name(expression, selector.name)
        yield from _matchers(expression, selector)
    if expression.use == "alert":
        yield from _lost(expression, query)
    for node, inside in query.nodes():
        which = promql.kind(node)
        if which == "Call":
            yield from _call(expression, node)
        elif which == "BinaryExpr":
            yield from _ratio(expression, node)
            if promql.operator(node) in promql.COMPARISONS:
                yield from _threshold(expression, node)
                if expression.use == "alert":
                    yield from _level(expression, node)
        elif which == "AggregateExpr":
            if promql.operator(node) == "quantile":
                yield from _share(expression, "quantile", node.param)
            yield from _grouping(expression, node, inside)


def name(expression: Expression, metric: str) -> Iterator[Finding]:
    """Whether somebody exports a metric."""
    known = foreign.find(metric)
    if known is not None:
        if all(who.startswith("AIBrix") for who in known.who) and foreign.find(f"vllm:{metric}"):
            yield expression.finding(ANOTHERS, f"`{metric}` is AIBrix's own.", metric)
        return
    if removed := foreign.gone(metric):
        why = f" Why: {removed.why}." if removed.why else ""
        fix = f"Use {removed.use}." if removed.use else "There is nothing in its place."
        yield expression.finding(REMOVED, f"`{metric}` was removed.{why}", metric, fix=fix)
        return
    near = foreign.near(metric)
    # a scaler that is not understood is worse than a panel: it is silent
    if foreign.belongs(metric) or near is not None or expression.use in ("scaler", "adapter"):
        fix = f"Did you mean `{near}`?" if near else ""
        yield expression.finding(UNKNOWN, f"Nobody exports `{metric}`.", metric, fix=fix)
    else:
        yield expression.finding(UNLISTED, f"`{metric}` is in no table.", metric)


_TEMPLATE = re.compile(r"(?:\$labels|\.Labels)\.(\w+)")


def _lost(expression: Expression, query: Query) -> Iterator[Finding]:
    """Labels of an alert's texts that its result does not have."""
    have = promql.result_labels(query.node)
    texts = [expression.settings.get(part) for part in ("annotations", "labels")]
    asked = [
        label
        for part in texts
        if isinstance(part, dict)
        for text in part.values()
        for label in _TEMPLATE.findall(str(text))
    ]
    for label in dict.fromkeys(asked):
        if have is not None and label not in have:
            kept = ", ".join(sorted(have)) or "no label"
            yield expression.finding(LABEL_LOST, f"The texts ask for `{label}`, and the result has {kept}.")


def _matchers(expression: Expression, selector: Selector) -> Iterator[Finding]:
    known = selector.known
    for label, _, _ in selector.matchers:
        if known is not None and not known.may_have(label):
            yield _label(expression, selector.name, known, label)


def _label(expression: Expression, metric: str, known: foreign.Known, label: str) -> Finding:
    have = ", ".join(sorted(known.labels - {"*"})) or "none of its own"
    return expression.finding(
        LABEL,
        f"`{metric}` has no label `{label}`: it has {have}.",
        label,
        after=metric,
    )


def _grouping(expression: Expression, node: Any, inside: tuple[Any, ...]) -> Iterator[Finding]:
    """Labels of `by` that nothing within has."""
    selectors = promql.Query(expression.text, node).selectors
    known = [each.known for each in selectors]
    for label in promql.labels_by(node) or ():
        if _made(node, label) or any(each is None or each.may_have(label) for each in known) or not selectors:
            continue
        first = known[0]
        assert first is not None
        yield _label(expression, selectors[0].name, first, label)


def _made(node: Any, label: str) -> bool:
    """Whether a function within makes the label."""
    for each, _ in promql.Query("", node).nodes():
        made = promql.kind(each) == "Call" and each.func.name in ("label_replace", "label_join")
        if made and any(getattr(argument, "val", None) == label for argument in each.args):
            return True
        if promql.kind(each) == "BinaryExpr" and each.modifier is not None:
            card = getattr(each.modifier, "group_labels", None)
            if card and label in card:
                return True
        if promql.kind(each) == "AggregateExpr" and promql.operator(each) == "count_values":
            return True
    return False


def _call(expression: Expression, node: Any) -> Iterator[Finding]:
    function = node.func.name
    if function in promql.RATES and node.args and promql.kind(node.args[0]) == "MatrixSelector":
        metric = node.args[0].vector_selector.name or ""
        known = foreign.find(metric)
        if known is not None and not known.grows:
            counters = _counter_for(metric)
            fix = f"Use {function}({counters}[5m])." if counters else ""
            yield expression.finding(
                RATE_OF_GAUGE, f"`{metric}` is a gauge, and {function}() is for counters.", metric, fix=fix
            )
        if expression.use != "panel" and known is not None and known.grows:
            return
    if function in ("histogram_quantile", "quantile_over_time") and len(node.args) == 2:
        yield from _share(expression, function, node.args[0])
    if function == "histogram_quantile" and len(node.args) == 2:
        yield from _quantile(expression, node.args[1])


def _counter_for(metric: str) -> str | None:
    for suffix in ("_total", "_count"):
        if foreign.find(metric + suffix):
            return metric + suffix
    return None


def _share(expression: Expression, function: str, argument: Any) -> Iterator[Finding]:
    node = promql.bare(argument)
    negative = promql.kind(node) == "UnaryExpr"
    node = promql.bare(node.expr) if negative else node
    if promql.kind(node) != "NumberLiteral":
        return
    value = -float(node.val) if negative else float(node.val)
    if not 0 <= value <= 1:
        fix = f"Write {value / 100:g}." if 1 < value <= 100 else ""
        yield expression.finding(QUANTILE, f"{function}({value:g}, …) is no quantile.", function, fix=fix)


def _quantile(expression: Expression, argument: Any) -> Iterator[Finding]:
    inner = promql.bare(argument)
    for each, _ in promql.Query("", inner).nodes():
        if promql.kind(each) != "AggregateExpr":
            continue
        by, without = promql.labels_by(each), promql.labels_without(each)
        # no modifier at all: every label goes
        if (by is None and without is None) or (by is not None and "le" not in by) or "le" in (without or ()):
            grouped = promql.operator(each)
            yield expression.finding(
                NO_LE,
                f"{grouped} takes le away.",
                grouped,
                fix=f"{grouped} by ({', '.join((*(by or ()), 'le'))}) (…)",
            )
    for selector in promql.Query("", inner).selectors:
        known = selector.known
        metric = selector.name
        if known is None and not metric.endswith(("_count", "_sum", "_total")):
            continue
        if known is not None and (known.part == "_bucket" or known.metric.endswith("_bucket")):
            continue
        if known is None or known.kind is not Kind.HISTOGRAM:
            has = foreign.find(f"{metric}_bucket")
            fix = f"Use {metric}_bucket." if has else ""
        else:
            fix = f"Use {known.metric}_bucket."
        yield expression.finding(NO_BUCKETS, f"`{metric}` has no buckets.", metric, fix=fix)


def _threshold(expression: Expression, node: Any) -> Iterator[Finding]:
    left, right = promql.bare(node.lhs), promql.bare(node.rhs)
    if promql.kind(right) == "NumberLiteral":
        side, value = left, float(right.val)
    elif promql.kind(left) == "NumberLiteral":
        side, value = right, float(left.val)
    else:
        return
    yield from threshold(expression, side, value)


def threshold(expression: Expression, side: Any, value: float) -> Iterator[Finding]:
    """Whether a number can be a threshold of such a value."""
    unit = promql.unit(side)
    names = [each.name for each in promql.Query("", side).selectors]
    first = names[0] if names else ""
    if unit == "share" and value > 1:
        yield expression.finding(
            UNIT, f"`{first}` is a share from 0 to 1, and {value:g} is never reached.", first,
            fix=f"Write {value / 100:g}." if value <= 100 else "",
        )  # fmt: skip
    elif unit == "percent" and 0 < value <= 1:
        yield expression.finding(
            UNIT, f"`{first}` goes from 0 to 100, and {value:g} is passed at once.", first,
            fix=f"Write {value * 100:g}.",
        )  # fmt: skip
    elif unit == "percent" and value > 100:
        yield expression.finding(
            UNIT, f"`{first}` goes from 0 to 100, and {value:g} is never reached.", first
        )
    elif unit == "seconds":
        least = _MILLISECONDS_ANSWER if _ANSWER.search(first) else _MILLISECONDS_LONG
        if re.search("first_token|inter_token|per_output_token", first):
            least = _MILLISECONDS
        if value >= least:
            yield expression.finding(
                UNIT, f"`{first}` is in seconds: {value:g} of them look like milliseconds.", first,
                fix=f"Write {value / 1000:g}.",
            )  # fmt: skip


def _level(expression: Expression, node: Any) -> Iterator[Finding]:
    """A raw counter, or a sum of raw counters, against a number other than 0."""
    left, right = promql.bare(node.lhs), promql.bare(node.rhs)
    if promql.kind(right) != "NumberLiteral" or right.val == 0 or promql.operator(node) in ("==", "!="):
        return
    while promql.kind(left) == "AggregateExpr" and promql.operator(left) in ("sum", "max", "avg", "min"):
        left = promql.bare(left.expr)
    if promql.kind(left) != "VectorSelector":
        return
    known = foreign.find(left.name or "")
    if known is not None and known.grows:
        what = f"`{left.name}` only grows: {right.val:g} is passed one day, for good."
        yield expression.finding(COUNTER_AS_LEVEL, what, left.name, fix=f"increase({left.name}[5m])")


def _ratio(expression: Expression, node: Any) -> Iterator[Finding]:
    if promql.operator(node) != "/":
        return
    left = {each.name for each in promql.Query("", node.lhs).selectors}
    right = {each.name for each in promql.Query("", node.rhs).selectors}
    if len(left) != 1 or len(right) != 1:
        return
    used, free = next(iter(left)), next(iter(right))
    for one, other in (("USED", "FREE"), ("used", "free"), ("used", "available"), ("usage", "available")):
        if one in used and used.replace(one, other) == free:
            fix = f"{used} / ({used} + {free})"
            yield expression.finding(USED_OVER_FREE, f"`{used} / {free}` is no share.", used, fix=fix)
            return
