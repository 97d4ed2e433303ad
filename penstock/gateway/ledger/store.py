"""The ledger's database: rows, accounts, leases and workers, in SQLite or PostgreSQL.

Every method is one transaction, and may be repeated after an error: what a worker applies is applied once, by
the position in its journal that stands in the same transaction; what it says of leases is absolute.

    apply     rows of the journal ─▶ ledger,  what they used ─▶ accounts,  leases shrink,  position moves,
              sums of rows ─▶ rollups
    lease     asks ─▶ grants (policy/leases.py decides)
    resettle  what a row has used after all ─▶ ledger, and the difference ─▶ accounts, rollups

It blocks: thread.py is where it runs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from operator import attrgetter
from typing import Any, NamedTuple, cast

import msgspec
import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from penstock.core.errors import StartupError, Unavailable
from penstock.gateway.policy.accounts import SPAN
from penstock.gateway.policy.amounts import Amounts, Unit
from penstock.gateway.policy.leases import TTL, Ask, Grant, Lease, counts, decide, lives
from penstock.gateway.records import Row

from .database import PASSWORD, make_engine, make_private, migrate, said
from .journal import Position
from .rollups import Changes, Rollups, add
from .schema import accounts, leases, ledger, meta, workers

logger = logging.getLogger("penstock.gateway")

_MANY = 1000
"""Numbers in one question."""
_FORGET = 40 * 86_400
"""Seconds after which leases of past windows are deleted. Rows of the ledger never are, nor a dead worker's
position in its journal: should that turn up again, nothing in it counts twice."""


class StoreDown(Unavailable):
    """The ledger's database cannot be reached."""

    code = "ledger_unavailable"


class Moved(Exception):
    """The position in the store is another one: this batch, or a part of it, has been applied before."""

    def __init__(self, position: Position) -> None:
        super().__init__(position)
        self.position = position


class Beat(NamedTuple):
    """What a worker learns when it says that it lives."""

    others: int
    """Workers besides it."""
    pressed: dict[str, float]
    """Accounts that others are short of, and the newest mark of it."""
    keys: int
    """Version of the keys."""
    weights: int = 0
    """Version of the routes' weights."""


class Entry(NamedTuple):
    """A row with its place and what was charged for it."""

    number: int
    row: Row
    charged: Mapping[str, int]


def sums(entries: Sequence[Entry]) -> dict[str, int]:
    """What entries charge to each account."""
    found: dict[str, int] = {}
    for entry in entries:
        for id, amount in entry.charged.items():
            found[id] = found.get(id, 0) + amount
    return found


