"""What runs on this machine, for tests that end it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest


def alive(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for what another process brings about."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail("it did not happen in time")
        time.sleep(0.01)


def read_pid(file: Path) -> int:
    """A process id that another process writes into a file."""
    eventually(lambda: file.exists() and file.read_text().strip().isdigit())
    return int(file.read_text())


def kill(pid: int) -> None:
    """kill -9"""
    os.kill(pid, 9)
