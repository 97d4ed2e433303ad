"""What escalation adds: to requests of routes without it, against a version that has none, and to those that
pass.

    python -m benchmarks.gateway.escalation --before CHECKOUT [--requests N] [--rounds R] [--concurrency C]

Gateways in front of the same fake upstream, one worker each, under the same load in turns, whose order
changes with each round: `before` is the code of another checkout, `without` a route that does not escalate,
and `verified` one whose verifier (a length) every answer passes. Compared is the CPU time of a request in the
gateway's process, round by round: a rate says little on a machine that others use as well.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.common import save

from .processes import Running, gateway, load, upstream

_ROUTE = ", escalate: {to: [{model: m, upstream: ours}], verifiers: [{length: {max_characters: 100000}}]}"
_WARMING = 200


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--before", required=True, type=Path)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--concurrency", type=int, default=20)
    args = parser.parse_args()
    runs: list[dict[str, Any]] = []
    with ExitStack() as stack:
        direct = stack.enter_context(upstream(0.001))
        paths: dict[str, Running] = {}
        for name, route, code in (
            ("before", "", args.before.resolve()),
            ("without", "", None),
            ("verified", _ROUTE, None),
        ):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            paths[name] = stack.enter_context(gateway(direct.port, folder, route=route, code=code))
        for running in paths.values():
            for stream in ([], ["--stream"]):
                load(running, "--requests", str(_WARMING), "--concurrency", "10", *stream)
        for number in range(args.rounds):
            names = list(paths)[number % 3 :] + list(paths)[: number % 3]
            for stream in (False, True):
                for name in names:
                    how = ["--concurrency", str(args.concurrency), "--requests", str(args.requests)]
                    run = load(paths[name], *how, *(["--stream"] if stream else []))
                    run |= {
                        "path": name,
                        "round": number,
                        "stream": stream,
                        "busy": round(os.getloadavg()[0], 2),
                    }
                    runs.append(run)
                    print(json.dumps(run), flush=True)
    found = list(_summary(runs, args.rounds))
    print(*found, sep="\n")
    sys.argv[1:] = [each.replace(str(args.before), "CHECKOUT") for each in sys.argv[1:]]
    arguments = {**vars(args), "before": "CHECKOUT"}  # where it lies is nobody's business
    save("gateway-escalation", {"arguments": arguments, "summary": found, "runs": runs})


def _summary(runs: list[dict[str, Any]], rounds: int) -> Iterable[str]:
    """Medians, and the differences of each round: their median, and how far they spread."""
    for stream in (False, True):
        kind = "streamed" if stream else "plain"
        cpu = {(run["path"], run["round"]): run["cpu_us"] for run in runs if run["stream"] == stream}
        for path, against in (("without", "before"), ("verified", "without")):
            values = [cpu[path, number] for number in range(rounds)]
            added = sorted(cpu[path, number] - cpu[against, number] for number in range(rounds))
            yield (
                f"{kind}, {path}: {statistics.median(values):.0f} us of CPU for a request, "
                f"{statistics.median(added):+.0f} against {against} ({added[0]:+} to {added[-1]:+})"
            )


if __name__ == "__main__":
    main()
