"""Where queries stand: rule files, PrometheusRules, KEDA's triggers, prometheus-adapter's rules, dashboards.

    Document ─▶ Expression (text, what it is for, where each of its characters stands)

ConfigMaps are looked into: a dashboard, a rule file or an adapter's configuration is a text in one of them.
It judges nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from . import sources
from .finding import Finding, Rule
from .sources import Document, dig

Use = Literal["alert", "record", "panel", "variable", "scaler", "adapter"]
Key = str | int


@dataclass(frozen=True, slots=True)
class Expression:
    """One query."""

    text: str
    """As it was written, less an adapter's templates, which are filled in."""
    use: Use
    name: str
    """Of the alert, record, panel, trigger or metric."""
    document: Document
    keys: tuple[Key, ...]
    """Where it stands in the document."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What stands around it: the rule, the trigger's metadata, the adapter's rule."""
    base: tuple[int, bool] = (0, False)
    """Of a text within a text: (line of its first line, whether its lines are the document's)."""

    def at(self, word: str = "", after: str = "") -> tuple[int, int]:
        """Line and column of a word in it, the first one after another; of its beginning, if not found."""
        start = max(0, self.text.find(after)) if after else 0
        match = re.search(rf"(?<![\w:]){re.escape(word)}(?![\w:])", self.text[start:]) if word else None
        offset = start + match.start() if match else 0
        line, column = self.document.value_at(*self.keys, offset=offset)
        return _shifted(line, column, self.base)

    def finding(self, rule: Rule, what: str, word: str = "", *, fix: str = "", after: str = "") -> Finding:
        """A finding at a word of it."""
        line, column = self.at(word, after)
        return Finding(rule, self.document.path, line, column, what, fix)


def _shifted(line: int, column: int, base: tuple[int, bool]) -> tuple[int, int]:
    first, exact = base
    if not first:
        return line, column
    return (first + line - 1, column) if exact else (first, 1)


def expressions(document: Document) -> Iterator[Expression]:
    """All queries of a document."""
    yield from _of(document, (0, False))


def recorded(document: Document) -> Iterator[str]:
    """Names that recording rules of the document make."""
    for each in expressions(document):
        if each.use == "record":
            yield each.name


def adapted(document: Document) -> Iterator[tuple[str, Expression]]:
    """Names of metrics that prometheus-adapter makes of series, and their rules."""
    for each in expressions(document):
        if each.use == "adapter":
            yield each.name, each


def _of(document: Document, base: tuple[int, bool]) -> Iterator[Expression]:
    data = document.data
    if not isinstance(data, dict):
        return
    kind = data.get("kind")
    if kind == "ConfigMap":
        yield from _inside(document)
    elif kind in ("ScaledObject", "ScaledJob"):
        yield from _triggers(document)
    elif kind == "PrometheusRule":
        yield from _groups(document, ("spec", "groups"), base)
    elif kind is None or "apiVersion" not in data:
        if isinstance(data.get("groups"), list):
            yield from _groups(document, ("groups",), base)
        yield from _adapter(document, ("rules",), base)
        if isinstance(data.get("panels"), list):
            yield from _dashboard(document, (), base)
        elif isinstance(dig(data, "dashboard", "panels"), list):
            yield from _dashboard(document, ("dashboard",), base)


def _inside(document: Document) -> Iterator[Expression]:
    """Texts of a ConfigMap that are rules, dashboards or an adapter's configuration."""
    entries = dig(document.data, "data")
    for key, text in entries.items() if isinstance(entries, dict) else ():
        if not isinstance(text, str) or not re.search(r"\b(panels|groups|seriesQuery)\b", text):
            continue
        line, _ = document.value_at("data", key)
        node = document.node.find(("data", key))
        exact = node is not None and node.end > node.value_line
        if text.lstrip()[:1] == "{":
            found = sources.read_text(text, f"{key}.json").documents
        else:
            found = tuple(sources.documents_of(text, document.path)[0])
        for each in found:
            yield from _of(Document(document.path, each.data, each.node, line, line), (line, exact))


def _groups(document: Document, keys: tuple[Key, ...], base: tuple[int, bool]) -> Iterator[Expression]:
    for index, group in enumerate(_list(dig(document.data, *keys))):
        for number, rule in enumerate(_list(dig(group, "rules"))):
            if not isinstance(rule, dict) or not isinstance(rule.get("expr"), str | int | float):
                continue
            use: Use = "record" if "record" in rule else "alert"
            name = str(rule.get("record") or rule.get("alert") or "")
            where = (*keys, index, "rules", number, "expr")
            yield Expression(str(rule["expr"]), use, name, document, where, rule, base)


