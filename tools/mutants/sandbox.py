"""Copies of the tree, and tests run in them, in processes that can be stopped.

A worker imports and collects a room's tests once, as pytest does. For each fault it forks, and the child
takes over the fault and runs the tests that can tell:

    in a function           the function gets the code of the faulty one; nothing is imported anew
    elsewhere (defaults,    Penstock and its tests are imported anew, from the faulty file
    constants, fields), or
    it ran at import

The faulty file lies in the worker's copy meanwhile, for processes that the tests start.
"""

from __future__ import annotations

import compileall
import contextlib
import ctypes
import gc
import inspect
import json
import os
import py_compile
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import hypothesis
import operators
import pytest

MEMORY = 8 << 30
"""Bytes of data that a process of a mutant may have, so that one that allocates for ever ends first."""

LOG = ".mutant.log"
"""In a worker's copy: what the tests of the last mutant said."""

# As tests/conftest.py has them: libraries are imported before it.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}

_FLAGS = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
# plugins that are imported already count as a warning, and warnings are errors
_FLAGS += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]


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
    """path → line → tests that ran it, those that share a fixture included; "" for what ran at import."""
    spawning: list[str]
    """Tests of modules that start processes, in which nobody sees what runs."""
    _rank: dict[str, tuple[float, float]] = field(init=False)

    def __post_init__(self) -> None:
        files: dict[str, float] = {}
        for test, seconds in self.seconds.items():
            files[_file(test)] = files.get(_file(test), 0.0) + seconds
        self._rank = {test: (files[_file(test)], seconds) for test, seconds in self.seconds.items()}

    def tests_of(self, mutant: operators.Mutant) -> list[str]:
        """Who can tell: the tests that run its line. Where it ran when its module was imported (defaults,
        constants), those that run the function or class around it, then any part of the file, then all. Where
        no test runs it, those that start processes."""
        lines = self.lines.get(mutant.path, {})
        groups = [self._ran(lines, *mutant.lines)]
        if self.imported(mutant) or not mutant.function:
            groups += [self._ran(lines, *mutant.body), self._ran(lines, 0, max(lines, default=0))]
            groups.append(set(self.seconds))
        if not any(groups):
            groups.append(set(self.spawning))
        ordered: dict[str, None] = {}
        for group in groups:
            ordered.update(dict.fromkeys(sorted(group, key=lambda test: (*self._rank[test], test))))
        return list(ordered)

    def imported(self, mutant: operators.Mutant) -> bool:
        """Whether its line ran when its module was imported."""
        lines = self.lines.get(mutant.path, {})
        return any("" in lines.get(line, ()) for line in range(mutant.lines[0], mutant.lines[1] + 1))

    def cheap(self, tests: Sequence[str], share: float) -> list[str]:
        """Those of them that together take this share of the time of all tests there are."""
        left = share * sum(self.seconds.values())
        chosen = []
        for test in sorted(tests, key=self.seconds.__getitem__):
            left -= self.seconds[test]
            if left < 0:
                break
            chosen.append(test)
        return [test for test in tests if test in set(chosen)]

    def _ran(self, lines: dict[int, list[str]], first: int, last: int) -> set[str]:
        return {test for line, tests in lines.items() if first <= line <= last for test in tests if test}


def _file(test: str) -> str:
    return test.split("::")[0]


