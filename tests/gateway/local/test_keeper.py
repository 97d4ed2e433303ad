"""The process between `up` and an engine: whatever happens, nothing stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.gateway.local import keeper

from .processes import alive, eventually, kill, read_pid

PYTHON = [sys.executable, "-I", "-S"]
KEEPER = [*PYTHON, keeper.__file__]
SLEEPS = "import time; time.sleep(300)"
FAMILY = """
import os, pathlib, subprocess, sys, time
folder = pathlib.Path(sys.argv[1])
child = subprocess.Popen(["sleep", "300"], start_new_session=True)
(folder / "child").write_text(str(child.pid))
(folder / "self").write_text(str(os.getpid()))
time.sleep(300)
"""
"""A command that starts another, in a session of its own."""


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[bytes]]]:
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for each in processes:
        if each.stdin is not None:
            each.stdin.close()
        if each.poll() is None:
            each.kill()
        each.wait(10)


def keep(started: list[subprocess.Popen[bytes]], *command: str, grace: float = 20) -> subprocess.Popen[bytes]:
    started.append(subprocess.Popen([*KEEPER, str(grace), *command], stdin=subprocess.PIPE))
    return started[-1]


@pytest.mark.parametrize(
    ("code", "status"),
    [("raise SystemExit(0)", 0), ("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137)],
)
def test_the_exit_status_is_the_commands(
    started: list[subprocess.Popen[bytes]], code: str, status: int
) -> None:
    assert keep(started, *PYTHON, "-c", code).wait(20) == status


def test_a_command_that_is_not_there(
    capfd: pytest.CaptureFixture[str], started: list[subprocess.Popen[bytes]]
) -> None:
    assert keep(started, "/nonexistent/engine").wait(20) == 127
    assert "/nonexistent/engine cannot be started: No such file" in capfd.readouterr().err


def test_sigterm_is_passed_on_and_the_command_ends_itself(
    tmp_path: Path, started: list[subprocess.Popen[bytes]]
) -> None:
    code = (
        "import os, pathlib, signal, sys\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))\n"
        "pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))\n"
        "signal.pause()"
    )
    process = keep(started, *PYTHON, "-c", code, str(tmp_path / "self"))
    read_pid(tmp_path / "self")
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 5


def test_a_command_that_ignores_sigterm_is_killed_after_its_grace(
    tmp_path: Path, started: list[subprocess.Popen[bytes]]
) -> None:
    code = (
        "import os, pathlib, signal, sys\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))\n"
        "while True: signal.pause()"
    )
    process = keep(started, *PYTHON, "-c", code, str(tmp_path / "self"), grace=0.2)
    command = read_pid(tmp_path / "self")
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 128 + signal.SIGKILL
    assert not alive(command)


def test_what_the_command_leaves_behind_ends_too(
    tmp_path: Path, started: list[subprocess.Popen[bytes]]
) -> None:
    process = keep(started, *PYTHON, "-c", FAMILY, str(tmp_path))
    command, child = read_pid(tmp_path / "self"), read_pid(tmp_path / "child")
    kill(command)
    assert process.wait(20) == 128 + signal.SIGKILL
    assert not alive(child)


def test_sigquit_ends_all_at_once(tmp_path: Path, started: list[subprocess.Popen[bytes]]) -> None:
    process = keep(started, *PYTHON, "-c", FAMILY, str(tmp_path), grace=1000)
    command, child = read_pid(tmp_path / "self"), read_pid(tmp_path / "child")
    process.send_signal(signal.SIGQUIT)
    assert process.wait(20) == 128 + signal.SIGKILL
    assert not alive(command)
    assert not alive(child)


def test_the_end_of_the_life_line_ends_all(tmp_path: Path, started: list[subprocess.Popen[bytes]]) -> None:
    process = keep(started, *PYTHON, "-c", FAMILY, str(tmp_path))
    command, child = read_pid(tmp_path / "self"), read_pid(tmp_path / "child")
    assert process.stdin is not None
    process.stdin.close()
    process.wait(20)
    assert not alive(command)
    assert not alive(child)


@pytest.mark.parametrize("inherited", [False, True], ids=["alone", "somebody else has the pipe"])
def test_nothing_is_left_when_the_one_who_started_it_is_killed(tmp_path: Path, inherited: bool) -> None:
    """kill -9 of `up`; also where another process of its, which lives on, has the pipe's end."""
    up = (
        "import json, os, pathlib, subprocess, sys, time\n"
        "folder, command = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])\n"
        "keeper = subprocess.Popen(command, stdin=subprocess.PIPE)\n"
        f"holder = os.fork() if {inherited} else None\n"
        "if holder == 0:\n"
        "    (folder / 'holder').write_text(str(os.getpid()))\n"
        "    time.sleep(300)\n"
        "(folder / 'keeper').write_text(str(keeper.pid))\n"
        "time.sleep(300)"
    )
    import json

    command = json.dumps([*KEEPER, "1000", *PYTHON, "-c", FAMILY, str(tmp_path)])
    process = subprocess.Popen([*PYTHON, "-c", up, str(tmp_path), command])
    try:
        pids = [read_pid(tmp_path / name) for name in ("keeper", "self", "child")]
        process.kill()
        process.wait(10)
        eventually(lambda: not any(map(alive, pids)))
    finally:
        if inherited:
            kill(read_pid(tmp_path / "holder"))
        process.kill()
        process.wait(10)


def test_the_command_ends_when_its_keeper_is_killed(
    tmp_path: Path, started: list[subprocess.Popen[bytes]]
) -> None:
    process = keep(started, *PYTHON, "-c", FAMILY, str(tmp_path))
    command, child = read_pid(tmp_path / "self"), read_pid(tmp_path / "child")
    process.kill()
    process.wait(10)
    eventually(lambda: not alive(command))
    os.kill(child, signal.SIGKILL)  # that one had another session, and its parent is gone


def test_a_life_line_that_has_ended_before_the_start(tmp_path: Path) -> None:
    process = subprocess.run(
        [*KEEPER, "1000", *PYTHON, "-c", SLEEPS], stdin=subprocess.DEVNULL, timeout=30, check=False
    )
    assert process.returncode == 128 + signal.SIGTERM
