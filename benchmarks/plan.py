"""How long `penstock plan` and `compile` take, as a user waits for them: a process of its own each time.

    python -m benchmarks.plan [--runs 5]

A bare model (all devices that have a price), one device, a page, a spec of two models, and a question that is
refused, which looks through the whole catalogue for what would do; what `penstock init` writes, planned and
compiled. Seconds, and those of a processor; of the runs the median is what to look at, and less than a second
what is wanted.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import save
from penstock.cli.init import example

_SPEC = """
version: 1
pools: {gpu: {hardware: A100-80GB, count: 4, price_per_hour: 3.43}}
models:
  vision: {weights: Qwen/Qwen3-VL-8B-Instruct, pool: gpu, engine: vllm, slo: {ttft_p99: 5s}}
  text: {weights: RedHatAI/Qwen3-32B-quantized.w8a8, pool: gpu, engine: vllm, slo: {ttft_p99: 5s}}
"""
_ASKED = {
    "a bare model": ("plan llama-3.1-8b", 0),
    "one device, JSON": ("plan qwen3-32b --gpu A100-80GB --quantization int8 --json", 0),
    "a page": ("plan llama-3.1-8b --gpu L40S --html plan.html", 0),
    "a spec": ("plan hub.yaml --rate 0.2", 0),
    "impossible": ("plan llama-3.1-405b --gpu T4 --ttft-p99 1ms", 2),
    "what init writes": ("plan penstock.yaml", 0),
    "what init writes, compiled": ("compile penstock.yaml -o bundle", 0),
    "a spec, compiled": ("compile hub.yaml -o hub", 0),
}


def once(arguments: list[str], status: int, folder: Path) -> tuple[float, float]:
    """Seconds, and those of a processor."""
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "penstock", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
    )
    took, now = time.monotonic() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != status:
        raise RuntimeError(f"{arguments}: status {done.returncode}: {done.stderr.decode()[-500:]}")
    return took, now.ru_utime + now.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "hub.yaml").write_text(_SPEC)
        (folder / "penstock.yaml").write_text(example())
        for what, (command, status) in _ASKED.items():
            arguments = command.split()
            times = [once(arguments, status, folder) for _ in range(args.runs)]
            seconds, cpu = ([round(each[place], 3) for each in times] for place in (0, 1))
            found[what] = {
                "arguments": arguments, "seconds": seconds, "cpu_seconds": cpu,
                "median_seconds": statistics.median(seconds), "median_cpu_seconds": statistics.median(cpu),
                "busy": round(os.getloadavg()[0], 2),
            }  # fmt: skip
            print(what, json.dumps(found[what]), flush=True)
    save("plan", {"arguments": {"runs": args.runs}, "plans": found})


if __name__ == "__main__":
    main()
