"""One replica: its process, from the first start to the last, and what it is doing.

    asleep ─wake─▶ starting ─probe answers─▶ ready ─sleep─▶ stopping ─▶ asleep
                      ▲          └────── ends, or hangs ──────┐
                      └── after a while (restart.Backoff) ── waiting

It knows processes, one port and two paths. All methods run on one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from penstock.core.errors import brief, cause
from penstock.gateway.fleet import Replica, State

from . import keeper
from .command import Command
from .restart import Backoff

logger = logging.getLogger("penstock.up")

_LONGEST_LINE = 4096
"""Characters of a line of an engine's log."""
_TAIL = 12
"""Lines that an engine said last, for the reason of its end."""
_CONFIGURATION = frozenset({2, 126, 127})
"""Exit statuses of a command that cannot work: starting it again changes nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How patient a supervisor is; seconds."""

    start: float = 1800.0
    """Until the first answer of its probe; a hub's download counts."""
    grace: float = 40.0
    """Until a process that shall end is killed: an engine drains within its --shutdown-timeout."""
    poll: float = 0.2
    """Between two probes of an engine that starts."""
    watch: float = 2.0
    """Between two looks at one that runs."""
    answer: float = 5.0
    """For the answer of a probe."""
    misses: int = 3
    """Looks in a row without a good answer, after which it counts as stuck."""


class Port:
    """A port of the loopback device, kept for an engine: bound here and never listened on, so that nobody
    else gets it, and the engine, which also sets SO_REUSEADDR, does, again and again."""

    def __init__(self) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", 0))
        self.number: int = self._socket.getsockname()[1]

    def close(self) -> None:
        """Give it back."""
        self._socket.close()


