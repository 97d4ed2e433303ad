"""`penstock check`: what it prints, and with which status it ends."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from penstock.check import flags
from penstock.cli.flags_page import table
from penstock.cli.main import main

BAD = "vllm serve m --uds x --max-model-len 8K --swap-space 4\n"
WARNS = "vllm serve m --uds x --max-model-len 8K --trust-remote-code\n"
GOOD = "echo fine\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = main(["check", *words])
    out, err = capsys.readouterr()
    return status, out, err


def test_statuses(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "bad.sh").write_text(BAD)
    (folder / "warns.sh").write_text(WARNS)
    (folder / "good.sh").write_text(GOOD)
    assert check(capsys, "good.sh")[:2] == (0, "Nothing found in 1 file.\n")
    assert check(capsys, "warns.sh")[0] == 0
    assert check(capsys, "--strict", "warns.sh")[0] == 1
    status, out, _ = check(capsys)  # the folder
    assert status == 1
    assert out.splitlines()[0].startswith("./bad.sh:1:41: error flag-removed: vLLM 0.32 has no --swap-space.")
    assert out.endswith("1 error, 1 warning in 3 files.\n")
    status, _, err = check(capsys, "missing.yaml")
    assert (status, "missing.yaml: there is no such file or folder." in err) == (2, True)


def test_what_cannot_be_read_is_not_checked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    status, out, _ = check(capsys, "binary.yaml")
    assert status == 2
    assert "file-unreadable" in out


def test_rules_can_be_chosen(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "a.sh").write_text(BAD + WARNS)
    assert check(capsys, "a.sh", "--ignore", "flag-removed")[0] == 0
    assert "trust" not in check(capsys, "a.sh", "--select", "flag-removed,flag-unknown")[1]
    status, _, err = check(capsys, "a.sh", "--ignore", "flag-remvoed")
    assert status == 2
    assert "Did you mean flag-removed?" in err


def test_comments_ignore_with_a_reason(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "a.sh").write_text(f"# penstock: ignore[flag-removed] an old engine\n{BAD}")
    assert check(capsys, "a.sh")[:2] == (0, "Nothing found in 1 file.\n")


def test_standard_input(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    data = b"agent:\n  max_iterations: null\n"
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    status, out, _ = check(capsys, "-")
    assert status == 1
    assert out.startswith("-:2:3: error loop-unbounded:")


def test_formats(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "a.sh").write_text(BAD)
    status, out, _ = check(capsys, "a.sh", "--format", "json")
    assert (status, json.loads(out)["findings"][0]["rule"]) == (1, "flag-removed")
    status, out, _ = check(capsys, "a.sh", "--format", "sarif")
    (ran,) = json.loads(out)["runs"]
    assert (status, ran["results"][0]["ruleId"]) == (1, "flag-removed")


def test_rules_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = check(capsys, "--list-rules")
    assert status == 0
    assert any(line.split()[:2] == ["flag-removed", "error"] for line in out.splitlines())
    status, out, _ = check(capsys, "--explain", "flag-removed")
    assert status == 0
    assert "Why: " in out
    assert check(capsys, "--explain", "flag-removd")[0] == 2


def test_a_terminal_gets_colours(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "a.sh").write_text(BAD.replace("swap-space", "swap-space").replace(" 4", " [4]"))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    _, out, _ = check(capsys, "a.sh")
    assert "\x1b[1;31merror\x1b[0m" in out


def test_the_table_of_our_flags_is_new() -> None:
    """python -m penstock.cli.flags_page --table > penstock/check/tables/penstock.txt"""
    known = Path(flags.__file__).parent / "tables" / "penstock.txt"
    assert known.read_text() == table()


def test_the_tables_agree_on_what_vllm_has_not() -> None:
    assert not set(flags.REMOVED) & set(flags.vllm().names)
    for name in flags.RANGES.keys() | flags.SIZES | flags.vllm().choices.keys():
        assert name in flags.vllm().names


def test_a_folder_with_nothing_to_check_is_no_success(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "empty").mkdir()
    (folder / "full").mkdir()
    (folder / "full" / "good.sh").write_text(GOOD)
    (folder / "empty" / "photo.png").write_bytes(b"\x89PNG")
    status, out, err = check(capsys, "empty")
    assert (status, out) == (2, "")
    assert "empty: there is no file in it that is checked." in err
    assert check(capsys, "full", "empty")[0] == 2
    assert check(capsys, "full")[0] == 0
