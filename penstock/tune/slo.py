"""Targets: what 95 of 100 requests must keep. Milliseconds, under the names that reports use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

RANK = 95.0
"""The percentile that targets are for."""

TITLES = {"ttft": "TTFT", "tpot": "TPOT", "e2el": "end-to-end latency"}


@dataclass(frozen=True, slots=True)
class Slo:
    """Bounds in ms on the 95th percentile of TTFT, TPOT and end-to-end latency; None is no bound."""

    ttft: float | None = None
    tpot: float | None = None
    e2el: float | None = None

    @property
    def bounds(self) -> dict[str, float]:
        """Those that there are, by metric."""
        pairs = (("ttft", self.ttft), ("tpot", self.tpot), ("e2el", self.e2el))
        return {name: bound for name, bound in pairs if bound is not None}

    def or_else(self, others: Mapping[str, float]) -> Slo:
        """These targets if there are any, else the others: half of each would be nobody's wish."""
        return self if self.bounds else Slo(**{name: others[name] for name in TITLES if name in others})

    def __str__(self) -> str:
        return ", ".join(f"P95 {TITLES[name]} ≤ {bound:g} ms" for name, bound in self.bounds.items())
