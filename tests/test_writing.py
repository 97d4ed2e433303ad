"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from penstock import writing
from penstock.core.errors import StartupError


@pytest.mark.parametrize("durable", [False, True])
def test_what_stood_there_is_replaced(durable: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("a long one, of which nothing stays")
    writing.write(path, "short \ud800", durable=durable)
    assert path.read_text() == "short \\ud800"
    assert os.listdir(tmp_path) == ["a.json"]


def test_what_cannot_be_moved_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_text("old")

    def refuse(self: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(StartupError, match=r"a cannot be written: Operation not permitted") as caught:
        writing.write(path, "new", param="--html")
    assert caught.value.param == "--html"
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="No such file or directory"):
        writing.write(tmp_path / "none" / "a", "text")


def test_a_link_stays_one(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("old")
    link.symlink_to(real)
    writing.write(link, "new")
    assert link.is_symlink()
    assert real.read_text() == "new"


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    """As /dev/stdout may be one."""
    pipe, found = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: found.append(pipe.read_text()))
    reader.start()
    writing.write(pipe, "through")
    reader.join(timeout=30)
    assert found == ["through"]
    assert pipe.is_fifo()
