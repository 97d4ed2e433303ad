"""The journal: what it holds after a full disk or half a record, and who may take it over."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from penstock.core.errors import StartupError
from penstock.gateway.ledger import journal as module
from penstock.gateway.ledger.journal import (
    CorruptJournal,
    Journal,
    Position,
    SpoolFull,
    dead,
    segments,
    whole,
)
from penstock.gateway.records import Row


def row(id: str, **fields: object) -> Row:
    return Row(id=id, at=1, key_id="k", **fields)  # type: ignore[arg-type]


def read_all(journal: Journal) -> list[tuple[str, int, str]]:
    at, found = Position(), []
    while at != journal.end:
        records, at = journal.read(at, 200)
        found += [(record.kind, record.number, record.row.id) for record in records]
    return found


def test_what_is_written_is_read(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    first = journal.open(row("a"), {"x": 5})
    journal.close(first, row("a", note="n" * 500), {"x": 3})
    assert journal.open(row("b"), {}) == 1
    assert read_all(journal) == [("open", 0, "a"), ("end", 0, "a"), ("open", 1, "b")]
    assert journal.read(journal.end, 100) == ([], journal.end)


def test_a_new_segment_begins_with_what_is_open(tmp_path: Path) -> None:
    journal = Journal(tmp_path, segment_bytes=2000)
    kept = journal.open(row("kept"), {})
    for index in range(40):
        journal.close(journal.open(row(f"r{index}"), {}), row(f"r{index}"), {})
    files = segments(tmp_path, journal.worker)
    assert len(files) > 2
    journal.forget(journal.end.segment)
    assert segments(tmp_path, journal.worker) == files[-1:]
    journal.close(kept, row("kept"), {})
    found = [record for _, record in whole(tmp_path, journal.worker)]
    assert [record.kind for record in found if record.row.id == "kept"] == ["open", "end"]


def test_a_full_disk_refuses_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path)
    number = journal.open(row("a"), {})
    other = journal.open(row("b"), {})
    real, left = os.write, 10

    def write(fd: int, data: bytes) -> int:
        nonlocal left
        if not left:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = min(left, len(data))
        left -= count
        return real(fd, data[:count])

    monkeypatch.setattr(module.os, "write", write)
    with pytest.raises(SpoolFull, match="No space left on device"):
        journal.open(row("c"), {})
    journal.close(number, row("a"), {})
    journal.close(other, row("b"), {})
    assert journal.pending == 2
    with pytest.raises(SpoolFull):
        journal.open(row("d"), {})
    left = 1 << 20
    assert journal.open(row("e"), {}) == 2
    assert journal.pending == 0
    kinds = [(record.kind, record.row.id) for _, record in whole(tmp_path, journal.worker)]
    assert kinds == [("open", "a"), ("open", "b"), ("end", "a"), ("end", "b"), ("open", "e")]


@pytest.mark.parametrize("cut", [1, 7, 20])
def test_half_a_record_at_the_end_is_told_and_the_rest_is_kept(tmp_path: Path, cut: int) -> None:
    journal = Journal(tmp_path)
    journal.open(row("a"), {})
    journal.open(row("b"), {})
    path = segments(tmp_path, journal.worker)[0]
    path.write_bytes(path.read_bytes()[:-cut])
    found = [record for _, record in whole(tmp_path, journal.worker)]
    assert isinstance(found[-1], CorruptJournal)
    assert [record.row.id for record in found[:-1]] == ["a"]


def test_a_flipped_bit_is_told(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for name in "abc":
        journal.open(row(name), {})
    path = segments(tmp_path, journal.worker)[0]
    data = bytearray(path.read_bytes())
    data[len(module.MAGIC) + (len(data) - len(module.MAGIC)) // 2] ^= 4
    path.write_bytes(data)
    found = [record for _, record in whole(tmp_path, journal.worker)]
    assert isinstance(found[-1], CorruptJournal)
    assert [record.row.id for record in found[:-1]] == ["a"]


def test_only_the_dead_are_taken_over(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.open(row("a"), {})
    assert list(dead(tmp_path)) == []
    journal.shut(delete=False)
    [(worker, lock)] = dead(tmp_path)
    assert worker == journal.worker
    assert list(dead(tmp_path)) == []  # while somebody is at it, nobody else is
    os.close(lock)


def test_a_spool_that_cannot_be_written_is_told_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StartupError, match=r"spool .*file/x cannot be written"):
        Journal(tmp_path / "file" / "x")