class Store:
    """One database, by URL. Raises StartupError where it cannot be opened."""

    def __init__(self, url: str, *, clock: Callable[[], float] | None = None) -> None:
        self._clock = clock
        self.engine = make_engine(url)
        self._sqlite = self.engine.dialect.name == "sqlite"
        names = ", ".join(map(self.engine.dialect.identifier_preparer.quote, COLUMNS))
        marks = ", ".join(["?" if self._sqlite else "%s"] * len(COLUMNS))
        self._append_sql = f"INSERT INTO ledger ({names}) VALUES ({marks}) ON CONFLICT DO NOTHING"
        dialect = "sqlite" if self._sqlite else "postgresql"  # only the one that is used: each takes its time
        self.insert: Any = import_module(f"sqlalchemy.dialects.{dialect}").insert
        self.rollups = Rollups(self.engine.dialect)
        # made once: each takes a millisecond, and what it was made of is left to the garbage collector
        charge, grant = self.insert(accounts), self.insert(leases)
        self._charging = charge.on_conflict_do_update(
            index_elements=["id"], set_={"used": accounts.c.used + charge.excluded.used}
        )
        self._granting = grant.on_conflict_do_update(
            index_elements=["account", "worker"],
            set_={name: grant.excluded[name] for name in ("granted", "touched", "wanted_since")},
        )

    def open(self) -> None:
        """Reach the database and bring its tables up to date. Raises StartupError."""
        make_private(self.engine)
        try:
            migrate(self.engine)
        except SQLAlchemyError as error:
            raise StartupError(
                f"The ledger {self.engine.url.render_as_string()} cannot be opened: {said(error)}.",
                param="ledger.url",
                advice="It is SQLite's sqlite:///FILE or postgresql://USER@HOST/DATABASE, with the password "
                f"in {PASSWORD}.",
            ) from None

    def close(self) -> None:
        """Let go of the connections."""
        self.engine.dispose()

    def register(self, worker: str, host: str = "") -> None:
        """A worker begins."""
        with self.writing() as connection:
            now = self.now(connection)
            row = {"id": worker, "host": host, "seen": now}
            connection.execute(self.insert(workers).values(row).on_conflict_do_nothing())
            self._sweep(connection, now)

    def beat(self, worker: str, *, write: bool = True) -> Beat:
        """A worker lives (with `write`), and learns what the others need."""
        with self.writing() if write else self.reading() as connection:
            now = self.now(connection)
            if write:
                connection.execute(workers.update().where(workers.c.id == worker).values(seen=now, gone=None))
            about = {"me": worker, "since": now - TTL, "until": now + 1}
            others = connection.execute(_OTHERS, about).scalar_one()
            pressed = dict(connection.execute(_PRESSED, about).all()) if others else {}
            versions = dict(connection.execute(_VERSIONS).all())
        return Beat(others, pressed, versions.get("keys", 0), versions.get("weights", 0))

    def lease(self, worker: str, asks: Sequence[Ask]) -> list[Grant]:
        """Give leases, all asks in one transaction."""
        ids = [ask.id for ask in asks]
        with self.writing() as connection:
            now = self.now(connection)
            used: dict[str, int] = dict(connection.execute(_USED, {"ids": ids}).all())
            new = [ask for ask in asks if ask.id not in used]
            if new:
                rows = [_account(ask.id) for ask in sorted(new, key=lambda ask: ask.id)]
                connection.execute(self.insert(accounts).on_conflict_do_nothing(), rows)
                used = dict(connection.execute(_USED, {"ids": ids}).all())
            mine: dict[str, float | None] = {}
            others: dict[str, list[Lease]] = {id: [] for id in ids}
            windows = {ask.id: ask.limit.window for ask in asks}
            for id, holder, granted, since, heard, seen, gone in connection.execute(_LEASES, {"ids": ids}):
                if holder == worker:
                    mine[id] = since
                    continue
                alive = lives(gone=gone, seen=seen, now=now)
                counted = counts(windows[id], gone=gone, seen=seen, now=now)
                others[id].append(Lease(granted, heard, alive, counted))
            grants, rows = [], []
            for ask in asks:
                grant, since = decide(ask, used[ask.id], others[ask.id], mine.get(ask.id), now)
                grants.append(grant)
                row = {"account": ask.id, "worker": worker, "granted": grant.granted, "touched": ask.heard}
                rows.append({**row, "wanted_since": since})
            connection.execute(self._granting, rows)
        return grants

    def charged(self, account: str) -> int:
        """What an account has counted for good."""
        with self.reading() as connection:
            found = connection.execute(sa.select(accounts.c.used).where(accounts.c.id == account))
            return found.scalar_one_or_none() or 0

    def booked(self, ids: Sequence[str]) -> dict[str, tuple[int, int]]:
        """Of each of these accounts that there is: what it has counted for good, and what workers hold of it
        for requests that are under way or to come."""
        held = sa.func.coalesce(sa.func.sum(leases.c.granted), 0)
        query = (
            sa.select(accounts.c.id, accounts.c.used, held)
            .outerjoin(leases, leases.c.account == accounts.c.id)
            .where(accounts.c.id.in_(ids))
            .group_by(accounts.c.id, accounts.c.used)
        )
        with self.reading() as connection:
            return {id: (used, int(granted)) for id, used, granted in connection.execute(query)}

    def position(self, worker: str) -> tuple[Position, bool]:
        """How far a worker's journal is in the ledger, and whether that is all of it."""
        with self.reading() as connection:
            row = connection.execute(
                sa.select(workers.c.segment, workers.c.offset, workers.c.done).where(workers.c.id == worker)
            ).one_or_none()
        return (Position(), False) if row is None else (Position(row[0], row[1]), row[2])

    def apply(
        self, worker: str, entries: Sequence[Entry], begin: Position, end: Position, *, last: bool = False
    ) -> dict[str, int]:
        """Take over what stands in a worker's journal between two positions; `last` says that it is dead and
        that this is the end. Returns what was added to the accounts. Raises Moved."""
        charged = sums(entries)
        changes: Changes = {}
        for entry in entries:
            add(changes, entry.row)
        with self.writing(durable=bool(entries)) as connection:
            moved: dict[str, Any] = {"b_segment": end.segment, "b_offset": end.offset}
            here = {"b_worker": worker, "b_from_segment": begin.segment, "b_from": begin.offset}
            if connection.execute(_MOVE, {**here, **moved}).rowcount != 1:
                raise Moved(self.position(worker)[0])
            if entries:
                self._append(connection, worker, entries)
            self._charge(connection, charged)
            self._shrink(connection, worker, charged)
            if last:
                gone = sa.func.coalesce(workers.c.gone, self.now(connection))
                connection.execute(
                    workers.update().where(workers.c.id == worker).values(done=True, gone=gone)
                )
                ended = sa.select(accounts.c.id).where(accounts.c.window != "minute")
                connection.execute(
                    leases.delete().where(leases.c.worker == worker, leases.c.account.in_(ended))
                )
            self.rollups.write(connection, changes)  # last, since all workers wait for one another here
        return charged

    def resettle(
        self, places: Collection[tuple[str, int]], settle: Callable[[Row], Amounts | None]
    ) -> dict[str, int]:
        """Settle rows that are in the ledger already, all in one transaction with the accounts that they
        charge. May be repeated: `settle` sees what the row is by then.

        Args:
            places: worker and number of each row; those that are not there are passed over.
            settle: changes the row that it is shown, and returns what that request has used (every account
                that it charges then has that in place of what it had), or None: what it charges stays.

        Returns what was added to the accounts, negative where a reservation was more than was used.
        """
        added: dict[str, int] = {}
        changes: Changes = {}
        with self.writing(durable=True) as connection:
            place = sa.tuple_(ledger.c.worker, ledger.c.number)
            found = (
                sa.select(ledger).where(place.in_(list(places))).order_by(ledger.c.worker, ledger.c.number)
            )
            for was in connection.execute(found.with_for_update()).mappings().all():
                row = as_row(was)
                add(changes, row, -1)
                used = settle(row)
                add(changes, row)
                changed = {name: value for name, value in _columns(row).items() if was[name] != value}
                if used is not None:
                    charged = {id: used.of(unit_of(id)) for id in was["charged"]}
                    for id, amount in charged.items():
                        added[id] = added.get(id, 0) + amount - was["charged"][id]
                    changed["charged"] = charged
                if changed:
                    here = sa.and_(ledger.c.worker == was["worker"], ledger.c.number == was["number"])
                    connection.execute(ledger.update().where(here).values(changed))
            added = {id: amount for id, amount in added.items() if amount}
            self._charge(connection, added)
            self.rollups.write(connection, changes)
        return added

    def owed(self, since: int, most: int) -> list[tuple[str, int, Row]]:
        """Rows that wait for bills, with their places; those that came first are first.

        Args:
            since: Unix nanoseconds; older ones wait for nothing any more.
            most: how many.
        """
        waiting = sa.select(ledger).where(ledger.c.owed.is_not(None), ledger.c.at >= since)
        with self.reading() as connection:
            found = connection.execute(waiting.order_by(ledger.c.at).limit(most)).mappings()
            return [(each["worker"], each["number"], as_row(each)) for each in found]

    def entries(self, worker: str, numbers: Sequence[int]) -> list[Entry]:
        """Rows of a worker by their numbers, as far as there are such."""
        found: list[Entry] = []
        with self.reading() as connection:
            for first in range(0, len(numbers), _MANY):
                some = ledger.c.number.in_(numbers[first : first + _MANY])
                rows = connection.execute(sa.select(ledger).where(ledger.c.worker == worker, some)).mappings()
                found += [Entry(each["number"], as_row(each), each["charged"]) for each in rows]
        return found

    def leave(self, worker: str, *, done: bool) -> None:
        """A worker has given back its leases and ends; `done` once its journal is in the ledger."""
        with self.writing() as connection:
            connection.execute(
                workers.update()
                .where(workers.c.id == worker)
                .values(gone=self.now(connection), **({"done": True} if done else {}))
            )
            connection.execute(leases.delete().where(leases.c.worker == worker, leases.c.granted == 0))

    @contextmanager
    def writing(self, *, durable: bool = False) -> Iterator[sa.Connection]:
        """A transaction that writes. `durable`: committed means on disk, also where the machine dies (with
        PostgreSQL always). Raises StoreDown."""
        try:
            with self.engine.connect() as connection:
                if self._sqlite:
                    level = "FULL" if durable else "NORMAL"
                    driver: Any = connection.connection.dbapi_connection
                    driver.execute(f"PRAGMA synchronous={level}")
                committed = False
                try:
                    with connection.begin():
                        yield connection
                    committed = True
                finally:
                    self.rollups.ended(connection, committed=committed)
        except SQLAlchemyError as error:
            raise StoreDown(
                f"The ledger's database does not answer: {said(error)}.", retry_after=1
            ) from error

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A transaction that only reads. Raises StoreDown."""
        try:
            with self.engine.connect().execution_options(penstock_reads=True) as connection:
                yield connection
        except SQLAlchemyError as error:
            raise StoreDown(
                f"The ledger's database does not answer: {said(error)}.", retry_after=1
            ) from error

    def now(self, connection: sa.Connection) -> float:
        """By which clock workers are believed to live, the same for all: the database server's, or for SQLite
        this machine's monotonic one, which nobody sets."""
        if self._clock is not None:
            return self._clock()
        if self._sqlite:
            return time.monotonic()
        return float(connection.execute(_SERVER_TIME).scalar_one())

    def _append(self, connection: sa.Connection, worker: str, entries: Sequence[Entry]) -> None:
        """Insert rows, past SQLAlchemy's work on each value: it would hold up the event loop's thread."""
        connection.exec_driver_sql(self._append_sql, [_values(worker, entry) for entry in entries])

    def _charge(self, connection: sa.Connection, charged: Mapping[str, int]) -> None:
        """Amounts enter the accounts, or leave them where they are negative."""
        if not charged:
            return
        ordered = sorted(charged.items())  # as everybody locks them
        connection.execute(self._charging, [{**_account(id), "used": amount} for id, amount in ordered])

    def _shrink(self, connection: sa.Connection, worker: str, charged: Mapping[str, int]) -> None:
        """What has entered the accounts is no longer a worker's to lease."""
        if charged:
            ordered = sorted(charged.items())
            connection.execute(
                _SHRINK, [{"b_worker": worker, "b_account": id, "b_amount": amount} for id, amount in ordered]
            )

    def _sweep(self, connection: sa.Connection, now: float) -> None:
        """Delete what no longer counts for anybody."""
        heard = sa.func.coalesce(workers.c.gone, workers.c.seen)
        over = sa.select(workers.c.id).where(sa.or_(heard < now - TTL - 2 * SPAN, heard > now + TTL))
        passing = sa.select(accounts.c.id).where(accounts.c.window.in_(("minute", "now")))
        connection.execute(leases.delete().where(leases.c.worker.in_(over), leases.c.account.in_(passing)))
        past = sa.select(accounts.c.id).where(accounts.c.start.between(1, time.time() - _FORGET))
        connection.execute(leases.delete().where(leases.c.account.in_(past)))


