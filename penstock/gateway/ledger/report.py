"""Reading the ledger: rows by filters, under the names that exports and spans use.

Money is in US dollars and device time in seconds there, exact to nine decimals; times are ISO 8601 in UTC.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, NamedTuple

import sqlalchemy as sa

from penstock.gateway.policy.amounts import NANO
from penstock.spec.units import seconds

from .schema import ledger
from .store import Store

_PAGE = 1000
_attempt = ledger.alias("attempt")
_COST = sa.case(
    (_attempt.c.id.is_not(None), sa.func.coalesce(_attempt.c.dollars, 0) + _attempt.c.lost_dollars)
)
"""Of an attempt: also what a cloud took for one that failed."""
_DELTA = ledger.c.dollars - _COST
_ROWS = sa.select(ledger, _COST.label("attempt_dollars"), _DELTA.label("delta_dollars")).select_from(
    ledger.outerjoin(
        _attempt,
        sa.and_(_attempt.c.id == ledger.c.escalated_from, _attempt.c.worker == ledger.c.worker),
    )
)
"""Every row, with what the attempt has cost that it was escalated from, and how much dearer it was itself."""


@dataclass(frozen=True)
class Filter:
    """Which rows; what is None does not matter."""

    since: int | None = None
    """Unix nanoseconds; of the request's arrival."""
    until: int | None = None
    key: str | None = None
    """Its id or its name."""
    team: str | None = None
    tags: tuple[tuple[str, str], ...] = ()
    route: str | None = None
    upstream: str | None = None
    model: str | None = None
    settlement: str | None = None
    verdict: str | None = None
    id: str | None = None

    def conditions(self) -> list[sa.ColumnElement[bool]]:
        """As SQL."""
        columns = ledger.c
        found: list[sa.ColumnElement[bool]] = []
        if self.since is not None:
            found.append(columns.at >= self.since)
        if self.until is not None:
            found.append(columns.at < self.until)
        if self.key is not None:
            found.append(sa.or_(columns.key_id == self.key, columns.key_name == self.key))
        for name in ("team", "route", "upstream", "model", "settlement", "verdict", "id"):
            if (value := getattr(self, name)) is not None:
                found.append(columns[name] == value)
        for name, value in self.tags:
            indexed = columns.feature if name == "feature" else columns.tags[name].as_string()
            found.append(indexed == value)
        return found


def rows(store: Store, wanted: Filter, *, newest: int | None = None) -> Iterator[dict[str, Any]]:
    """Rows in the order of their arrival, page by page; or the `newest` ones, last first."""
    place = (ledger.c.at, ledger.c.worker, ledger.c.number)
    query = _ROWS.where(*wanted.conditions())
    if newest is not None:
        with store.reading() as connection:
            latest = query.order_by(*(each.desc() for each in place)).limit(newest)
            yield from (record(row) for row in connection.execute(latest).mappings())
        return
    after: tuple[Any, ...] | None = None
    while True:
        page = query if after is None else query.where(sa.tuple_(*place) > sa.tuple_(*map(sa.literal, after)))
        with store.reading() as connection:
            found = connection.execute(page.order_by(*place).limit(_PAGE)).mappings().all()
        yield from (record(row) for row in found)
        if len(found) < _PAGE:
            return
        after = (found[-1]["at"], found[-1]["worker"], found[-1]["number"])


class Place(NamedTuple):
    """Where a row stands among all."""

    at: int
    worker: str
    number: int

    def __str__(self) -> str:
        return f"{self.at}.{self.number}.{self.worker}"

    @classmethod
    def read(cls, text: str) -> Place:
        """What `str` wrote. Raises ValueError."""
        at, number, worker = text.split(".", 2)
        if not all(each.isascii() and each.isdecimal() and len(each) < 20 for each in (at, number)):
            raise ValueError("no numbers")
        if max(int(at), int(number)) >= 1 << 63:
            raise ValueError("numbers that no database holds")
        return cls(int(at), worker, int(number))


