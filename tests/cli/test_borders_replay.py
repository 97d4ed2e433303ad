"""`penstock replay`: what it says of a record that follows, of one that does not, and of what is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from penstock.cli.main import main
from tests.engine.fake import add
from tests.engine.test_loop import make_loop, run


@pytest.fixture
def record(tmp_path: Path) -> Path:
    """A recorded run of a small engine."""
    path = tmp_path / "é.jsonl"
    loop = make_loop(log=path)
    for name in ("é", "b"):
        loop.handle(add(name, (1, 2, 3), max_tokens=3))
    run(loop)
    assert loop._log is not None
    loop._log.close()
    return path


def test_a_record_that_follows(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plans = sum('"plan":' in line for line in record.read_text().splitlines())
    assert main(["replay", str(record)]) == 0
    assert capsys.readouterr().out == f"{plans} steps, all identical\n"


def test_the_first_step_that_differs_is_shown(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = record.read_text().splitlines()
    second = [place for place, line in enumerate(lines) if '"plan":' in line][1]
    changed = json.loads(lines[second])
    changed["plan"]["step"] += 7
    lines[second] = json.dumps(changed)
    record.write_text("\n".join(lines))
    assert main(["replay", str(record)]) == 1
    first, recorded, replayed = capsys.readouterr().out.splitlines()
    assert first == "step 1 differs"
    assert recorded.startswith("recorded: {")
    assert '"step":8' in recorded
    assert replayed.startswith("replayed: {")
    assert '"step":1' in replayed


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "5\n",
        '{"config": 1, "capacity": 2}',
        "text",
        '{"config": 1, "capacity": 2}\n5',
        '{"config": 1, "capacity": 2}\n[]',
    ],
)
def test_what_is_no_record(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log"
    path.write_text(content)
    assert main(["replay", str(path)]) == 2
    assert f"penstock replay: {path} is not a step log: " in capsys.readouterr().err
    assert main(["replay", str(tmp_path)]) == 2
    assert f"penstock replay: cannot read {tmp_path}: Is a directory." in capsys.readouterr().err