def learn(base: Path, tests: Sequence[str], files: Sequence[str]) -> Learned:
    """Run the tests once in this copy, with coverage, in a process of their own.

    Raises RuntimeError with the end of what they said, if they fail.
    """
    report, log = base / ".learned.json", base / ".learned.log"
    status = _in_child(lambda: _learn(base, tests, files, report), 3600, log)
    if status != 0:
        raise RuntimeError(f"the tests fail without any fault:\n{log.read_text()[-4000:]}")
    raw = json.loads(report.read_text())
    everybody = list(raw["seconds"])

    def share(ran: list[str]) -> list[str]:
        """A fixture of a module, or of the session, was made in one test and used in all."""
        found = dict.fromkeys(context for context in ran if not context.startswith("@"))
        for place in (context[1:] for context in ran if context.startswith("@")):
            found.update(dict.fromkeys(test for test in everybody if test.startswith(place)))
        return list(found)

    lines = {
        path: {int(line): share(ran) for line, ran in each.items()} for path, each in raw["lines"].items()
    }
    # from now on a module's bytecode counts for exactly its source: a fault may come within the same second
    for cache in (base / "penstock").rglob("__pycache__"):
        shutil.rmtree(cache)
    mode = py_compile.PycInvalidationMode.CHECKED_HASH
    compileall.compile_dir(base / "penstock", quiet=2, invalidation_mode=mode)
    return Learned(raw["seconds"], lines, raw["spawning"])


def _learn(base: Path, tests: Sequence[str], files: Sequence[str], report: Path) -> int:
    import coverage

    _enter(base)
    meter = coverage.Coverage(
        data_file=None, config_file=False, include=[str(base / "penstock" / "*")], concurrency=["thread"]
    )
    meter.start()
    watch = _Watch(meter)
    status = int(pytest.main([*_FLAGS, *tests], plugins=[watch]))
    meter.stop()
    data = meter.get_data()
    seen = {path: data.contexts_by_lineno(str(base / path)) for path in files}
    spawning = [test for test in watch.seconds if _file(test) in watch.spawning]
    if Path(sys.modules["penstock"].__file__ or "").parent != base / "penstock":
        raise RuntimeError(f"the tests import {sys.modules['penstock'].__file__}, not the copy")
    report.write_text(json.dumps({"seconds": watch.seconds, "lines": seen, "spawning": spawning}))
    return status


class _Watch:
    """A pytest plugin: names the running test to coverage, and keeps times and who starts processes."""

    def __init__(self, meter: Any) -> None:
        self.seconds: dict[str, float] = {}
        self.spawning: set[str] = set()
        self._meter = meter
        self._now = self._test = ""
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: object) -> None:
        if event in ("subprocess.Popen", "os.fork", "os.posix_spawn", "os.forkpty"):
            self.spawning.add(self._now)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._now, self._test = _file(nodeid), nodeid
        self._meter.switch_context(nodeid)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Iterator[None]:
        if fixturedef.scope == "function":
            return (yield)
        shared = request.node.nodeid if fixturedef.scope in ("class", "module", "package") else ""
        self._meter.switch_context(f"@{shared}")
        try:
            return (yield)
        finally:
            self._meter.switch_context(self._test)

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration


# ---------------------------------------------------------------------------- running with a fault


@dataclass(frozen=True)
class Job:
    """A file's text, with a fault or without, and the tests to run with it, in this order."""

    path: str
    source: str
    tests: tuple[str, ...]
    limit: float
    """Seconds."""
    anew: bool = False
    """Import everything anew in any case."""


def serve(connection: Connection, place: str, tests: Sequence[str]) -> None:
    """A worker's life: jobs in, (killed, timeout or survived; what the tests said) out, until None."""
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: what a test leaves behind comes to us
    sys.dont_write_bytecode = True
    _enter(Path(place))
    _redirect(Path(LOG))
    pytest.main([*_FLAGS, "-s", "--tb=line", *tests], plugins=[_Server(connection)])


