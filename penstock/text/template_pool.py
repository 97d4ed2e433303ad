"""The processes that run chat templates, from the side of who waits for them.

    pool().run(text, variables, limits) ──▶ a free worker ──▶ answer, or the worker is ended and replaced

Templates are other people's programs, fed with other people's data. In a process they can be stopped whatever
they do; in a thread they could not be. At most WORKERS run at a time; the first is started early, the second
when it is needed. It knows processes and their messages, and nothing of jinja2 or of chats.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import marshal
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from penstock.core.errors import PenstockError, Unavailable

from .template_worker import (
    ANSWER,
    FAILED,
    MEMORY,
    NO_MEMORY,
    REFUSED,
    REQUEST,
    SYNTAX,
    TEXT,
    TOO_LONG,
    receive,
)

WORKERS = 2
"""Templates that run at a time."""
_GRACE = 10.0
"""Seconds beyond its limit that an answer is waited for: a process may have to start, on a busy machine."""
_PATIENCE = 5
"""A request that has waited for so many time limits is sent away."""
_KEPT = ("PATH", "LANG", "TZ", "LD_LIBRARY_PATH", "VIRTUAL_ENV")
"""Of the environment, beside PYTHON… and LC_…: the rest may hold secrets."""

Kind = Literal["syntax", "refused", "failed", "time", "length", "memory"]
_KINDS: Mapping[bytes, Kind] = {
    SYNTAX: "syntax",
    REFUSED: "refused",
    FAILED: "failed",
    TOO_LONG: "length",
    NO_MEMORY: "memory",
}
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one run of a template."""

    seconds: float = 2.0
    characters: int = 1 << 24
    """Of its output."""
    memory: int = MEMORY
    """Bytes. Fixed when a worker starts."""

    @classmethod
    def for_context(cls, seconds: float, tokens: int) -> Limits:
        """Those of a server: no prompt of a context so long has more characters, by a wide margin."""
        return cls(seconds, max(1 << 20, 64 * tokens))


class TemplateError(Exception):
    """A template came to no good end.

    Attributes:
        kind: how.
        line: of a syntax error.
    """

    def __init__(self, kind: Kind, message: str = "", line: int = 0) -> None:
        super().__init__(message)
        self.kind = kind
        self.line = line


class Worker:
    """One process. Used by one thread at a time."""

    def __init__(self, module: str = f"{__package__}.template_worker") -> None:
        """Start it; it is ready some tenths of a second later. Raises OSError."""
        self._socket, theirs = socket.socketpair()
        environment = {
            key: value
            for key, value in os.environ.items()
            if key in _KEPT or key.startswith(("PYTHON", "LC_"))
        }
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env=environment,
            )

    def ask(self, request: bytes, limits: Limits) -> tuple[bytes, bytes, bool]:
        """(kind, text, whether it can be asked again). Raises TemplateError; then it has ended."""
        most = 4 * limits.characters + (1 << 16)
        self._socket.settimeout(limits.seconds + _GRACE)
        try:
            self._socket.sendall(REQUEST.pack(limits.seconds, len(request)))
            self._socket.sendall(request)
            kind, stays, length = ANSWER.unpack(receive(self._socket, ANSWER.size))
            if length > most:
                raise TemplateError("length")
            return kind, bytes(receive(self._socket, length)), stays == b"1"
        except TimeoutError:
            raise TemplateError("time") from None
        except (EOFError, ConnectionError):
            raise self._diagnosis() from None

    @property
    def alive(self) -> bool:
        """False if somebody has ended it while it was idle."""
        return self._process.poll() is None

    def close(self) -> None:
        """End it now."""
        self._socket.close()
        if self._process.poll() is None:
            self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)

    def _diagnosis(self) -> TemplateError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        status = self._process.poll()
        if status == -signal.SIGALRM:
            return TemplateError("time")
        if status in (-signal.SIGKILL, -signal.SIGABRT):  # not by us: the system, or it, was short of memory
            return TemplateError("memory")
        return TemplateError("failed", f"its process ended with status {status}")


class Shelf:
    """Workers that are free. Safe to use from any thread."""

    def __init__(self) -> None:
        self._free: list[Worker] = []
        self._lock = threading.Lock()

    def take(self) -> Worker | None:
        """One that lives; None if there is none."""
        with self._lock:
            while self._free:
                worker = self._free.pop()
                if worker.alive:
                    return worker
                worker.close()
        return None

    def put(self, worker: Worker) -> None:
        """It is free."""
        with self._lock:
            self._free.append(worker)

    def close(self) -> None:
        """End all of them."""
        with self._lock:
            workers, self._free = self._free, []
        for worker in workers:
            worker.close()


class TemplatePool(Shelf):
    """Workers, at most WORKERS, shared by all templates of this process. Safe to use from any thread."""

    def __init__(self) -> None:
        super().__init__()
        self._places = threading.Semaphore(WORKERS)
        self._threads = ThreadPoolExecutor(WORKERS, thread_name_prefix="template")

    def start(self) -> None:
        """Have a worker ready, so that the first template does not wait for it. Returns at once."""
        with self._lock, contextlib.suppress(OSError):  # who needs one hears of it
            if not self._free:
                self._free.append(Worker())

    def run(self, text: str, variables: Mapping[str, Any] | None, limits: Limits) -> str:
        """Render a template, or, without variables, its content format.

        Args:
            variables: of types that marshal writes.

        Raises:
            TemplateError: it has an error, refuses, or takes more than its limits.
            ValueError: a value of another type, or nested too deeply.
            Unavailable: no process can be started.
        """
        request = marshal.dumps((text, variables, limits.characters))  # type: ignore[arg-type]
        with self._places:
            worker = self._take()
            keep = False
            try:
                kind, answer, keep = worker.ask(request, limits)
            finally:
                if keep:
                    self.put(worker)
                else:
                    worker.close()
                    self.start()
        said = answer.decode("utf-8", "surrogatepass")
        if kind == TEXT:
            return said
        if kind == SYNTAX:
            line, _, said = said.partition(" ")
            raise TemplateError("syntax", said, int(line))
        raise TemplateError(_KINDS.get(kind, "failed"), said)

    async def in_thread(self, limits: Limits, function: Callable[[], T]) -> T:
        """function(), which runs a template, in one of the pool's own threads: others serve others.

        Raises Unavailable for one that has waited for too long.
        """
        asked = time.monotonic()

        def start() -> T:
            if time.monotonic() - asked > _PATIENCE * limits.seconds:
                raise Unavailable("chat templates of other requests take too long.", retry_after=1)
            return function()

        return await asyncio.get_running_loop().run_in_executor(self._threads, start)

    def _take(self) -> Worker:
        if (free := self.take()) is not None:
            return free
        try:
            return Worker()
        except OSError as error:
            failure: PenstockError = Unavailable(f"no process for chat templates can be started: {error}.")
            raise failure from error


@functools.cache
def pool() -> TemplatePool:
    """The one of this process."""
    made = TemplatePool()
    atexit.register(made.close)
    return made
