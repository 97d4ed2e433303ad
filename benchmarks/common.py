"""What the benchmarks share: a server of ours in a process of its own, requests to it, and result files."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from penstock.bench.report import describe_machine
from penstock.bench.startup import free_port

RESULTS = Path(__file__).parent / "results"
MODELS = Path(__file__).parents[1] / "models"


@contextlib.contextmanager
def serving(model: str | Path, *flags: str, seconds: float = 300.0) -> Iterator[str]:
    """`penstock serve` on a free port for the length of a with block; yields its URL."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [
        sys.executable,
        "-m",
        "penstock",
        "serve",
        str(model),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    command += ["--disable-log-stats", "--disable-uvicorn-access-log", *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{' '.join(command)} did not start")
            time.sleep(0.1)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def post(url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """One JSON request."""
    request = urllib.request.Request(
        url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        result: dict[str, Any] = json.load(answer)
        return result


def save(name: str, result: dict[str, Any]) -> None:
    """Write results/NAME.json with the machine and the command line."""
    RESULTS.mkdir(exist_ok=True)
    module = Path(sys.argv[0]).resolve().relative_to(RESULTS.parents[1]).with_suffix("")
    record = {
        "benchmark": name,
        "date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "command": f"python -m {' '.join(['.'.join(module.parts), *sys.argv[1:]])}",
        "machine": describe_machine(),
        **result,
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
