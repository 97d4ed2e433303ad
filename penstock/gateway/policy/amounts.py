"""What a request uses, and what a limit counts: integers, so that sums are exact in any order.

unit            one is
requests        a request that was let through
tokens          a token, in or out
concurrent      a request under way
dollars         a nanodollar
device_seconds  a nanosecond of one device
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Unit = Literal["requests", "tokens", "concurrent", "dollars", "device_seconds"]
Window = Literal["minute", "day", "month", "now"]
"""`minute` slides; days and months are UTC's; `now` is what is under way."""

NANO = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Amounts:
    """What a request uses, or will use at most."""

    requests: int = 1
    tokens: int = 0
    dollars: int = 0
    """Nanodollars."""
    device_seconds: int = 0
    """Nanoseconds times devices."""

    def of(self, unit: Unit) -> int:
        """The amount in one unit."""
        return 1 if unit == "concurrent" else int(getattr(self, unit))

    def plus(self, other: Amounts) -> Amounts:
        """Both together, as one request."""
        return Amounts(
            requests=self.requests,
            tokens=self.tokens + other.tokens,
            dollars=self.dollars + other.dollars,
            device_seconds=self.device_seconds + other.device_seconds,
        )


@dataclass(frozen=True, slots=True)
class Limit:
    """A cap on what one scope uses in one window."""

    scope: str
    """Whose: `key:ID`, `team:NAME`, `tag:feature=search`."""
    unit: Unit
    window: Window
    cap: int
    """In the unit's integers."""