_MOVE = (
    workers.update()
    .where(
        workers.c.id == sa.bindparam("b_worker"),
        workers.c.segment == sa.bindparam("b_from_segment"),
        workers.c.offset == sa.bindparam("b_from"),
        sa.not_(workers.c.done),
    )
    .values(segment=sa.bindparam("b_segment"), offset=sa.bindparam("b_offset"))
)
_USED = (
    sa.select(accounts.c.id, accounts.c.used)
    .where(accounts.c.id.in_(sa.bindparam("ids", expanding=True)))
    .order_by(accounts.c.id)
    .with_for_update()
)
_LEASES = (
    sa.select(
        leases.c.account,
        leases.c.worker,
        leases.c.granted,
        leases.c.wanted_since,
        leases.c.touched,
        workers.c.seen,
        workers.c.gone,
    )
    .join(workers, workers.c.id == leases.c.worker)
    .where(leases.c.account.in_(sa.bindparam("ids", expanding=True)))
)
_SHRINK = (
    leases.update()
    .where(leases.c.worker == sa.bindparam("b_worker"), leases.c.account == sa.bindparam("b_account"))
    .values(
        granted=sa.case(
            (leases.c.granted > sa.bindparam("b_amount"), leases.c.granted - sa.bindparam("b_amount")),
            else_=0,
        )
    )
)
_LIVE = sa.and_(
    workers.c.id != sa.bindparam("me"),
    workers.c.gone.is_(None),
    workers.c.seen > sa.bindparam("since"),
    workers.c.seen <= sa.bindparam("until"),
)
_OTHERS = sa.select(sa.func.count()).select_from(workers).where(_LIVE)
_PRESSED = (
    sa.select(leases.c.account, sa.func.max(leases.c.wanted_since))
    .join(workers, workers.c.id == leases.c.worker)
    .where(leases.c.wanted_since.is_not(None), _LIVE)
    .group_by(leases.c.account)
)
_VERSIONS = sa.select(meta.c.name, meta.c.value).where(meta.c.name.in_(("keys", "weights")))
_SERVER_TIME = sa.select(sa.extract("epoch", sa.func.clock_timestamp()))


