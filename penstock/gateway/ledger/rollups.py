"""Sums over the ledger's rows, kept as rows are written: what reports read instead of millions of rows.

    rows ──changes──▶ {(hour, series): measures} ──write──▶ rollups of 1 hour, 24 and 720, and their series

A series is one combination of whose requests and where they went (`DIMENSIONS`); what is summed is in
`MEASURES`. Both tables change in the transaction that changes the rows, so at every moment

    rollups = Σ of the rows that arrived in their hour, day (UTC), or thirty days

`read` sums over any span of time: whole months of thirty days, counted from 1970, then whole days, whole
hours, and at the edges the rows themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from hashlib import blake2b
from operator import attrgetter
from typing import Any

import msgspec
import sqlalchemy as sa

from penstock.gateway.policy.amounts import NANO
from penstock.gateway.records import Row

from .schema import MEASURES, ledger, rollups, series

HOUR = 3600 * NANO
DAY = 24 * HOUR
MONTH = 30 * DAY
"""Nanoseconds."""
WIDTHS = ((720, MONTH), (24, DAY), (1, HOUR))
"""What is summed apart: in hours, and in nanoseconds; the widest first."""

DIMENSIONS = ("key_id", "key_name", "team", "feature", "route", "upstream", "model", "pool", "context")
"""Columns of rows that a series has; the same names in both tables."""
_KNOWN = 100_000
"""Series that a process remembers to be there."""

_NEW = "penstock_new_series"

Sums = list[int]
"""In the order of MEASURES."""
Changes = dict[tuple[int, tuple[Any, ...]], Sums]
"""Hour (Unix nanoseconds) and dimensions → what is added to the sums there."""

_series_of = attrgetter("key_id", "key_name", "team", "route", "upstream", "model", "pool", "context")
_SUCCESS, _FAILURE = "success", "failure"
ATTEMPT = "escalated"
"""How an attempt ended that was in vain; and its outcome, once that of the final answer is known: what it
took belongs to that, and it was no try of its own."""


def score(outcome: str) -> int:
    """What an outcome counts as, in billionths of a success: all, nothing, or its score."""
    if outcome == _SUCCESS:
        return NANO
    return 0 if outcome in (_FAILURE, ATTEMPT) else int(Decimal(outcome) * NANO)


def measures(row: Row) -> Sums:
    """What one row adds, in the order of MEASURES."""
    known = row.settlement != "unsettled"
    dollars, device = row.dollars or 0, row.device_seconds or 0
    length = row.input_tokens + row.output_tokens
    compared = known and row.comparator_dollars is not None and row.dollars is not None
    told, escalated = row.outcome is not None, row.escalated_from is not None
    attempt = row.end == ATTEMPT
    took = dollars + row.lost_dollars
    return [
        1,
        row.status >= 400 and not attempt,
        not known,
        row.input_tokens,
        row.output_tokens,
        row.cached_tokens,
        dollars,
        0 if known else dollars,
        row.dollars is None and (length > 0 or device > 0),
        device if known else 0,
        0 if known else device,
        row.lost_device_seconds,
        compared and not attempt,
        dollars if compared else 0,
        device if compared else 0,
        (row.comparator_dollars or 0) if compared and not attempt else 0,  # a cloud is asked once
        told and not attempt and row.outcome != ATTEMPT,
        0 if row.outcome is None or attempt else score(row.outcome),
        took if told else 0,
        device if told and known else 0,
        row.verdict != "",
        attempt,
        took if attempt else 0,
        escalated,
        took if escalated else 0,
        row.uncapped and not attempt,
        dollars if row.uncapped else 0,
        length > 2048,
        length > 8192,
        length > 32_768,
        row.lost_dollars,
        row.lost_estimated_dollars,
        row.unverified,
    ]


def _expressions() -> dict[str, sa.ColumnElement[Any]]:
    """The same of a row in the database."""
    one: sa.ColumnElement[int] = sa.literal_column("1")
    zero: sa.ColumnElement[int] = sa.literal_column("0")
    row = ledger.c
    known = row.settlement != "unsettled"
    dollars, device = sa.func.coalesce(row.dollars, 0), sa.func.coalesce(row.device_seconds, 0)
    length = row.input_tokens + row.output_tokens
    compared = sa.and_(known, row.comparator_dollars.is_not(None), row.dollars.is_not(None))
    told, escalated = row.outcome.is_not(None), row.escalated_from.is_not(None)
    attempt = row.end == ATTEMPT
    took = dollars + row.lost_dollars
    number = sa.func.round(sa.cast(row.outcome, sa.Double) * NANO)
    return {
        "requests": one,
        "failed": sa.case((sa.and_(row.status >= 400, ~attempt), one), else_=zero),
        "unsettled": sa.case((known, zero), else_=one),
        "input_tokens": row.input_tokens,
        "output_tokens": row.output_tokens,
        "cached_tokens": row.cached_tokens,
        "dollars": dollars,
        "unsettled_dollars": sa.case((known, zero), else_=dollars),
        "unpriced": sa.case(
            (sa.and_(row.dollars.is_(None), sa.or_(length > 0, device > 0)), one), else_=zero
        ),
        "device_seconds": sa.case((known, device), else_=zero),
        "unsettled_device_seconds": sa.case((known, zero), else_=device),
        "lost_device_seconds": row.lost_device_seconds,
        "compared": sa.case((sa.and_(compared, ~attempt), one), else_=zero),
        "compared_dollars": sa.case((compared, dollars), else_=zero),
        "compared_device_seconds": sa.case((compared, device), else_=zero),
        "comparator_dollars": sa.case((sa.and_(compared, ~attempt), row.comparator_dollars), else_=zero),
        "told": sa.case((sa.and_(told, ~attempt, row.outcome != ATTEMPT), one), else_=zero),
        "score": sa.case(
            (sa.or_(row.outcome.is_(None), attempt), zero),
            (row.outcome == _SUCCESS, sa.literal_column(str(NANO))),
            (row.outcome.in_((_FAILURE, ATTEMPT)), zero),
            else_=sa.cast(number, sa.BigInteger),
        ),
        "told_dollars": sa.case((told, took), else_=zero),
        "told_device_seconds": sa.case((sa.and_(told, known), device), else_=zero),
        "judged": sa.case((row.verdict != "", one), else_=zero),
        "attempts": sa.case((attempt, one), else_=zero),
        "attempt_dollars": sa.case((attempt, took), else_=zero),
        "escalated": sa.case((escalated, one), else_=zero),
        "escalated_dollars": sa.case((escalated, took), else_=zero),
        "uncapped": sa.case((sa.and_(row.uncapped, ~attempt), one), else_=zero),
        "uncapped_dollars": sa.case((row.uncapped, dollars), else_=zero),
        "over_2k": sa.case((length > 2048, one), else_=zero),
        "over_8k": sa.case((length > 8192, one), else_=zero),
        "over_32k": sa.case((length > 32_768, one), else_=zero),
        "lost_dollars": row.lost_dollars,
        "lost_estimated_dollars": row.lost_estimated_dollars,
        "unverified": sa.case((row.unverified, one), else_=zero),
    }


EXPRESSIONS = _expressions()


def dimensions(row: Row) -> tuple[Any, ...]:
    """The series of a row, in the order of DIMENSIONS."""
    key_id, key_name, team, *rest = _series_of(row)
    return (key_id, key_name, team, row.tags.get("feature"), *rest)


def add(changes: Changes, row: Row, sign: int = 1) -> None:
    """Take a row in; with -1, out."""
    place = (row.at - row.at % HOUR, dimensions(row))
    new = measures(row)
    old = changes.get(place)
    if old is None:
        changes[place] = [sign * each for each in new]
    else:
        changes[place] = [before + sign * each for before, each in zip(old, new, strict=True)]


def series_id(found: Sequence[Any]) -> bytes:
    """The name of a series: of 128 bits, so that nobody has to be asked for one."""
    return blake2b(msgspec.msgpack.encode(tuple(found)), digest_size=16).digest()


class Rollups:
    """Writes them for one store."""

    def __init__(self, dialect: sa.Dialect) -> None:
        sqlite = dialect.name == "sqlite"
        quote = dialect.identifier_preparer.quote

        def values(count: int) -> str:
            return ", ".join(["?" if sqlite else "%s"] * count)

        names = [quote(column.name) for column in rollups.columns]
        own = quote(rollups.name)
        more = ", ".join(f"{name} = {own}.{name} + excluded.{name}" for name in map(quote, MEASURES))
        keys = ", ".join(quote(column.name) for column in rollups.primary_key)
        self._upsert = (
            f"INSERT INTO {own} ({', '.join(names)}) VALUES ({values(len(names))}) "
            f"ON CONFLICT ({keys}) DO UPDATE SET {more}"
        )
        columns = ["id", *DIMENSIONS]
        self._insert = (
            f"INSERT INTO {quote(series.name)} ({', '.join(map(quote, columns))}) "
            f"VALUES ({values(len(columns))}) ON CONFLICT DO NOTHING"
        )
        self._known: set[bytes] = set()

    def write(self, connection: sa.Connection, changes: Changes) -> None:
        """In the caller's transaction; `ended` is called after it."""
        sums: dict[tuple[int, int, bytes], Sums] = {}
        new: dict[bytes, tuple[Any, ...]] = {}
        for (hour, found), added in changes.items():
            if not any(added):
                continue
            id = series_id(found)
            if id not in self._known:
                new[id] = (id, *found)
            for hours, width in WIDTHS:
                place = (hours, hour - hour % width, id)
                old = sums.get(place)
                sums[place] = added if old is None else [a + b for a, b in zip(old, added, strict=True)]
        if not sums:
            return
        if new:
            connection.exec_driver_sql(self._insert, [new[id] for id in sorted(new)])
            connection.info.setdefault(_NEW, set()).update(new)
        # in one order, as everybody locks them
        connection.exec_driver_sql(self._upsert, [(*place, *added) for place, added in sorted(sums.items())])

    def ended(self, connection: sa.Connection, *, committed: bool) -> None:
        """A transaction is over: what it wrote is there for good, or is not."""
        new: set[bytes] = connection.info.pop(_NEW, set())
        if committed and new:
            if len(self._known) > _KNOWN:
                self._known.clear()
            self._known |= new


