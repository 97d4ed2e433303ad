"""When an engine that has died is started again: soon, then ever later. Pure: time is an argument."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Backoff:
    """Delays of one replica's restarts: `first`, then twice as long each time, up to `most`."""

    first: float = 0.5
    """Seconds."""
    most: float = 60.0
    """Seconds."""
    steady: float = 60.0
    """Whoever has been ready for so many seconds had a good start, and begins anew."""
    failures: int = 0
    """Deaths in a row."""

    def died(self, now: float, ready_since: float | None) -> float:
        """Seconds until the next start. `ready_since`: monotonic time, or None if it never was ready."""
        if ready_since is not None and now - ready_since >= self.steady:
            self.failures = 0
        delay = min(self.most, self.first * 2.0 ** min(self.failures, 30))
        self.failures += 1
        return delay
