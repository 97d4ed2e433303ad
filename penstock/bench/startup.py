"""`penstock bench startup`: how long from exec until a server answers, measured from outside.

    exec ──▶ port open ──▶ /health answers 200 ──▶ first streamed token
     0 s     port_open_s   healthy_s               first_token_s

The server is any command that will listen at a known URL. It runs in a session of its own and is ended
after each repeat: SIGTERM, a bounded wait, then SIGKILL for whatever is left of that session's group.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import urlsplit

import aiohttp

from penstock.bench.client import RequestRecord, Target, find_model, get_json, open_session, send_request
from penstock.bench.errors import BenchError
from penstock.bench.prompts import Prompt
from penstock.bench.report import describe_machine, timestamp

if TYPE_CHECKING:
    from rich.console import Console

POLL_S = 0.005
"""Pause between two looks at the server; the resolution of the first two times."""
PROMPT = Prompt("What is a Pod?", max_tokens=2)
PHASES = ("port_open_s", "healthy_s", "first_token_s")


@dataclass(frozen=True, slots=True)
class StartupTimes:
    """Seconds from exec; each includes the one before."""

    port_open_s: float
    healthy_s: float
    first_token_s: float


@dataclass(frozen=True, slots=True)
class StartupBench:
    """What to start and how to look at it."""

    command: tuple[str, ...]
    base_url: str
    model: str | None = None
    """Name for the first request; None asks the server, which adds one short request."""
    endpoint: str = "/v1/completions"
    headers: Mapping[str, str] | None = None
    repeats: int = 3
    timeout: float = 600.0
    """Seconds until a server that has not answered is given up."""
    stop_timeout: float = 35.0
    """Seconds for the server to end after SIGTERM; a little over its own drain of 30 s."""


def serve_command(model: str, flags: Sequence[str], port: int) -> tuple[str, ...]:
    """The command line of `penstock serve` under this Python, on a port of the loopback interface."""
    return (
        sys.executable,
        "-m",
        "penstock",
        "serve",
        model,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        *flags,
    )


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def bench_startup(
    bench: StartupBench, on_done: Callable[[StartupTimes], None] = lambda _: None
) -> dict[str, Any]:
    """Start the server `repeats` times; return every run, their summary and the machine.

    Raises BenchError if the port is already taken, or if the server ends or stays silent.
    """
    if bench.repeats < 1:
        raise BenchError(f"--repeats is {bench.repeats}; it must be at least 1")
    runs: list[StartupTimes] = []
    for _ in range(bench.repeats):
        runs.append(measure(bench))
        on_done(runs[-1])
    columns = {phase: [float(getattr(run, phase)) for run in runs] for phase in PHASES}
    report: dict[str, Any] = {"date": timestamp(), "command": list(bench.command), "repeats": bench.repeats}
    for phase, values in columns.items():
        report |= {f"min_{phase}": min(values), f"max_{phase}": max(values)}
        report |= {f"mean_{phase}": statistics.fmean(values), f"median_{phase}": statistics.median(values)}
    return {**report, "runs": [asdict(run) for run in runs], "machine": describe_machine()}


def measure(bench: StartupBench) -> StartupTimes:
    """Start the server once, time it, and end it."""
    host, port = _address(bench.base_url)
    if _port_open(host, port):
        raise BenchError(f"something already listens at {bench.base_url}; stop it or choose another port")
    with tempfile.TemporaryFile() as output:
        started = time.perf_counter()
        with _server(bench, output) as process:
            watch = _Watch(bench, process, output, started)
            return asyncio.run(watch.times(host, port))


class _Watch:
    """Looks at one starting server until it has answered, ended, or run out of time."""

    def __init__(
        self, bench: StartupBench, process: subprocess.Popen[bytes], output: IO[bytes], started: float
    ) -> None:
        self._bench = bench
        self._process = process
        self._output = output
        self._started = started

    async def times(self, host: str, port: int) -> StartupTimes:
        bench = self._bench
        headers = bench.headers or {}

        async def listening() -> bool:
            return _port_open(host, port)

        async with open_session() as session:
            port_open = await self._until(listening, "to listen")
            healthy = await self._until(lambda: _healthy(session, bench.base_url), "to be healthy")
            model = bench.model or await find_model(session, bench.base_url, headers)
            # A greedy answer: start-up of sampling is not what is measured.
            left = max(POLL_S, bench.timeout - healthy)
            target = Target(bench.base_url, bench.endpoint, model, headers, {"temperature": 0}, left)
            record = RequestRecord(0, time.perf_counter())
            await send_request(session, target, PROMPT, record)
        if not record.chunk_times or record.cause:
            raise BenchError(f"the first request failed: {record.cause}: {record.message}{self._tail()}")
        return StartupTimes(port_open, healthy, record.chunk_times[0] - self._started)

    async def _until(self, ready: Callable[[], Awaitable[bool]], what: str) -> float:
        """Poll `ready`; the seconds since exec at which it was true."""
        while not await ready():
            elapsed = time.perf_counter() - self._started
            if (code := self._process.poll()) is not None:
                raise BenchError(f"the server ended with status {code} after {elapsed:.1f} s{self._tail()}")
            if elapsed > self._bench.timeout:
                raise BenchError(
                    f"the server took longer than {self._bench.timeout:g} s {what} (--timeout){self._tail()}"
                )
            await asyncio.sleep(POLL_S)
        return time.perf_counter() - self._started

    def _tail(self, lines: int = 15) -> str:
        """The last lines that the server printed, as the end of an error message."""
        # The child shares this file's position: reading it is only safe because the run has failed.
        self._output.seek(0)
        text = self._output.read().decode("utf-8", errors="replace").rstrip()
        return (
            "; its last output:\n" + "\n".join(text.splitlines()[-lines:]) if text else "; it printed nothing"
        )


@contextlib.contextmanager
def _server(bench: StartupBench, output: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    try:
        process = subprocess.Popen(
            bench.command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    except OSError as error:
        raise BenchError(f"cannot run {bench.command[0]!r}: {error}") from error
    try:
        yield process
    finally:
        _end(process, bench.stop_timeout)


def _end(process: subprocess.Popen[bytes], timeout: float) -> None:
    """SIGTERM to the process; SIGKILL to its group if it has not ended in `timeout` seconds."""
    process.terminate()
    try:
        process.wait(timeout)
    except subprocess.TimeoutExpired:
        # Not reaped yet, so the id is still that of the group that was started here.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _address(base_url: str) -> tuple[str, int]:
    parts = urlsplit(base_url)
    default = 443 if parts.scheme == "https" else 80
    return parts.hostname or "127.0.0.1", parts.port or default


def _port_open(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=1):
            return True
    except OSError:
        return False


async def _healthy(session: aiohttp.ClientSession, base_url: str) -> bool:
    try:
        status, _ = await get_json(session, f"{base_url}/health", {})
    except BenchError:
        return False
    return status == 200


def print_startup(report: Mapping[str, Any], console: Console) -> None:
    """Show the runs and their median as a table."""
    from rich import box
    from rich.table import Table

    table = Table(title="Start-up: seconds from exec", box=box.SIMPLE_HEAD)
    for heading in ("run", "port open", "healthy", "first token"):
        table.add_column(heading, justify="right")
    for number, run in enumerate(report["runs"], start=1):
        table.add_row(str(number), *(f"{run[phase]:.3f}" for phase in PHASES))
    table.add_section()
    table.add_row("median", *(f"{report[f'median_{phase}']:.3f}" for phase in PHASES), style="bold")
    console.print(table)