def read(
    connection: sa.Connection,
    by: Sequence[str],
    since: int | None = None,
    until: int | None = None,
    equal: Mapping[str, Any] | None = None,
    conditions: Sequence[sa.ColumnElement[bool]] = (),
) -> dict[tuple[Any, ...], Sums]:
    """Sums of all rows that arrived in [since, until) (Unix nanoseconds), in groups.

    Args:
        by: of DIMENSIONS, and `day` (Unix nanoseconds of its beginning).
        equal: of DIMENSIONS, what must be so; `key` is its id or its name.
        conditions: on columns of `ledger`, which no roll-up can answer: then all rows of the span are read.

    Returns groups in the order of `by`, each with its sums in the order of MEASURES.
    """
    found: dict[tuple[Any, ...], Sums] = {}
    widths = [each for each in WIDTHS if each[1] <= DAY or "day" not in by]
    parts = [(0, since, until)] if conditions else parts_of(since, until, widths)
    for hours, begin, end in parts:
        query = (
            _over_rows(by, begin, end, equal or {}, conditions)
            if hours == 0
            else _over_rollups(hours, by, begin, end, equal or {})
        )
        for row in connection.execute(query):
            group, added = tuple(row[: len(by)]), [int(each or 0) for each in row[len(by) :]]
            if not added[0]:
                continue
            old = found.get(group)
            found[group] = added if old is None else [a + b for a, b in zip(old, added, strict=True)]
    return found


