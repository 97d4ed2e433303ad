"""Files, batches and the answers of lines, on disk: what is here survives whatever becomes of the process.

    FOLDER/batches.sqlite    files, batches, and results (batch, line) ─▶ a line of output
    FOLDER/files/ID          contents

A line's result is there or it is not: it is written in one transaction, and its key is the line, so that none
is lost that was told, and none is there twice. A file has its name when all of it is on disk. Methods block.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import msgspec

_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, owner TEXT NOT NULL,
    purpose TEXT NOT NULL, filename TEXT NOT NULL, bytes INTEGER NOT NULL, created_at INTEGER NOT NULL,
    expires_at INTEGER
);
CREATE TABLE IF NOT EXISTS batches (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, owner TEXT NOT NULL,
    live INTEGER NOT NULL, told TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS results (
    batch TEXT NOT NULL, line INTEGER NOT NULL, failed INTEGER NOT NULL, text BLOB NOT NULL,
    PRIMARY KEY (batch, line)
) WITHOUT ROWID;
"""
_COPIED = 1 << 20
"""Bytes of a file that are written at once."""


class File(msgspec.Struct, kw_only=True):
    """One file."""

    number: int = 0
    id: str
    owner: str
    purpose: str
    filename: str
    bytes: int
    created_at: int
    expires_at: int | None = None

    def told(self) -> dict[str, Any]:
        """As the API tells it."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.bytes,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
        }


class Stored(msgspec.Struct):
    """One batch."""

    number: int
    owner: str
    told: dict[str, Any]
    """As the API tells it."""


class BatchStore:
    """Everything in one folder. For one process, whose threads may share it."""

    def __init__(self, folder: Path) -> None:
        """Raises OSError and sqlite3.Error where the folder cannot be used."""
        self.folder = folder
        self.contents = folder / "files"
        self.contents.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._held = (folder / "lock").open("wb")
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._held.close()
            raise OSError("another server has it") from None
        self._lock = threading.RLock()
        self._database = sqlite3.connect(folder / "batches.sqlite", check_same_thread=False)
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.execute("PRAGMA synchronous=FULL")
        with self._database:
            self._database.executescript(_SCHEMA)

    def close(self) -> None:
        """No more."""
        with self._lock:
            self._database.close()
        self._held.close()

    # ---- files ----
    def add_file(self, file: File, content: IO[bytes]) -> None:
        """Keep a file, in place of the one that has this id."""
        self._write(file.id, iter(lambda: content.read(_COPIED), b""))
        self._insert(file)

    def add_lines(self, file: File, batch: str, *, failed: bool) -> File:
        """Keep a file of the results of a batch, in the order of its lines."""
        size = self._write(file.id, (text + b"\n" for _, text in self.results(batch, failed)))
        file = msgspec.structs.replace(file, bytes=size)
        self._insert(file)
        return file

    def _insert(self, file: File) -> None:
        row = (file.id, file.owner, file.purpose, file.filename, file.bytes, file.created_at, file.expires_at)
        with self._lock, self._database:
            self._database.execute(
                "INSERT OR REPLACE INTO files (id, owner, purpose, filename, bytes, created_at, expires_at) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                row,
            )

    def _write(self, id: str, pieces: Iterator[bytes]) -> int:
        path = self.contents / id
        part = path.with_suffix(".part")
        size = 0
        with part.open("wb") as file:
            for piece in pieces:
                size += file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        return size

    def file(self, id: str, owner: str, now: float) -> File | None:
        """One of this owner's that has not expired."""
        found = self._files("id = ? AND owner = ?", (id, owner), 1, now)
        return found[0] if found else None

    def files(
        self, owner: str, now: float, *, after: int | None, oldest: bool, most: int, purpose: str | None
    ) -> list[File]:
        """A page of this owner's. after: the number of the last one before it."""
        where, values = _page("owner = ?", [owner], after, oldest)
        if purpose is not None:
            where, values = f"{where} AND purpose = ?", [*values, purpose]
        return self._files(where, values, most, now, "ASC" if oldest else "DESC")

    def _files(self, where: str, values: Any, most: int, now: float, order: str = "ASC") -> list[File]:
        with self._lock:
            rows = self._database.execute(
                "SELECT number, id, owner, purpose, filename, bytes, created_at, expires_at FROM files "
                f"WHERE {where} AND (expires_at IS NULL OR expires_at > ?) ORDER BY number {order} LIMIT ?",
                (*values, now, most),
            ).fetchall()
        return [msgspec.convert(dict(zip(File.__struct_fields__, row, strict=True)), File) for row in rows]

    def delete_file(self, id: str) -> None:
        """Forget it."""
        with self._lock, self._database:
            self._database.execute("DELETE FROM files WHERE id = ?", (id,))
        (self.contents / id).unlink(missing_ok=True)

    def delete_expired(self, now: float) -> None:
        """Forget files whose time has come, and that no batch reads."""
        with self._lock:
            rows = self._database.execute("SELECT id FROM files WHERE expires_at <= ?", (now,)).fetchall()
        for (id,) in rows:
            if not self.uses(id):
                self.delete_file(id)

    # ---- batches ----
    def save(self, told: dict[str, Any], owner: str, *, live: bool) -> None:
        """A batch as it is now; its results go when it is not live any more."""
        text = msgspec.json.encode(told).decode()
        with self._lock, self._database:
            self._database.execute(
                "INSERT INTO batches (id, owner, live, told) VALUES (?, ?, ?, ?) "
                "ON CONFLICT (id) DO UPDATE SET live = excluded.live, told = excluded.told",
                (told["id"], owner, live, text),
            )
            if not live:
                self._database.execute("DELETE FROM results WHERE batch = ?", (told["id"],))

    def batch(self, id: str, owner: str) -> Stored | None:
        """One of this owner's."""
        found = self._batches("id = ? AND owner = ?", (id, owner), 1)
        return found[0] if found else None

    def batches(self, owner: str, *, after: int | None, most: int) -> list[Stored]:
        """A page of this owner's, the latest first."""
        where, values = _page("owner = ?", [owner], after, False)
        return self._batches(where, values, most, "DESC")

    def live(self) -> list[Stored]:
        """Those that go on, the eldest first."""
        return self._batches("live", (), -1)

    def uses(self, file: str) -> bool:
        """Whether a batch that goes on reads this file."""
        return any(each.told["input_file_id"] == file for each in self.live())

    def _batches(self, where: str, values: Any, most: int, order: str = "ASC") -> list[Stored]:
        with self._lock:
            rows = self._database.execute(
                f"SELECT number, owner, told FROM batches WHERE {where} ORDER BY number {order} LIMIT ?",
                (*values, most),
            ).fetchall()
        return [Stored(number, owner, msgspec.json.decode(told)) for number, owner, told in rows]

    # ---- results ----
    def add_result(self, batch: str, line: int, text: bytes, *, failed: bool) -> bool:
        """A line's result; False where it has one."""
        with self._lock, self._database:
            cursor = self._database.execute(
                "INSERT OR IGNORE INTO results VALUES (?, ?, ?, ?)", (batch, line, failed, text)
            )
        return cursor.rowcount == 1

    def results(self, batch: str, failed: bool) -> Iterator[tuple[int, bytes]]:
        """(line, text) in order."""
        last = 0
        while True:
            with self._lock:
                rows = self._database.execute(
                    "SELECT line, text FROM results WHERE batch = ? AND failed = ? AND line > ? "
                    "ORDER BY line LIMIT 256",
                    (batch, failed, last),
                ).fetchall()
            if not rows:
                return
            yield from rows
            last = rows[-1][0]

    def done(self, batch: str) -> dict[int, bool]:
        """Lines that have a result → whether it is a failure."""
        with self._lock:
            rows = self._database.execute("SELECT line, failed FROM results WHERE batch = ?", (batch,))
            return {line: bool(failed) for line, failed in rows}


def _page(where: str, values: list[Any], after: int | None, oldest: bool) -> tuple[str, list[Any]]:
    if after is None:
        return where, values
    return f"{where} AND number {'>' if oldest else '<'} ?", [*values, after]
