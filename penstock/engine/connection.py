"""The API process's end of its connection with the engine: requests out, events in, over ZeroMQ.

    async for events in connection.generate(spec): …       one queue for each call (engine.unread)

Its two sockets are bound in the engine's directory; the engine connects to them. It knows messages and
events; it does not know who has started the engine's process, nor how that ends (engine.remote,
engine.attached).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from pathlib import Path

import zmq
import zmq.asyncio

from penstock.core.errors import Draining, EngineDead, InvalidRequest, PenstockError, StartupError
from penstock.core.plan import Event, Failure
from penstock.core.request_spec import FinishReason, RequestSpec
from penstock.core.stats import EngineStats

from .client import Liveness
from .config import EngineConfig
from .heartbeat import Heartbeat
from .messages import Abort, Add, Failed, Lost, ModelInfo, Output, Ready, ToEngine, decode_from_engine, encode
from .unread import Call, Unread

logger = logging.getLogger("penstock.engine")

_SLACK = 10.0
"""A step may take this many times its prediction, plus the grace, before the engine counts as stuck."""


def addresses(directory: Path, client: int = 0) -> tuple[str, str]:
    """(where a client's requests go, where its events come); 0 is the process that has started the engine."""
    suffix = f"-{client}" if client else ""
    return f"ipc://{directory}/requests{suffix}", f"ipc://{directory}/events{suffix}"


class EngineConnection:
    """The part of an EngineClient that is messages. All methods run on one event loop.

    Args:
        directory: where the engine's sockets are.
        slot: which of the heartbeat's counts is this process's.
    """

    def __init__(self, directory: Path, config: EngineConfig, client: int = 0, slot: int = 0) -> None:
        self._directory = directory
        self._config = config
        self._addresses = addresses(directory, client)
        self._slot = slot
        self._heartbeat = Heartbeat(directory / "heartbeat")
        self._context = zmq.asyncio.Context()
        self._inbox: zmq.asyncio.Socket
        self._outbox: zmq.asyncio.Socket
        self._unread = Unread(config.max_unread_tokens, self._cut_off)
        self._calls: dict[str, Call] = {}
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
        self._last_words: Failed | None = None
        self._receiver: asyncio.Task[None] | None = None

    def _connect(self) -> None:
        """Bind the sockets, and listen to the engine from now on."""
        self._inbox = self._context.socket(zmq.PULL)
        self._outbox = self._context.socket(zmq.PUSH)
        for end in (self._inbox, self._outbox):
            end.set_hwm(0)  # messages are never dropped, and sending never blocks
        requests, events = self._addresses
        self._inbox.bind(events)
        self._outbox.bind(requests)
        self._receiver = asyncio.get_running_loop().create_task(self._receive())
        self._receiver.add_done_callback(self._on_receiver_end)

    # ------------------------------------------------------------------ EngineClient

    @property
    def info(self) -> ModelInfo:
        """Known once the engine is ready."""
        if self._info is None:
            raise StartupError("the engine is still loading.")
        return self._info

    async def generate(
        self, spec: RequestSpec, on_orphan: Callable[[Event], None] | None = None
    ) -> AsyncGenerator[list[Event], None]:
        """See EngineClient.generate."""
        if self._failure is not None:
            raise self._failure
        if self._draining:
            raise Draining("the server is shutting down.", advice="Send the request to another server.")
        message = encode(Add(spec))
        open_ids = set(spec.ids)
        if used := sorted(open_ids & self._owed):
            raise InvalidRequest(f"request id {used[0]!r} is already in use.", param="request_id")
        if not self._owed:
            self._waiting_since = time.monotonic()
        call = self._unread.open(open_ids)
        self._calls.update(dict.fromkeys(open_ids, call))
        self._owed |= open_ids
        self._count()
        try:
            self._outbox.send(message)  # not awaited: to an engine that has died it takes for ever
            while open_ids:
                events = await self._unread.get(call)
                if not events:  # the engine has died
                    raise self._failure or EngineDead("the engine has ended.")
                open_ids.difference_update(event.request for event in events if event.finish is not None)
                yield events
        finally:
            self._unread.close(call)
            if open_ids:
                self._orphan(open_ids, call, on_orphan or (lambda event: None))

    def abort(self, ids: Sequence[str]) -> None:
        """See EngineClient.abort."""
        if self._failure is None and not self._closed:
            # a ZeroMQ send to a connected peer does not block; the future needs no waiting for
            self._outbox.send(encode(Abort(tuple(ids))))

    def settled(self, id: str) -> None:
        """See EngineClient.settled."""

    def liveness(self) -> Liveness:
        """Stuck means: work waits, and neither a step's end nor its beginning is recent enough."""
        if self._failure is not None:
            return Liveness(False, str(self._failure))
        owed, waiting_since = (0, 0.0) if self._closed else self._heartbeat.owed()
        if self._info is None or not owed:
            return Liveness(True, "")
        progress, began, predicted, steps = self._heartbeat.read()
        now = time.monotonic()
        bound = self._config.liveness_grace + _SLACK * predicted
        since = max(progress, waiting_since)
        if now - since <= bound:
            return Liveness(True, "")
        doing = f"step {int(steps)} began {now - began:.1f} s ago" if began else "no step began"
        return Liveness(
            False,
            f"{owed} requests wait, but {doing} (predicted {predicted:.3f} s, bound {bound:.1f} s).",
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
        """Requests that the engine has taken and not finished, those of other API processes included."""
        return 0 if self._closed else self._heartbeat.owed()[0]

    @property
    def stats(self) -> EngineStats:
        """State after the last step."""
        return self._stats

    def on_stats(self, callback: Callable[[EngineStats], None]) -> None:
        """Call back with the statistics of every step."""
        self._callbacks.append(callback)

    # ------------------------------------------------------------------ inside

    def _cut_off(self, call: Call) -> None:
        logger.warning("a client does not read its stream, which is cut off (--max-unread-tokens)")
        self.abort(sorted(call.ids & self._owed))

    def _count(self) -> None:
        """Tell everybody how many we wait for."""
        if not self._closed:
            self._heartbeat.set_owed(self._slot, len(self._owed), self._waiting_since)

    def _orphan(self, ids: set[str], call: Call, on_orphan: Callable[[Event], None]) -> None:
        """The caller has gone: abort what runs, pass on the last events, also those that are here already."""
        for event in call.left():
            if event.finish is not None and event.request in ids:
                ids.discard(event.request)
                on_orphan(event)
        if self._failure is not None:
            self._bury(dict.fromkeys(sorted(ids), on_orphan), self._failure)
        left = sorted(ids & self._owed)
        for request in left:
            self._calls.pop(request, None)
            self._orphans[request] = on_orphan
        if left:
            self.abort(left)

    async def _send(self, message: ToEngine) -> None:
        await self._outbox.send(encode(message))

    async def _receive(self) -> None:
        while True:
            message = decode_from_engine(await self._inbox.recv())
            if isinstance(message, Output):
                self._deliver(message)
                if self._unread.much:  # what has come meanwhile is received without a pause
                    await asyncio.sleep(0)
            elif isinstance(message, Ready):
                self._info = message.info
                self._started.set()
            elif isinstance(message, Lost):
                self._on_lost(message)
            else:
                self._last_words = message

    def _on_lost(self, message: Lost) -> None:
        """Only who has started the engine hears of these."""

    def _deliver(self, output: Output) -> None:
        batches: dict[Call, list[Event]] = {}
        for event in output.events:
            call = self._calls.get(event.request)
            if call is not None:
                batches.setdefault(call, []).append(event)
            if event.finish is not None:
                self._owed.discard(event.request)
                self._calls.pop(event.request, None)
                if (orphaned := self._orphans.pop(event.request, None)) is not None:
                    orphaned(event)
        for call, events in batches.items():
            self._unread.put(call, events)
        self._count()
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
        for call in dict.fromkeys(self._calls.values()):
            call.end()
        self._owed.clear()
        self._count()
        orphans, self._orphans = self._orphans, {}
        self._bury(orphans, failure)
        self._started.set()

    @staticmethod
    def _bury(orphans: Mapping[str, Callable[[Event], None]], failure: PenstockError) -> None:
        """The engine has died before it sent their last events: these say so, and no figures."""
        cause = Failure(failure.message, type(failure).__name__)
        for request, on_orphan in orphans.items():
            on_orphan(Event(request, finish=FinishReason.ERROR, failure=cause))

    async def _quiet(self) -> None:
        """The engine has ended: wait for what is still on the way. Half a second after a message, that is
        nothing."""
        patience, last = 50, self._stats
        while patience and self._last_words is None and not (self._draining and not self._owed):
            await asyncio.sleep(0.01)
            patience, last = (patience - 1 if self._stats is last else 50), self._stats

    async def _stop_receiving(self) -> None:
        if self._receiver is not None:
            self._receiver.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):  # it was logged when it failed
                await self._receiver
            self._receiver = None

    def _disconnect(self, linger: int = 0) -> None:
        """Free the sockets and the page. May be called twice.

        linger: milliseconds for what has not been sent yet.
        """
        if not self._closed:
            self._owed.clear()
            self._count()
            self._closed = True
            self._context.destroy(linger=linger)
            self._heartbeat.close()
