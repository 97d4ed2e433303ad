"""Files into a folder: all or none, and nobody else's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from penstock.core.errors import StartupError
from penstock.deploy.writing import LIST, write


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != LIST
    }


def test_a_new_folder_has_everything(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "out"
    assert write(folder, {"a.yaml": "a", "b/c.yaml": "c"}) == ["a.yaml", "b/c.yaml"]
    assert contents(folder) == {"a.yaml": "a", "b/c.yaml": "c"}
    assert oct(folder.stat().st_mode & 0o777) == "0o755"
    assert sorted(path.name for path in folder.parent.iterdir()) == ["out"], "nothing is left beside"


def test_the_second_time_changes_what_has_changed(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    write(folder, {"a": "1", "b/c": "2", "d": "3"})
    (folder / "mine.txt").write_text("mine")
    assert write(folder, {"a": "1", "d": "4", "e/f": "5"}) == ["d", "e/f"]
    assert contents(folder) == {"a": "1", "d": "4", "e/f": "5", "mine.txt": "mine"}
    assert not (folder / "b").exists(), "folders that are empty go"
    assert write(folder, {"a": "1", "d": "4", "e/f": "5"}) == []


@pytest.mark.parametrize("case", ["foreign", "changed", "link", "folder", "stale"])
def test_what_somebody_else_has_written_stays(tmp_path: Path, case: str) -> None:
    folder = tmp_path / "out"
    write(folder, {"a": "1", "z": "1"})
    if case == "foreign":
        (folder / "b").write_text("mine")
    elif case == "changed":
        (folder / "a").write_text("mine")
    elif case == "link":
        (folder / "a").unlink()
        (folder / "a").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "elsewhere").write_text("1")
    elif case == "folder":
        (folder / "b").mkdir()
    else:
        (folder / "z").write_text("mine")  # made once, changed since, and not made any more
    before = contents(folder)
    with pytest.raises(StartupError, match="did not make, or that were changed since"):
        write(folder, {"a": "2", "b": "2"})
    assert contents(folder) == before


def test_what_is_kept_is_written_once(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    kept = frozenset({"overlay"})
    write(folder, {"a": "1", "overlay": "1"}, kept)
    (folder / "overlay").write_text("mine")
    write(folder, {"a": "2", "overlay": "2"}, kept)
    assert contents(folder) == {"a": "2", "overlay": "mine"}


def test_a_failure_in_the_middle_puts_everything_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    write(folder, {"a": "1", "b": "1", "c": "1"})
    before = contents(folder)
    replace, calls = os.replace, []

    def failing(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 5:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(StartupError, match="No space left"):
        write(folder, {"a": "2", "b": "2", "d": "2"})
    monkeypatch.undo()
    assert contents(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert write(folder, {"a": "2", "b": "2", "d": "2"})


def test_a_new_folder_does_not_appear_before_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, calls = Path.write_text, []

    def failing(path: Path, *args: object, **more: object) -> int:
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return text(path, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "write_text", failing)
    with pytest.raises(StartupError):
        write(tmp_path / "out", {"a": "1", "b": "2"})
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_filled_and_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", {"a": "1"})
    assert contents(tmp_path / "empty") == {"a": "1"}
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StartupError, match="no folder"):
        write(tmp_path / "file", {"a": "1"})


def test_a_list_that_is_damaged_or_leads_out_is_not_believed(tmp_path: Path) -> None:
    folder, outside = tmp_path / "out", tmp_path / "outside"
    outside.write_text("mine")
    write(folder, {"a": "1"})
    (folder / LIST).write_text('{"version": 1, "files": {"../outside": "x", "/etc/hostname": "x", "a": "x"}}')
    with pytest.raises(StartupError, match="changed since: a"):
        write(folder, {"a": "1"})
    assert outside.read_text() == "mine"
    (folder / LIST).write_text("[")
    with pytest.raises(StartupError, match="damaged"):
        write(folder, {"a": "1"})
