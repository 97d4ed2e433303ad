"""Files and batches that upstreams keep for the gateway's keys: whose they are, and what was said of them.

    file    body: the upstream's object    about: of a batch's input, what its lines may use (Contents)
    batch   body: the upstream's object    about: its row and its terms (Charged)
            asked ─▶ running ─▶ over       asked: nobody has said yet whether there is one

Every method is one transaction, and blocks: ledger/thread.py is where it runs. Times are Unix nanoseconds.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal

import msgspec
import sqlalchemy as sa

from penstock.gateway.ledger.schema import objects
from penstock.gateway.ledger.store import Store

Kind = Literal["file", "batch"]
State = Literal["", "asked", "running", "over"]
_ALIVE = ("asked", "running")


class Kept(msgspec.Struct, kw_only=True):
    """A file or a batch."""

    replica: str
    """Id of the station that has it."""
    id: str
    """The upstream's."""
    kind: Kind
    key_id: str
    """Whose it is."""
    purpose: str = ""
    created: int
    expires: int | None = None
    state: State = ""
    checked: int = 0
    """When its upstream was last asked about it."""
    body: bytes = b"{}"
    about: bytes = b"{}"


_COLUMNS = tuple(objects.c[name] for name in Kept.__struct_fields__)


class Objects:
    """All of them, in the ledger's database."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def add(self, kept: Kept) -> None:
        """Remember one; one that is known stays as it is."""
        with self._store.writing(durable=True) as connection:
            connection.execute(
                self._store.insert(objects).values(msgspec.structs.asdict(kept)).on_conflict_do_nothing()
            )

    def find(self, replica: str, id: str) -> Kept | None:
        """One, if it is known."""
        with self._store.reading() as connection:
            found = connection.execute(sa.select(*_COLUMNS).where(_is(replica, id))).one_or_none()
        return None if found is None else _kept(found)

    def change(self, replica: str, id: str, /, **values: Any) -> bool:
        """Write fields of one; false where it is gone."""
        with self._store.writing(durable=True) as connection:
            done = connection.execute(objects.update().where(_is(replica, id)).values(**values))
            return bool(done.rowcount)

    def remove(self, replica: str, id: str) -> None:
        """Forget one."""
        with self._store.writing() as connection:
            connection.execute(objects.delete().where(_is(replica, id)))

    def page(
        self,
        kind: Kind,
        key_id: str,
        replicas: Collection[str],
        *,
        after: tuple[str, str] | None,
        limit: int,
        now: int,
        purpose: str | None = None,
        oldest_first: bool = False,
    ) -> tuple[list[Kept], bool]:
        """A key's own at these stations, newest first, and whether there are more.

        Args:
            after: station and id of the last one of the page before.
        """
        at = sa.tuple_(objects.c.created, objects.c.replica, objects.c.id)
        wanted = [
            objects.c.key_id == key_id,
            objects.c.kind == kind,
            objects.c.replica.in_(replicas),
            objects.c.state != "asked",
            sa.or_(objects.c.expires.is_(None), objects.c.expires > now),
        ]
        if purpose is not None:
            wanted.append(objects.c.purpose == purpose)
        with self._store.reading() as connection:
            if after is not None:
                found = connection.execute(
                    sa.select(objects.c.created).where(_is(*after), objects.c.key_id == key_id)
                ).scalar_one_or_none()
                if found is None:
                    return [], False
                edge = sa.tuple_(sa.literal(found), sa.literal(after[0]), sa.literal(after[1]))
                wanted.append(at > edge if oldest_first else at < edge)
            order = [objects.c.created, objects.c.replica, objects.c.id]
            rows = connection.execute(
                sa.select(*_COLUMNS)
                .where(*wanted)
                .order_by(*(order if oldest_first else [each.desc() for each in order]))
                .limit(limit + 1)
            ).all()
        return [_kept(row) for row in rows[:limit]], len(rows) > limit

    def due(self, before: int, now: int, replicas: Collection[str], limit: int) -> list[Kept]:
        """Batches whose upstreams were not asked since `before`; they are the caller's for now, and nobody
        else gets them."""
        alive = [objects.c.state.in_(_ALIVE), objects.c.replica.in_(replicas)]
        stale = sa.or_(objects.c.checked < before, objects.c.checked > now)
        with self._store.reading() as connection:
            rows = connection.execute(
                sa.select(*_COLUMNS).where(*alive, stale).order_by(objects.c.checked).limit(limit)
            ).all()
        if not rows:
            return []
        taken = []
        with self._store.writing() as connection:
            for kept in map(_kept, rows):
                mine = objects.update().where(_is(kept.replica, kept.id), objects.c.checked == kept.checked)
                if connection.execute(mine.values(checked=now)).rowcount:
                    taken.append(kept)
        return taken


def _is(replica: str, id: str) -> sa.ColumnElement[bool]:
    return sa.and_(objects.c.replica == replica, objects.c.id == id)


def _kept(row: Sequence[Any]) -> Kept:
    return Kept(**dict(zip(Kept.__struct_fields__, row, strict=True)))