class Supervisor:
    """Keeps one replica as it is wanted: awake or asleep."""

    def __init__(
        self,
        replica: Replica,
        command: Command,
        *,
        session: Callable[[], aiohttp.ClientSession],
        on_change: Callable[[Replica], None],
        show: Callable[[str], None],
        wanted: Callable[[], bool] = lambda: True,
        backoff: Backoff | None = None,
        timing: Timing | None = None,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        """
        Args:
            replica: its name and its URL; it sleeps.
            show: prints a line of its log.
            wanted: whether one that has died is to be started again.
            environment: what its process gets beside the command's own.
        """
        self.replica = replica
        self.refused = False
        """Whether it ended because of its configuration: then nobody need wait for it."""
        self.start_seconds: float | None = None
        """How long its last start took."""
        self._command = command
        self._session = session
        self._on_change = on_change
        self._show = show
        self._wanted = wanted
        self._backoff = backoff or Backoff()
        self._timing = timing or Timing()
        self._given = environment
        self._environment = {**environment, **command.environment}
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._tail: deque[str] = deque(maxlen=_TAIL)
        self.pid: int | None = None
        """The keeper's process id, while there is one."""

    def wake(self) -> None:
        """Start it, if it sleeps or is going to."""
        if self._task is not None and not self._stop.is_set():
            return
        before, self._task = self._task, None
        self._stop = asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._run(before, self._stop))

    def sleep(self) -> None:
        """Have it end; it stops counting as ready at once."""
        if self._task is not None and not self._stop.is_set():
            self._stop.set()
            self._become("stopping")

    def restart(self, command: Command) -> None:
        """Have it end, as `sleep` does, and start again with another command."""
        self._command, self._environment = command, {**self._given, **command.environment}
        self.refused = False
        self.sleep()
        self.wake()

    async def close(self, *, patient: bool = True) -> None:
        """End it for good, and wait until its process is gone. Without patience, it is killed, also where it
        was told to end before."""
        if not patient:
            self._hurry.set()
        self.sleep()
        if self._task is not None:
            await asyncio.wait({self._task})

    # ------------------------------------------------------------------ inside

    async def _run(self, before: asyncio.Task[None] | None, stop: asyncio.Event) -> None:
        """From waking up to falling asleep. `before`: the last such time, which may not be over."""
        if before is not None:
            await asyncio.wait({before})
        try:
            while not stop.is_set():
                self._become("starting")
                try:
                    ready_since, why = await self._live(stop)
                except Exception as error:
                    logger.exception("%s: its supervision failed", self.replica.name)
                    ready_since, why = None, cause(error)
                if stop.is_set():
                    break
                delay = self._backoff.died(_now(), ready_since)
                logger.error(
                    "%s has ended: %s. Starting it again in %g s (%d in a row).",
                    self.replica.name, why, delay, self._backoff.failures,
                )  # fmt: skip
                self._become("waiting", why)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), delay)
                if stop.is_set() or not self._wanted():
                    break
                self.replica = msgspec.structs.replace(self.replica, restarts=self.replica.restarts + 1)
        finally:
            if self._stop is stop:  # nobody has woken it meanwhile
                self._task = None
                self._become("asleep", self.replica.why)

    async def _live(self, stop: asyncio.Event) -> tuple[float | None, str]:
        """One process, from start to end: (monotonic time since when it was ready, why it ended)."""
        began = _now()
        self._tail.clear()
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-I", "-S", str(Path(keeper.__file__)), str(self._timing.grace),
                *self._command.arguments,
                stdin=theirs.fileno(),
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,  # the terminal's Ctrl-C is for us
            )  # fmt: skip
        except (OSError, ValueError) as error:
            ours.close()
            return None, f"its process cannot be started: {cause(error)}"
        finally:
            theirs.close()
        self.pid = process.pid
        pump = asyncio.ensure_future(self._pump(process))
        ended = asyncio.ensure_future(process.wait())
        told = asyncio.ensure_future(asyncio.get_running_loop().sock_recv(ours, 1))
        watching = asyncio.ensure_future(self._watch(began))
        stopping = asyncio.ensure_future(stop.wait())
        try:
            await asyncio.wait({ended, told, watching, stopping}, return_when=asyncio.FIRST_COMPLETED)
            ready_since = self.replica.since if self.replica.state == "ready" else None
            over = ended.done() or told.done()
            stuck = "" if over or not watching.done() else watching.result()
            if not stop.is_set():
                self._become("stopping", stuck)
            if over:  # its leftovers are the keeper's matter, and that is a matter of seconds
                await asyncio.wait({ended}, timeout=self._timing.grace)
            if not ended.done():
                await self._end(process, ended, patient=not stuck)
            await asyncio.wait({pump}, timeout=1.0)
            return ready_since, stuck or self._reason(ended.result(), ready_since)
        finally:
            self.pid = None
            if process.returncode is None:
                process.kill()  # then the kernel kills what it keeps
            for task in (pump, ended, told, watching, stopping):
                task.cancel()
            await asyncio.wait({told})  # the loop lets go of the socket
            ours.close()

    async def _end(
        self, process: asyncio.subprocess.Process, ended: asyncio.Future[int], *, patient: bool
    ) -> None:
        """Have it end: gently, unless it is stuck or there is no time; the keeper sees to the rest."""
        hurry = asyncio.ensure_future(self._hurry.wait())
        try:
            if patient:
                _send(process, signal.SIGTERM)
                waiting: set[asyncio.Future[Any]] = {ended, hurry}
                await asyncio.wait(waiting, timeout=self._timing.grace, return_when=asyncio.FIRST_COMPLETED)
            for number in (signal.SIGQUIT, signal.SIGKILL):
                if ended.done():
                    return
                _send(process, number)
                await asyncio.wait({ended}, timeout=5.0)
        finally:
            hurry.cancel()
        if ended.done():
            return
        logger.error("%s: process %d does not end.", self.replica.name, process.pid)

    async def _watch(self, began: float) -> str:
        """Announce that it is ready; then return why it must be ended, once it must be."""
        timing = self._timing
        while await self._ask(self._command.probe) is not None:
            if _now() - began > timing.start:
                return f"it has not answered {self._command.probe} within {timing.start:g} s"
            await asyncio.sleep(timing.poll)
        self.start_seconds = _now() - began
        self.refused = False
        self._become("ready")
        logger.info(
            "%s is ready after %.1f s, at %s", self.replica.name, self.start_seconds, self.replica.url
        )
        misses = 0
        while misses < timing.misses:
            await asyncio.sleep(timing.watch)
            problem = await self._ask(self._command.alive)
            misses = 0 if problem is None else misses + 1
        return f"{self._command.alive}: {problem}, {misses} times in a row"

    async def _ask(self, path: str) -> str | None:
        """None if the answer is 200, else what is wrong."""
        timeout = aiohttp.ClientTimeout(total=self._timing.answer)
        try:
            async with self._session().get(self.replica.url + path, timeout=timeout) as answer:
                return None if answer.status == 200 else f"status {answer.status}"
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return type(error).__name__

    async def _pump(self, process: asyncio.subprocess.Process) -> None:
        """Its log, line by line, under its name."""
        assert process.stdout is not None
        rest = b""
        while chunk := await process.stdout.read(1 << 16):
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) > 4 * _LONGEST_LINE:
                lines, rest = [*lines, rest], b""
            for line in lines:
                self._say(line)
        if rest:
            self._say(rest)

    def _say(self, line: bytes) -> None:
        # a progress bar writes over itself: its last state is the line
        text = line.decode("utf-8", "replace").rstrip("\r").rpartition("\r")[2]
        text = "".join(letter if letter.isprintable() or letter == "\t" else "�" for letter in text).rstrip()
        if text:
            text = brief(text, _LONGEST_LINE)
            self._tail.append(text)
            self._show(f"[{self.replica.name}] {text}")

    def _reason(self, status: int, ready_since: float | None) -> str:
        self.refused = status in _CONFIGURATION and ready_since is None
        how = f"signal {status - 128}" if status > 128 else f"status {status}"
        said = brief(self._tail[-1].strip(), 500) if self._tail else ""
        return f"{how}, after saying: {said}" if said else how

    def _become(self, state: State, why: str = "") -> None:
        if state == self.replica.state and why == self.replica.why:
            return
        self.replica = msgspec.structs.replace(self.replica, state=state, since=_now(), why=why)
        self._on_change(self.replica)


def _send(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(number)


def _now() -> float:
    return asyncio.get_running_loop().time()
