"""Copies of the tree, and tests run in them, in processes that can be stopped."""

from __future__ import annotations

import compileall
import contextlib
import ctypes
import importlib
import json
import os
import py_compile
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import operators

MEMORY = 8 << 30
"""Bytes of data that a process of a mutant may have, so that one that allocates for ever ends first."""

LOG = ".mutant.log"
"""In a worker's copy: what the tests of the last mutant said."""

# As tests/conftest.py has them: libraries are imported before it.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}


def copy_tree(root: Path, to: Path) -> None:
    """All files that git tracks or would, as they are now."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (root / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, to / name)


# ---------------------------------------------------------------------------- which test runs which line


@dataclass
class Learned:
    """What a run of all tests without a fault has shown."""

    seconds: dict[str, float]
    """Of each test, set-up included."""
    lines: dict[str, dict[int, list[str]]]
    """path → line → tests that ran it; "" for what ran when it was imported."""
    spawning: list[str]
    """Tests of modules that start processes, in which nobody sees what runs."""
    modules: list[str]
    """What was imported besides Penstock and its tests."""
    _rank: dict[str, tuple[float, float]] = field(init=False)

    def __post_init__(self) -> None:
        files: dict[str, float] = {}
        for test, seconds in self.seconds.items():
            files[test.split("::")[0]] = files.get(test.split("::")[0], 0.0) + seconds
        self._rank = {test: (files[test.split("::")[0]], seconds) for test, seconds in self.seconds.items()}

    def tests_of(self, mutant: operators.Mutant) -> list[str]:
        """Who can tell: the tests that run its line. Where it ran when its module was imported (defaults,
        constants), those that run the function or class around it, and then any part of the file. Where no
        test runs it, those that start processes."""
        lines = self.lines.get(mutant.path, {})
        groups = [self._ran(lines, *mutant.lines)]
        imported = any("" in lines.get(line, ()) for line in range(mutant.lines[0], mutant.lines[1] + 1))
        if imported or not mutant.function:
            groups += [self._ran(lines, *mutant.body), self._ran(lines, 0, max(lines, default=0))]
            if not any(groups):
                groups.append(set(self.seconds))
        if not any(groups):
            groups.append(set(self.spawning))
        ordered: dict[str, None] = {}
        for group in groups:
            ordered.update(dict.fromkeys(sorted(group, key=lambda test: (*self._rank[test], test))))
        return list(ordered)

    def _ran(self, lines: dict[int, list[str]], first: int, last: int) -> set[str]:
        return {test for line, tests in lines.items() if first <= line <= last for test in tests if test}


def learn(base: Path, tests: Sequence[str], files: Sequence[str]) -> Learned:
    """Run the tests once in this copy, with coverage, in a process of their own.

    Raises RuntimeError with the end of what they said, if they fail.
    """
    report, log = base / ".learned.json", base / ".learned.log"
    status = _in_child(lambda: _learn(base, tests, files, report), 3600, log)
    if status != 0:
        raise RuntimeError(f"the tests fail without any fault:\n{log.read_text()[-4000:]}")
    raw = json.loads(report.read_text())
    lines = {path: {int(line): ran for line, ran in each.items()} for path, each in raw["lines"].items()}
    shutil.rmtree(base / ".hypothesis", ignore_errors=True)
    # from now on a module's bytecode counts for exactly its source: a fault may come within the same second
    for cache in (base / "penstock").rglob("__pycache__"):
        shutil.rmtree(cache)
    mode = py_compile.PycInvalidationMode.CHECKED_HASH
    compileall.compile_dir(base / "penstock", quiet=2, invalidation_mode=mode)
    return Learned(raw["seconds"], lines, raw["spawning"], raw["modules"])


def _learn(base: Path, tests: Sequence[str], files: Sequence[str], report: Path) -> int:
    import coverage
    import pytest

    _enter(base)
    meter = coverage.Coverage(
        data_file=None, config_file=False, include=[str(base / "penstock" / "*")], concurrency=["thread"]
    )
    meter.start()
    watch = _Watch(meter)
    status = int(pytest.main([*_FLAGS, *tests], plugins=[watch]))
    meter.stop()
    data = meter.get_data()
    seen: dict[str, dict[int, list[str]]] = {}
    for path in files:
        seen[path] = data.contexts_by_lineno(str(base / path))
    spawning = [test for test in watch.seconds if test.split("::")[0] in watch.spawning]
    own = ("penstock", "tests", "coverage", "conftest", "operators", "sandbox", "run", "__m")
    modules = [name for name in sys.modules if not name.startswith(own)]
    if Path(sys.modules["penstock"].__file__ or "").parent != base / "penstock":
        raise RuntimeError(f"the tests import {sys.modules['penstock'].__file__}, not the copy")
    record = {"seconds": watch.seconds, "lines": seen, "spawning": spawning, "modules": modules}
    report.write_text(json.dumps(record))
    return status


class _Watch:
    """A pytest plugin: names the running test to coverage, and keeps times and who starts processes."""

    def __init__(self, meter: Any) -> None:
        self.seconds: dict[str, float] = {}
        self.spawning: set[str] = set()
        self._meter = meter
        self._file = ""
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: object) -> None:
        if event in ("subprocess.Popen", "os.fork", "os.posix_spawn", "os.forkpty"):
            self.spawning.add(self._file)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._file = nodeid.split("::")[0]
        self._meter.switch_context(nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration


# ---------------------------------------------------------------------------- running with a fault


class _Select:
    """A pytest plugin: these tests only, in this order."""

    def __init__(self, tests: Iterable[str]) -> None:
        self._place = {test: place for place, test in enumerate(tests)}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if item.nodeid in self._place]
        items.sort(key=lambda item: self._place[item.nodeid])


_FLAGS = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
# plugins that are imported already count as a warning, and warnings are errors
_FLAGS += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]


def settle(places: Any, modules: Sequence[str]) -> None:
    """A worker's start: its own copy, and all libraries imported once for all of its children."""
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: what a test leaves behind comes to us
    sys.dont_write_bytecode = True
    _enter(Path(places.get()))
    for name in modules:
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def run_with(path: str, source: str, tests: Sequence[str], limit: float) -> str:
    """Run these tests with another text of this file: killed, timeout or survived."""
    import pytest

    file = Path(path)
    before = file.read_text()
    names = list(dict.fromkeys(test.split("::")[0] for test in tests))

    def work() -> int:
        return int(pytest.main([*_FLAGS, *names], plugins=[_Select(tests)]))

    file.write_text(source)
    try:
        status = _in_child(
            lambda: int(pytest.main([*_FLAGS, *names], plugins=[_Select(tests)])), limit, Path(LOG)
        )
    finally:
        file.write_text(before)
    if status is None:
        return "timeout"
    return "survived" if status in (0, 5) else "killed"


