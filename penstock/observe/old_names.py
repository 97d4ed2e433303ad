"""Names that metrics had in older versions of vLLM, for dashboards that were never changed.

vLLM renames a metric in one version, hides the old name in the next, where --show-hidden-metrics-for-version
shows it, and drops it in the one after. Here the flag gives back every name that the version it says showed
by itself (`names.OLD_NAMES`): 0.31 shows none of them, as in vLLM 0.32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from .names import OLD_NAMES, OldName


class Metrics(Protocol):
    """A metric, or many of them."""

    def collect(self) -> Iterable[Family]:
        """What they are now."""
        ...


class OldNames(Collector):
    """Shows metrics once more under the names that a version of vLLM had for them."""

    def __init__(self, version: tuple[int, int], metrics: Iterable[Metrics]) -> None:
        """metrics: where today's are read."""
        self._metrics = tuple(metrics)
        self._shown: dict[str, list[OldName]] = {}
        for each in OLD_NAMES:
            if each.last >= version:  # a family's name is without the suffix of counters
                self._shown.setdefault(each.now.removesuffix("_total"), []).append(each)

    def collect(self) -> Iterable[Family]:
        """What they are now."""
        for metric in self._metrics:
            for family in metric.collect():
                for each in self._shown.get(family.name, ()):
                    yield _renamed(family, each)

    def describe(self) -> Iterator[Family]:
        """Nothing: they are not looked at before they are collected."""
        return iter(())


def _renamed(family: Family, name: OldName) -> Family:
    renamed = Family(name.old, f"{family.documentation} DEPRECATED: use {name.now}.", family.type)
    for sample in family.samples:
        suffix = sample.name.removeprefix(name.now)
        renamed.samples.append(Sample(name.old + suffix, sample.labels, sample.value))
    return renamed
