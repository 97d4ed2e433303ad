"""Mutation testing of one room: `make mutants ROOM=core`, or

    python tools/mutants/run.py --room text --sample 300 --seed 1 --json text.json

Everything happens in a copy of the working tree in a temporary folder; the tree itself is only read. The
room's tests are run once with coverage, to learn which test runs which line. Then each fault is written into
a copy, and the tests that run its line are run, the fastest first, until one fails.

killed: a test failed. timeout: the tests did not end. explained: no test can tell, and explained.toml says
why (it is not run). survived: what is printed, as a difference.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import random
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import operators
import sandbox

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
EXPLAINED = HERE / "explained.toml"
# room → its tests, and what else belongs to it
TESTS = {
    "cli": ["tests/cli", "tests/test_offline.py"],
    "engine": ["tests/engine", "tests/cli/test_flags.py"],  # what flags are made of is in EngineConfig
}
ALSO = {"cli": ["penstock/offline.py"]}


@dataclass(frozen=True)
class Verdict:
    """What became of one mutant."""

    path: str
    line: int
    function: str
    diff: str
    status: str
    """killed, timeout, explained, survived."""
    tests: int
    """How many tests run its line."""
    seconds: float


def files_of(room: str) -> list[str]:
    """The room's modules, relative to the repository."""
    found = sorted((ROOT / "penstock" / room).rglob("*.py"))
    if not found:
        raise SystemExit(f"no room penstock/{room}")
    return [str(path.relative_to(ROOT)) for path in found] + ALSO.get(room, [])


