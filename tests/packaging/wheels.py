"""Wheels made here, and environments that have a few packages of this one's and nothing else."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from penstock.kernels.cpu import build

ROOT = Path(__file__).parents[2]
HERE = platform.machine()


def run(*command: str | Path) -> str:
    """What a command says."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build_wheel(machine: str, variants: list[str], out: Path, python: str | Path = sys.executable) -> Path:
    """A wheel for an architecture, with some of its libraries; skips if no compiler makes it."""
    compiler = build.find_compiler() if machine == HERE else shutil.which(f"{machine}-linux-gnu-g++")
    if compiler is None:
        pytest.skip(f"no compiler for {machine}")
    tool = ROOT / "tools" / "wheel" / "build.py"
    run(python, tool, "--quick", "--variants", ",".join(variants), "--out", out, machine)
    (wheel,) = out.glob("*.whl")
    return wheel


def needed(name: str, extras: Iterable[str] = ()) -> dict[str, importlib.metadata.Distribution]:
    """What a distribution asks for, and what that asks for, without itself; as it is installed here."""
    found: dict[str, importlib.metadata.Distribution] = {}
    todo = [(name, frozenset(extras))]
    seen = set(todo)
    while todo:
        name, wanted = todo.pop()
        for text in importlib.metadata.requires(name) or ():
            requirement = Requirement(text)
            asked = [{"extra": extra} for extra in wanted] or [{"extra": ""}]
            if requirement.marker is None or any(requirement.marker.evaluate(each) for each in asked):
                other = (canonicalize_name(requirement.name), frozenset(requirement.extras))
                if other not in seen:
                    seen.add(other)
                    found[other[0]] = importlib.metadata.distribution(other[0])
                    todo.append(other)
    return found


def environment_of(home: Path, packages: Iterable[importlib.metadata.Distribution]) -> Path:
    """An environment with these, by links to what is here: nothing is fetched or copied. Its Python."""
    venv.create(home, symlinks=True)
    (place,) = home.glob("lib/python*/site-packages")
    for package in packages:
        for name in {file.parts[0] for file in package.files or ()} - {"..", "__pycache__"}:
            if not (place / name).exists():
                (place / name).symlink_to(Path(str(package.locate_file(name))))
    return home / "bin" / "python"
