"""A real `penstock serve` in a process of its own, on loopback."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from tests.ports import free_port

START_SECONDS = 90.0


class Page:
    """A page of metrics."""

    def __init__(self, samples: list[Sample]) -> None:
        self._samples = samples

    def total(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        values = [s.value for s in self._samples if s.name == name and labels.items() <= s.labels.items()]
        assert values, f"no sample of {name} with {labels}"
        return sum(values)


class Server:
    """The process, its address, and what it printed."""

    def __init__(self, *flags: str, log: Path, open_files: int | None = None) -> None:
        """`open_files`: its limit of descriptors, soft and hard."""
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = log
        command = [
            sys.executable,
            "-m",
            "penstock",
            "serve",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            *flags,
        ]
        if open_files is not None:
            command = ["sh", "-c", f'ulimit -n {open_files} && exec "$@"', "sh", *command]
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=out, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )

    def wait(self) -> Server:
        """Until it serves; fails with its log if it ends instead."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended with {self.process.returncode}:\n{self.log}")
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return self
            time.sleep(0.05)
        raise AssertionError(f"the server did not start:\n{self.log}")

    @property
    def log(self) -> str:
        """Everything that was printed so far."""
        return self._log.read_text()

    def get(self, path: str) -> tuple[int, str]:
        """(status, body)"""
        try:
            with urllib.request.urlopen(self.url + path, timeout=30) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metrics(self) -> Page:
        """One look at /metrics."""
        families = text_string_to_metric_families(self.get("/metrics")[1])
        return Page([sample for family in families for sample in family.samples])

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels, now."""
        return self.metrics().total(name, **labels)

    def exit_status(self, seconds: float = 60.0) -> int:
        """Wait for the end."""
        return self.process.wait(seconds)

    def engine_pid(self) -> int:
        """The engine's process."""
        (pid,) = children(self.process.pid, "penstock.engine.process")
        return pid

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Its engine stands still: what runs goes on running, and no machine is too fast to look."""
        engine = self.engine_pid()
        os.kill(engine, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(engine, signal.SIGCONT)

    def close(self) -> None:
        """End it, gently first."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(10)


@contextlib.contextmanager
def serving(*flags: str, log: Path, open_files: int | None = None) -> Iterator[Server]:
    """A server for the length of a with block."""
    server = Server(*flags, log=log, open_files=open_files)
    try:
        yield server.wait()
    finally:
        server.close()


def children(pid: int, module: str = "") -> list[int]:
    """Processes that this one has started and that run; module: only those that run this module."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():  # a thread's children are not its process's list
        with contextlib.suppress(OSError):  # it has ended
            found += [int(child) for child in (task / "children").read_text().split()]
    return [child for child in found if module in _command(child)]


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def eventually(condition: object, seconds: float = 30.0) -> None:
    """Wait for something that another process brings about."""
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
