"""The journal: what it holds after a full disk or half a record, and who may take it over."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import msgspec
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
from penstock.gateway.ledger.store import Store
from penstock.gateway.ledger.writer import bury
from penstock.gateway.records import Asked, Rate, Row


def row(id: str, **fields: object) -> Row:
    return Row(id=id, at=1, key_id="k", **fields)  # type: ignore[arg-type]


def read_all(journal: Journal) -> list[tuple[str, int, str]]:
    at, found = Position(), []
    while at != journal.end:
        records, at = journal.read(at, 200)
        found += [
            (record.kind, record.number, "" if record.row is None else record.row.id) for record in records
        ]
    return found


def test_what_is_written_is_read(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    first = journal.open(row("a"), {"x": 5})
    journal.close(first, row("a", note="n" * 500), {"x": 3})
    assert journal.open(row("b"), {}) == 1
    assert read_all(journal) == [("open", 0, "a"), ("end", 0, "a"), ("open", 1, "b")]
    assert journal.read(journal.end, 100) == ([], journal.end)


def test_one_ends_and_another_begins_in_one_write_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path)
    first = journal.open(row("a"), {"x": 9})
    real, left = os.write, 200

    def write(fd: int, data: bytes) -> int:
        return real(fd, data[:left])

    monkeypatch.setattr(module.os, "write", write)
    with pytest.raises(SpoolFull):
        journal.hand_over(first, row("a.attempt"), {"x": 3}, row("a"), {"x": 5})
    left = 1 << 20
    assert read_all(journal) == [("open", 0, "a")]
    second = journal.hand_over(first, row("a.attempt"), {"x": 3}, row("a"), {"x": 5})
    assert second == 1
    assert read_all(journal) == [("open", 0, "a"), ("end", 0, "a.attempt"), ("open", 1, "a")]
    journal.ask(second, Asked(replica="r", upstream="u", model="m"))
    journal.close(second, row("a"), {"x": 4})
    assert [kind for kind, number, _ in read_all(journal) if number == second] == ["open", "ask", "end"]
    assert journal.draw() == 2


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
    assert [record.kind for record in found if record.number == kept] == ["open", "end"]


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


ASKED = Asked(replica="ours/1", upstream="ours", model="tiny", bill="b", price=Rate(1, 2, None, 3))


def test_who_is_asked_is_written_and_carried_into_a_new_segment(tmp_path: Path) -> None:
    journal = Journal(tmp_path, segment_bytes=2000)
    kept = journal.open(row("kept"), {"x": 1})
    journal.ask(kept, ASKED)
    for index in range(40):
        journal.close(journal.open(row(f"r{index}"), {}), row(f"r{index}"), {})
    journal.ask(kept, msgspec.structs.replace(ASKED, bill="c"))
    journal.forget(journal.end.segment)
    found = [record for _, record in whole(tmp_path, journal.worker) if record.number == kept]
    assert [record.kind for record in found] == ["open", "ask", "ask"]
    assert [record.asked for record in found][1:] == [ASKED, msgspec.structs.replace(ASKED, bill="c")]


def test_a_full_disk_loses_only_who_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path)
    number = journal.open(row("a"), {})
    real = os.write
    with monkeypatch.context() as patch:
        patch.setattr(module.os, "write", lambda fd, data: real(fd, data[:5]))
        journal.ask(number, ASKED)
    journal.close(number, row("a"), {})
    assert [record.kind for _, record in whole(tmp_path, journal.worker)] == ["open", "end"]


def test_a_journal_of_the_version_before_is_taken_over(tmp_path: Path) -> None:
    """Its records are those of now, without `ask`."""
    journal = Journal(tmp_path)
    journal.open(row("a", reserved_dollars=7), {"x": 7})
    journal.shut(delete=False)
    path = segments(tmp_path, journal.worker)[0]
    path.write_bytes(path.read_bytes().replace(b"penstock journal 2", b"penstock journal 1"))
    [(_, record)] = whole(tmp_path, journal.worker)
    assert (record.kind, record.charged, record.asked) == ("open", {"x": 7}, None)
    path.write_bytes(path.read_bytes().replace(b"penstock journal 1", b"penstock journal 9"))
    [(_, error)] = whole(tmp_path, journal.worker)
    assert isinstance(error, CorruptJournal)


def test_the_dead_leave_rows_that_wait_for_whoever_was_asked(tmp_path: Path) -> None:
    """The last one has the answer; those before it had failed. Who was sent nowhere waits for nobody."""
    store = Store(f"sqlite:///{tmp_path / 'ledger.db'}")
    store.open()
    journal = Journal(tmp_path / "spool")
    twice, never, cloud = (journal.open(row(name, reserved_dollars=9), {}) for name in ("a", "b", "c"))
    second = msgspec.structs.replace(ASKED, replica="ours/0", pool="box", device="L4", bill="c")
    journal.ask(twice, ASKED)
    journal.ask(twice, second)
    journal.ask(cloud, msgspec.structs.replace(ASKED, bill=""))
    journal.shut(delete=False)
    [entries] = bury(store, tmp_path / "spool").values()
    rows = {entry.number: entry.row for entry in entries}
    assert rows[twice].owed == (msgspec.structs.replace(ASKED, lost=True), second)
    assert (rows[twice].replica, rows[twice].pool, rows[twice].attempts) == ("ours/0", "box", 2)
    assert rows[never].owed == rows[cloud].owed == ()
    assert (rows[never].upstream, rows[cloud].upstream) == ("", "ours")
    assert {each.settlement for each in rows.values()} == {"unsettled"}
    [(_, number, found)] = store.owed(0, 10)
    assert (number, found) == (twice, rows[twice])
    store.close()


def test_who_is_about_to_begin_is_not_dead(tmp_path: Path) -> None:
    """Its lock is hidden until it is held: nobody must take it in between, and bury it."""
    (tmp_path / ".worker.lock").touch()
    assert list(dead(tmp_path)) == []
    left = Journal(tmp_path, "left")
    assert list(dead(tmp_path)) == []
    left.shut(delete=False)
    [(name, lock)] = dead(tmp_path)
    os.close(lock)
    assert name == "left"
