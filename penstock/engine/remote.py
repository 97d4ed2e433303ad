"""An engine in a process of its own, as the API process sees it: an EngineClient over ZeroMQ.

    engine = RemoteEngine.launch(config)     starts the process at once, so that it loads while we import
    await engine.start()                     waits until it is ready; raises the StartupError that stopped it
    async for events in engine.generate(spec): …
    await engine.drain(timeout)              lets running requests end, then the process

Events of a request go to one asyncio queue per call of generate. When the process dies, every caller gets
EngineDead with the root cause: the engine's own last words if it had any, else its exit status.
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
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from penstock.core.errors import BY_NAME, Draining, EngineDead, InvalidRequest, PenstockError, StartupError
from penstock.core.plan import Event, Failure
from penstock.core.request_spec import FinishReason, RequestSpec
from penstock.core.stats import EngineStats

from .client import Liveness
from .config import EngineConfig
from .environment import prepare
from .heartbeat import Heartbeat
from .messages import (
    Abort,
    Add,
    Drain,
    Failed,
    ModelInfo,
    Output,
    Ready,
    ToEngine,
    decode_from_engine,
    encode,
)
from .process import Launch

logger = logging.getLogger("penstock.engine")

_SLACK = 10.0
"""A step may take this many times its prediction, plus the grace, before the engine counts as stuck."""

_LONGEST_PATH = 90
"""Characters; a Unix socket's address holds 107, the socket's own name included."""


class RemoteEngine:
    """Implements EngineClient. Made by `launch`; all other methods run on one event loop."""

    def __init__(
        self, process: subprocess.Popen[bytes], directory: Path, config: EngineConfig, parent_pipe: int
    ) -> None:
        self._process = process
        self._parent_pipe: int | None = parent_pipe
        """Our end of the pipe that tells the engine that we are gone."""
        self._directory = directory
        self._config = config
        self._heartbeat = Heartbeat(directory / "heartbeat")
        self._context = zmq.asyncio.Context()
        self._inbox: zmq.asyncio.Socket
        self._outbox: zmq.asyncio.Socket
        self._queues: dict[str, asyncio.Queue[list[Event]]] = {}
        self._orphans: dict[str, Callable[[Event], None]] = {}
        """Requests whose caller has gone, until their last event."""
        self._owed: set[str] = set()
        """Requests whose last event the engine still owes us."""
        self._closed = False
        self._callbacks: list[Callable[[EngineStats], None]] = []
        self._info: ModelInfo | None = None
        self._stats = EngineStats()
        self._failure: PenstockError | None = None
        self._draining = False
        self._waiting_since = 0.0
        self._started = asyncio.Event()
        self._ended = asyncio.Event()
        self._last_words: Failed | None = None
        self._receiver: asyncio.Task[None] | None = None

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
        launch = Launch(
            config=config,
            inbox=f"ipc://{directory}/requests",
            outbox=f"ipc://{directory}/events",
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
        self._inbox = self._context.socket(zmq.PULL)
        self._outbox = self._context.socket(zmq.PUSH)
        for end in (self._inbox, self._outbox):
            end.set_hwm(0)  # messages are never dropped, and sending never blocks
        self._inbox.bind(f"ipc://{self._directory}/events")
        self._outbox.bind(f"ipc://{self._directory}/requests")
        threading.Thread(target=self._watch, args=(loop,), name="engine-watch", daemon=True).start()
        self._receiver = loop.create_task(self._receive())
        self._receiver.add_done_callback(self._on_receiver_end)
        await self._started.wait()
        if self._failure is not None:
            raise self._failure

    # ------------------------------------------------------------------ EngineClient

    @property
    def info(self) -> ModelInfo:
        """Known once the engine is ready."""
        if self._info is None:
            raise StartupError("the engine is still loading.")
        return self._info

    @property
    def pid(self) -> int:
        """Process id of the engine."""
        return self._process.pid

    async def generate(
        self, spec: RequestSpec, on_orphan: Callable[[Event], None] | None = None
    ) -> AsyncGenerator[list[Event], None]:
        """See EngineClient.generate."""
        if self._failure is not None:
            raise self._failure
        if self._draining:
            raise Draining("the server is shutting down.", advice="Send the request to another server.")
        message = encode(Add(spec))
        queue: asyncio.Queue[list[Event]] = asyncio.Queue()
        open_ids = set(spec.ids)
        if used := sorted(open_ids & self._owed):
            raise InvalidRequest(f"request id {used[0]!r} is already in use.", param="request_id")
        if not self._owed:
            self._waiting_since = time.monotonic()
        self._queues.update(dict.fromkeys(open_ids, queue))
        self._owed |= open_ids
        try:
            self._outbox.send(message)  # not awaited: to an engine that has died it takes for ever
            while open_ids:
                events = await queue.get()
                if not events:  # the engine has died
                    raise self._failure or EngineDead("the engine has ended.")
                open_ids.difference_update(event.request for event in events if event.finish is not None)
                yield events
        finally:
            if open_ids:
                self._orphan(open_ids, queue, on_orphan or (lambda event: None))

    def abort(self, ids: Sequence[str]) -> None:
        """See EngineClient.abort."""
        if self._failure is None and not self._closed:
            # a ZeroMQ send to a connected peer does not block; the future needs no waiting for
            self._outbox.send(encode(Abort(tuple(ids))))

    def liveness(self) -> Liveness:
        """Stuck means: work waits, and neither a step's end nor its beginning is recent enough."""
        if self._failure is not None:
            return Liveness(False, str(self._failure))
        if self._info is None or not self._owed:
            return Liveness(True, "")
        progress, began, predicted, steps = self._heartbeat.read()
        now = time.monotonic()
        bound = self._config.liveness_grace + _SLACK * predicted
        since = max(progress, self._waiting_since)
        if now - since <= bound:
            return Liveness(True, "")
        doing = f"step {int(steps)} began {now - began:.1f} s ago" if began else "no step began"
        return Liveness(
            False,
            f"{len(self._owed)} requests wait, but {doing} "
            f"(predicted {predicted:.3f} s, bound {bound:.1f} s).",
        )

    @property
    def ready(self) -> bool:
        """Loaded, alive and not draining."""
        return self._info is not None and self._failure is None and not self._draining

    @property
    def draining(self) -> bool:
        """Shutting down."""
        return self._draining

    @property
    def failure(self) -> PenstockError | None:
        """Why the engine died, if it did."""
        return self._failure

    @property
    def load(self) -> int:
        """Requests that the engine has taken and not finished."""
        return len(self._owed)

    @property
    def stats(self) -> EngineStats:
        """State after the last step."""
        return self._stats

    def on_stats(self, callback: Callable[[EngineStats], None]) -> None:
        """Call back with the statistics of every step."""
        self._callbacks.append(callback)

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
        if self._receiver is not None:
            self._receiver.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):  # it was logged when it failed
                await self._receiver
            self._receiver = None
        self._free()

    def kill(self) -> None:
        """The same, without an event loop."""
        self._draining = True
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait(10)
        self._free()

    # ------------------------------------------------------------------ inside

    def _orphan(
        self, ids: set[str], queue: asyncio.Queue[list[Event]], on_orphan: Callable[[Event], None]
    ) -> None:
        """The caller has gone: abort what runs, pass on the last events, also those that are here already."""
        while not queue.empty():
            for event in queue.get_nowait():
                if event.finish is not None and event.request in ids:
                    ids.discard(event.request)
                    on_orphan(event)
        if self._failure is not None:
            self._bury(dict.fromkeys(sorted(ids), on_orphan), self._failure)
        left = sorted(ids & self._owed)
        for request in left:
            self._queues.pop(request, None)
            self._orphans[request] = on_orphan
        if left:
            self.abort(left)

    def _free(self) -> None:
        self._closed = True
        self._context.destroy(linger=0)
        if self._parent_pipe is not None:
            os.close(self._parent_pipe)
            self._parent_pipe = None
            self._heartbeat.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    async def _send(self, message: ToEngine) -> None:
        await self._outbox.send(encode(message))

    async def _receive(self) -> None:
        while True:
            message = decode_from_engine(await self._inbox.recv())
            if isinstance(message, Output):
                self._deliver(message)
            elif isinstance(message, Ready):
                self._info = message.info
                self._started.set()
            else:
                self._last_words = message

    def _deliver(self, output: Output) -> None:
        by_queue: dict[int, tuple[asyncio.Queue[list[Event]], list[Event]]] = {}
        for event in output.events:
            queue = self._queues.get(event.request)
            if queue is not None:
                by_queue.setdefault(id(queue), (queue, []))[1].append(event)
            if event.finish is not None:
                self._owed.discard(event.request)
                self._queues.pop(event.request, None)
                if (orphaned := self._orphans.pop(event.request, None)) is not None:
                    orphaned(event)
        for queue, events in by_queue.values():
            queue.put_nowait(events)
        if output.stats is not None:
            self._stats = output.stats
            for callback in self._callbacks:
                callback(output.stats)

    def _on_receiver_end(self, task: asyncio.Task[None]) -> None:
        """It ends by being cancelled; anything else is a bug that must not leave callers waiting for ever."""
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("the engine's messages cannot be read any more", exc_info=error)
            self._fail(EngineDead(f"the engine's messages cannot be read: {type(error).__name__}: {error}"))

    def _fail(self, failure: PenstockError) -> None:
        self._failure = failure
        for queue in {id(queue): queue for queue in self._queues.values()}.values():
            queue.put_nowait([])
        self._owed.clear()
        orphans, self._orphans = self._orphans, {}
        self._bury(orphans, failure)
        self._started.set()

    @staticmethod
    def _bury(orphans: Mapping[str, Callable[[Event], None]], failure: PenstockError) -> None:
        """The engine has died before it sent their last events: these say so, and no figures."""
        cause = Failure(failure.message, type(failure).__name__)
        for request, on_orphan in orphans.items():
            on_orphan(Event(request, finish=FinishReason.ERROR, failure=cause))

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        status = self._process.wait()
        with contextlib.suppress(RuntimeError):  # the event loop may be closed already
            loop.call_soon_threadsafe(lambda: loop.create_task(self._on_exit(status)))

    async def _on_exit(self, status: int) -> None:
        # its last words may still be on the way; half a second after a message, none is
        patience, last = 50, self._stats
        while patience and self._last_words is None and not (self._draining and not self._owed):
            await asyncio.sleep(0.01)
            patience, last = (patience - 1 if self._stats is last else 50), self._stats
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