def _triggers(document: Document) -> Iterator[Expression]:
    for index, trigger in enumerate(_list(dig(document.data, "spec", "triggers"))):
        query = dig(trigger, "metadata", "query")
        if dig(trigger, "type") == "prometheus" and isinstance(query, str):
            name = str(dig(trigger, "name") or dig(trigger, "metadata", "metricName") or "")
            where = ("spec", "triggers", index, "metadata", "query")
            yield Expression(query, "scaler", name, document, where, trigger)


_TEMPLATE = re.compile(r"<<-?\s*\.(Series|LabelMatchers|LabelValuesByName|GroupBy|GroupBySlice)[^>]*>>")


def _adapter(document: Document, keys: tuple[Key, ...], base: tuple[int, bool]) -> Iterator[Expression]:
    rules = dig(document.data, *keys)
    groups: list[tuple[tuple[Key, ...], Any]] = [(keys, rules)]
    if isinstance(rules, dict):
        groups = [((*keys, name), rules.get(name)) for name in ("custom", "external")]
    for name in ("externalRules",):
        groups.append(((name,), dig(document.data, name)))
    for where, found in groups:
        for index, rule in enumerate(_list(found)):
            series = dig(rule, "seriesQuery")
            query = dig(rule, "metricsQuery")
            if not isinstance(series, str) or not isinstance(query, str):
                continue
            external = str(where[-1]).startswith("external")
            bare = series.partition("{")[0].strip()
            matchers = series.partition("{")[2].rpartition("}")[0]
            filled = {
                "Series": bare,
                "LabelMatchers": matchers or 'namespace="x"',
                "GroupBy": "namespace" if external else "namespace, pod",
            }
            text = _TEMPLATE.sub(lambda match, filled=filled: filled.get(match[1], "x"), query)  # type: ignore[misc]
            name = _named(rule, bare)
            settings = {**rule, "external": external}
            yield Expression(text, "adapter", name, document, (*where, index, "metricsQuery"), settings, base)


def _named(rule: Any, series: str) -> str:
    """What the adapter calls the metric."""
    matches, given = dig(rule, "name", "matches"), dig(rule, "name", "as")
    if not isinstance(given, str) or not given:
        return series
    try:
        pattern = re.compile(str(matches or ".*")[:200])
        found = pattern.fullmatch(series)
        plain = re.sub(r"\$\{?(\d+)\}?", r"\\g<\1>", given)
        return found.expand(plain) if found else given
    except (re.error, IndexError):
        return given


def _dashboard(document: Document, keys: tuple[Key, ...], base: tuple[int, bool]) -> Iterator[Expression]:
    data = dig(document.data, *keys) if keys else document.data
    stack: list[tuple[tuple[Key, ...], Any]] = [((*keys, "panels"), dig(data, "panels"))]
    for index, row in enumerate(_list(dig(data, "rows"))):
        stack.append(((*keys, "rows", index, "panels"), dig(row, "panels")))
    while stack:
        where, panels = stack.pop()
        for index, panel in enumerate(_list(panels)):
            if not isinstance(panel, dict):
                continue
            stack.append(((*where, index, "panels"), panel.get("panels")))
            if not _prometheus(panel.get("datasource")):
                continue
            for number, target in enumerate(_list(panel.get("targets"))):
                text = dig(target, "expr")
                if isinstance(text, str) and text.strip() and _prometheus(dig(target, "datasource")):
                    at = (*where, index, "targets", number, "expr")
                    yield Expression(text, "panel", str(panel.get("title", "")), document, at, panel, base)
    for index, variable in enumerate(_list(dig(data, "templating", "list"))):
        query = dig(variable, "query")
        at = (*keys, "templating", "list", index, "query")
        if isinstance(query, dict):
            query, at = query.get("query"), (*at, "query")
        if dig(variable, "type") != "query" or not isinstance(query, str):
            continue
        found = re.match(r"\s*(?:label_values|query_result)\((.*?)(?:,\s*\w+)?\)\s*$", query, re.S)
        if found and "(" not in found[1][:1] and re.match(r"[\w:]", found[1]):
            yield Expression(found[1], "variable", str(dig(variable, "name")), document, at, variable, base)


def _prometheus(source: Any) -> bool:
    """Whether a data source may be Prometheus: it is, or it is not said."""
    kind = dig(source, "type")
    return kind in (None, "prometheus", "datasource")


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
