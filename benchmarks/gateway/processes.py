"""The processes of a measurement on loopback: fake upstream, gateway, LiteLLM, load; and what they use."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.bench.startup import free_port

SPEC = """
pools: {{box: {{hardware: L4, price_per_hour: 3.60}}}}
upstreams:
  ours: {{url: "http://127.0.0.1:{port}", kind: openai, pool: box, models: {{m: {{context: 8192}}}}}}
routes: {{small: {{targets: [{{model: m, upstream: ours}}]{more}}}{others}}}
limits:
  requests_per_minute: 100000000
  tokens_per_minute: 1000000000000
  dollars_per_day: 1000000
  concurrent_requests: 10000
gateway: {{port: 0}}
"""
"""Keys, limits, prices and the ledger (SQLite) are on."""
LITELLM = """
model_list:
  - model_name: small
    litellm_params:
      model: openai/m
      api_base: http://127.0.0.1:{port}/v1
      api_key: none
      input_cost_per_token: 0.000001
      output_cost_per_token: 0.000002
litellm_settings: {{num_retries: 0, request_timeout: 600, set_verbose: false}}
"""
"""Its virtual keys, budgets and spend logs need PostgreSQL and are off: it has its master key, and prices."""
_TICK = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Running:
    """Somebody who answers."""

    process: subprocess.Popen[str]
    port: str
    key: str = ""

    @property
    def cpu_seconds(self) -> float:
        """Used so far, in user and system mode."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICK

    @property
    def memory(self) -> int:
        """Resident bytes."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def _process(
    command: Sequence[str],
    cwd: Path | None = None,
    more: Mapping[str, str] | None = None,
    *,
    stdout: int = subprocess.PIPE,
) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), **(more or {})}
    started = subprocess.Popen(
        command, stdout=stdout, stderr=subprocess.DEVNULL, text=True, cwd=cwd, env=environment
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


@contextmanager
def upstream(gap: float) -> Iterator[Running]:
    """The fake one (`upstream`)."""
    command = [sys.executable, "-m", "benchmarks.gateway.upstream", "--gap", str(gap)]
    with _process(command) as process:
        assert process.stdout is not None
        yield Running(process, process.stdout.readline().strip())


@contextmanager
def gateway(
    port: str, folder: Path, *, route: str = "", others: str = "", code: Path | None = None
) -> Iterator[Running]:
    """Ours, one worker, in front of an upstream at `port`.

    Args:
        route: more of the route `small`, as `, retries: 0`.
        others: more routes, as `, large: {…}`.
        code: a checkout of another version; this one if not given.
    """
    (folder / "penstock.yaml").write_text(SPEC.format(port=port, more=route, others=others))
    more = {} if code is None else {"PYTHONPATH": str(code)}
    with _process([sys.executable, "-m", "penstock", "gateway"], folder, more) as process:
        assert process.stdout is not None
        url, key = (process.stdout.readline().split()[-1] for _ in range(2))
        yield Running(process, url.removesuffix("/v1").rpartition(":")[2], key)


@contextmanager
def litellm(command: str, port: str, folder: Path) -> Iterator[Running]:
    """LiteLLM's proxy, one worker, as its documentation has it for production and for benchmarks."""
    (folder / "litellm.yaml").write_text(LITELLM.format(port=port))
    own, key = str(free_port()), "sk-" + secrets.token_hex(32)
    settings = {
        "LITELLM_MASTER_KEY": key,
        "LITELLM_LOG": "ERROR",
        "LITELLM_MODE": "PRODUCTION",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "PYTHONPATH": "",
    }
    arguments = ["--config", "litellm.yaml", "--host", "127.0.0.1", "--port", own, "--num_workers", "1"]
    with _process([command, *arguments], folder, settings, stdout=subprocess.DEVNULL) as process:
        end = time.monotonic() + 300
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{own}/health/liveliness", timeout=5):
                    break
            except OSError:
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"{command} did not start") from None
                time.sleep(0.5)
        yield Running(process, own, key)


def version_of(command: str) -> str:
    """Of LiteLLM, in the environment that a command is in."""
    python = Path(command).with_name("python")
    code = "import importlib.metadata as m; print(m.version('litellm'))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def load(where: Running, *arguments: str) -> dict[str, Any]:
    """Run the load generator to its end; `cpu_us` and `load_cpu_us`: the CPU time of a request there and in
    the generator itself."""
    key = ["--key", where.key] if where.key else []
    before = where.cpu_seconds
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gateway.load", "--port", where.port, *key, *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    result: dict[str, Any] = json.loads(done.stdout)
    result["cpu_us"] = round(1e6 * (where.cpu_seconds - before) / result["requests_with_warming"])
    return result
