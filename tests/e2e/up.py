"""A real `penstock up` in a process of its own, and the engines that it starts: real ones, or a script."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tests.gateway.local.processes import alive, eventually

SCRIPT = Path(__file__).parents[1] / "gateway/local/engine.py"


class Up:
    """The process, what it printed, and everybody below it."""

    def __init__(self, folder: Path, spec: str | None, environment: dict[str, str]) -> None:
        self.folder = folder
        if spec is not None:
            (folder / "penstock.yaml").write_text(spec)
        self._out, self._err = folder / "up.out", folder / "up.err"
        with self._out.open("ab") as out, self._err.open("ab") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "penstock", "up"],
                cwd=folder,
                stdout=out,
                stderr=err,
                env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            )

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    @property
    def url(self) -> str:
        """Once it listens."""
        eventually(lambda: "/v1\n" in self.out or self.process.poll() is not None, 90)
        found = re.search(r"The gateway is at (http://\S+)/v1\n", self.out)
        assert found is not None, f"it ended with {self.process.poll()}:\n{self.err}"
        return found[1]

    @property
    def key(self) -> str:
        """The first one."""
        assert self.url
        (key,) = re.findall(r"sk-ps-\S+", self.out)
        return str(key)

    def post(self, path: str, body: object, key: str | None = None) -> tuple[int, dict[str, object]]:
        """(status, body)"""
        request = urllib.request.Request(
            self.url + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json", "Authorization": f"Bearer {key or self.key}"},
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def descendants(self) -> list[int]:
        """Everybody below it."""
        found: list[int] = []
        todo = [self.process.pid]
        while todo:
            parent = todo.pop()
            for task in Path(f"/proc/{parent}/task").glob("*"):
                with contextlib.suppress(OSError):
                    children = [int(pid) for pid in (task / "children").read_text().split()]
                    found += children
                    todo += children
        return found

    def stop(self) -> int:
        """SIGTERM, and its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextlib.contextmanager
def running(folder: Path, spec: str | None = None, **environment: str) -> Iterator[Up]:
    """`penstock up` in a folder, for the length of a with block; nobody of it is left afterwards."""
    up = Up(folder, spec, environment)
    everybody: set[int] = set()
    try:
        yield up
    finally:
        everybody.update(up.descendants())
        if up.process.poll() is None:
            up.stop()
        eventually(lambda: not any(map(alive, everybody)))


def scripted_vllm(folder: Path, **files: str) -> str:
    """A PATH whose `vllm` is tests/gateway/local/engine.py, with these files in its folder."""
    place = folder / "engine"
    place.mkdir(exist_ok=True)
    for name, text in files.items():
        (place / name).write_text(text)
    tool = folder / "vllm"
    tool.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S {SCRIPT} {place} "$@"\n')
    tool.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"
