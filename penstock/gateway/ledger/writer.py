"""What journals hold goes into the store, behind the requests: this worker's own, and those of the dead."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from msgspec.structs import replace

from penstock.gateway.records import Asked, Row

from .journal import CorruptJournal, Journal, Position, Record, dead, remove, segments, whole
from .store import Entry, Moved, Store, sums

logger = logging.getLogger("penstock.gateway")

BATCH = 256
"""Rows of one transaction, about: leases wait for it."""
_BYTES = 256 * 1024


class Charged(NamedTuple):
    """What a batch has added to the accounts."""

    amounts: dict[str, int]
    doubted: bool
    """Whether it had been written by an earlier try whose answer was lost."""


class Writer:
    """Takes a live worker's journal into the store, batch by batch. Blocks; one thread."""

    def __init__(self, store: Store, journal: Journal) -> None:
        self._store = store
        self._journal = journal
        self._at = Position()  # read until there
        self._stored = Position()  # as the store knows it
        self.rows = 0
        """Rows written so far."""

    @property
    def is_done(self) -> bool:
        """Whether everything in the journal is in the store."""
        return self._at == self._journal.end

    def step(self) -> Charged:
        """One batch. Raises Unavailable."""
        records, end = self._journal.read(self._at, _BYTES)
        entries = _ended(records)
        if not entries and end.segment == self._at.segment:
            self._at = end  # nothing but what is open
            return Charged({}, False)
        doubted = False
        try:
            charged = self._store.apply(self._journal.worker, entries, self._stored, end)
        except Moved as moved:
            if moved.position != end:
                raise CorruptJournal(
                    f"the ledger is at {tuple(moved.position)}, not at {tuple(self._stored)} or {tuple(end)}"
                ) from None
            # the answer to the last try was lost, but not what it wrote
            logger.warning("ledger: a batch had been written before")
            charged, doubted = sums(entries), True
        if end.segment != self._at.segment:
            self._journal.forget(end.segment)
        self._at = self._stored = end
        self.rows += len(entries)
        return Charged(charged, doubted)


def bury(store: Store, spool: Path) -> dict[str, list[Entry]]:
    """Take over the journals of dead workers: requests without an end become `unsettled`, at what they had
    reserved; whoever was asked for them still owes his bill. Returns the workers with the rows that were
    added. Raises Unavailable; may then be repeated."""
    found: dict[str, list[Entry]] = {}
    for worker, lock in dead(spool):
        try:
            entries, broken = _replay(store, spool, worker)
            if broken:
                _set_aside(spool, worker)
            remove(spool, worker)
            logger.warning(
                "worker %s had died: %d rows of its journal are in the ledger, %d of them unsettled",
                worker,
                len(entries),
                sum(entry.row.settlement == "unsettled" for entry in entries),
            )
            found[worker] = entries
        finally:
            os.close(lock)
    return found


def _replay(store: Store, spool: Path, worker: str) -> tuple[list[Entry], bool]:
    at, done = store.position(worker)
    if done:  # whoever did it died before he could delete the files
        return [], False
    store.register(worker)  # it may have died before it was known
    added: list[Entry] = []
    batch: list[Entry] = []
    opened: dict[int, Entry] = {}
    asked: dict[int, list[Asked]] = {}
    end, broken = at, False
    for position, record in whole(spool, worker):
        if isinstance(record, CorruptJournal):
            logger.error("ledger: %s; what follows in that file is lost", record)
            broken = True
            continue
        entry = None if record.row is None else Entry(record.number, record.row, record.charged)
        if record.kind == "open" and entry is not None:
            opened[record.number], asked[record.number] = entry, []
        elif record.kind == "ask" and record.asked is not None:
            asked.setdefault(record.number, []).append(record.asked)
        else:
            opened.pop(record.number, None)
            asked.pop(record.number, None)
        if position <= at:
            continue
        if record.kind == "end" and entry is not None:
            batch.append(entry)
        end = position
        if len(batch) >= BATCH:
            store.apply(worker, batch, at, end)
            added += batch
            batch, at = [], end
    batch += [
        Entry(number, unsettled(entry.row, asked[number]), entry.charged)
        for number, entry in sorted(opened.items())
    ]
    store.apply(worker, batch, at, end, last=True)
    return added + batch, broken


def unsettled(row: Row, asked: Sequence[Asked] = ()) -> Row:
    """The row of a request whose end nobody knows: charged at its reservation, and waiting for the bills of
    whoever was asked: the last one, and those whose stream the next one went on with, for their answer."""
    row.settlement, row.end = "unsettled", "killed"
    row.dollars = row.reserved_dollars or None
    row.device_seconds = row.reserved_device_seconds or None
    if asked:
        last = asked[-1]
        row.upstream, row.replica, row.model = last.upstream, last.replica, last.model
        row.pool, row.device, row.attempts = last.pool, last.device, len(asked)
        row.owed = tuple(each for each in (*_before(asked), last) if each.bill)
    return row


def _before(asked: Sequence[Asked]) -> Iterator[Asked]:
    """All but the last attempt, with what the client got of each; what gave nothing has only failed."""
    for each, following in pairwise(asked):
        gave = following.behind - each.behind
        yield replace(each, gave=gave) if gave > 0 else replace(each, lost=True)


def _ended(records: list[Record]) -> list[Entry]:
    return [
        Entry(record.number, record.row, record.charged)
        for record in records
        if record.kind == "end" and record.row is not None
    ]


def _set_aside(spool: Path, worker: str) -> None:
    for path in segments(spool, worker):
        path.rename(path.with_suffix(".broken"))
