"""What escalation adds: to requests of routes without it, and to those that pass.

    python -m benchmarks.gateway.escalation [--before CHECKOUT] [--requests N] [--rounds R] [--concurrency C]

Gateways in front of the same fake upstream, one worker each, under the same load in turns, there and back
again (A B C D D C B A), so that what changes slowly on the machine is the same for all:

    none      no route of the spec escalates
    again     the same once more: what differs between two processes of the same code and spec
    beside    the route that is asked does not, and another one does
    verified  the route that is asked does; its verifier (a length) every answer passes
    before    the code of another checkout, which may be of before there was such a thing

Compared are a request's CPU time in the gateway's process and its latency, paired, round by round: the median
of the differences, and the 95 % interval of that median by the binomial law (no assumption on their
distribution). What escalation adds to requests that do not escalate is `beside` against `none`: nothing, if
that interval has zero in it and both of its ends are small, or if `again` differs from `none` as much.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.common import save

from .processes import Running, gateway, load, upstream

_ESCALATES = ", escalate: {to: [{model: m, upstream: ours}], verifiers: [{length: {max_characters: 100000}}]}"
_BESIDE = f", other: {{targets: [{{model: m, upstream: ours}}]{_ESCALATES}}}"
_WARMING = 200
_PAIRS = (
    ("again", "none"),
    ("beside", "none"),
    ("beside", "again"),
    ("verified", "none"),
    ("none", "before"),
)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--before", type=Path, help="a checkout of another version")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=10, help="of two turns each")
    parser.add_argument("--concurrency", type=int, default=8)
    args = parser.parse_args()
    ways: list[tuple[str, dict[str, Any]]] = [
        ("none", {}),
        ("again", {}),
        ("beside", {"others": _BESIDE}),
        ("verified", {"route": _ESCALATES}),
    ]
    if args.before is not None:
        ways.append(("before", {"code": args.before.resolve()}))
    runs: list[dict[str, Any]] = []
    with ExitStack() as stack:
        direct = stack.enter_context(upstream(0.001))
        paths: dict[str, Running] = {}
        for name, how in ways:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            paths[name] = stack.enter_context(gateway(direct.port, folder, **how))
        for running in paths.values():
            for stream in ([], ["--stream"]):
                load(running, "--requests", str(_WARMING), "--concurrency", "10", *stream)
        for number in range(args.rounds):
            first = list(paths)[number % len(paths) :] + list(paths)[: number % len(paths)]
            for stream in (False, True):
                for turn, name in enumerate([*first, *reversed(first)]):
                    flags = ["--concurrency", str(args.concurrency), "--requests", str(args.requests)]
                    run = load(paths[name], *flags, *(["--stream"] if stream else []))
                    run |= {
                        "path": name,
                        "round": number,
                        "turn": turn,
                        "stream": stream,
                        "busy": round(os.getloadavg()[0], 2),
                    }
                    runs.append(run)
                    print(json.dumps(run), flush=True)
    found = list(summary(runs))
    print(*found, sep="\n")
    if args.before is not None:
        sys.argv[1:] = [each.replace(str(args.before), "CHECKOUT") for each in sys.argv[1:]]
    arguments = {**vars(args), "before": args.before and "CHECKOUT"}  # where it lies is nobody's business
    save("gateway-escalation", {"arguments": arguments, "summary": found, "runs": runs})


def summary(runs: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Medians, and the medians of the paired differences with their intervals."""
    names = {run["path"] for run in runs}
    for stream in (False, True):
        kind = "streamed" if stream else "plain"
        for what, unit in (("cpu_us", "us of CPU"), ("whole_ms", "ms")):
            means: dict[tuple[str, int], list[float]] = {}
            for run in runs:
                if run["stream"] == stream:
                    value = run[what]["p50"] if what == "whole_ms" else run[what]
                    means.setdefault((run["path"], run["round"]), []).append(value)
            of = {place: statistics.fmean(some) for place, some in means.items()}
            rounds = sorted({number for _, number in of})
            for path, against in _PAIRS:
                if not {path, against} <= names:
                    continue
                values = [of[path, number] for number in rounds]
                added = sorted(of[path, number] - of[against, number] for number in rounds)
                low, high = interval(added)
                yield (
                    f"{kind}, {path}: {statistics.median(values):.3g} {unit} for a request, "
                    f"{statistics.median(added):+.3g} against {against} (95 %: {low:+.3g} to {high:+.3g}, "
                    f"{len(added)} rounds)"
                )


def interval(ordered: Sequence[float]) -> tuple[float, float]:
    """Of the median of what these are a sample of, at 95 %: the k-th from below and from above, with the
    largest k for which P(Binomial(n, 1/2) < k) <= 2.5 %. All of them, where they are too few for that (under
    six)."""
    n, k, below = len(ordered), 0, 0.0
    while below + math.comb(n, k) / 2**n <= 0.025:
        below += math.comb(n, k) / 2**n
        k += 1
    return ordered[max(k - 1, 0)], ordered[n - max(k, 1)]


if __name__ == "__main__":
    main()