def page(
    store: Store, wanted: Filter, limit: int, after: Place | None = None
) -> tuple[list[dict[str, Any]], Place | None]:
    """At most `limit` rows, newest first, from after a place; and the last one's, where there are more."""
    place = (ledger.c.at, ledger.c.worker, ledger.c.number)
    query = _ROWS.where(*wanted.conditions())
    if after is not None:
        query = query.where(sa.tuple_(*place) < sa.tuple_(*map(sa.literal, after)))
    query = query.order_by(*(each.desc() for each in place)).limit(limit + 1)
    with store.reading() as connection:
        found = connection.execute(query).mappings().all()
    shown = found[:limit]
    last = None
    if len(found) > limit:
        last = Place(shown[-1]["at"], shown[-1]["worker"], shown[-1]["number"])
    return [record(row) for row in shown], last


def instant(text: str, now: int) -> int:
    """A time in Unix nanoseconds: a date or a time (UTC where it does not say), or so long before `now`, as
    `24h`. Raises ValueError."""
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        return now - round(seconds(text) * NANO)
    if not 1970 <= when.year < 2262:
        raise ValueError("it is not between 1970 and 2261")
    return round((when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp() * 1000) * (NANO // 1000)


def record(row: Any) -> dict[str, Any]:
    """One row under the names of exports, in their order."""
    return {name: convert(row[column]) for name, (column, convert) in COLUMNS.items()}


def decimal(amount: int | None) -> Decimal | None:
    """Nanodollars in dollars, nanoseconds in seconds; exact."""
    return None if amount is None else Decimal(amount) / NANO


def moment(at: int) -> str:
    """Unix nanoseconds as ISO 8601, to the microsecond."""
    return datetime.fromtimestamp(at // 1000 / 1_000_000, UTC).isoformat(timespec="microseconds")


def _same(value: Any) -> Any:
    return value


COLUMNS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "time": ("at", moment),
    "id": ("id", _same),
    "key_id": ("key_id", _same),
    "key": ("key_name", _same),
    "team": ("team", _same),
    "feature": ("feature", _same),
    "tags": ("tags", _same),
    "endpoint": ("endpoint", _same),
    "route": ("route", _same),
    "inference.backend": ("upstream", _same),
    "replica": ("replica", _same),
    "model": ("model", _same),
    "status": ("status", _same),
    "end": ("end", _same),
    "settlement": ("settlement", _same),
    "attempts": ("attempts", _same),
    "failed_attempts": ("failed", lambda failed: failed or []),
    "input_tokens": ("input_tokens", _same),
    "output_tokens": ("output_tokens", _same),
    "cached_tokens": ("cached_tokens", _same),
    "gpu_seconds": ("device_seconds", decimal),
    "gpu_seconds_estimated": ("device_seconds_estimated", bool),
    "lost_gpu_seconds": ("lost_device_seconds", decimal),
    "pool": ("pool", _same),
    "device": ("device", _same),
    "dollars": ("dollars", decimal),
    "lost_dollars": ("lost_dollars", decimal),
    "lost_estimated_dollars": ("lost_estimated_dollars", decimal),
    "comparator_dollars": ("comparator_dollars", decimal),
    "waited_seconds": ("waited", decimal),
    "first_byte_seconds": ("first_byte", decimal),
    "total_seconds": ("total", decimal),
    "reserved_tokens": ("reserved_tokens", _same),
    "reserved_dollars": ("reserved_dollars", decimal),
    "reserved_gpu_seconds": ("reserved_device_seconds", decimal),
    "escalated_from": ("escalated_from", _same),
    "attempt_dollars": ("attempt_dollars", decimal),
    "delta_dollars": ("delta_dollars", decimal),
    "verifier": ("verifier", _same),
    "verdict": ("verdict", _same),
    "score": ("score", _same),
    "reason": ("reason", _same),
    "unverified": ("unverified", bool),
    "outcome": ("outcome", _same),
    "uncapped": ("uncapped", bool),
    "context": ("context", _same),
    "note": ("note", _same),
    "worker": ("worker", _same),
    "number": ("number", _same),
}
"""Name in exports → column of the table, and how it is told."""
