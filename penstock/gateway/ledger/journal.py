"""What a worker has let through, on disk before the upstream sees it: the ledger's spool.

    WORKER.lock            locked as long as the worker lives
    WORKER.000000.journal  magic, then records: length, crc32 (little endian, 4 bytes each), msgpack
    WORKER.000001.journal  begins with copies of what was still open

A record is (kind, number, row, charged, asked): `open` when a request is let through, with its worst case,
`ask` when somebody is asked, with who that is and under which name his bill will come, and `end` with what it
used; `charged` is {account: amount} of the accounts that the store counts for good. Records are written with
one write(2) each and no fsync: they survive the death of the process, not that of the machine. Version 1 had
no `ask`; it is read, too.

A worker's journal is read by itself, behind its requests, and after its death by whoever gets its lock.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import zlib
from collections.abc import Iterator
from pathlib import Path
from struct import Struct
from typing import Literal, NamedTuple

import msgspec

from penstock.core.errors import StartupError, Unavailable
from penstock.gateway.records import Asked, Row

MAGIC = b"penstock journal 2\n"
_MAGIC_1 = b"penstock journal 1\n"
SEGMENT = 16 * 1024 * 1024
"""Bytes after which a new file begins, so that the old one can go."""
_LARGEST = 1 << 24
_HEAD = Struct("<II")

Kind = Literal["open", "ask", "end"]


class Record(NamedTuple):
    """One line of the journal."""

    kind: Kind
    number: int
    """Of the request, counted by its worker."""
    row: Row | None
    """None with `ask`."""
    charged: dict[str, int]
    asked: Asked | None = None
    """With `ask`."""


class Position(NamedTuple):
    """A place between two records."""

    segment: int = 0
    offset: int = 0


class SpoolFull(Unavailable):
    """The spool cannot be written: no request may pass that nobody could account for."""

    code = "ledger_unavailable"


class CorruptJournal(Exception):
    """A record that cannot be what was written."""


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Record)


class Journal:
    """The journal of this worker; one thread writes, and another may read."""

    def __init__(self, spool: Path, worker: str | None = None, *, segment_bytes: int = SEGMENT) -> None:
        self.worker = worker or secrets.token_hex(8)
        self.spool = spool
        self.number = 0
        self._segment_bytes = segment_bytes
        self._open: dict[int, bytes] = {}
        self._unwritten: dict[int, bytes] = {}
        self._at = Position()
        self._fd = -1
        try:
            spool.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = _locked_new(spool, self.worker)
            self._begin(0)
        except OSError as error:
            raise StartupError(
                f"The ledger's spool {spool} cannot be written: {error.strerror or error}.",
                param="ledger.spool",
                advice="ledger.spool names a folder on a local disk.",
            ) from None

    @property
    def end(self) -> Position:
        """Behind the last whole record."""
        return self._at

    @property
    def pending(self) -> int:
        """Requests whose end could not be written yet."""
        return len(self._unwritten)

    def draw(self) -> int:
        """A number for a request; those of requests that are not let through are missing in the journal."""
        number, self.number = self.number, self.number + 1
        return number

    def open(self, row: Row, charged: dict[str, int], number: int | None = None) -> int:
        """A request is let through; returns its number: the one that was drawn for it, if any. Raises
        SpoolFull, and then nothing is written."""
        if self._unwritten:
            self.retry()
        if self._unwritten:
            raise _full(self.spool, "No space left on device")
        if number is None:
            number = self.number
        data = _framed("open", number, row, charged)
        try:
            self._append(data)
        except OSError as error:
            raise _full(self.spool, error.strerror or str(error)) from None
        self.number = max(self.number, number + 1)
        self._open[number] = data
        return number

    def ask(self, number: int, asked: Asked) -> None:
        """An upstream will be asked. Never raises: what cannot be written is only missed if this worker dies,
        and then the request stays at its reservation."""
        data = _framed("ask", number, None, {}, asked)
        try:
            self._append(data)
        except OSError:
            return
        self._open[number] += data

    def close(self, number: int, row: Row, charged: dict[str, int]) -> None:
        """A request has ended. Never raises: what cannot be written now is kept, and written with `retry`."""
        data = _framed("end", number, row, charged)
        self._open.pop(number, None)
        try:
            if self._unwritten:
                raise OSError(errno.ENOSPC, "")
            self._append(data)
        except OSError:
            self._unwritten[number] = data

    def hand_over(
        self,
        number: int,
        row: Row,
        charged: dict[str, int],
        next_row: Row,
        next_charged: dict[str, int],
        next_number: int | None = None,
    ) -> int:
        """A request ends and another one that it had reserved for begins, both or neither; returns the other
        one's number. Raises SpoolFull, and then nothing is written."""
        if self._unwritten:
            raise _full(self.spool, "No space left on device")
        if next_number is None:
            next_number = self.number
        begun = _framed("open", next_number, next_row, next_charged)
        try:
            self._append(_framed("end", number, row, charged) + begun)
        except OSError as error:
            raise _full(self.spool, error.strerror or str(error)) from None
        self.number = max(self.number, next_number + 1)
        self._open.pop(number, None)
        self._open[next_number] = begun
        return next_number

    def retry(self) -> None:
        """Write what could not be written before."""
        for number, data in list(self._unwritten.items()):
            try:
                self._append(data)
            except OSError:
                return
            del self._unwritten[number]

    def read(self, position: Position, most: int) -> tuple[list[Record], Position]:
        """About `most` bytes of records from a position, and the one behind them. For the other thread."""
        end = self._at  # before the file is read: behind it may be half a record
        last = position.segment >= end.segment
        length = min(most, end.offset - position.offset) if last else most
        data = _piece(self._path(position.segment), position.offset, length)
        found = parse(data, first=position.offset == 0)
        if found.problem:
            raise CorruptJournal(f"{self._path(position.segment)}: {found.problem}")
        if not found.records and len(data) == most:  # one record is larger than that
            return self.read(position, 2 * most)
        if not data and not last:
            return [], Position(position.segment + 1)
        return found.records, Position(position.segment, position.offset + found.used)

    def forget(self, before: int) -> None:
        """The segments before this one are in the store."""
        for path in segments(self.spool, self.worker):
            if _number(path) < before:
                path.unlink(missing_ok=True)

    def shut(self, *, delete: bool) -> None:
        """Let go of it; `delete` once everything is in the store."""
        os.close(self._fd)
        if delete:
            remove(self.spool, self.worker)
        os.close(self._lock)

    def _append(self, data: bytes) -> None:
        if self._at.offset + len(data) > self._segment_bytes and self._at.offset > self._carried:
            self._begin(self._at.segment + 1)
        self._write(data)

    def _write(self, data: bytes) -> None:
        written = os.write(self._fd, data)
        if written != len(data):
            # the disk is full in the middle of a record: take back its beginning
            os.ftruncate(self._fd, self._at.offset)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._at = Position(self._at.segment, self._at.offset + written)

    def _begin(self, segment: int) -> None:
        """Go on in a new file, with copies of what is open."""
        path = self._path(segment)
        data = b"".join([MAGIC, *self._open.values()])
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_TRUNC, 0o600)
        try:
            if os.write(fd, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.close(fd)
            path.unlink(missing_ok=True)
            raise
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._at, self._carried = fd, Position(segment, len(data)), len(data)

    def _path(self, segment: int) -> Path:
        return self.spool / f"{self.worker}.{segment:06}.journal"


class Parsed(NamedTuple):
    """The whole records of a piece of a file."""

    records: list[Record]
    ends: list[int]
    """Where each ends."""
    used: int
    """Where the last one ends."""
    problem: str = ""
    """Why what follows is no record; empty where it may only be incomplete."""


def parse(data: bytes, *, first: bool) -> Parsed:
    """Whole records at the beginning of `data`. `first` says that it is the beginning of a file."""
    records: list[Record] = []
    ends: list[int] = []
    at = 0
    problem = ""
    if first and data:
        if not (MAGIC.startswith(data[: len(MAGIC)]) or data.startswith(_MAGIC_1)):
            return Parsed([], [], 0, "it does not begin as a journal of this version")
        if len(data) < len(MAGIC):
            return Parsed([], [], 0)
        at = len(MAGIC)
    while at + _HEAD.size <= len(data):
        length, crc = _HEAD.unpack_from(data, at)
        end = at + _HEAD.size + length
        if length > _LARGEST:
            problem = f"a record of {length} bytes at {at}"
            break
        if end > len(data):
            break
        payload = data[at + _HEAD.size : end]
        if zlib.crc32(payload) != crc:
            problem = f"a record with the wrong checksum at {at}"
            break
        try:
            records.append(_decoder.decode(payload))
        except msgspec.MsgspecError as error:
            problem = f"a record that is none at {at}: {error}"
            break
        ends.append(end)
        at = end
    return Parsed(records, ends, at, problem)


def segments(spool: Path, worker: str) -> list[Path]:
    """The files of a worker's journal, in their order."""
    return sorted(spool.glob(f"{worker}.*.journal"), key=_number)


def whole(spool: Path, worker: str) -> Iterator[tuple[Position, Record | CorruptJournal]]:
    """A dead worker's records with the positions behind them. One that is broken, or whose end is missing as
    a power failure leaves it, comes as an error, and nothing of its file after it."""
    for path in segments(spool, worker):
        segment, offset, most = _number(path), 0, 1 << 20
        while data := _piece(path, offset, most):
            found = parse(data, first=offset == 0)
            for end, record in zip(found.ends, found.records, strict=True):
                yield Position(segment, offset + end), record
            problem = found.problem
            if not problem and found.used < len(data) < most:
                problem = f"half a record at {offset + found.used}"
            offset += found.used
            if problem:
                yield Position(segment, offset), CorruptJournal(f"{path}: {problem}")
                break
            if found.used == 0:
                most *= 2


def remove(spool: Path, worker: str) -> None:
    """Delete a worker's journal; whoever calls holds its lock."""
    for path in segments(spool, worker):
        path.unlink(missing_ok=True)
    (spool / f"{worker}.lock").unlink(missing_ok=True)


def dead(spool: Path) -> Iterator[tuple[str, int]]:
    """Workers whose journals nobody holds, with their locks, which are held now. Close them when done."""
    for path in sorted(spool.glob("[!.]*.lock")):  # pathlib's * sees hidden ones, which are being made
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            gone = os.fstat(fd).st_nlink == 0  # somebody else was faster, and has deleted it
        except BlockingIOError:
            gone = True
        if gone:
            os.close(fd)
        else:
            yield path.stem, fd


def _locked_new(spool: Path, worker: str) -> int:
    """A lock that is held before anybody sees it."""
    hidden = spool / f".{worker}.lock"
    fd = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        hidden.rename(spool / f"{worker}.lock")
    except OSError:
        os.close(fd)
        hidden.unlink(missing_ok=True)
        raise
    return fd


def _framed(
    kind: Kind, number: int, row: Row | None, charged: dict[str, int], asked: Asked | None = None
) -> bytes:
    record = (kind, number, row, charged) if asked is None else (kind, number, row, charged, asked)
    payload = _encoder.encode(record)
    return _HEAD.pack(len(payload), zlib.crc32(payload)) + payload


def _full(spool: Path, why: str) -> SpoolFull:
    return SpoolFull(
        f"The ledger's spool {spool} cannot be written: {why}. No request is let through that could not be "
        "accounted for.",
        retry_after=5,
    )


def _piece(path: Path, offset: int, most: int) -> bytes:
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        return file.read(max(0, most))


def _number(path: Path) -> int:
    return int(path.name.split(".")[-2])
