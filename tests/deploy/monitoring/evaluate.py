"""Evaluates what the scalers ask, as they ask it: the part of PromQL that is in their queries, at one moment.

    samples: {(name, ((label, value), …)): number}

What it does not know is an error. `test_scaling.py` holds it to Prometheus' own answers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from penstock.check import promql

Labels = tuple[tuple[str, str], ...]
Samples = Mapping[tuple[str, Labels], float]
Vector = dict[Labels, float]

_AGGREGATES: dict[str, Callable[[list[float]], float]] = {
    "sum": sum,
    "max": max,
    "min": min,
    "avg": lambda values: sum(values) / len(values),
    "count": lambda values: float(len(values)),
}


def evaluate(text: str, samples: Samples) -> float | None:
    """The single element of a query's result; None where there is none."""
    result = _value(promql.parse(text).node, samples)
    if isinstance(result, float):
        return result
    assert len(result) <= 1, f"{text} has {len(result)} elements"
    return next(iter(result.values()), None)


def _value(node: Any, samples: Samples) -> Vector | float:
    node = promql.bare(node)
    kind = promql.kind(node)
    if kind == "NumberLiteral":
        return float(node.val)
    if kind == "VectorSelector":
        (selector,) = promql.Query("", node).selectors
        return {
            labels: value
            for (name, labels), value in samples.items()
            if name == selector.name and all(_fits(dict(labels), matcher) for matcher in selector.matchers)
        }
    if kind == "AggregateExpr":
        groups: dict[Labels, list[float]] = {}
        by = promql.labels_by(node) or ()
        inner = _value(node.expr, samples)
        assert isinstance(inner, dict)
        for labels, value in inner.items():
            groups.setdefault(tuple(each for each in labels if each[0] in by), []).append(value)
        return {labels: _AGGREGATES[promql.operator(node)](values) for labels, values in groups.items()}
    if kind == "Call":
        name, (first, *rest) = node.func.name, [_value(each, samples) for each in node.args]
        if name == "scalar":
            assert isinstance(first, dict)
            return next(iter(first.values())) if len(first) == 1 else float("nan")
        assert name in ("clamp_min", "clamp_max"), name
        assert isinstance(first, dict)
        assert isinstance(rest[0], float)
        bound, pick = rest[0], max if name == "clamp_min" else min
        return {labels: pick(value, bound) for labels, value in first.items()}
    assert kind == "BinaryExpr", kind
    return _binary(promql.operator(node), _value(node.lhs, samples), _value(node.rhs, samples))


def _binary(operator: str, left: Vector | float, right: Vector | float) -> Vector | float:
    if operator == "or":
        assert isinstance(left, dict)
        assert isinstance(right, dict)
        return left or right
    compute: dict[str, Callable[[float, float], float]] = {
        "+": lambda a, b: a + b,
        "-": lambda a, b: a - b,
        "/": lambda a, b: a / b,
    }
    of = compute[operator]
    if isinstance(left, float):
        return of(left, right) if isinstance(right, float) else {k: of(left, v) for k, v in right.items()}
    if isinstance(right, float):
        return {labels: of(value, right) for labels, value in left.items()}
    return {labels: of(value, right[labels]) for labels, value in left.items() if labels in right}


def _fits(labels: Mapping[str, str], matcher: tuple[str, str, str]) -> bool:
    label, operator, value = matcher
    have = labels.get(label, "")
    if operator in ("=", "!="):
        return (have == value) == (operator == "=")
    return (re.fullmatch(value, have) is not None) == (operator == "=~")
