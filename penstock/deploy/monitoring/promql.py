"""Selectors and numbers as PromQL writes them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from penstock.observe.names import Metric


def text(value: str) -> str:
    """A string in double quotes."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def number(value: float) -> str:
    """Without what is not needed: 1, 0.9, 12.8."""
    return f"{value:.10g}"


def duration(seconds: float) -> str:
    """Of `for` and ranges, in whole seconds or minutes."""
    whole = max(1, round(seconds))
    return f"{whole // 60}m" if whole % 60 == 0 else f"{whole}s"


def jobs(names: Iterable[str]) -> str:
    """A matcher for series of these Services."""
    each = list(names)
    if len(each) == 1:
        return f"job={text(each[0])}"
    return f"job=~{text('|'.join(re.escape(name).replace(chr(92) + '-', '-') for name in each))}"


def select(metric: Metric | str, *matchers: str, part: str = "") -> str:
    """`name{…}`. part: `bucket`, `count` or `sum` of a histogram; a counter has its `_total`."""
    if isinstance(metric, str):
        name = metric
    elif part:
        name = next(series for series in metric.series() if series.endswith(f"_{part}"))
    else:
        (name,) = metric.series()
    return f"{name}{{{','.join(matchers)}}}" if matchers else name


def quantile(q: float, metric: Metric, by: Iterable[str], *matchers: str, window: str = "5m") -> str:
    """A percentile of a histogram over a window."""
    buckets = select(metric, *matchers, part="bucket")
    return f"histogram_quantile({number(q)}, sum by ({', '.join((*by, 'le'))}) (rate({buckets}[{window}])))"
