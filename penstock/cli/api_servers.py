"""Several API processes before one engine (--api-server-count), seen by the process that starts them all.

    starter ─┬─ engine                    one
             ├─ api 1 ─┐
             └─ api 2 ─┴─ one listening socket, which all of them accept on

The socket is bound here and inherited, as in vLLM. SO_REUSEPORT would give each process a queue of its own:
the kernel deals connections out by a hash, also to a process that is busy, and those that wait in the queue
of one that dies are lost; and nobody could tell a second server on the port from a further process of this
one.

Nobody listens before all have loaded. One that dies takes its connections with it; the engine aborts its
requests, their bills are counted here, and another takes its place. This process also counts the engine's
steps. It knows processes and signals; requests pass it by.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import time
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from penstock.core.errors import EngineDead, PenstockError, StartupError
from penstock.core.request_spec import FinishReason
from penstock.engine.config import EngineConfig
from penstock.engine.messages import LostSequence
from penstock.engine.remote import RemoteEngine
from penstock.server.config import ServerConfig

from .api import announce
from .api_process import label
from .control import Channel, Died, Error, Listen, Loaded, Refused, Serving, Setup, Signal

if TYPE_CHECKING:
    from penstock.http.peers import Peers
    from penstock.observe.metrics import Metrics

logger = logging.getLogger("penstock.server")

_MOST_DEATHS = 5
"""API processes that may die within `_WINDOW` before the server gives up."""
_WINDOW = 60.0
"""Seconds."""
_GOODBYE = 20.0
"""Seconds that processes get to end beyond the time that requests have."""
_TICK = 1.0
"""Seconds between two looks at the clock of an idle engine."""


class _Api:
    """One API process. The futures are set by what it says, or by its end."""

    def __init__(
        self, index: int, client: int, process: asyncio.subprocess.Process, channel: Channel
    ) -> None:
        loop = asyncio.get_running_loop()
        self.index = index
        self.client = client
        self.process = process
        self.channel = channel
        self.loaded: asyncio.Future[Loaded] = loop.create_future()
        self.serving: asyncio.Future[None] = loop.create_future()
        for future in (self.loaded, self.serving):
            future.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may ask
        self.watching: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        """As in the log."""
        return f"{label(self.index)} (process {self.process.pid})"

    def fail(self, error: PenstockError) -> None:
        """It will say no more."""
        for future in (self.loaded, self.serving):
            if not future.done():
                future.set_exception(error)


class ApiServers:
    """All of them, and the engine.

    Args:
        engine: launched, not started.
        sock: bound, not listening; closed when the server drains.
    """

    def __init__(
        self, engine: RemoteEngine, engine_config: EngineConfig, config: ServerConfig, sock: socket.socket
    ) -> None:
        self._engine = engine
        self._engine_config = engine_config
        self._count = config.api_server_count
        self._config = config
        self._sock = sock
        self._apis: dict[int, _Api] = {}
        """By index, those that live."""
        self._clients = 0
        self._deaths: deque[float] = deque()
        self._status = 0
        self._stopping = False
        self._changed = asyncio.Event()
        self._metrics: Metrics | None = None

    async def run(self) -> int:
        """Serve until a signal. Returns the exit status: 0 after a complete drain, else 1."""
        try:
            await self._start()
            return await self._serve()
        finally:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                asyncio.get_running_loop().remove_signal_handler(number)
            await self._kill()

    # ------------------------------------------------------------------ the start

    async def _start(self) -> None:
        """Until all of them serve. Raises what stopped one of them, or the engine."""
        from penstock.http.peers import Peers
        from penstock.server.stats_log import StatsLog

        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        loop.add_signal_handler(signal.SIGTERM, task.cancel)
        try:
            Peers.create(self._engine.directory / "connections", self._count)
            starting = asyncio.ensure_future(self._engine.start())
            await asyncio.sleep(0)  # it has its sockets now
            try:
                apis = [await self._launch(index) for index in range(1, self._count + 1)]
                await _all([starting, *(api.loaded for api in apis)])
            finally:
                starting.cancel()
            self._measure()
            if not self._engine_config.disable_log_stats:
                self._engine.on_stats(StatsLog(time.monotonic))
            serving = announce(self._config, self._sock, template=apis[0].loaded.result().template)
        finally:
            loop.remove_signal_handler(signal.SIGTERM)
        # from the first answer on, a signal is for a server that serves
        loop.add_signal_handler(signal.SIGTERM, self._stop, signal.SIGTERM)
        loop.add_signal_handler(signal.SIGINT, self._stop, signal.SIGINT)
        loop.add_signal_handler(signal.SIGHUP, self._pass_on, signal.SIGHUP)
        for api in apis:
            api.channel.tell(Listen())
        await _all([api.serving for api in apis])
        if not self._stopping:
            serving()
            logger.info("%d API processes accept on this port", self._count)

    async def _launch(self, index: int, *, first: bool = True) -> _Api:
        """Start a process at a place. first: at all, so that it tells of the model's files."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", f"{__package__}.api_process", str(theirs.fileno())),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), self._sock.fileno()),
            )
        ours.setblocking(False)
        self._clients += 1
        channel = Channel(*await asyncio.open_connection(sock=ours))
        api = self._apis[index] = _Api(index, self._clients, process, channel)
        self._engine.join(api.client)
        channel.tell(
            Setup(
                engine=self._engine_config,
                server=replace(
                    self._config, max_connections=max(1, -(-self._config.max_connections // self._count))
                ),
                directory=str(self._engine.directory),
                index=index,
                count=self._count,
                client=api.client,
                listener=self._sock.fileno(),
                log_level=self._config.uvicorn_log_level.replace("trace", "debug"),
                first=first and index == 1,
            )
        )
        api.watching = asyncio.create_task(self._watch(api))
        return api

    async def _watch(self, api: _Api) -> None:
        """Hear what a process says, until its end."""
        while (message := await api.channel.hear()) is not None:
            if isinstance(message, Loaded) and not api.loaded.done():
                api.loaded.set_result(message)
            elif isinstance(message, Serving) and not api.serving.done():
                api.serving.set_result(None)
            elif isinstance(message, Refused):
                error = message.error.exception()
                if self._metrics is not None:
                    logger.error("%s cannot serve: %s", api.name, error)
                api.fail(error)
        status = await api.process.wait()
        api.channel.close()
        if self._stopping and not api.serving.done():
            api.serving.set_result(None)
        api.fail(StartupError(f"{api.name} ended {_how(status)} before it served."))
        if self._apis.get(api.index) is api:
            del self._apis[api.index]
        if self._stopping or self._engine.failure is not None:
            self._status = max(self._status, 1 if status else 0)
        elif self._metrics is not None:  # before that, the start fails
            await self._replace(api, status)
        self._changed.set()

    async def _replace(self, api: _Api, status: int) -> None:
        """It has died while the server serves."""
        from penstock.observe import shared

        logger.error(
            "%s ended %s: its requests are aborted, and another takes its place", api.name, _how(status)
        )
        self._engine.leave(api.client, api.index)
        self._peer(api.index).leave()
        shared.died(f"api{api.index}")
        now = time.monotonic()
        self._deaths.append(now)
        while now - self._deaths[0] > _WINDOW:
            self._deaths.popleft()
        try:
            if len(self._deaths) > _MOST_DEATHS:
                raise StartupError(f"{len(self._deaths)} API processes have died within {_WINDOW:g} s")
            (await self._launch(api.index, first=False)).channel.tell(Listen())
        except (StartupError, OSError) as error:
            logger.critical("The server ends: %s", error)
            self._status = 1
            self._stop(signal.SIGTERM)

    # ------------------------------------------------------------------ the end

    async def _serve(self) -> int:
        """Until all have ended, and the engine."""
        ticking = asyncio.create_task(self._tick())
        dying = asyncio.create_task(self._tell_of_death())
        try:
            while self._apis:
                self._changed.clear()
                await self._changed.wait()
            if self._engine.failure is None:
                await self._engine.drain(0.0)
        finally:
            ticking.cancel()
            dying.cancel()
        return 1 if self._engine.failure is not None else self._status

    def _stop(self, number: signal.Signals) -> None:
        if not self._stopping:
            self._stopping = True
            if self._config.uds is None:  # closing that would take its path away from those who drain
                self._sock.close()  # who drains answers 503; when the last has ended, nobody listens
            limit = self._config.shutdown_timeout + self._engine_config.liveness_grace + _GOODBYE
            asyncio.get_running_loop().call_later(limit, self._end_now)
        for api in self._apis.values():
            if not api.loaded.done():  # it has nothing to drain
                api.process.kill()
        self._pass_on(number)

    def _pass_on(self, number: signal.Signals) -> None:
        for api in self._apis.values():
            api.channel.tell(Signal(number))

    async def _tell_of_death(self) -> None:
        """Of the engine's, to all: they say so to their clients, and end."""
        await self._engine.ended()
        if self._engine.failure is None:
            return
        failure = self._engine.failure
        for api in self._apis.values():
            api.channel.tell(
                Died(Error.of(failure if isinstance(failure, EngineDead) else EngineDead(str(failure))))
            )
        await asyncio.sleep(_GOODBYE)
        self._end_now()

    def _end_now(self) -> None:
        for api in self._apis.values():
            logger.error("%s has not ended in time and is killed", api.name)
            with contextlib.suppress(ProcessLookupError):
                api.process.kill()
            self._status = 1

    async def _kill(self) -> None:
        """Leave no process behind."""
        self._stopping = True
        apis = list(self._apis.values())
        for api in apis:
            with contextlib.suppress(ProcessLookupError):
                api.process.kill()
        for api in apis:
            if api.watching is not None:
                await api.watching

    # ------------------------------------------------------------------ what is counted here

    def _measure(self) -> None:
        """The engine's steps, and the bills of those who have died."""
        from penstock.observe.metrics import Metrics
        from penstock.observe.shared import share

        share(self._engine.directory / "metrics", "starter")
        self._metrics = Metrics(self._config.served_model_name[0], self._engine.info.max_model_len)
        if self._engine.stats.at:
            self._metrics.observe_step(self._engine.stats)
        self._engine.on_stats(self._metrics.observe_step)
        self._engine.on_lost(self._bill)

    def _bill(self, sequence: LostSequence) -> None:
        from penstock.observe.metrics import RequestFigures

        last = sequence.last
        if self._metrics is None or (last.failure is not None and last.scheduled_at is None):
            return  # refused, and no request for the statistics
        self._metrics.observe_sequence(
            RequestFigures(
                finished_reason=(
                    FinishReason.ERROR if last.finish is FinishReason.ERROR else FinishReason.ABORT
                ).value,
                prompt_tokens=sequence.prompt_tokens,
                generation_tokens=sequence.generation_tokens,
                cached_tokens=last.cached,
                max_tokens=sequence.max_tokens,
                preemptions=last.preemptions,
                device_seconds=last.device_seconds,
                e2e=max(0.0, last.at - sequence.arrived_at),
            )
        )

    async def _tick(self) -> None:
        while self._metrics is not None:
            self._metrics.count_idle(time.monotonic())
            await asyncio.sleep(_TICK)

    def _peer(self, index: int) -> Peers:
        from penstock.http.peers import Peers

        return Peers(self._engine.directory / "connections", index - 1, self._count)


async def _all(futures: list[asyncio.Future[Any]]) -> None:
    """Wait for all; raise the first error at once."""
    await asyncio.wait(futures, return_when=asyncio.FIRST_EXCEPTION)
    for future in futures:
        if future.done():
            future.result()


def _how(status: int) -> str:
    return f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
