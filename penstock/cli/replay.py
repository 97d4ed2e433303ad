"""`penstock replay`: prove that a recorded run schedules the same way again."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `penstock replay`."""
    parser.add_argument("log", type=Path, help="step log, written by penstock serve --record-steps FILE")


def run(args: argparse.Namespace) -> int:
    """0 if every plan is identical, 1 with the first difference otherwise."""
    from penstock.core.errors import StartupError
    from penstock.engine.replay import replay
    from penstock.engine.trace import ends_well

    try:
        with args.log.open(encoding="utf-8") as lines:
            recorded, replayed = replay(lines)
    except OSError as error:
        raise StartupError(f"cannot read {args.log}: {error.strerror}.") from error
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise StartupError(f"{args.log} is not a step log: {error!r}.") from error
    for number, (old, new) in enumerate(zip(recorded, replayed, strict=True)):
        if old != new:
            print(f"step {number} differs\nrecorded: {old}\nreplayed: {new}")
            return 1
    print(f"{len(recorded)} steps, all identical")
    if not ends_well(args.log):
        print("The record is incomplete: its last line is missing (a full disk, a killed engine).")
    return 0
