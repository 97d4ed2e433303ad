"""A line of statistics every so often while there is work, as people expect from a serving log."""

from __future__ import annotations

import logging
from collections.abc import Callable

from penstock.core.stats import EngineStats

logger = logging.getLogger("penstock.server")


class StatsLog:
    """Compares the engine's totals and logs what was done, at most every `interval` seconds; else silent.

    Args:
        monotonic: the clock, in seconds.
        interval: seconds between lines.
    """

    def __init__(self, monotonic: Callable[[], float], interval: float = 10.0) -> None:
        self._monotonic = monotonic
        self._interval = interval
        self._since: float | None = None
        self._last = self._start = EngineStats()
        """The last report, and the one that the window began with."""

    def __call__(self, stats: EngineStats) -> None:
        """Take in one report."""
        now = self._monotonic()
        if self._since is None or now - self._since > 3 * self._interval:
            self._since, self._start = now, self._last  # the first step after a pause starts a new window
        self._last = stats
        if now - self._since >= self._interval:
            self._report(now - self._since, stats, self._start)
            self._since, self._start = now, stats

    def _report(self, seconds: float, stats: EngineStats, start: EngineStats) -> None:
        new, old = stats.totals, start.totals
        queries, steps = new.prefix_queries - old.prefix_queries, new.steps - old.steps
        logger.info(
            "running %d, waiting %d; prompt %.1f tok/s, generation %.1f tok/s; KV cache %.1f%%, "
            "prefix hits %.1f%%; device busy %.0f%%, %.1f ms per step",
            stats.running,
            stats.waiting,
            (new.prompt_tokens - old.prompt_tokens) / seconds,
            (new.generation_tokens - old.generation_tokens) / seconds,
            100.0 * stats.kv_usage,
            100.0 * (new.prefix_hits - old.prefix_hits) / queries if queries else 0.0,
            100.0 * min(1.0, (stats.busy - start.busy) / seconds),
            1000.0 * (stats.busy - start.busy) / max(1, steps),
        )
