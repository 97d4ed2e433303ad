"""Command line; see the package's docstring."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path

from benchmarks.checkpoint import write_checkpoint
from benchmarks.common import MODELS, RESULTS
from penstock.bench.report import describe_machine

from . import setup
from .engines import ENGINES
from .loads import LOADS, QUICK
from .report import DOCUMENT, write_report
from .results import Results
from .run import Plan, run

PUBLISHED = RESULTS / "peers.json"
QUICK_RESULTS = RESULTS.parent / "out" / "peers-quick.json"


def main() -> None:
    """Parse and do."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("setup", help="make the peers' environments under .peers/")
    measure = commands.add_parser("run", help="measure, then report")
    measure.add_argument("--rounds", type=int, default=3)
    measure.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), metavar="ENGINE")
    measure.add_argument("--loads", nargs="+", choices=LOADS, default=list(LOADS), metavar="LOAD")
    measure.add_argument("--resume", action="store_true", help="keep what the result file has")
    measure.add_argument("--quick", action="store_true", help="a tiny model and tiny loads: does it work?")
    measure.add_argument("--no-cold", action="store_true", help="leave out the starts without compiled code")
    measure.add_argument("--lock", type=Path, help="a file to hold a lock on while measuring")
    for command in (measure, commands.add_parser("report", help="draw everything from the JSON again")):
        command.add_argument("--results", type=Path, help="the JSON file")
    args = parser.parse_args()
    # As Ctrl-C does: the engine that is alive is stopped on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    if args.command == "setup":
        setup.run()
    elif args.command == "report":
        _report(Results.read(args.results or PUBLISHED))
    else:
        _run(args)


def _run(args: argparse.Namespace) -> None:
    shape = "qwen3-tiny" if args.quick else "qwen3-0.6b"
    known = QUICK if args.quick else LOADS
    loads = [known[name] for name in args.loads if name in known]
    path = args.results or (QUICK_RESULTS if args.quick else PUBLISHED)
    if path.exists() and not args.resume:
        path.rename(path.with_suffix(".previous.json"))
    head = {
        "benchmark": "peers",
        "date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "command": f"python -m benchmarks.peers run --rounds {args.rounds}",
        "machine": describe_machine(),
        "model": shape,
        "loads": {load.id: load.describe() for load in loads},
    }
    results = Results(path, head, resume=args.resume)
    plan = Plan(
        engines=[ENGINES[name] for name in ENGINES if name in args.engines],
        loads=loads,
        rounds=1 if args.quick else args.rounds,
        model=write_checkpoint(MODELS / shape, shape),
        lock=args.lock,
        cold=not args.no_cold and not args.quick,
    )
    run(plan, results)
    if not args.quick:
        _report(results)


def _report(results: Results) -> None:
    """The document shows the published results; others get a copy of it beside them."""
    if results.path.resolve() == PUBLISHED.resolve():
        write_report(results)
    else:
        folder = results.path.with_suffix("")
        folder.mkdir(parents=True, exist_ok=True)
        copy = folder / DOCUMENT.name
        copy.write_text(DOCUMENT.read_text())
        write_report(results, copy, folder / "images")


if __name__ == "__main__":
    main()
