"""What an attack does to everybody else: a real server, its liveness while it is attacked, and its memory.

    with serving("demo", log=log) as server:
        toll = attacked(server, lambda: post(server, "/v1/completions", body))
    assert toll.worst_livez <= 0.5
    assert toll.grown <= 300 * MB

Memory is the kernel's own high-water mark of each process, set back before the attack: no sample can miss it.
"""

from __future__ import annotations

import contextlib
import gc
import http.client
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.e2e.server import Server, children

MB = 1 << 20
WORST_LIVEZ = 0.5
"""Seconds that /livez may take while anything is done to the server."""
MOST_MEMORY = 300 * MB
"""What the server's processes may take above idle, each."""
PATIENCE = 60.0
"""Seconds after which an exchange counts as a hang."""


@dataclass(frozen=True)
class Toll:
    """What an attack cost the others."""

    worst_livez: float
    """Seconds of the slowest probe of /livez."""
    probes: int
    failed: int
    """Probes without a 200."""
    grown: dict[str, int]
    """process → bytes of its peak above what it had before."""
    kept: dict[str, int]
    """process → bytes that it has more than before, afterwards."""

    def __str__(self) -> str:
        memory = ", ".join(
            f"{name} +{peak / MB:.0f} MB (kept {self.kept[name] / MB:.0f})"
            for name, peak in self.grown.items()
        )
        probes = f"in {self.probes} probes, {self.failed} failed"
        return f"/livez at worst {self.worst_livez:.3f} s {probes}; {memory}"


def attacked(server: Server, attack: Callable[[], object]) -> Toll:
    """Run the attack while /livez and memory are watched."""
    pids = processes(server)
    before = {name: _memory(pid, "VmRSS") for name, pid in pids.items()}
    for pid in pids.values():
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # the high-water mark starts from here
    with _watching(server.port) as probes:
        attack()
    return Toll(
        worst_livez=probes["worst"],
        probes=probes["count"],
        failed=probes["failed"],
        grown={name: _memory(pid, "VmHWM") - before[name] for name, pid in pids.items() if _runs(pid)},
        kept={name: _memory(pid, "VmRSS") - before[name] for name, pid in pids.items() if _runs(pid)},
    )


def withstands(server: Server, attack: Callable[[], object], attempts: int = 3) -> Toll:
    """Assert that an attack stays within the bounds; returns its toll.

    The bound on /livez is of wall-clock time, on machines that others use too: a stall that the attack causes
    comes again at each attempt, one that the machine causes does not. Memory is judged at every attempt.
    """
    tolls = []
    for _ in range(attempts):
        toll = attacked(server, attack)
        tolls.append(toll)
        assert server.process.poll() is None, f"the server has ended:\n{server.log[-4000:]}"
        assert max(toll.grown.values()) <= MOST_MEMORY, str(toll)
        if toll.worst_livez <= WORST_LIVEZ and not toll.failed:
            return toll
    raise AssertionError("; ".join(map(str, tolls)))


def post(server: Server, path: str, body: Any, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
    """(status, body) of one POST; a body that is not bytes is sent as JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    try:
        connection.request("POST", path, data, {"Content-Type": "application/json", **(headers or {})})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def error_of(answer: tuple[int, bytes]) -> dict[str, Any]:
    """The error of an answer in OpenAI's shape; fails where it has another."""
    status, body = answer
    error = json.loads(body)["error"]
    assert status >= 400, body[:200]
    assert set(error) >= {"message", "type", "param", "code"}, body[:400]
    assert error["message"], body[:400]
    return dict(error)


def processes(server: Server) -> dict[str, int]:
    """The server's processes: the API's, the engine's, and whatever else it has started."""
    api = server.process.pid
    named = {"api": api, "engine": server.engine_pid()}
    others = sorted(set(children(api)) - set(named.values()))
    return named | {f"child {number}": child for number, child in enumerate(others, 1)}


def _runs(pid: int) -> bool:
    """False for a process of templates that was stopped: the limit of its memory is the system's."""
    return Path(f"/proc/{pid}").exists()


def _memory(pid: int, field: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


@contextlib.contextmanager
def _watching(port: int) -> Iterator[dict[str, Any]]:
    """Fills in what the watcher saw, at the end of the with block."""
    gc.collect()
    found: dict[str, Any] = {}
    script = Path(__file__).with_name("watch.py")
    with subprocess.Popen(
        [sys.executable, str(script), str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as watcher:
        assert watcher.stdout is not None
        assert watcher.stdin is not None
        assert watcher.stdout.readline() == "watching\n"
        try:
            yield found
        finally:
            watcher.stdin.close()
            found.update(json.loads(watcher.stdout.readline()))
