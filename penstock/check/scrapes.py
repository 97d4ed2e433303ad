"""How often Prometheus asks, and for how long it waits: of monitors, Prometheus itself, scrape_configs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .cluster import Keys, items, mapping
from .finding import Finding, Rule, Severity
from .sources import Document, dig

TIMEOUT = Rule(
    "scrape-timeout",
    Severity.ERROR,
    "a scrape that may take longer than the time to the next",
    "Prometheus does not load such a file; the operator drops such a monitor, and only its own log tells: "
    "nothing is scraped, alerts stay silent, and scalers see no load.",
    "A scrapeTimeout of at most the interval.",
)
RULES = (TIMEOUT,)

_ENDPOINTS = {
    "ServiceMonitor": ("spec", "endpoints"),
    "PodMonitor": ("spec", "podMetricsEndpoints"),
}
_DURATION = re.compile(
    r"(?=.)(?:(\d{1,6})y)?(?:(\d{1,6})w)?(?:(\d{1,6})d)?(?:(\d{1,6})h)?(?:(\d{1,6})m)?(?:(\d{1,6})s)?"
    r"(?:(\d{1,9})ms)?"
)
_SECONDS = (365 * 86400, 7 * 86400, 86400, 3600, 60, 1, 0.001)


def rules_of(document: Document, all: Sequence[Document]) -> Iterator[Finding]:
    """Time-outs of a document that are above their interval, where both are said."""
    for keys, entry, interval, timeout in _scrapes(document):
        every, wait = duration(entry.get(interval)), duration(entry.get(timeout))
        if every and wait and wait > every:
            what = f"{timeout} is {entry[timeout]}, {interval} {entry[interval]}."
            yield document.finding(TIMEOUT, what, *keys, timeout)


def duration(value: Any) -> float | None:
    """Seconds of a duration as Prometheus has it (`1m30s`); None if it is none."""
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return None
    return float(sum(int(part or 0) * unit for part, unit in zip(match.groups(), _SECONDS, strict=True)))


def _scrapes(document: Document) -> Iterator[tuple[Keys, Mapping[str, Any], str, str]]:
    """(path, what is said there, name of the interval, name of the time-out)."""
    data, kind = document.data, dig(document.data, "kind")
    if str(dig(data, "apiVersion", default="")).startswith("monitoring.coreos.com/"):
        at = _ENDPOINTS.get(str(kind))
        for index, each in enumerate(items(document.get(*at)) if at else ()):
            yield (*(at or ()), index), mapping(each), "interval", "scrapeTimeout"
        if kind == "Probe":
            yield ("spec",), mapping(document.get("spec")), "interval", "scrapeTimeout"
        elif kind in ("Prometheus", "PrometheusAgent", "ScrapeConfig"):
            yield ("spec",), mapping(document.get("spec")), "scrapeInterval", "scrapeTimeout"
    elif isinstance(dig(data, "scrape_configs"), list):
        common = {"scrape_interval": "1m", **mapping(dig(data, "global"))}
        yield ("global",), common, "scrape_interval", "scrape_timeout"
        for index, each in enumerate(items(dig(data, "scrape_configs"))):
            entry = {"scrape_interval": common["scrape_interval"], **mapping(each)}
            yield ("scrape_configs", index), entry, "scrape_interval", "scrape_timeout"