def parts_of(
    since: int | None, until: int | None, widths: Sequence[tuple[int, int]] = WIDTHS
) -> Iterator[tuple[int, int | None, int | None]]:
    """A span as (hours, begin, end): months, days, hours, and the rest by rows (0); they touch one
    another."""
    if since is not None and until is not None and since >= until:
        return
    yield from _parts(since, until, widths)


def _parts(
    since: int | None, until: int | None, widths: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, int | None, int | None]]:
    if not widths:
        yield 0, since, until
        return
    hours, width = widths[0]
    first = None if since is None else -(-since // width) * width
    last = None if until is None else until // width * width
    if first is not None and last is not None and first >= last:
        yield from _parts(since, until, widths[1:])
        return
    if since is not None and since != first:
        yield from _parts(since, first, widths[1:])
    yield hours, first, last
    if until is not None and until != last:
        yield from _parts(last, until, widths[1:])


def _over_rollups(
    hours: int, by: Sequence[str], begin: int | None, end: int | None, equal: Mapping[str, Any]
) -> sa.Select[Any]:
    start = rollups.c.start
    where = [rollups.c.hours == hours, *_span(start, begin, end)]
    if equal:
        where.append(rollups.c.series.in_(sa.select(series.c.id).where(*_same(series.c, equal))))
    sums = [sa.func.sum(rollups.c[name]).label(name) for name in MEASURES]
    day = (start // DAY * DAY).label("day")
    inner = ["day"] if "day" in by else []
    # by series first, within which nothing is looked up: there are far fewer of them than sums
    each = (
        sa.select(rollups.c.series, *(day for _ in inner), *sums)
        .where(*where)
        .group_by(rollups.c.series, *(day for _ in inner))
        .subquery()
    )
    if inner and hours == 24:  # each sum is of a day, and of a series: there is nothing to gain
        each = (
            sa.select(rollups.c.series, start.label("day"), *(rollups.c[name] for name in MEASURES))
            .where(*where)
            .subquery()
        )
    groups = [each.c.day if name == "day" else series.c[name] for name in by]
    whole = [sa.func.sum(each.c[name]) for name in MEASURES]
    joined = each.join(series, series.c.id == each.c.series)
    return sa.select(*groups, *whole).select_from(joined).group_by(*groups)


def _over_rows(
    by: Sequence[str],
    begin: int | None,
    end: int | None,
    equal: Mapping[str, Any],
    conditions: Sequence[sa.ColumnElement[bool]],
) -> sa.Select[Any]:
    at = ledger.c.at
    groups = [at // DAY * DAY if name == "day" else ledger.c[name] for name in by]
    where = [*_span(at, begin, end), *_same(ledger.c, equal), *conditions]
    sums = [sa.func.sum(EXPRESSIONS[name]) for name in MEASURES]
    return sa.select(*groups, *sums).select_from(ledger).where(*where).group_by(*groups)


def _span(at: sa.ColumnElement[int], begin: int | None, end: int | None) -> Iterator[sa.ColumnElement[bool]]:
    if begin is not None:
        yield at >= begin
    if end is not None:
        yield at < end


def _same(columns: Any, equal: Mapping[str, Any]) -> Iterable[sa.ColumnElement[bool]]:
    for name, value in equal.items():
        if name == "key":
            yield sa.or_(columns.key_id == value, columns.key_name == value)
        else:
            yield columns[name].is_(None) if value is None else columns[name] == value
