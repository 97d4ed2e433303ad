"""Which setting to try next, from what was measured so far. Pure: no clock, no engine, no randomness.

    search = Bisection(64, low=1, high=256)
    while (value := search.propose()) is not None:
        search.record(value, goodput, pressure, same_from=…)
    search.best

`Stepwise` is the loop of the tuning guides: some fewer while the target is missed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

from .diagnosis import Pressure

RATIO = 1.25
"""Between two neighbours of the ladder; closer ones differ by less than a run's noise."""
MOST = 10
"""Settings that are tried at most; each is a restart."""


class Search(Protocol):
    """Proposes settings until it has seen enough."""

    @property
    def best(self) -> int | None:
        """The best one so far."""
        ...

    def propose(self) -> int | None:
        """The next setting; None at the end. The same until it is recorded."""
        ...

    def record(
        self,
        value: int,
        goodput: float,
        pressure: Pressure,
        *,
        met: bool = False,
        same_from: int | None = None,
    ) -> None:
        """What a setting has given.

        Args:
            goodput: requests per second within their targets; 0 for a setting that does not even start.
            met: whether all targets were kept.
            same_from: settings from here on up make the same engine: no more than so many were ever at work.
        """
        ...

    @property
    def ended(self) -> str:
        """Why there is no other proposal."""
        ...


def ladder(low: int, high: int, also: Sequence[int] = ()) -> list[int]:
    """Whole numbers from `low` to `high`, both included, each a quarter more than the last or the next
    number; and those of `also` that lie between. Raises ValueError if there is none."""
    if not 1 <= low <= high:
        raise ValueError(f"no setting lies between {low} and {high}")
    steps = [low]
    while steps[-1] < high:
        steps.append(min(high, max(steps[-1] + 1, round(steps[-1] * RATIO))))
    return sorted({*steps, *(value for value in also if low <= value <= high)})


class Bisection:
    """Finds the maximum of a goodput that rises up to some setting and falls from there, in few trials.

    1. The first trial is the setting as it is.
    2. The maximum lies between the neighbours, among what was tried, of the best trial.
    3. What held the best trial back says on which side: where requests wait, above; where they slow each
       other down, below; where neither is so, nowhere else. Where it does not tell, or tells of both, the
       wider side is next.
    4. The next trial is the middle of that side, by the ladder's steps. So each halves one of the two sides:
       where the first trial has some goodput, a ladder of n steps takes 3 + 2 log2(n) trials at most.
    5. While nothing has met the targets at all, there is no best trial, and each trial's own pressure bounds
       where it can be. Where that is not told either, the widest gap is halved, until none is left.
    """

    def __init__(self, start: int, *, low: int, high: int, most: int = MOST) -> None:
        """Raises ValueError for bounds without a setting between them."""
        start = min(max(start, low), high)
        self._ladder = ladder(low, high, (start,))
        self._start = start
        self._most = most
        self._seen: dict[int, tuple[float, Pressure]] = {}
        self._same_from: int | None = None
        self.ended = ""

    @property
    def best(self) -> int | None:
        """The setting with the most goodput so far; among equals the smallest: where more changes nothing,
        the maximum is there or below."""
        return max(self._seen, key=lambda value: (self._seen[value][0], -value), default=None)

    def record(
        self,
        value: int,
        goodput: float,
        pressure: Pressure,
        *,
        met: bool = False,
        same_from: int | None = None,
    ) -> None:
        """See Search.record."""
        self._seen[value] = (goodput, pressure)
        if same_from is not None:
            self._same_from = min(self._same_from or same_from, same_from)

    def propose(self) -> int | None:
        """See Search.propose."""
        if not self._seen:
            return self._start
        if len(self._seen) >= self._most:
            self.ended = f"{self._most} settings were tried"
            return None
        best = self.best
        assert best is not None
        goodput, pressure = self._seen[best]
        sides = self._below_and_above(best) if goodput > 0 else self._while_nothing_is_good()
        below, above = sides
        if goodput > 0:
            below, above = _worth_it(below, above, pressure)
        side = max((above, below), key=len)
        if not side:
            self.ended = "no other setting can be better" if goodput > 0 else "no setting meets the targets"
            return None
        return side[len(side) // 2]

    def _below_and_above(self, best: int) -> tuple[list[int], list[int]]:
        """Settings between the best one and what was tried next to it, on either side."""
        lower = max((value for value in self._seen if value < best), default=0)
        upper = min((value for value in self._seen if value > best), default=self._ladder[-1] + 1)
        return self._open(lower, best), self._open(best, upper)

    def _while_nothing_is_good(self) -> tuple[list[int], list[int]]:
        """Settings that no pressure rules out: the widest gap between those that were tried."""
        low, high = 0, self._ladder[-1] + 1
        for value, (_, pressure) in self._seen.items():
            if pressure in (Pressure.COMPUTE, Pressure.NONE, Pressure.MEMORY):
                high = min(high, value)
            elif pressure is Pressure.QUEUE:
                low = max(low, value)
        edges = sorted({low, high, *(value for value in self._seen if low < value < high)})
        gaps = [self._open(left, right) for left, right in pairwise(edges)]
        return max(gaps, key=len, default=[]), []

    def _open(self, low: int, high: int) -> list[int]:
        """The ladder strictly between two settings, without those that make the same engine as one that was
        tried."""
        same = self._same_from if self._same_from is not None else high
        return [value for value in self._ladder if low < value < min(high, same)]


def _worth_it(below: list[int], above: list[int], pressure: Pressure) -> tuple[list[int], list[int]]:
    """The sides that can hold something better."""
    match pressure:
        case Pressure.QUEUE:
            return [], above
        case Pressure.COMPUTE:
            return below, []
        case Pressure.NONE | Pressure.MEMORY:
            return [], []
        case _:
            return below, above


class Stepwise:
    """While the target is missed, `step` fewer: as guides have it, and no better than that."""

    def __init__(self, start: int, *, step: int, low: int = 1) -> None:
        self._next: int | None = max(start, low)
        self._step, self._low = step, low
        self._last: int | None = None
        self.ended = ""
        self.best: int | None = None
        """The first setting that met the targets."""

    def propose(self) -> int | None:
        """See Search.propose."""
        return self._next

    def record(
        self,
        value: int,
        goodput: float,
        pressure: Pressure,
        *,
        met: bool = False,
        same_from: int | None = None,
    ) -> None:
        """See Search.record."""
        self._next = None
        if met:
            self.best, self.ended = value, "the targets are met"
        elif value - self._step < self._low:
            self.ended = f"{self._step} fewer than {value} is none: no step of this loop meets the targets"
        else:
            self._next = value - self._step
