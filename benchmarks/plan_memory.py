"""What our engine takes of memory on a CPU, beside what a plan says.

    python -m benchmarks.plan_memory [--shapes plan-8x1024,qwen3-0.6b,…] [--quantization none,int8] [--folder
    DIR]

Each engine is a process of its own (`penstock serve`), with random weights in a real shape, a cache of 256
MiB (`--cache`), and 16 requests at a time until the cache is full. Memory is the anonymous part of the
resident set of the engine's process (RssAnon in /proc/PID/status: files that are mapped are the page cache's,
and go when others need room), looked at every 20 ms, above that of an engine with a model of 3 MB. The plan
is penstock.fleet.sizing's. `--malloc` sets glibc's thresholds to fixed values, which shows how much of the
rest is what the allocator keeps.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.checkpoint import SHAPES, write_checkpoint
from benchmarks.common import save
from penstock.bench.startup import free_port
from penstock.engine.config import EngineConfig, step_limits
from penstock.fleet import catalogue
from penstock.fleet.facts import SCHEMES
from penstock.fleet.roofline import Machine, fitted
from penstock.fleet.sizing import room

_EMPTY = "plan-empty"
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
_PATIENCE = 400.0


def anonymous(pid: int, of: str = "RssAnon") -> int:
    """Bytes of a process that no file has; or those that one has (`RssFile`)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{of}:"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"no {of} in /proc")


def engine_of(server: int) -> int:
    """The process that computes: of a server's children, the largest."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[1]) == server:
                pid = int(path.parent.name)
                found.append((anonymous(pid), pid))
        except (OSError, RuntimeError):
            continue
    return max(found)[1]


class Watch:
    """The highest that was seen of a process."""

    def __init__(self, pid: int) -> None:
        self._pid, self._ended = pid, threading.Event()
        self.peak = anonymous(pid)
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._ended.wait(0.02):
            self.peak = max(self.peak, anonymous(self._pid))

    def end(self) -> int:
        """Stop looking."""
        self._ended.set()
        self._thread.join()
        return self.peak


@contextmanager
def engine(folder: Path, flags: list[str], *, malloc: bool) -> Iterator[tuple[str, int]]:
    """Its URL, and the process that computes."""
    port = free_port()
    command = [sys.executable, "-m", "penstock", "serve", str(folder), "--port", str(port), *flags]
    environment = {**os.environ, **(_ALLOCATOR if malloc else {})}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + _PATIENCE
        while True:
            try:
                with urllib.request.urlopen(f"{url}/readyz", timeout=5):
                    break
            except OSError:
                if process.poll() is not None or time.monotonic() > end:
                    said = process.stderr.read().decode()[-2000:] if process.stderr else ""
                    raise RuntimeError(f"{folder.name} did not start: {said}") from None
                time.sleep(0.2)
        yield url, engine_of(process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def ask(url: str, number: int, prompt: int, output: int, vocabulary: int) -> None:
    """One request of so many tokens."""
    draw = random.Random(number)
    body = {
        "model": "m", "prompt": [draw.randrange(100, vocabulary) for _ in range(prompt)],
        "max_tokens": output, "ignore_eos": True, "temperature": 0.8, "seed": number,
    }  # fmt: skip
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=_PATIENCE) as response:
        response.read()


def measure(folder: Path, cache: int, scheme: str, *, malloc: bool) -> dict[str, int]:
    """Bytes of an engine: once it is ready, and the most that it takes under load."""
    config = json.loads((folder / "config.json").read_text())
    flags = [
        "--kv-cache-memory-bytes", str(cache), "--max-model-len", "2048", "--served-model-name", "m",
        "--dtype", "bfloat16", "--quantization", scheme,
    ]  # fmt: skip
    with engine(folder, flags, malloc=malloc) as (url, pid):
        watch = Watch(pid)
        ready, files = anonymous(pid), anonymous(pid, "RssFile")
        per_token = 2 * 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
        each = max(64, min(1500, cache // per_token // 16 - 40))
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            jobs = [pool.submit(ask, url, n, each, 32, config["vocab_size"]) for n in range(24)]
            for job in jobs:
                job.result()
        return {
            "ready": ready,
            "peak": watch.end(),
            "after": anonymous(pid),
            "files_ready": files,
            "files_after": anonymous(pid, "RssFile"),
        }


def planned(folder: Path, cache: int, scheme: str) -> dict[str, int]:
    """The same, as a plan has it."""
    names = {"none": "none", "int8": "int8", "int4": "awq"}
    facts, device = catalogue.find_model(str(folder)), catalogue.find_device("cpu")
    machine = Machine(facts, device, 1, SCHEMES[names[scheme]], 2, 2, fitted().efficiency)
    seqs, tokens = step_limits(EngineConfig(model=str(folder)), "cpu")
    space = room(
        machine, max_num_batched_tokens=tokens, max_num_seqs=seqs, max_model_len=2048, engine="penstock"
    )
    block = space.kv_bytes_per_token * 16
    kv = cache // block * block
    return {"weights": space.weights, "cache": kv, "step": space.step, "usual_step": space.usual_step or 0}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", default="plan-8x1024,plan-4x2048,qwen3-0.6b")
    parser.add_argument("--quantization", default="none,int8")
    parser.add_argument("--cache", type=int, default=256 << 20)
    parser.add_argument("--malloc", action="store_true", help="with fixed thresholds of the allocator")
    parser.add_argument("--folder", type=Path, help="where checkpoints are made (default: a temporary one)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        empty = write_checkpoint(folder / _EMPTY, _EMPTY)
        base = measure(empty, 4 << 20, "none", malloc=args.malloc)
        small = planned(empty, 4 << 20, "none")
        runs: list[dict[str, Any]] = []
        for shape in args.shapes.split(","):
            path = write_checkpoint(folder / shape, shape)
            for scheme in args.quantization.split(","):
                found, plan = (
                    measure(path, args.cache, scheme, malloc=args.malloc),
                    planned(path, args.cache, scheme),
                )
                took = {name: found[name] - base["ready"] for name in found}
                says = {name: plan[name] - small[name] for name in plan}
                whole = says["weights"] + says["cache"] + says["usual_step"]
                run = {
                    "shape": shape, "quantization": scheme, "measured": took, "planned": plan,
                    "planned_above_empty": says, "config": json.loads((path / "config.json").read_text()),
                    "weights_off_by": round(took["ready"] / says["weights"] - 1, 4),
                    "peak_off_by": round(took["peak"] / whole - 1, 4),
                }  # fmt: skip
                runs.append(run)
                print(json.dumps(run), flush=True)
    arguments = {name: value for name, value in vars(args).items() if name != "folder"}
    save("plan-memory", {"arguments": arguments, "empty": base, "runs": runs})


if __name__ == "__main__":
    assert _EMPTY in SHAPES
    main()