def unit_of(id: str) -> Unit:
    """The unit of an account, by its id."""
    return cast(Unit, id.rsplit("|", 3)[1])


def _account(id: str) -> dict[str, Any]:
    scope, unit, window, start = id.rsplit("|", 3)
    return {"id": id, "scope": scope, "unit": unit, "window": window, "start": int(start)}


_PLAIN = tuple(name for name in Row.__struct_fields__ if name not in ("tags", "failed", "owed"))
COLUMNS = ("worker", "number", *_PLAIN, "tags", "failed", "owed", "feature", "charged")
_plain = attrgetter(*_PLAIN)


def _values(worker: str, entry: Entry) -> tuple[Any, ...]:
    tags = entry.row.tags
    return (
        worker,
        entry.number,
        *_plain(entry.row),
        _json(tags),
        _json(entry.row.failed) if entry.row.failed else None,
        _json(entry.row.owed) if entry.row.owed else None,
        tags.get("feature"),
        _json(entry.charged),
    )


def as_row(found: sa.RowMapping) -> Row:
    """A row of the table, with all that a request's record says."""
    return msgspec.convert(
        {name: found[name] for name in Row.__struct_fields__}
        | {"failed": found["failed"] or (), "owed": found["owed"] or ()},
        Row,
    )


def _columns(row: Row) -> dict[str, Any]:
    """The other way: column by column."""
    values: dict[str, Any] = msgspec.to_builtins(row)
    instead = {"failed": values["failed"] or None, "owed": values["owed"] or None}
    return values | instead | {"feature": row.tags.get("feature")}


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
