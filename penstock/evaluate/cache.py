"""Answers that were given, by what was asked and whom: what a run that goes on need not ask again.

    DIR/<hash of the server>.sqlite3     about(server)   answers(key, answer)

One file for each server and model, so that two evaluations may share a folder; one writer for each file,
which holds SQLite's lock as long as it runs. An answer is written in a transaction of its own before it
counts: whoever is killed loses none that was reported, and a key has one answer.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from penstock.core.errors import StartupError, brief

from .answer import Answer
from .dataset import canonical

_VERSION = 1
_decode = msgspec.msgpack.Decoder(Answer).decode


def key(path: str, body: Mapping[str, Any]) -> str:
    """The name of an answer: a hash of the request's path and canonical body, its model included."""
    return hashlib.sha256(f"{path}\0{canonical(body)}".encode("utf-8", "surrogatepass")).hexdigest()


class Cache:
    """The answers of one server and model."""

    def __init__(self, folder: Path, server: Mapping[str, Any]) -> None:
        """`server`: what tells it from others: its URL or its weights, its model, its version.

        Raises StartupError: the file is another run's, is broken, or cannot be written.
        """
        about = canonical(server)
        self.path = folder / f"{hashlib.sha256(about.encode()).hexdigest()[:24]}.sqlite3"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))  # answers are nobody else's business
            self._database = sqlite3.connect(
                self.path, timeout=0.2, isolation_level=None, check_same_thread=False
            )
        except (OSError, sqlite3.Error) as error:
            raise StartupError(f"The cache {self.path} cannot be opened: {error}.", advice=_ADVICE) from error
        try:
            self._open(about)
        except (sqlite3.Error, StartupError) as error:
            self._database.close()
            if getattr(error, "sqlite_errorcode", None) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise StartupError(
                    f"Another `penstock eval` is asking the same server and model (it holds {self.path}).",
                    advice="Wait until it has ended, or keep this one's answers elsewhere with --cache DIR.",
                ) from None
            if isinstance(error, StartupError):
                raise
            raise StartupError(f"The cache {self.path} cannot be used: {error}.", advice=_ADVICE) from error

    def _open(self, about: str) -> None:
        run = self._database.execute
        run("PRAGMA locking_mode = EXCLUSIVE")
        run("PRAGMA journal_mode = WAL")
        # a killed process loses nothing; a machine without power the last answers, which are asked again
        run("PRAGMA synchronous = NORMAL")
        run("BEGIN IMMEDIATE")
        (version,) = run("PRAGMA user_version").fetchone()
        if version not in (0, _VERSION):
            raise StartupError(
                f"The cache {self.path} is of another version of Penstock ({version}, not {_VERSION}).",
                advice=_ADVICE,
            )
        run("CREATE TABLE IF NOT EXISTS about (server TEXT NOT NULL)")
        run("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer BLOB NOT NULL) WITHOUT ROWID")
        if run("SELECT count(*) FROM about").fetchone() == (0,):
            run("INSERT INTO about VALUES (?)", (about,))
        run(f"PRAGMA user_version = {_VERSION}")
        run("COMMIT")

    def get(self, name: str) -> Answer | None:
        """The answer of this key; None if there is none, or it cannot be read."""
        row = self._database.execute("SELECT answer FROM answers WHERE key = ?", (name,)).fetchone()
        if row is None:
            return None
        try:
            return _decode(row[0])
        except (msgspec.DecodeError, TypeError):
            return None

    def put(self, name: str, answer: Answer) -> None:
        """Keep it; in place of one that is there. Raises StartupError, as for a full disk."""
        try:
            self._database.execute(
                "INSERT OR REPLACE INTO answers VALUES (?, ?)", (name, msgspec.msgpack.encode(answer))
            )
        except sqlite3.Error as error:
            raise StartupError(
                f"The cache {self.path} cannot be written: {brief(str(error))}.",
                advice="What was kept is kept; the same command goes on where it stopped.",
            ) from error

    def close(self) -> None:
        """Let others have it."""
        with contextlib.suppress(sqlite3.Error):
            self._database.close()


_ADVICE = "Name another folder with --cache DIR, or remove the file: its answers are asked again then."
