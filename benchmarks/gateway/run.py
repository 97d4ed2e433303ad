"""What the gateway adds, measured: direct and through it, in turns, and through LiteLLM's proxy.

    python -m benchmarks.gateway.run [--requests N] [--rounds R] [--rate R] [--concurrency C]
                                     [--litellm /path/to/venv/bin/litellm]

A fake upstream, the gateway (keys, limits, meter and ledger on, one worker) and the load are processes of
their own on one machine. Loads, plain and streamed (16 chunks):

    closed   C requests at a time: requests per second
    single   one at a time: what is added to the time to the first byte where nobody waits for anybody
    open     at a rate that the gateway keeps up with: the same under load (not for LiteLLM, which does not)

Beside them the CPU time of a request in the process that answers and in the load generator (`cpu_us`,
`load_cpu_us`), which says more than rates do on a machine that is busy; `busy` is the load average. On two
cores, gateway, upstream and load share them: a rate is a lower bound of what one core of its own would give.
LiteLLM is `pip install "litellm[proxy]"` in an environment of its own; without PostgreSQL it has no virtual
keys, budgets and spend logs, so that it does less than the gateway does here.
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

from .processes import Running, gateway, litellm, load, upstream, version_of

_WARMING = 200
"""Requests to everybody before the first that count."""
_SINGLE = 10
"""Requests one at a time are fewer by this."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=200.0)
    parser.add_argument("--concurrency", type=int, default=100)
    parser.add_argument("--gap", type=float, default=0.005, help="seconds between two chunks")
    parser.add_argument("--litellm", help="its command")
    parser.add_argument("--litellm-requests", type=int, default=1000)
    args = parser.parse_args()
    runs: list[dict[str, Any]] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        direct = stack.enter_context(upstream(args.gap))
        paths: dict[str, Running] = {"direct": direct}
        paths["gateway"] = stack.enter_context(gateway(direct.port, folder))
        if args.litellm:
            paths["litellm"] = stack.enter_context(litellm(args.litellm, direct.port, folder))
        for running in paths.values():  # code that runs for the first time is slow, LiteLLM's above all
            for stream in ([], ["--stream"]):
                load(running, "--requests", str(_WARMING), "--concurrency", "10", *stream)
        memory = {name: running.memory for name, running in paths.items()}
        for number in range(args.rounds):
            for stream in (False, True):
                for shape in ("closed", "single", "open"):
                    for name, running in paths.items():
                        if shape == "open" and name == "litellm":
                            continue
                        count = args.litellm_requests if name == "litellm" else args.requests
                        runs.append(_run(running, shape, count, args, stream=stream))
                        runs[-1] |= {"path": name, "round": number}
                        print(json.dumps(runs[-1]), flush=True)
        grown = {name: [memory[name], running.memory] for name, running in paths.items()}
    found = list(_summary(runs, list(paths)))
    print(*found, sep="\n")
    versions: dict[str, Any] = {}
    if args.litellm:
        versions["litellm"] = version_of(args.litellm)
        sys.argv[1:] = [each.replace(args.litellm, "litellm") for each in sys.argv[1:]]
        args.litellm = "litellm"  # where it lies is nobody's business
    result = {"arguments": vars(args), **versions, "summary": found, "memory_bytes": grown, "runs": runs}
    save("gateway", result)


def _run(where: Running, shape: str, count: int, args: argparse.Namespace, *, stream: bool) -> dict[str, Any]:
    how = ["--rate", str(args.rate)] if shape == "open" else ["--concurrency", str(args.concurrency)]
    if shape == "single":
        how, count = ["--concurrency", "1"], max(1, count // _SINGLE)
    result = load(where, *how, *(["--stream"] if stream else []), "--requests", str(count))
    return result | {"loop": shape, "stream": stream, "busy": round(os.getloadavg()[0], 2)}


def _summary(runs: list[dict[str, Any]], paths: list[str]) -> Iterable[str]:
    """Medians of the rounds, and what they are to one another."""

    def median(path: str, shape: str, stream: bool, *names: str) -> float:
        values = []
        for run in runs:
            if (run["path"], run["loop"], run["stream"]) == (path, shape, stream):
                value: Any = run
                for name in names:
                    value = value.get(name, float("nan"))
                values.append(value)
        return statistics.median(values)

    for stream in (False, True):
        kind = "streamed" if stream else "plain"
        for path in paths:
            rate = median(path, "closed", stream, "per_second")
            line = f"{kind}, closed, {path}: {rate:.0f} requests/s"
            if path != "direct":
                line += f", {median(path, 'closed', stream, 'cpu_us'):.0f} us of CPU each"
            yield line
        if "litellm" in paths:
            ratio = median("gateway", "closed", stream, "per_second")
            ratio /= median("litellm", "closed", stream, "per_second")
            yield f"{kind}, closed: the gateway has {ratio:.1f} times LiteLLM's rate"
        for shape in ("single", "open"):
            for path in paths[1:]:
                if shape == "open" and path == "litellm":
                    continue
                added = [
                    median(path, shape, stream, "first_ms", p)
                    - median("direct", shape, stream, "first_ms", p)
                    for p in ("p50", "p99")
                ]
                added_ms = f"{added[0]:+.2f} ms at p50, {added[1]:+.2f} at p99"
                yield f"{kind}, {shape}, {path}: to the first byte {added_ms}"


if __name__ == "__main__":
    main()