def _enter(place: Path) -> None:
    os.environ.update(ENVIRONMENT, PYTHONPATH=os.pathsep.join([str(place), *_tools()]))
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1" if sys.dont_write_bytecode else ""
    os.chdir(place)
    sys.path.insert(0, str(place))


def _tools() -> list[str]:
    return [each for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each]


def _in_child(work: Callable[[], int], limit: float, log: Path = Path(os.devnull)) -> int | None:
    """Exit status of this work in a forked process, or None if it took more than so many seconds. Nothing
    that it started is left."""
    child = os.fork()
    if child == 0:
        status = 70
        try:
            os.setsid()
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            null = os.open(os.devnull, os.O_RDONLY)
            for source, target in ((null, 0), (out, 1), (out, 2)):
                os.dup2(source, target)
            resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            status = work()
            sys.stdout.flush()
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(status)
    end, status = time.monotonic() + limit, None
    while time.monotonic() < end:
        done, raw = os.waitpid(child, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(raw)
            break
        time.sleep(0.005)
    else:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    _end_orphans()
    return status


def _end_orphans() -> None:
    """Of the mutant's processes, those that had made themselves independent are our children now."""
    for _ in range(20):
        left = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        if not left:
            return
        for each in left:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(int(each), signal.SIGKILL)
                os.waitpid(int(each), 0)
