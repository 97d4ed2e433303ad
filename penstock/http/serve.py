"""Running the application: the socket, uvicorn, signals, draining, and what ends the process.

    bind ─▶ (a slow start) ─▶ serving ──SIGTERM──▶ draining ──all done or time over──▶ exit 0
                              │  │                     └──second signal──▶ 503 ──────▶ exit 1
                              │  └──worker dies──▶ 503 with the cause, for a moment ──▶ exit 1
                              └──SIGHUP──▶ TLS files are read again

While it drains, the server still listens: /readyz fails, new requests get a 503, running ones end. It knows
who does the work (an engine, a gateway's upstreams) only as something to drain, to close, and to find dead.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Protocol

import uvicorn
from starlette.types import ASGIApp

from penstock.core.errors import PenstockError, StartupError

from .bind import bind_error
from .config import HttpConfig
from .connection import Connection
from .layers import restricted
from .limits import Connections, Limits, affordable
from .listener import Listener
from .peers import Peers
from .proxies import Proxies
from .tls import Certificates

logger = logging.getLogger("penstock.http")

Actions = Mapping[signal.Signals, Callable[[], None]]
"""What a signal does."""

_POLL = 0.1
"""Seconds between two looks at the worker's health."""
_LAST_WORDS = 2.0
"""Seconds that a server whose worker is dead goes on to answer 503 with the cause."""
_FLUSH = 5.0
"""Seconds that connections get to send what they have, after everything else has ended."""
_LOOK = 10
"""Ticks of uvicorn's, of 0.1 s, between two looks at the TLS files."""
_ABORT = 1.0
"""Seconds that handlers get to say goodbye after the second signal."""


class Worker(Protocol):
    """Who does the work of a server: an engine, or whatever stands behind a gateway."""

    @property
    def failure(self) -> PenstockError | None:
        """Why it died, if it did."""
        ...

    @property
    def load(self) -> int:
        """Requests taken and not finished."""
        ...

    async def drain(self, timeout: float) -> None:
        """Refuse new requests from now on; return when all running ones have ended. What still runs after
        `timeout` seconds is aborted."""
        ...

    async def close(self) -> None:
        """Stop now, and wait until it is gone."""
        ...


async def serve(
    app: ASGIApp,
    config: HttpConfig,
    worker: Worker,
    sock: socket.socket,
    *,
    name: str = "worker",
    on_started: Callable[[], None] | None = None,
    handle_signals: bool = True,
    on_actions: Callable[[Actions], None] | None = None,
    peers: Peers | None = None,
    beside: Sequence[tuple[Server, socket.socket]] = (),
) -> int:
    """Serve until a signal or the worker's death. Returns the exit status: 0 after a complete drain, else 1.

    Args:
        worker: drained at the first signal, and closed at the end.
        sock: from `bind`; closed here.
        name: what the log calls the worker.
        on_started: called once the server listens.
        handle_signals: SIGTERM and SIGINT drain; needs the main thread.
        on_actions: told what each signal does, where somebody else hears of them.
        peers: other processes that accept on the same socket.
        beside: servers that listen on sockets of their own, until the worker is closed.
    """
    server = Server(app, config, on_started=on_started, peers=peers)
    lifecycle = Lifecycle(server, worker, name, config.shutdown_timeout)
    loop = asyncio.get_running_loop()

    def reload() -> None:
        for each in (server, *(other for other, _ in beside)):
            each.reload()

    actions: Actions = {
        signal.SIGTERM: lifecycle.stop,
        signal.SIGINT: lifecycle.stop,
        signal.SIGHUP: reload,
    }
    signals = actions if handle_signals else {}
    for number, action in signals.items():
        loop.add_signal_handler(number, action)
    if on_actions is not None:
        on_actions(actions)
    watching = asyncio.create_task(lifecycle.watch())
    others = [loop.create_task(other.serve(sockets=[its])) for other, its in beside]
    try:
        await server.serve(sockets=[sock])
    except OSError as error:  # someone else has begun to listen since bind
        sock.close()
        raise bind_error(f"{config.host}:{config.port}", config.port, error) from error
    finally:
        for number in signals:
            loop.remove_signal_handler(number)
        watching.cancel()
        await lifecycle.finish()
        for other, _ in beside:
            other.should_exit = True
        await asyncio.gather(*others, return_exceptions=True)
        await worker.close()
    return lifecycle.exit_status


