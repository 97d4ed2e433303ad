"""PromQL: parsed by promql-parser (the grammar of Prometheus 2.45), walked, and asked what it means.

    text ─▶ Query ─┬─ selectors   which series it reads
                   ├─ single      whether its result is one element
                   └─ unit        whether its result is a share, a percentage, or seconds

Variables of Grafana (`$__rate_interval`, `$job`) are filled in first. It knows no rule, and no file.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from penstock.observe import foreign

try:
    parser: Any = importlib.import_module("promql_parser")
except ImportError:  # the extra `check` is not installed
    parser = None

MAX_CHARACTERS = 20_000
"""Longest query that is parsed."""
MAX_NESTED, MAX_OPERATORS = 60, 250
"""Most parentheses and brackets that are open at a time, and most operators: the parser descends as deep, and
ends the process where its stack ends."""

RATES = frozenset("rate irate increase resets".split())
"""Functions that are about counters."""
SAME_UNIT = frozenset(
    "max_over_time min_over_time avg_over_time last_over_time quantile_over_time clamp clamp_max clamp_min "
    "abs sort sort_desc label_replace label_join round ceil floor".split()
)
"""Functions whose result has the unit of what they are given."""
_SAME_UNIT_AGGREGATES = frozenset("max min avg quantile topk bottomk any group_left".split())
_ONE = frozenset("absent absent_over_time scalar vector time pi".split())
COMPARISONS = frozenset("> < >= <= == !=".split())
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"|\'(?:[^\'\\]|\\.)*\'|`[^`]*`', re.S)
_OPERATOR = re.compile(r"[-+*/%^]|[<>=!]=?~?|\b(?:and|or|unless|atan2|offset)\b", re.I)
_VARIABLE = re.compile(r"\$\{(\w+)(?::\w+)?\}|\$(\w+)|\[\[(\w+)(?::\w+)?\]\]")

SHARES = frozenset(
    "vllm:kv_cache_usage_perc vllm:hisparse_host_cache_usage_perc vllm:kv_offload_cpu_cache_usage_perc "
    "vllm:kv_offload_cpu_cache_write_usage_perc vllm:kv_offload_cpu_cache_read_usage_perc "
    "vllm:kv_offload_tiering_primary_write_usage_perc vllm:kv_offload_tiering_primary_read_usage_perc "
    "penstock:gateway_upstream_weight".split()
)
"""Gauges from 0 to 1, whatever `_perc` sounds like; and DCGM_FI_PROF_*_ACTIVE."""
PERCENT = frozenset(
    "DCGM_FI_DEV_GPU_UTIL DCGM_FI_DEV_MEM_COPY_UTIL DCGM_FI_DEV_ENC_UTIL DCGM_FI_DEV_DEC_UTIL".split()
)
"""Gauges from 0 to 100."""


class Broken(ValueError):
    """It is no PromQL."""


@dataclass(frozen=True, slots=True)
class Selector:
    """Series that a query reads."""

    name: str
    """Empty where only matchers say which."""
    matchers: tuple[tuple[str, str, str], ...]
    """(label, `=` `!=` `=~` `!~`, value)."""
    inside: tuple[Any, ...]
    """Nodes around it, from the outermost."""
    node: Any

    @property
    def known(self) -> foreign.Known | None:
        """What the tables have under its name."""
        return foreign.find(self.name)

    def value(self, label: str) -> tuple[str, str] | None:
        """(operator, value) of a matcher."""
        return next(((op, value) for name, op, value in self.matchers if name == label), None)


@dataclass(frozen=True, slots=True)
class Query:
    """A query that was parsed."""

    text: str
    """As it was written."""
    node: Any

    @property
    def selectors(self) -> tuple[Selector, ...]:
        """All series that it reads."""
        return tuple(_selectors(self.node, ()))

    @property
    def single(self) -> bool:
        """Whether its result is certainly one element, or a scalar."""
        return _single(self.node)

    def nodes(self) -> Iterator[tuple[Any, tuple[Any, ...]]]:
        """Every node, with those around it."""
        yield from _walk(self.node, ())


def available() -> bool:
    """Whether queries can be parsed: the package promql-parser is there."""
    return parser is not None


@functools.lru_cache(2048)
def parse(text: str) -> Query:
    """A query. Raises Broken, with the parser's own word on it."""
    if len(text) > MAX_CHARACTERS:
        raise Broken(f"it has over {MAX_CHARACTERS} characters")
    filled = fill(text)
    plain = _STRING.sub("", filled)
    deep = most = 0
    for sign in plain:
        deep += (sign in "([{") - (sign in ")]}")
        most = max(most, deep)
    operators = len(_OPERATOR.findall(re.sub(r"\{[^{}]*\}", "", plain)))
    if most > MAX_NESTED or operators > MAX_OPERATORS or plain.count("[") > MAX_OPERATORS:
        raise Broken(f"it has over {MAX_OPERATORS} operators, or is nested over {MAX_NESTED} deep")
    try:
        return Query(text, parser.parse(filled))
    except ValueError as error:
        raise Broken(str(error)) from None


