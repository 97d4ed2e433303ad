"""An engine in a process of its own, as the process that starts it sees it: an EngineClient over ZeroMQ.

    engine = RemoteEngine.launch(config)     starts the process at once, so that it loads while we import
    await engine.start()                     waits until it is ready; raises the StartupError that stopped it
    async for events in engine.generate(spec): …
    await engine.drain(timeout)              lets running requests end, then the process

When the process dies, every caller gets EngineDead with the root cause: the engine's own last words if it had
any, else its exit status. Where several API processes share the engine (engine.attached), this is the process
that has started all of them: it tells the engine who comes and who is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec

from penstock.core.errors import BY_NAME, EngineDead, PenstockError, StartupError

from .config import EngineConfig
from .connection import EngineConnection, addresses
from .environment import prepare
from .heartbeat import Heartbeat
from .messages import Drain, Join, Leave, Lost, LostSequence, encode
from .process import Launch

logger = logging.getLogger("penstock.engine")

_LONGEST_PATH = 90
"""Characters; a Unix socket's address holds 107, the socket's own name included."""


class RemoteEngine(EngineConnection):
    """Implements EngineClient. Made by `launch`; all other methods run on one event loop."""

    def __init__(
        self, process: subprocess.Popen[bytes], directory: Path, config: EngineConfig, parent_pipe: int
    ) -> None:
        super().__init__(directory, config)
        self._process = process
        self._parent_pipe: int | None = parent_pipe
        """Our end of the pipe that tells the engine that we are gone."""
        self._ended = asyncio.Event()
        self._count_lost: Callable[[LostSequence], None] | None = None

    @classmethod
    def launch(
        cls, config: EngineConfig, *, log_level: str = "info", log_format: str = "text"
    ) -> RemoteEngine:
        """Start the engine's process. Needs no running event loop, and returns before anything is loaded."""
        directory = Path(tempfile.mkdtemp(prefix="penstock-"))
        if len(str(directory)) > _LONGEST_PATH:
            directory.rmdir()
            directory = Path(tempfile.mkdtemp(prefix="penstock-", dir="/tmp"))
        Heartbeat(directory / "heartbeat", create=True).close()
        reader, writer = os.pipe()
        inbox, outbox = addresses(directory)
        launch = Launch(
            config=config,
            inbox=inbox,
            outbox=outbox,
            heartbeat=str(directory / "heartbeat"),
            parent=reader,
            log_level=log_level,
            log_format=log_format,
        )
        environment = dict(os.environ)
        prepare(environment, config.threads)
        process = subprocess.Popen(
            [sys.executable, "-m", "penstock.engine.process", msgspec.json.encode(launch).decode()],
            stdin=subprocess.DEVNULL,
            pass_fds=(reader,),
            env=environment,
        )
        os.close(reader)
        return cls(process, directory, config, writer)

    async def start(self) -> None:
        """Wait until the engine is ready. Raises what stopped it."""
        loop = asyncio.get_running_loop()
        self._connect()
        threading.Thread(target=self._watch, args=(loop,), name="engine-watch", daemon=True).start()
        await self._started.wait()
        if self._failure is not None:
            raise self._failure

    @property
    def pid(self) -> int:
        """Process id of the engine."""
        return self._process.pid

    @property
    def directory(self) -> Path:
        """Where the engine's sockets are; only this user may look into it, and it ends with the engine."""
        return self._directory

    # ------------------------------------------------------------------ other API processes

    def join(self, client: int) -> None:
        """Another process has its requests computed, as `client`: a number that none has had. To be called
        after `start` has begun."""
        inbox, outbox = addresses(self._directory, client)
        self._outbox.send(encode(Join(client, inbox, outbox)))

    def leave(self, client: int, slot: int) -> None:
        """That process is gone. What it had is aborted; `on_lost` hears of each sequence that it has not
        counted."""
        if self._failure is None and not self._closed:
            self._heartbeat.set_owed(slot, 0, 0.0)
            self._outbox.send(encode(Leave(client)))
        for address in addresses(self._directory, client):
            Path(address.removeprefix("ipc://")).unlink(missing_ok=True)

    def on_lost(self, callback: Callable[[LostSequence], None]) -> None:
        """Call back with sequences whose process is gone: their bills have to be counted, too."""
        self._count_lost = callback

    def _on_lost(self, message: Lost) -> None:
        if self._count_lost is not None:
            for sequence in message.sequences:
                self._count_lost(sequence)

    async def ended(self) -> None:
        """Wait for the end of the engine's process, whatever it is."""
        await self._ended.wait()

    # ------------------------------------------------------------------ the end

    async def drain(self, timeout: float) -> None:
        """Refuse new requests; let running ones end within `timeout` seconds, abort the rest; then end."""
        self._draining = True
        if self._failure is None and self._process.poll() is None:
            await self._send(Drain(timeout))
            # a step under way at the deadline may end late; beyond that the process is stuck
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), timeout + self._config.liveness_grace)
        await self.close()

    async def close(self) -> None:
        """End the process now, if it still runs, and free what belongs to it. May be called twice."""
        self._draining = True
        if self._process.poll() is None:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(self._process.wait, 10)
        await self._stop_receiving()
        self._free()

    def kill(self) -> None:
        """The same, without an event loop."""
        self._draining = True
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait(10)
        self._free()

    def _free(self) -> None:
        self._disconnect()
        if self._parent_pipe is not None:
            os.close(self._parent_pipe)
            self._parent_pipe = None
        shutil.rmtree(self._directory, ignore_errors=True)

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        status = self._process.wait()
        with contextlib.suppress(RuntimeError):  # the event loop may be closed already
            loop.call_soon_threadsafe(lambda: loop.create_task(self._on_exit(status)))

    async def _on_exit(self, status: int) -> None:
        await self._quiet()
        if not self._draining or self._owed or self._info is None:
            failure = self._diagnose(status)
            trace = self._last_words.trace if self._last_words is not None else ""
            if self._info is not None or trace:
                # before it was ready, `start` raises the failure, which is told there
                why = f": {failure}" if self._info is not None else ""
                logger.error("engine process %d ended%s", self._process.pid, why, extra={"trace": trace})
            self._fail(failure)
        self._started.set()
        self._ended.set()

    def _diagnose(self, status: int) -> PenstockError:
        words = self._last_words
        if words is not None:
            kind = BY_NAME.get(words.error_type, EngineDead)
            if issubclass(kind, StartupError):
                return kind(words.message, param=words.param, advice=words.advice)
            return EngineDead(f"the engine died: {words.message}")
        if status < 0:
            name = signal.Signals(-status).name
            hint = "Often this means that the machine ran out of memory." if name == "SIGKILL" else ""
            return EngineDead(f"the engine process was ended by {name}.", advice=hint)
        return EngineDead(f"the engine process ended with status {status}.")