class Lifecycle:
    """What ends a server, and with which exit status."""

    def __init__(self, server: uvicorn.Server, worker: Worker, name: str, shutdown_timeout: float) -> None:
        self.exit_status = 0
        self._server = server
        self._worker = worker
        self._name = name
        self._shutdown_timeout = shutdown_timeout
        self._draining: asyncio.Task[None] | None = None

    def stop(self) -> None:
        """A signal: drain; the second one: abort."""
        if self._draining is None:
            self._draining = asyncio.get_running_loop().create_task(self._drain())
            return
        logger.warning("Second signal: aborting %d running requests.", self._worker.load)
        self.exit_status = 1
        self._server.should_exit = self._server.force_exit = True

    async def watch(self) -> None:
        """End the server, with status 1, a moment after the worker has died."""
        while (failure := self._worker.failure) is None:
            await asyncio.sleep(_POLL)
        logger.critical("The %s has died: %s", self._name, failure)
        self.exit_status = 1
        await asyncio.sleep(_LAST_WORDS)
        self._server.should_exit = True

    async def finish(self) -> None:
        """Leave no task behind."""
        if self._draining is not None:
            self._draining.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._draining

    async def _drain(self) -> None:
        logger.info(
            "Draining: %d running requests get up to %g s to finish; a second signal aborts them.",
            self._worker.load,
            self._shutdown_timeout,
        )
        try:
            await self._worker.drain(self._shutdown_timeout)
        except Exception:
            logger.exception("draining failed")
            self.exit_status = 1
        self._server.should_exit = True


class Server(uvicorn.Server):
    """uvicorn with our listener and limits, and without its own signal handling.

    Raises StartupError where the process may not have enough open files.
    """

    def __init__(
        self,
        app: ASGIApp,
        config: HttpConfig,
        *,
        on_started: Callable[[], None] | None = None,
        peers: Peers | None = None,
    ) -> None:
        super().__init__(_uvicorn_config(app, config))
        self.config.load()
        self._tls = None if config.ssl_certfile is None else Certificates(config)
        self._watches_tls = config.enable_ssl_refresh
        self._on_started = on_started
        self._peers = peers
        self._proxies = Proxies(config.trusted_proxies)
        try:
            self._limits = Limits.of(config, affordable(config.max_connections))
        except ValueError as error:
            raise StartupError(f"Cannot serve: {error}.", param="--max-connections") from None

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        clock = asyncio.get_running_loop().time
        connections = Connections(self._limits, clock, self._peers, self._proxies)

        def make(address: str) -> Connection:
            return Connection(self.config, self.server_state, connections, address, restricted)

        self.servers = [
            Listener(sock, connections, make, self._tls, self.config.backlog)  # type: ignore[misc]
            for sock in sockets or ()
        ]
        self.started = True
        if self._on_started is not None:
            self._on_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop; handlers that a second signal cuts off still answer with the error that this is."""
        await super().shutdown(sockets)
        tasks = set(self.server_state.tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_ABORT)

    def reload(self) -> None:
        """SIGHUP: read the TLS files again, for new connections; those that cannot be used change nothing."""
        if self._tls is None:
            logger.info("SIGHUP: there is nothing to read again; flags and keys hold until the next start.")
        else:
            self._tls.reload("SIGHUP")

    async def on_tick(self, counter: int) -> bool:
        """uvicorn's clock: ten times a second."""
        if self._tls is not None and self._watches_tls and counter % _LOOK == 0:
            self._tls.look()
        return await super().on_tick(counter)


def _uvicorn_config(app: ASGIApp, config: HttpConfig) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        ws="none",
        lifespan="off",
        log_config=None,  # who runs the process says how it logs
        access_log=False,  # ours knows the route, the duration and the id (`exchanges`)
        server_header=False,
        proxy_headers=False,  # ours believes nobody unasked (`proxies`)
        timeout_keep_alive=config.timeout_keep_alive,
        timeout_graceful_shutdown=int(_FLUSH),
    )