def fill(text: str) -> str:
    """Variables outside of strings: durations where one stands, else a label's name or a number."""
    parts: list[str] = []
    end = 0
    for string in _STRING.finditer(text):
        parts += (_filled(text[end : string.start()], "".join(parts)), string[0])
        end = string.end()
    parts.append(_filled(text[end:], "".join(parts)))
    return "".join(parts)


def _filled(text: str, before: str) -> str:
    def one(match: re.Match[str]) -> str:
        ahead = (before + text[: match.start()]).rstrip()
        name = match[1] or match[2] or match[3]
        if name.startswith("__") or re.search(r"(\[|:|\boffset)$", ahead):
            return "5m"
        if re.search(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^()]*$", ahead):
            return "job"
        return "1"

    return _VARIABLE.sub(one, text)


def kind(node: Any) -> str:
    """`AggregateExpr`, `Call`, …"""
    return type(node).__name__


def operator(node: Any) -> str:
    """Of a BinaryExpr or AggregateExpr: `>`, `sum`."""
    return str(node.op)


def children(node: Any) -> tuple[Any, ...]:
    """What a node is made of."""
    which = kind(node)
    if which in ("AggregateExpr", "ParenExpr", "UnaryExpr", "SubqueryExpr"):
        parameter = getattr(node, "param", None)
        return (node.expr, *((parameter,) if hasattr(parameter, "prettify") else ()))
    if which == "BinaryExpr":
        return (node.lhs, node.rhs)
    if which == "MatrixSelector":
        return (node.vector_selector,)
    return tuple(node.args) if which == "Call" else ()


def bare(node: Any) -> Any:
    """Without parentheses."""
    while kind(node) == "ParenExpr":
        node = node.expr
    return node


def labels_by(node: Any) -> tuple[str, ...] | None:
    """Labels of an aggregation's `by`; None where it has none."""
    modifier = node.modifier
    if modifier is None or str(modifier.type).endswith("Without"):
        return None
    return tuple(modifier.labels)


def labels_without(node: Any) -> tuple[str, ...] | None:
    """Labels of an aggregation's `without`; None where it has none."""
    modifier = node.modifier
    return tuple(modifier.labels) if modifier is not None and labels_by(node) is None else None


def _walk(node: Any, inside: tuple[Any, ...]) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    yield node, inside
    for child in children(node):
        yield from _walk(child, (*inside, node))


_OPERATORS = {"Equal": "=", "NotEqual": "!=", "Re": "=~", "NotRe": "!~"}


def _selectors(root: Any, inside: tuple[Any, ...]) -> Iterator[Selector]:
    for node, around in _walk(root, inside):
        if kind(node) == "VectorSelector":
            every = [*node.matchers.matchers, *(each for more in node.matchers.or_matchers for each in more)]
            matchers = [
                (each.name, _OPERATORS[str(each.op).rpartition(".")[2]], each.value) for each in every
            ]
            named = next((value for label, op, value in matchers if (label, op) == ("__name__", "=")), "")
            rest = tuple(each for each in matchers if each[0] != "__name__" or each[1] != "=")
            yield Selector(node.name or named, rest, around, node)


