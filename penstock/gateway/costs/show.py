"""A report for eyes: so many lines, short figures, and what has to be known to read them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

from penstock.gateway.policy.amounts import NANO

from .records import group
from .report import Line, Report
from .words import count, money, percent

NONE = "(none)"
"""Requests without a feature, a team, a pool."""


def heads(by: Sequence[str]) -> list[str]:
    """Columns of what a line is of: a key's name says more than its id."""
    names = list(group(by, [None] * len(by)))
    return [name for name in names if not (name == "key_id" and "key" in names)]


def shortened(report: Report, top: int) -> Report:
    """The dearest lines in their order, and all others together in one more: still every dollar once."""
    if len(report.lines) <= top:
        return report
    kept = sorted(report.lines, key=lambda line: (-line.cost, -line.requests))[:top]
    places = {id(line) for line in kept}
    others = [line for line in report.lines if id(line) not in places]
    about, first = f"({len(others):,} others)", heads(report.by)[0]
    names = group(report.by, [None] * len(report.by))
    rest = _together(tuple(about if name == first else "-" for name in names), others)
    lines = [line for line in report.lines if id(line) in places]
    return Report(by=report.by, lines=[*lines, rest], total=report.total, pools=report.pools)


def without_days(report: Report) -> Report:
    """The same lines over all days."""
    if "day" not in report.by:
        return report
    place = report.by.index("day")
    found: dict[tuple[Any, ...], list[Line]] = {}
    for line in report.lines:
        found.setdefault(line.group[:place] + line.group[place + 1 :], []).append(line)
    lines = [_together(values, some) for values, some in found.items()]
    by = report.by[:place] + report.by[place + 1 :]
    return Report(by=by, lines=lines, total=report.total, pools=report.pools)


def _together(values: tuple[Any, ...], lines: Sequence[Line]) -> Line:
    return Line(
        group=values,
        sums={name: sum(line.sums[name] for line in lines) for name in lines[0].sums},
        own={name: sum(line.own[name] for line in lines) for name in lines[0].own},
        idle=sum(line.idle for line in lines),
        told_idle=sum((line.told_idle for line in lines), Fraction(0)),
        compared_idle=sum((line.compared_idle for line in lines), Fraction(0)),
    )


def shown(name: str, value: Any) -> str:
    """A figure of records.FIGURES in short; `-` where it is not known."""
    if value is None:
        return "-"
    if "dollars" in name:
        return money(round(value * NANO))
    if name in ("idle_share", "break_even_utilization", "escalation_rate", "utilization"):
        return percent(float(value))
    return count(float(value))


def remarks(report: Report, tags: Sequence[tuple[str, str]] = ()) -> Iterator[str]:
    """What has to be known to read the figures."""
    sums = report.total.sums
    if sums["unsettled"]:
        yield (
            f"{sums['unsettled']:,} requests are unsettled: {money(sums['unsettled_dollars'])} of the "
            "dollars are what they had reserved, and not what they used."
        )
    if sums["unpriced"]:
        yield f"{sums['unpriced']:,} requests have no price: they used something, and are in no dollars."
    if sums["lost_dollars"]:
        yield (
            f"Attempts at clouds that came to nothing took {money(sums['lost_dollars'])}, which is in the "
            f"cost and charged to nobody; {money(sums['lost_estimated_dollars'])} of it is estimated, since "
            "those clouds did not say how many tokens it was."
        )
    if sums["unverified"]:
        yield (
            f"{sums['unverified']:,} answers were given although no verifier had passed them: it failed "
            "open, or nobody dearer could be asked (penstock ledger list --verdict open, failed or closed)."
        )
    for use in report.pools:
        if use.paid is None:
            why = "no price or no paid hours in this span"
            yield f"Pool {use.pool} has {why}: what of it was idle is in no dollars."
        elif use.idle is not None and use.idle < 0:
            yield (
                f"Pool {use.pool}: its requests were charged {money(use.charged)}, and {money(use.paid)} was "
                "paid: engines share its devices, or were used while no gateway ran (penstock ledger idle "
                "says which). Its idle is negative."
            )
    if sums["told"] and sums["told"] < report.total.requests:
        share = Fraction(sums["told"], report.total.requests)
        yield (
            f"Outcomes are known of {percent(share)} of the requests: the cost of a success is that of "
            "these, failures among them included."
        )
    if tags:
        yield "Roll-ups have no tag but feature: every row of the span was read."
