"""A report over a ledger: sums from roll-ups, paid hours from the gateways' claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from penstock.gateway.ledger.idle import claims
from penstock.gateway.ledger.rollups import DAY, DIMENSIONS, read
from penstock.gateway.ledger.schema import MEASURES, ledger
from penstock.gateway.ledger.store import Store
from penstock.gateway.policy.idle import HOUR, Spell, paid

from .findings import Seen
from .report import PoolUse, Report, build

BY = {
    "key": ("key_id", "key_name"),
    "team": ("team",),
    "feature": ("feature",),
    "route": ("route",),
    "upstream": ("upstream",),
    "model": ("model",),
    "pool": ("pool",),
    "day": ("day",),
}
"""What can be grouped by → columns."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which requests; times are Unix nanoseconds of their arrival."""

    since: int | None = None
    until: int | None = None
    equal: Mapping[str, str] = field(default_factory=dict)
    """Of BY but `day`; a key by its id or its name."""
    tags: tuple[tuple[str, str], ...] = ()
    """Other tags than feature, which roll-ups do not have: all rows of the span are read."""


@dataclass(frozen=True, slots=True)
class Found:
    """All that is told of a span."""

    report: Report
    seen: Seen
    days: float
    """How long the span is, as far as anything is known of it."""
    whole: bool = True
    """Whether it is of all requests of its pools: what was paid and used of these is of no fewer."""


def find(store: Store, by: Sequence[str], wanted: Wanted, now: int) -> Found:
    """Read a ledger. Raises StoreDown.

    Args:
        by: keys of BY.
        now: Unix nanoseconds; paid hours end there.
    """
    columns = [name for each in by for name in BY[each]]
    conditions = [ledger.c.tags[name].as_string() == value for name, value in wanted.tags]
    since, until = wanted.since, wanted.until
    with store.reading() as connection:
        fine = read(connection, DIMENSIONS, since, until, wanted.equal, conditions)
        names, daily = [*columns, "pool"], ["day"] if "day" in by else []
        if daily:
            groups = read(connection, names, since, until, wanted.equal, conditions)
        else:
            groups = _fold(fine, DIMENSIONS, names)
        narrow = bool(wanted.equal or wanted.tags)
        only = wanted.equal.get("pool")
        if narrow:
            usage = read(connection, ["pool", *daily], since, until, {"pool": only} if only else {})
        else:
            usage = _fold(groups, names, ["pool", *daily])
        spells = claims(connection)
        begin, end = _span(connection, spells, since, until, now)
    span_usage = _fold(usage, ["pool", *daily], ["pool"])
    features = _fold(fine, DIMENSIONS, ["feature", "route", "upstream", "model", "pool", "context"])
    feature = DIMENSIONS.index("feature")
    untagged = {group: sums for group, sums in fine.items() if group[feature] is None}
    keys = _fold(untagged, DIMENSIONS, ["key_id", "key_name"])
    if only is not None:
        spells = {pool: each for pool, each in spells.items() if pool == only}
    span = _uses(spells, span_usage, None, begin, end)
    pools = span
    if daily:
        pools = []
        for day in range(begin // DAY * DAY, max(end, begin + 1), DAY):
            here = {(pool,): sums for (pool, when), sums in usage.items() if when == day}
            pools += _uses(spells, here, day, max(begin, day), min(end, day + DAY), list(span))
    whole = not narrow or (set(wanted.equal) == {"pool"} and not wanted.tags)
    report = build(
        columns,
        {group: _named(sums) for group, sums in groups.items()},
        pools,
        span=span,
        names=MEASURES,
        whole=whole,
    )
    seen = Seen(
        features={group: _named(sums) for group, sums in features.items()},
        untagged={group: _named(sums) for group, sums in keys.items()},
    )
    return Found(report, seen, max(end - begin, 0) / DAY, whole)


def _named(sums: Sequence[int]) -> dict[str, int]:
    return dict(zip(MEASURES, sums, strict=True))


def _fold(
    groups: Mapping[tuple[Any, ...], Sequence[int]], names: Sequence[str], to: Sequence[str]
) -> dict[tuple[Any, ...], list[int]]:
    """Sums of coarser groups from those of finer ones, by the names of both."""
    places = [names.index(name) for name in to]
    found: dict[tuple[Any, ...], list[int]] = {}
    for group, sums in groups.items():
        coarse = tuple(group[place] for place in places)
        old = found.get(coarse)
        found[coarse] = list(sums) if old is None else [a + b for a, b in zip(old, sums, strict=True)]
    return found


def _uses(
    spells: Mapping[str, Sequence[Spell]],
    usage: Mapping[tuple[Any, ...], Sequence[int]],
    day: int | None,
    begin: int,
    end: int,
    known: Sequence[PoolUse] = (),
) -> list[PoolUse]:
    """Of each pool that was paid for or used. A pool that is not `known` to be paid for never was."""
    found = []
    unpaid = {use.pool for use in known if use.paid is None}
    for pool in sorted({*spells, *(pool for (pool,) in usage if pool)}):
        sums = _named(usage[pool,]) if (pool,) in usage else dict.fromkeys(MEASURES, 0)
        amount = None
        if pool in spells and pool not in unpaid:
            # by cumulative sums, so that days add up to their span
            before, after = (paid(spells[pool], None, moment) for moment in (begin, end))
            if after[1] is not None and before[1] is not None and (after[0] or known):
                amount = after[1] // HOUR - before[1] // HOUR
        found.append(
            PoolUse(
                pool=pool,
                day=day,
                paid=amount,
                charged=sums["dollars"] - sums["unsettled_dollars"],
                device_seconds=sums["device_seconds"],
            )
        )
    return found


def _span(
    connection: sa.Connection,
    spells: Mapping[str, Sequence[Spell]],
    since: int | None,
    until: int | None,
    now: int,
) -> tuple[int, int]:
    """From the first thing that is known of it until the last."""
    # one by one: SQLite looks at an end of the index for each, and for both at once at all of it
    first, last = (
        connection.execute(sa.select(end(ledger.c.at))).scalar_one() for end in (sa.func.min, sa.func.max)
    )
    begins = [each.begin for some in spells.values() for each in some]
    ends = [each.until for some in spells.values() for each in some]
    begins += [first] if first is not None else []
    ends += [last + 1] if last is not None else []
    if not begins:
        return (since or now, until or now)
    begin = max(min(begins), since) if since is not None else min(begins)
    end = min(max(ends), until) if until is not None else max(ends)
    return begin, max(begin, end)