def _single(node: Any) -> bool:
    node = bare(node)
    which = kind(node)
    if which in ("NumberLiteral", "StringLiteral"):
        return True
    if which == "AggregateExpr":
        name = operator(node)
        if name in ("topk", "bottomk", "limitk"):
            return getattr(node.param, "val", 0) == 1 and node.modifier is None
        return name not in ("count_values", "limit_ratio") and (
            node.modifier is None or labels_by(node) == ()
        )
    if which == "BinaryExpr":
        if operator(node) in ("and", "unless"):
            return _single(node.lhs)
        return _single(node.lhs) and _single(node.rhs)
    if which in ("UnaryExpr", "SubqueryExpr"):
        return _single(node.expr)
    if which == "Call":
        name = node.func.name
        if name in _ONE:
            return True
        if name == "histogram_quantile":
            inner = bare(node.args[1])
            return kind(inner) == "AggregateExpr" and labels_by(inner) == ("le",)
        return bool(node.args) and _single(node.args[-1] if name == "quantile_over_time" else node.args[0])
    return False


def result_labels(node: Any) -> frozenset[str] | None:
    """The labels that a result has; None where that hangs on the series."""
    node = bare(node)
    which = kind(node)
    if which == "AggregateExpr":
        if operator(node) in ("topk", "bottomk", "limitk", "limit_ratio"):
            return result_labels(node.expr)
        if operator(node) == "count_values":
            return None
        by = labels_by(node)
        return frozenset(by or ()) if node.modifier is None or by is not None else None
    if which in ("UnaryExpr", "SubqueryExpr"):
        return result_labels(node.expr)
    if which == "NumberLiteral":
        return frozenset()
    if which == "Call":
        name = node.func.name
        if name in ("scalar", "vector", "time", "pi"):
            return frozenset()
        if name == "histogram_quantile":
            labels = result_labels(node.args[1])
            return labels and labels - {"le"}
        return result_labels(node.args[0]) if name in SAME_UNIT - {"label_replace", "label_join"} else None
    if which != "BinaryExpr":
        return None
    left, right = result_labels(node.lhs), result_labels(node.rhs)
    if operator(node) == "or":
        return None if left is None or right is None else left | right
    if operator(node) in ("and", "unless") or kind(bare(node.rhs)) == "NumberLiteral":
        return left
    if kind(bare(node.lhs)) == "NumberLiteral":
        return right
    plain = node.modifier is None or (node.modifier.matching is None and not node.modifier.group_labels)
    return left if plain else None


def unit(node: Any) -> str | None:
    """`share` (0 to 1), `percent` (0 to 100), `seconds` of the latency of requests; None where it is not
    known."""
    node = bare(node)
    which = kind(node)
    if which in ("VectorSelector", "MatrixSelector"):
        name = (node.vector_selector if which == "MatrixSelector" else node).name or ""
        if name in PERCENT:
            return "percent"
        dcgm = name.startswith("DCGM_FI_PROF_") and name.endswith("_ACTIVE")
        return "share" if dcgm or name in SHARES else None
    if which == "AggregateExpr":
        return unit(node.expr) if operator(node) in _SAME_UNIT_AGGREGATES else None
    if which in ("UnaryExpr", "SubqueryExpr"):
        return unit(node.expr)
    if which == "Call":
        name = node.func.name
        if name == "histogram_quantile":
            names = {each.name for each in _selectors(node, ())}
            return "seconds" if names and all("_seconds" in each for each in names) else None
        if name in SAME_UNIT and node.args:
            return unit(node.args[-1] if name == "quantile_over_time" else node.args[0])
        return None
    if which == "BinaryExpr":
        return _unit_of_two(node)
    return None


def _unit_of_two(node: Any) -> str | None:
    name = operator(node)
    left, right = bare(node.lhs), bare(node.rhs)
    value = next((each.val for each in (right, left) if kind(each) == "NumberLiteral"), None)
    other = left if kind(right) == "NumberLiteral" else right
    if value == 100 and name == "*":
        return "percent" if unit(other) == "share" else None
    if value == 100 and name == "/" and other is left:
        return "share" if unit(left) == "percent" else None
    if name in COMPARISONS or name in ("and", "unless"):
        return unit(left)
    if name == "or":
        first = unit(left)
        return first if first is not None and first == unit(right) else None
    if name == "/" and value is None:
        names = [{each.name for each in _selectors(side, ())} for side in (left, right)]
        # a part of a whole: of the same metric, or of a sum that it is in
        return "share" if names[0] and names[0] <= names[1] else None
    return None