def _tests_of(room: str) -> list[str]:
    return TESTS.get(room, [f"tests/{room}"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 if at least `--least` percent of the mutants are killed or explained, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--room", required=True, help="a folder of penstock/")
    parser.add_argument("--sample", type=int, default=0, help="so many mutants, drawn by --seed; 0: all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--json", type=Path, help="where to write the verdicts")
    parser.add_argument("--least", type=float, default=0.0, help="percent to be killed or explained")
    parser.add_argument("--only", default="", help="only mutants whose path and function have this in them")
    parser.add_argument("--survivors", type=Path, help="only what survived in this --json of an earlier run")
    parser.add_argument("--resume", action="store_true", help="go on with what --json has of the same sample")
    parser.add_argument(
        "--quick", type=float, help="first look: the cheapest tests, this share of their time"
    )
    parser.add_argument("--full", action="store_true", help="run all of the room's tests for each mutant")
    options = parser.parse_args(arguments)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that copies and workers go, too
    started = time.monotonic()
    mutants = [mutant for path in files_of(options.room) for mutant in operators.mutants_of(ROOT, path)]
    options.total = total = len(mutants)
    if options.only:
        mutants = [each for each in mutants if options.only in f"{each.path}:{each.function}"]
    if options.survivors:
        left = {
            (each["path"], each["function"], each["diff"])
            for each in json.loads(options.survivors.read_text())["verdicts"]
            if each["status"] == "survived"
        }
        names = {name[:2] for name in left}
        mutants = [
            each
            for each in mutants
            if (each.path, each.function) in names
            and (each.path, each.function, operators.apply(ROOT, each)[1]) in left
        ]
    elif options.sample and options.sample < len(mutants):
        chosen = random.Random(options.seed).sample(range(len(mutants)), options.sample)
        mutants = [mutants[place] for place in sorted(chosen)]

    before: list[Verdict] = []
    if options.resume and options.json and options.json.exists():
        before = [Verdict(**each) for each in json.loads(options.json.read_text())["verdicts"]]
        known = {(each.path, each.function, each.diff) for each in before}
        chosen_by_name = [(each.path, each.function, operators.apply(ROOT, each)[1]) for each in mutants]
        mutants = [each for each, name in zip(mutants, chosen_by_name, strict=True) if name not in known]
        before = [each for each in before if (each.path, each.function, each.diff) in set(chosen_by_name)]
        print(f"{len(before)} are known", flush=True)

    def keep(verdicts: list[Verdict]) -> None:
        if options.json:
            record = {"verdicts": [asdict(each) for each in verdicts]}
            options.json.write_text(json.dumps(record, indent=1) + "\n")

    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        base = Path(folder) / "base"
        sandbox.copy_tree(ROOT, base)
        print(f"{options.room}: {len(mutants)} of {total} mutants; first the tests as they are", flush=True)
        learned = sandbox.learn(base, _tests_of(options.room), files_of(options.room))
        print(f"{len(learned.seconds)} tests, {sum(learned.seconds.values()):.0f} s", flush=True)
        verdicts = _run(mutants, learned, Path(folder), options, before, keep)
    verdicts.sort(key=lambda each: (each.path, each.line))
    counts = Counter(each.status for each in verdicts)
    fine = len(verdicts) - counts["survived"]
    share = 100 * fine / max(1, len(verdicts))
    summary = {
        "room": options.room,
        "mutants": total,
        "run": len(verdicts),
        "sample": options.sample,
        "seed": options.seed,
        **{name: counts[name] for name in ("killed", "timeout", "explained", "survived")},
        "killed or explained, percent": round(share, 1),
        "tests": len(learned.seconds),
        "minutes": round((time.monotonic() - started) / 60, 1),
    }
    print("\n" + json.dumps(summary))
    if options.json:
        record = {"summary": summary, "verdicts": [asdict(each) for each in verdicts]}
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return int(share < options.least)


def _run(
    mutants: Sequence[operators.Mutant],
    learned: sandbox.Learned,
    folder: Path,
    options: argparse.Namespace,
    before: Sequence[Verdict],
    keep: Callable[[list[Verdict]], None],
) -> list[Verdict]:
    """A control first: all tests in a worker, without a fault, imported anew. `before`: what an earlier run
    has found; `keep` is given all verdicts so far, now and then."""
    explained, base = _explained(), folder / "base"
    verdicts = list(before)
    todo: list[tuple[operators.Mutant, str]] = []
    for mutant in mutants:
        diff = operators.apply(base, mutant)[1]
        if explained.pop((mutant.path, mutant.function, diff), None) is None:
            todo.append((mutant, diff))
        else:
            known = Verdict(mutant.path, mutant.lines[0], mutant.function, diff, "explained", 0, 0.0)
            verdicts.append(known)
    if len(verdicts) + len(todo) == options.total:
        for path, function, diff in explained:
            if path in files_of(options.room):
                print(f"explained.toml has what is no mutant any more: {path} {function}\n{diff}")
    under_way: dict[Connection, tuple[operators.Mutant | None, str, int, float]] = {}
    waiting = iter([(None, ""), *todo])

    def give(worker: Connection) -> None:
        for mutant, diff in waiting:
            job = _job(mutant or mutants[0], learned, base, options, control=mutant is None)
            under_way[worker] = (mutant, diff, len(job.tests), time.monotonic())
            worker.send(job)
            return

    with contextlib.ExitStack() as stack:
        for number in range(options.jobs):
            give(_start(stack, folder, str(number), _tests_of(options.room)))
        while under_way:
            for worker in wait(list(under_way)):
                assert isinstance(worker, Connection)
                tried, diff, count, started = under_way.pop(worker)
                try:
                    status, said = worker.recv()
                except (EOFError, ConnectionError):
                    logs = [log.read_text()[-4000:] for log in folder.glob(f"*/{sandbox.LOG}")]
                    raise SystemExit("\n".join([*logs, "a worker has ended"])) from None
                if tried is None:
                    if status != "survived":
                        raise SystemExit(f"{said}\nwithout a fault, the tests in a worker: {status}")
                else:
                    seconds = round(time.monotonic() - started, 2)
                    line = tried.lines[0]
                    verdicts.append(Verdict(tried.path, line, tried.function, diff, status, count, seconds))
                    if status == "survived":
                        print(f"{tried.path}:{line} {tried.function} ({count} tests)\n{diff}", flush=True)
                    keep(verdicts)
                    if len(verdicts) % 50 == 0:
                        figures = dict(Counter(each.status for each in verdicts))
                        print(f"  {len(verdicts)} of {len(before) + len(mutants)}: {figures}", flush=True)
                give(worker)
    return verdicts


def _job(
    mutant: operators.Mutant,
    learned: sandbox.Learned,
    base: Path,
    options: argparse.Namespace,
    control: bool,
) -> sandbox.Job:
    everything = list(learned.seconds)
    if control:
        return sandbox.Job(
            mutant.path, (base / mutant.path).read_text(), tuple(everything), 3600.0, anew=True
        )
    tests = everything if options.full else learned.tests_of(mutant)
    if options.quick:
        tests = learned.cheap(tests, options.quick)
    limit = 15 + 3 * sum(learned.seconds[test] for test in tests)
    source = operators.apply(base, mutant)[0]
    return sandbox.Job(mutant.path, source, tuple(tests), limit, anew=learned.imported(mutant))


def _start(stack: contextlib.ExitStack, folder: Path, name: str, tests: Sequence[str]) -> Connection:
    """A worker with a copy of its own, which ends with the stack."""
    shutil.copytree(folder / "base", folder / name)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=sandbox.serve, args=(theirs, str(folder / name), tests))
    process.start()
    theirs.close()
    stack.callback(process.join, 30)
    stack.callback(process.terminate)
    stack.enter_context(ours)
    return ours


def _explained() -> dict[tuple[str, str, str], str]:
    """(path, function, difference) → why no test can tell."""
    entries: list[dict[str, Any]] = tomllib.loads(EXPLAINED.read_text()).get("mutant", [])
    return {(each["path"], each["function"], each["diff"].strip()): each["reason"] for each in entries}


if __name__ == "__main__":
    sys.exit(main())
