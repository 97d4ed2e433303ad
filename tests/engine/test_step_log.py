"""--record-steps where the file cannot be written any more: it is said, and serving goes on."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.cli.main import main
from penstock.engine.loop import EngineLoop
from penstock.engine.trace import StepLog
from tests.attack.harness import post
from tests.e2e.server import serving
from tests.engine.fake import add
from tests.engine.test_loop import make_loop, run


def recorded(path: Path) -> tuple[EngineLoop, StepLog]:
    loop = make_loop(log=path)
    assert loop._log is not None
    return loop, loop._log


def serve_some(loop: EngineLoop, requests: int = 200) -> int:
    """How many of them ended."""
    for number in range(requests):
        loop.handle(add(str(number), (1, 2, 3), max_tokens=4))
    return sum(event.finish is not None for event in run(loop))


def test_a_full_disk_is_named_when_it_is_met_and_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    loop, log = recorded(Path("/dev/full"))
    assert serve_some(loop) == 200
    (met,) = caplog.messages
    assert met.startswith("--record-steps /dev/full: No space left on device after ")
    assert met.endswith("; recording stops here, serving goes on")
    assert serve_some(loop) == 200
    log.close()
    log.close()
    assert caplog.messages == [met, f"{met.split(';')[0]}: the record is incomplete"]


def test_what_fits_into_a_buffer_fails_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    loop, log = recorded(Path("/dev/full"))
    assert serve_some(loop, 1) == 1
    assert not caplog.messages
    log.close()
    assert "No space left on device" in caplog.text
    assert caplog.messages[-1].endswith("the record is incomplete")


def test_a_folder_that_vanishes_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    loop, log = recorded(folder / "steps.jsonl")
    shutil.rmtree(folder)
    assert serve_some(loop, 400) == 400
    assert len(caplog.messages) == 1, "while it runs, not only at the end"
    assert f"--record-steps {folder}/steps.jsonl: the file has been deleted after 512 entries" in caplog.text
    log.close()
    assert caplog.messages[-1].endswith("the record is incomplete")


def test_a_record_that_was_written_ends_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loop, log = recorded(tmp_path / "steps.jsonl")
    serve_some(loop)
    log.close()
    assert not caplog.messages


def replayed(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What `penstock replay` prints of a record whose plans are the same again."""
    assert main(["replay", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "all identical" in shown
    return shown


def test_a_record_says_that_it_ends_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "steps.jsonl"
    loop, log = recorded(path)
    serve_some(loop, 3)
    log.close()
    entries = path.read_text().splitlines()
    assert json.loads(entries[-1]) == {"end": len(entries) - 2}
    assert "incomplete" not in replayed(path, capsys)


@pytest.mark.parametrize("left", [-1, -6, -7, -40, -200])
def test_replay_tells_that_a_record_is_incomplete(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], left: int
) -> None:
    """Cut off anywhere: within its last line, before it, within an entry."""
    path = tmp_path / "steps.jsonl"
    loop, log = recorded(path)
    serve_some(loop, 3)
    log.close()
    path.write_bytes(path.read_bytes()[:left])
    assert "The record is incomplete: its last line is missing" in replayed(path, capsys)


def test_a_record_of_a_full_disk_is_told_as_incomplete(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "steps.jsonl"
    subprocess.run([sys.executable, "-c", _LIMITED, str(path)], capture_output=True, timeout=60, check=True)
    assert "The record is incomplete" in replayed(path, capsys)


def test_entries_that_are_missing_in_the_middle_are_no_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "steps.jsonl"
    loop, log = recorded(path)
    serve_some(loop, 3)
    log.close()
    entries = path.read_text().splitlines(keepends=True)
    path.write_text("".join(entries[:4] + entries[5:]))
    assert main(["replay", str(path)]) == 2
    assert f"{len(entries) - 3} entries are left of {len(entries) - 2}" in capsys.readouterr().err


_LIMITED = """
import resource, sys
from pathlib import Path
from tests.engine.test_step_log import recorded, serve_some
loop, log = recorded(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
print(serve_some(loop))
log.close()
"""


def test_a_limit_on_the_size_of_files_is_named(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, str(path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "200\n"), done.stderr
    assert f"--record-steps {path}: File too large after " in done.stderr
    assert "the record is incomplete" in done.stderr
    assert path.stat().st_size == 20_000


def test_a_server_goes_on_when_its_record_cannot(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    small = ("--kv-cache-memory-bytes", "16MiB", "--record-steps", str(path))
    with serving(*small, log=tmp_path / "log") as server:
        limit = 1 << 16  # its messages go into a file, too
        resource.prlimit(server.engine_pid(), resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        for _ in range(20):
            status, body = post(server, "/v1/completions", {"prompt": [5] * 2000, "max_tokens": 1})
            assert status == 200, body
        assert "File too large after " in server.log
        server.close()
        assert server.exit_status() == 0
        log = server.log
    assert "the record is incomplete" in log
    assert "Traceback" not in log