class _Server:
    """A pytest plugin: instead of the tests that were collected, whatever is asked for."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def pytest_configure(self) -> None:
        """An example that fails is enough: it need not be the smallest."""
        phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
        hypothesis.settings.register_profile("mutants", hypothesis.settings.default, phases=phases)
        hypothesis.settings.load_profile("mutants")

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}
        functions: dict[str, list[FunctionType]] = {}
        for each in gc.get_objects():
            if type(each) is FunctionType:  # isinstance asks the object, and some warn
                functions.setdefault(each.__code__.co_filename, []).append(each)
        gc.freeze()
        while (job := self._connection.recv()) is not None:
            self._connection.send(self._run(job, session, items, functions))
        return True

    def _run(
        self,
        job: Job,
        session: pytest.Session,
        items: dict[str, pytest.Item],
        functions: dict[str, list[FunctionType]],
    ) -> tuple[str, str]:
        if not job.tests:  # pytest would collect everything there is, and time out
            return "survived", "no test runs it"
        file = Path(job.path).resolve()
        before = file.read_text()
        known = functions.get(str(file), [])
        patches = None if job.anew else _patches(before, job.source, str(file), known)

        def work() -> int:
            if patches is None:
                return _anew(job.tests)
            for function, code in patches:
                function.__code__ = code
            return _loop(session, [items[test] for test in job.tests])

        file.write_text(job.source)
        try:
            status = _in_child(work, job.limit, Path(LOG))
        finally:
            file.write_text(before)
        said = Path(LOG).read_text(errors="replace")[-4000:]
        return "timeout" if status is None else "survived" if status in (0, 5) else "killed", said


def _loop(session: pytest.Session, items: Sequence[pytest.Item]) -> int:
    """As pytest's own, until the first failure."""
    session.items = list(items)
    for item, after in zip(items, [*items[1:], None], strict=True):
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
        if session.testsfailed:
            return 1
    return 0


def _anew(tests: Sequence[str]) -> int:
    """With all of Penstock and its tests imported once more."""
    for name in list(sys.modules):
        if name.split(".")[0] in ("penstock", "tests", "conftest"):
            del sys.modules[name]
    names = list(dict.fromkeys(map(_file, tests)))
    return int(pytest.main([*_FLAGS, *names], plugins=[_Select(tests)]))


class _Select:
    """A pytest plugin: these tests only, in this order."""

    def __init__(self, tests: Iterable[str]) -> None:
        self._place = {test: place for place, test in enumerate(tests)}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if item.nodeid in self._place]
        items.sort(key=lambda item: self._place[item.nodeid])


def _patches(
    before: str, after: str, name: str, functions: Sequence[FunctionType]
) -> list[tuple[FunctionType, CodeType]] | None:
    """The functions whose code differs, with their new code; None if something else does, too."""
    try:
        pairs = list(_differing(compile(before, name, "exec"), compile(after, name, "exec")))
    except SyntaxError:
        return None
    patches = []
    for old, new in pairs:
        found = [] if old is None else [each for each in functions if each.__code__ == old]
        if not found or new is None:
            return None
        patches += [(function, new) for function in found]
    return patches or None


def _differing(old: CodeType, new: CodeType) -> Iterator[tuple[CodeType | None, CodeType | None]]:
    """Pairs of functions' codes; (None, None) where what is run at import differs."""
    if (old.co_code, old.co_names) != (new.co_code, new.co_names) or len(old.co_consts) != len(new.co_consts):
        yield None, None
        return
    for one, other in zip(old.co_consts, new.co_consts, strict=True):
        if not isinstance(one, CodeType) or not isinstance(other, CodeType):
            if repr(one) != repr(other):
                yield None, None
        elif one.co_flags & inspect.CO_OPTIMIZED:
            if one != other:
                yield (one, other) if one.co_freevars == other.co_freevars else (None, None)
        else:
            yield from _differing(one, other)


def _enter(place: Path) -> None:
    others = [each for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each]
    os.environ.update(ENVIRONMENT, PYTHONPATH=os.pathsep.join([str(place), *others]))
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1" if sys.dont_write_bytecode else ""
    os.chdir(place)
    sys.path.insert(0, str(place))


def _in_child(work: Callable[[], int], limit: float, log: Path) -> int | None:
    """Exit status of this work in a forked process, or None if it took more than so many seconds. Nothing
    that it started is left."""
    child = os.fork()
    if child == 0:
        status = 70
        try:
            os.setsid()
            _redirect(log)
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


def _redirect(log: Path) -> None:
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (out, 1), (out, 2)):
        os.dup2(source, target)


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
