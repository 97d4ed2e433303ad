"""What the gateway adds, measured: direct and through it, in turns.

    python -m benchmarks.gateway.run [--requests N] [--rounds R] [--rate R] [--concurrency C]

A fake upstream, the gateway (keys, limits, meter and ledger on, one worker) and the load are processes of
their own on one machine. Closed loop: requests per second with C requests at a time. Open loop: what the
gateway adds to the time to the first byte at a rate that it keeps up with. Beside them the gateway's own CPU
time for a request, which says more than rates do on a machine that is busy; `busy` is the load average.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.common import save

_SPEC = """
pools: {{box: {{hardware: L4, price_per_hour: 3.60}}}}
upstreams:
  ours: {{url: "http://127.0.0.1:{port}", kind: openai, pool: box, models: {{m: {{context: 8192}}}}}}
routes: {{small: {{targets: [{{model: m, upstream: ours}}]}}}}
limits:
  requests_per_minute: 100000000
  tokens_per_minute: 1000000000000
  dollars_per_day: 1000000
  concurrent_requests: 10000
gateway: {{port: 0}}
"""
_TICK = os.sysconf("SC_CLK_TCK")


@contextmanager
def process(*command: str, cwd: str | None = None) -> Iterator[subprocess.Popen[str]]:
    """A process of ours, ended by SIGTERM."""
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    started = subprocess.Popen(
        [sys.executable, "-m", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=cwd,
        env=environment,
    )
    try:
        yield started
    finally:
        started.send_signal(signal.SIGTERM)
        try:
            started.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            started.kill()
            started.communicate()


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICK


def memory(pid: int) -> int:
    """Resident bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def load(*arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gateway.load", *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=200.0)
    parser.add_argument("--concurrency", type=int, default=100)
    parser.add_argument("--gap", type=float, default=0.005)
    args = parser.parse_args()
    runs: list[dict[str, Any]] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        process("benchmarks.gateway.upstream", "--gap", str(args.gap)) as upstream,
    ):
        assert upstream.stdout is not None
        direct = upstream.stdout.readline().strip()
        (Path(folder) / "penstock.yaml").write_text(_SPEC.format(port=direct))
        with process("penstock", "gateway", cwd=folder) as gateway:
            assert gateway.stdout is not None
            url, key = (gateway.stdout.readline().split()[-1] for _ in range(2))
            through = ["--port", url.removesuffix("/v1").rpartition(":")[2], "--key", key]
            begun = memory(gateway.pid)
            for number in range(args.rounds):
                for stream in ([], ["--stream"]):
                    closed = ["--concurrency", str(args.concurrency)]
                    for how, shape in (("closed", closed), ("open", ["--rate", str(args.rate)])):
                        for name, where in (("direct", ["--port", direct]), ("gateway", through)):
                            before = cpu_seconds(gateway.pid)
                            result = load(*where, *shape, *stream, "--requests", str(args.requests))
                            used = cpu_seconds(gateway.pid) - before
                            result |= {"round": number, "loop": how, "stream": bool(stream), "path": name}
                            result["busy"] = os.getloadavg()[0]
                            if name == "gateway":
                                result["cpu_us"] = round(1e6 * used / (result["requests"] + 20))
                            runs.append(result)
                            print(json.dumps(result), flush=True)
            print(f"resident memory: {begun >> 20} MiB at first, {memory(gateway.pid) >> 20} MiB at the end")
    save("gateway", {"arguments": vars(args), "runs": runs})


if __name__ == "__main__":
    main()
