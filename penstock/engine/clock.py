"""The engine's clock: CLOCK_MONOTONIC, which all processes of a machine share, or virtual time."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Seconds since some fixed moment."""

    def now(self) -> float:
        """Seconds; never goes back."""
        ...

    def spent(self, seconds: float) -> None:
        """A step took this long: virtual clocks move on, real ones have moved already."""
        ...


class MonotonicClock:
    """Real time."""

    def now(self) -> float:
        """CLOCK_MONOTONIC in seconds."""
        return time.monotonic()

    def spent(self, seconds: float) -> None:
        """Nothing to do."""


class VirtualClock:
    """Time that passes only when a step says so."""

    def __init__(self, start: float = 0.0) -> None:
        self._now = start

    def now(self) -> float:
        """Virtual seconds."""
        return self._now

    def spent(self, seconds: float) -> None:
        """Move on."""
        self._now += seconds
