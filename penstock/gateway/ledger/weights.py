"""Weights of routes in the ledger's database: written in one transaction, heard of by all workers with their
next beat, and there after a restart.

    admin API ──▶ WeightTable ──▶ table weights, version in meta
    beat ──▶ Helm.version ──another one──▶ read again ──▶ the worker's routes, all at once
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import msgspec
import sqlalchemy as sa

from penstock.gateway.policy.weights import Steering, Weight

from .schema import meta, weights
from .store import Store
from .thread import StoreThread

logger = logging.getLogger("penstock.gateway")

_VERSION = "weights"


class WeightTable:
    """The table. It blocks."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def read(self) -> tuple[int, list[Steering]]:
        """The version, and all that was said."""
        with self._store.reading() as connection:
            version = connection.execute(
                sa.select(meta.c.value).where(meta.c.name == _VERSION)
            ).scalar_one_or_none()
            found = connection.execute(sa.select(weights)).mappings().all()
        return version or 0, [_steering(row) for row in found]

    def put(self, steering: Steering) -> None:
        """Say how a route shares out its requests, whatever was said before."""
        values: dict[str, Any] = msgspec.to_builtins(steering)
        with self._store.writing(durable=True) as connection:
            statement = self._store.insert(weights).values(values)
            kept = {name: values[name] for name in ("targets", "instead", "changed", "note")}
            connection.execute(statement.on_conflict_do_update(index_elements=["route"], set_=kept))
            self._changed(connection)

    def drop(self, route: str) -> bool:
        """As the spec has it again. Whether anything else was said."""
        with self._store.writing(durable=True) as connection:
            gone = connection.execute(weights.delete().where(weights.c.route == route)).rowcount
            if gone:
                self._changed(connection)
        return bool(gone)

    def _changed(self, connection: sa.Connection) -> None:
        statement = self._store.insert(meta).values(name=_VERSION, value=1)
        connection.execute(
            statement.on_conflict_do_update(index_elements=["name"], set_={"value": meta.c.value + 1})
        )


class Helm:
    """What a worker knows of the table. Belongs to its event loop."""

    def __init__(
        self, table: WeightTable, thread: StoreThread, steer: Callable[[list[Steering]], None]
    ) -> None:
        """`steer` is told all that was said, whenever something of it is new."""
        self._table, self._thread, self._steer = table, thread, steer
        self._known: int | None = None
        self._reading = False

    async def open(self) -> None:
        """Read it before the first request. Raises Unavailable."""
        self._apply(await self._thread.call(self._table.read, urgent=True))

    def version(self, version: int) -> None:
        """The database's version of all weights, at least once a second."""
        if self._known is None or version == self._known or self._reading:
            return
        self._reading = True
        self._thread.call(self._table.read, apply=self._apply, urgent=True).add_done_callback(self._over)

    def _over(self, reading: asyncio.Future[Any]) -> None:
        self._reading = False
        if not reading.cancelled() and (error := reading.exception()) is not None:
            logger.warning("weights of routes could not be read, and are asked for again: %s", error)

    def _apply(self, found: tuple[int, list[Steering]]) -> None:
        self._known, steerings = found
        self._steer(steerings)


def _steering(row: Any) -> Steering:
    targets, instead = (msgspec.convert(row[name], tuple[Weight, ...]) for name in ("targets", "instead"))
    return Steering(row["route"], targets, instead, row["changed"], row["note"])
