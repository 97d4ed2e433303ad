"""A line of statistics every so often while there is work, as people expect from a serving log."""

from __future__ import annotations

import logging
from collections.abc import Callable

from penstock.engine.messages import StepStats

logger = logging.getLogger("penstock.server")


class StatsLog:
    """Sums up the steps' statistics and logs them at most every `interval` seconds; silent when idle.

    Args:
        monotonic: the clock, in seconds.
        interval: seconds between lines.
    """

    def __init__(self, monotonic: Callable[[], float], interval: float = 10.0) -> None:
        self._monotonic = monotonic
        self._interval = interval
        self._since: float | None = None
        self._prompt = self._generated = self._queries = self._hits = self._steps = 0
        self._busy = 0.0

    def __call__(self, stats: StepStats) -> None:
        """Take in one step."""
        now = self._monotonic()
        if self._since is None or now - self._since > 3 * self._interval:
            self._reset(now, stats)  # the first step after a pause starts a new window
        self._prompt += stats.prompt_tokens
        self._generated += stats.generation_tokens
        self._queries += stats.prefix_queries
        self._hits += stats.prefix_hits
        self._steps += 1
        if self._since is not None and now - self._since >= self._interval:
            self._report(now - self._since, stats)
            self._reset(now, stats)

    def _report(self, seconds: float, stats: StepStats) -> None:
        logger.info(
            "running %d, waiting %d; prompt %.1f tok/s, generation %.1f tok/s; KV cache %.1f%%, "
            "prefix hits %.1f%%; device busy %.0f%%, %.1f ms per step",
            stats.running,
            stats.waiting,
            self._prompt / seconds,
            self._generated / seconds,
            100.0 * stats.kv_usage,
            100.0 * self._hits / self._queries if self._queries else 0.0,
            100.0 * min(1.0, (stats.busy - self._busy) / seconds),
            1000.0 * (stats.busy - self._busy) / self._steps,
        )

    def _reset(self, now: float, stats: StepStats) -> None:
        self._since = now
        self._prompt = self._generated = self._queries = self._hits = self._steps = 0
        self._busy = stats.busy
