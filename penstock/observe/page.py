"""A metrics page of some engine, read: values by vLLM's names, whichever version wrote it.

Pure functions of the text. The page is somebody else's: one that is no metrics page is a ValueError, and what
it does not have is None. Names that vLLM has changed are found under either (`names.OLD_NAMES`).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from .names import OLD_NAMES

_OTHER = {old.now: old.old for old in OLD_NAMES}
_BOUND = "le"

MOST_BYTES = 16 << 20
"""Longest page that is read; vLLM's largest have had a megabyte."""


@dataclass(frozen=True, slots=True)
class Histogram:
    """A distribution, or what was added to one between two pages."""

    count: float
    sum: float
    buckets: tuple[tuple[float, float], ...] = ()
    """(upper bound, values at or below it), rising; the last bound is infinite."""

    @property
    def mean(self) -> float | None:
        """None without values."""
        return self.sum / self.count if self.count > 0 else None

    def bound(self, share: float) -> float | None:
        """The lowest bucket's bound that at least this share (0 to 1) of the values is at or below; inf where
        only the last bucket has them, None without values."""
        total = self.buckets[-1][1] if self.buckets else 0.0
        if total <= 0:
            return None
        return next((upper for upper, below in self.buckets if below >= share * total), math.inf)

    def since(self, earlier: Histogram | None) -> Histogram:
        """What was added since an earlier page; all of it, where the engine was started again meanwhile."""
        if earlier is None or earlier.count > self.count:
            return self
        before = dict(earlier.buckets)
        buckets = tuple((upper, max(0.0, below - before.get(upper, 0.0))) for upper, below in self.buckets)
        return Histogram(self.count - earlier.count, max(0.0, self.sum - earlier.sum), buckets)


class Page:
    """The samples of one page."""

    def __init__(self, text: str) -> None:
        """Raises ValueError for a text that is no page of Prometheus's format."""
        if len(text) > MOST_BYTES:
            raise ValueError(f"it has {len(text):,} characters; a metrics page has less than {MOST_BYTES:,}")
        self._samples: dict[str, list[tuple[Mapping[str, str], float]]] = defaultdict(list)
        try:
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    self._samples[sample.name].append((sample.labels, float(sample.value)))
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ValueError(f"it is not in Prometheus's text format: {error}") from error

    def has(self, prefix: str) -> bool:
        """Whether any sample's name begins so."""
        return any(name.startswith(prefix) for name in self._samples)

    def total(self, name: str, **labels: str) -> float | None:
        """Sum over all samples of that name (a counter's with its `_total`) that have these labels, as of
        several engines behind one page."""
        found = [value for have, value in self._named(name) if labels.items() <= have.items()]
        finite = [value for value in found if math.isfinite(value)]
        return sum(finite) if finite else None

    def most(self, name: str) -> float | None:
        """The largest of them, as of shares, which do not add up."""
        return max((value for _, value in self._named(name) if math.isfinite(value)), default=None)

    def labels(self, name: str) -> Mapping[str, str]:
        """Labels of the first sample of that name: what `…_info` metrics tell. Empty if there is none."""
        return next((have for have, _ in self._named(name)), {})

    def histogram(self, name: str) -> Histogram | None:
        """A histogram over all engines and models of the page."""
        count, total = self.total(f"{name}_count"), self.total(f"{name}_sum")
        if count is None or total is None:
            return None
        below: dict[float, float] = defaultdict(float)
        for have, value in self._named(f"{name}_bucket"):
            try:
                upper = float(have[_BOUND])
            except (KeyError, ValueError):
                continue
            if math.isfinite(value) and not math.isnan(upper):
                below[upper] += value
        return Histogram(count, total, tuple(sorted(below.items())))

    def _named(self, name: str) -> list[tuple[Mapping[str, str], float]]:
        if name in self._samples:
            return self._samples[name]
        for suffix in ("", "_total", "_count", "_sum", "_bucket"):
            other = _OTHER.get(name.removesuffix(suffix)) if name.endswith(suffix) else None
            if other is not None and other + suffix in self._samples:
                return self._samples[other + suffix]
        return []
