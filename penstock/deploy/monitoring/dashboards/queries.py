"""What the queries of pages have in common: rates over Grafana's interval, percentiles, the namespace."""

from __future__ import annotations

from penstock.deploy.monitoring.panels import RATE, Variable
from penstock.deploy.monitoring.promql import quantile, select
from penstock.observe.names import Metric

GREEN, YELLOW, RED, CLEAR = "green", "yellow", "red", "transparent"


def namespace(metric: Metric) -> Variable:
    """Which namespace, of those that have the metric."""
    return Variable("namespace", f"label_values({select(metric)}, namespace)", "Namespace", several=False)


def rate(metric: Metric, *where: str, by: str = "", part: str = "") -> str:
    """The sum of a counter's rates, by labels."""
    grouped = f" by ({by})" if by else ""
    return f"sum{grouped} (rate({select(metric, *where, part=part)}[{RATE}]))"


def percentiles(metric: Metric, *where: str, by: str, legend: str) -> tuple[tuple[str, str], ...]:
    """P50, P95, P99 by a label, each with its legend."""
    return tuple(
        (quantile(q, metric, (by,), *where, window=RATE), f"P{q * 100:g} {legend}") for q in (0.5, 0.95, 0.99)
    )
