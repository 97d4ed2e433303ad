"""What a group of requests cost: what they were charged, and their share of what was paid and not used.

    cost = charged dollars + lost dollars + share of idle
    lost dollars   = what clouds took for attempts that came to nothing, and that nobody is charged for
    idle of a pool = paid hours at its price - what its settled requests were charged

Idle is divided among groups by the device time that they used there, over the whole span, or within each day
where days are groups. What nobody used is in a line of its own. Whole nanodollars, so that

    Σ lines = Σ rows of the ledger + Σ idle        exactly, whatever the groups

Failed attempts on devices of our own, which nobody was charged for, are in the idle, and so is what rounding
leaves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from operator import add
from typing import Any

from .allocate import divide

NOBODY = "(nobody)"
"""Who used what was paid for on a day without requests."""

Sums = Mapping[str, int]
"""Of ledger.schema.MEASURES."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolUse:
    """What became of a pool in one period: a day, or the whole span."""

    pool: str
    day: int | None
    """Unix nanoseconds of its beginning; None: the whole span."""
    paid: int | None
    """Nanodollars; None where the ledger has no paid hours or no price."""
    charged: int
    """Nanodollars of its settled requests."""
    device_seconds: int
    """Nanoseconds times devices of these."""

    @property
    def idle(self) -> int | None:
        """Nanodollars that were paid, and charged to nobody."""
        return None if self.paid is None else self.paid - self.charged


@dataclass(slots=True, kw_only=True)
class Line:
    """One group."""

    group: tuple[Any, ...]
    """Its values, in the order of `Report.by`."""
    sums: dict[str, int]
    own: dict[str, int]
    """The same of requests on devices of our own."""
    idle: int = 0
    """Nanodollars."""
    told_idle: Fraction = Fraction(0)
    """Of these, for requests whose outcome is known."""
    compared_idle: Fraction = Fraction(0)
    """For requests with a comparator."""

    @property
    def cost(self) -> int:
        """Nanodollars, with what attempts in vain took, and idle."""
        return self.sums["dollars"] + self.sums["lost_dollars"] + self.idle

    @property
    def successes(self) -> Fraction:
        """Outcomes that were successes; a score counts as a part of one."""
        return Fraction(self.sums["score"], 10**9)

    @property
    def cost_per_success(self) -> Fraction | None:
        """Nanodollars of requests whose outcome is known, with their idle, for each success among them."""
        if not self.successes:
            return None
        return (self.sums["told_dollars"] + self.told_idle) / self.successes

    @property
    def compared_cost(self) -> Fraction | None:
        """Nanodollars of self-hosted requests with a comparator, and their idle; None where there is none."""
        return self.own["compared_dollars"] + self.compared_idle if self._compares else None

    @property
    def comparator(self) -> int | None:
        """What that takes for the same tokens. Zero where there are attempts in vain alone: it would not have
        been asked for them."""
        return self.own["comparator_dollars"] if self._compares else None

    @property
    def _compares(self) -> bool:
        return bool(self.own["compared"] or self.own["compared_dollars"])

    @property
    def break_even(self) -> Fraction | None:
        """Share of the paid time that must be used, so that self-hosting costs what the comparator takes:
        what a busy device costs over what the cloud takes for its work. Over 1: never."""
        if not self._compares or not self.own["comparator_dollars"]:
            return None
        return Fraction(self.own["compared_dollars"], self.own["comparator_dollars"])

    @property
    def requests(self) -> int:
        """As clients count them: an attempt that was escalated has another row for its answer."""
        return self.sums["requests"] - self.sums["attempts"]

    @property
    def escalation_rate(self) -> Fraction | None:
        """Attempts that were in vain, of those that a verifier looked at; None where there was none."""
        judged = self.sums["judged"]
        return Fraction(self.sums["attempts"], judged) if judged else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All groups, dearest first; with days, in their order."""

    by: tuple[str, ...]
    lines: list[Line]
    total: Line
    pools: list[PoolUse] = field(default_factory=list)
    """Of the whole span."""
    unknown: tuple[str, ...] = ()
    """Pools that served requests with a comparator, and of whose idle nothing is known."""


def build(
    by: Sequence[str],
    groups: Mapping[tuple[Any, ...], Sums],
    pools: Sequence[PoolUse],
    *,
    span: Sequence[PoolUse] = (),
    names: Sequence[str],
    whole: bool = True,
) -> Report:
    """Divide the idle among groups.

    Args:
        by: what is grouped by; with `day`, `pools` has one entry a day.
        groups: sums of each (*by, pool).
        pools: what is to be divided.
        span: the pools over the whole span, for the report.
        names: measures.
        whole: whether the groups are all that there is; else pools were used by others, too, whose share of
            the idle is not here, and neither is what nobody used.
    """
    day = by.index("day") if "day" in by else None
    lines: dict[tuple[Any, ...], Line] = {}
    nothing = dict.fromkeys(names, 0)
    users: dict[tuple[str, int | None], list[tuple[Line, Sums]]] = {}

    def line(group: tuple[Any, ...]) -> Line:
        if group not in lines:
            lines[group] = Line(group=group, sums=dict(nothing), own=dict(nothing))
        return lines[group]

    for (*values, pool), sums in groups.items():
        found = line(tuple(values))
        found.sums = _added(found.sums, sums)
        if pool:
            found.own = _added(found.own, sums)
            users.setdefault((pool, None if day is None else values[day]), []).append((found, sums))
    for use in pools:
        if not use.idle:
            continue
        here = [each for each in users.get((use.pool, use.day), []) if each[1]["device_seconds"]]
        weights = [sums["device_seconds"] for _, sums in here]
        others = max(0, use.device_seconds - sum(weights))  # two reads may see a row come between them
        if not weights and not others:
            if whole:
                group = tuple({"day": use.day, "pool": use.pool}.get(name, NOBODY) for name in by)
                line(group).idle += use.idle
            continue
        for (found, sums), part in zip(here, divide(use.idle, [*weights, others]), strict=False):
            found.idle += part
            if told := sums["told_device_seconds"]:  # sums of fractions take long
                found.told_idle += Fraction(part * told, sums["device_seconds"])
            if compared := sums["compared_device_seconds"]:
                found.compared_idle += Fraction(part * compared, sums["device_seconds"])
    total = Line(group=("total",) * len(by), sums=dict.fromkeys(names, 0), own=dict.fromkeys(names, 0))
    for found in lines.values():
        total.idle += found.idle
        total.told_idle += found.told_idle
        total.compared_idle += found.compared_idle
    if lines:
        every = lines.values()
        total.sums = dict(
            zip(names, map(sum, zip(*(each.sums.values() for each in every), strict=True)), strict=True)
        )
        total.own = dict(
            zip(names, map(sum, zip(*(each.own.values() for each in every), strict=True)), strict=True)
        )

    def order(found: Line) -> tuple[Any, ...]:
        when = () if day is None else (found.group[day],)
        return (*when, -found.cost, -found.sums["requests"], tuple(map(str, found.group)))

    unpaid = {use.pool for use in span if use.paid is None}
    compared_in = {pool for (*_, pool), sums in groups.items() if sums["compared"]}
    return Report(
        by=tuple(by),
        lines=sorted(lines.values(), key=order),
        total=total,
        pools=list(span),
        unknown=tuple(sorted(unpaid & compared_in)),
    )


def _added(sums: Sums, more: Sums) -> dict[str, int]:
    """Of the same names, in the same order."""
    return dict(zip(sums, map(add, sums.values(), more.values()), strict=True))
