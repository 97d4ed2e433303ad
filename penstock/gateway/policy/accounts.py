"""One limit, counted: what is reserved, what was used, and whether one more request fits.

    free = granted - reserved - used        never below zero by a reservation

`granted` is the whole cap, or a lease of a part of it (leases.py). How an amount passes through a window:

minute           a reservation counts from its beginning to its end; what was used then counts for 60 more
                 seconds, by slots of one second (so up to one second longer, never shorter). A request
                 itself is counted when it comes and stays counted, whatever becomes of it.
day, month       what was reserved in a window of UTC is settled in that window, whenever it ends: the sum of
                 a day's rows is the day's account
now              reserved only
"""

from __future__ import annotations

from collections import deque
from datetime import UTC, datetime, timedelta

from .amounts import Limit, Unit, Window

SPAN = 60
"""Seconds of the sliding window."""


def window_start(window: Window, now: float) -> int:
    """Unix time at which the window around `now` began; 0 for windows that have no beginning."""
    if window == "day":
        return int(now // 86_400) * 86_400
    if window == "month":
        day = datetime.fromtimestamp(now, UTC)
        return int(datetime(day.year, day.month, 1, tzinfo=UTC).timestamp())
    return 0


def window_end(window: Window, start: int) -> float:
    """Unix time at which the window that began at `start` ends."""
    if window == "day":
        return start + 86_400
    if window == "month":
        day = datetime.fromtimestamp(start, UTC) + timedelta(days=32)
        return datetime(day.year, day.month, 1, tzinfo=UTC).timestamp()
    return float("inf")


def account_id(scope: str, unit: Unit, window: Window, start: int) -> str:
    """The name of one account in every store."""
    return f"{scope}|{unit}|{window}|{start}"


class Account:
    """One limit in one window. `now` is Unix time, and does not jump without `shift`; should it go backwards,
    nothing is forgotten for it."""

    __slots__ = ("_at_once", "_slots", "cap", "end", "granted", "id", "limit", "reserved", "start", "used")

    def __init__(self, limit: Limit, now: float, granted: int = 0) -> None:
        self.limit = limit
        self.cap = limit.cap
        self.start = window_start(limit.window, now)
        self.end = window_end(limit.window, self.start)
        self.id = account_id(limit.scope, limit.unit, limit.window, self.start)
        self.granted = granted
        self.reserved = 0
        self.used = 0
        # seconds of the last minute and what they used, oldest first; at most SPAN + 2 of them
        self._slots: deque[list[int]] | None = deque() if limit.window == "minute" else None
        self._at_once = limit.unit == "requests" and limit.window == "minute"

    @property
    def is_budget(self) -> bool:
        """Whether what it counts stays counted until its window ends."""
        return self.limit.window in ("day", "month")

    def held(self, now: float) -> int:
        """What counts at present."""
        if self._slots:
            self._roll(int(now))
        return self.used + self.reserved

    def free(self, now: float) -> int:
        """What one more request may reserve; negative after a request has used more than it had reserved."""
        if self._slots:
            self._roll(int(now))
        return self.granted - self.reserved - self.used

    def reserve(self, amount: int, now: float) -> None:
        """Count a request's worst case. The caller has seen that it is free."""
        if self._at_once:
            self._use(amount, now)
        else:
            self.reserved += amount

    def settle(self, reserved: int, used: int, now: float) -> None:
        """A reservation of `reserved` has ended, and has used `used`."""
        if self._at_once:
            return
        self.reserved -= reserved
        if used and self.limit.window != "now":
            self._use(used, now)

    def fold(self, amount: int) -> None:
        """The store counts `amount` of what was used here, and has taken it from the lease."""
        self.used -= amount
        self.granted = max(0, self.granted - amount)

    def frees_in(self, amount: int, now: float) -> float | None:
        """Seconds until `amount` is free by time alone; None if time alone does not free it."""
        short = amount - self.free(now)
        if short <= 0:
            return 0.0
        if self._slots is not None:
            for slot, used in self._slots:
                short -= used
                if short <= 0:
                    return slot + SPAN + 1 - now
            return None
        return self.end - now if self.is_budget and amount <= self.cap else None

    def shift(self, seconds: int) -> None:
        """The clock was set by so much: what was used moves with it."""
        for slot in self._slots or ():
            slot[0] += seconds

    def _use(self, amount: int, now: float) -> None:
        self.used += amount
        slots = self._slots
        if slots is None:
            return
        second = int(now)
        self._roll(second)
        if slots and slots[-1][0] == second:
            slots[-1][1] += amount
        else:
            slots.append([second, amount])

    def _roll(self, second: int) -> None:
        """Forget what left the window; what seems to lie in the future (the clock was set back) is now."""
        slots = self._slots
        assert slots is not None
        while slots and slots[0][0] < second - SPAN:
            self.used -= slots.popleft()[1]
        ahead = 0
        while slots and slots[-1][0] > second:
            ahead += slots.pop()[1]
        if ahead:
            if slots and slots[-1][0] == second:
                slots[-1][1] += ahead
            else:
                slots.append([second, ahead])

    def check(self) -> None:
        """Raises AssertionError where the sums are wrong."""
        if self._slots is not None:
            assert self.used == sum(used for _, used in self._slots), self.id
            assert [slot for slot, _ in self._slots] == sorted({slot for slot, _ in self._slots}), self.id
            assert len(self._slots) <= SPAN + 2, self.id
        assert self.reserved >= 0, self.id
