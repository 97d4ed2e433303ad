"""The engine's clock: CLOCK_MONOTONIC, which all processes of a machine share. Tests have a virtual one."""

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
