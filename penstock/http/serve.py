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
import errno
import logging
import signal
import socket
import ssl
from collections.abc import Callable, Generator
from typing import Any, Protocol

import uvicorn
from starlette.types import ASGIApp
from uvicorn.config import LOGGING_CONFIG

from penstock.core.errors import PenstockError, StartupError

from .config import HttpConfig
from .connection import Connection
from .layers import restricted
from .limits import Connections, Limits, affordable
from .listener import Listener

logger = logging.getLogger("penstock.http")

_POLL = 0.1
"""Seconds between two looks at the worker's health."""
_LAST_WORDS = 2.0
"""Seconds that a server whose worker is dead goes on to answer 503 with the cause."""
_FLUSH = 5.0
"""Seconds that connections get to send what they have, after everything else has ended."""
_BACKLOG = 2048
"""Connections that wait to be accepted; uvicorn's default."""
_PATH_SHOWN = 256
"""Characters of a path in the access log."""
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


def bind(config: HttpConfig) -> socket.socket:
    """The server's socket, bound but not listening yet: call it before a slow start.

    Raises StartupError: the port is in use or needs privileges, the host is unknown, a TLS file cannot be
    read.
    """
    if config.ssl_certfile is not None:
        _check_tls(config)
    where = f"{config.host}:{config.port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise StartupError(
            f"--host {config.host!r} cannot be resolved: {error.strerror}.",
            param="--host",
            advice="Use an address of this machine, 0.0.0.0 for all of them, or 127.0.0.1.",
        ) from error
    sock = socket.socket(family, kind, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise _bind_error(where, config.port, error) from error
    sock.setblocking(False)
    return sock


def listen(sock: socket.socket, config: HttpConfig) -> None:
    """Listen on a bound socket at once, for workers that share it. Raises StartupError where somebody else
    does so already."""
    try:
        sock.listen(_BACKLOG)
    except OSError as error:
        raise _bind_error(f"{config.host}:{config.port}", config.port, error) from error


async def serve(
    app: ASGIApp,
    config: HttpConfig,
    worker: Worker,
    sock: socket.socket,
    *,
    name: str = "worker",
    on_started: Callable[[], None] | None = None,
    handle_signals: bool = True,
    log_config: dict[str, Any] | None = LOGGING_CONFIG,
) -> int:
    """Serve until a signal or the worker's death. Returns the exit status: 0 after a complete drain, else 1.

    Args:
        worker: drained at the first signal, and closed at the end.
        sock: from `bind`; closed here.
        name: what the log calls the worker.
        on_started: called once the server listens.
        handle_signals: SIGTERM and SIGINT drain; needs the main thread.
        log_config: for `logging.config`; None leaves logging as it is.
    """
    server = Server(app, config, log_config=log_config, on_started=on_started)
    lifecycle = Lifecycle(server, worker, name, config.shutdown_timeout)
    loop = asyncio.get_running_loop()
    actions = {signal.SIGTERM: lifecycle.stop, signal.SIGINT: lifecycle.stop, signal.SIGHUP: server.reload}
    signals = actions if handle_signals else {}
    for number, action in signals.items():
        loop.add_signal_handler(number, action)
    watching = asyncio.create_task(lifecycle.watch())
    try:
        await server.serve(sockets=[sock])
    except OSError as error:  # someone else has begun to listen since bind
        sock.close()
        raise _bind_error(f"{config.host}:{config.port}", config.port, error) from error
    finally:
        for number in signals:
            loop.remove_signal_handler(number)
        watching.cancel()
        await lifecycle.finish()
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
        log_config: dict[str, Any] | None = None,
        on_started: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(_uvicorn_config(app, config, log_config))
        self.config.load()
        logging.getLogger("uvicorn.access").addFilter(_without_query)
        self._http = config
        self._on_started = on_started
        try:
            self._limits = Limits.of(config, affordable(config.max_connections))
        except ValueError as error:
            raise StartupError(f"Cannot serve: {error}.", param="--max-connections") from None

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        connections = Connections(self._limits, asyncio.get_running_loop().time)

        def make(address: str) -> Connection:
            return Connection(self.config, self.server_state, connections, address, restricted)

        self.servers = [
            Listener(sock, connections, make, self.config.ssl, self.config.backlog)  # type: ignore[misc]
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
        config, context = self._http, self.config.ssl
        if context is None or config.ssl_certfile is None:
            logger.info("SIGHUP: there is nothing to read again; flags and keys hold until the next start.")
            return
        try:
            _check_tls(config)
            _load_tls(context, config)
        except (StartupError, OSError, ssl.SSLError) as error:
            logger.error("SIGHUP: the TLS files stay as they were. %s", error)
        else:
            logger.info("SIGHUP: new connections get the certificate in %s.", config.ssl_certfile)


def _without_query(record: logging.LogRecord) -> bool:
    """Cut an access line's URL: its query may hold keys, and a path can be as long as all headers."""
    if isinstance(record.args, tuple) and len(record.args) == 5:
        client, method, url, version, status = record.args
        path, query, _ = str(url).partition("?")
        shown = path if len(path) <= _PATH_SHOWN else path[:_PATH_SHOWN] + "…"
        record.args = (client, method, shown + ("?…" if query else ""), version, status)
    return True


def _uvicorn_config(app: ASGIApp, config: HttpConfig, log_config: dict[str, Any] | None) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        ws="none",
        lifespan="off",
        log_config=log_config,
        log_level=config.uvicorn_log_level if log_config is not None else None,
        access_log=not config.disable_uvicorn_access_log,
        server_header=False,
        proxy_headers=False,  # they would stand in the access log as the client wrote them
        root_path=config.root_path,
        timeout_keep_alive=config.timeout_keep_alive,
        timeout_graceful_shutdown=int(_FLUSH),
        ssl_keyfile=config.ssl_keyfile,
        ssl_certfile=config.ssl_certfile,
        ssl_ca_certs=config.ssl_ca_certs,
        ssl_cert_reqs=config.ssl_cert_reqs,
    )


def _load_tls(context: ssl.SSLContext, config: HttpConfig) -> None:
    context.load_cert_chain(str(config.ssl_certfile), config.ssl_keyfile)
    if config.ssl_ca_certs is not None:
        context.load_verify_locations(config.ssl_ca_certs)


def _check_tls(config: HttpConfig) -> None:
    try:
        _load_tls(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), config)
    except (OSError, ssl.SSLError) as error:
        raise StartupError(
            f"The TLS files cannot be used ({config.ssl_certfile}, {config.ssl_keyfile}): {error}.",
            param="--ssl-certfile",
        ) from error


def _bind_error(where: str, port: int, error: OSError) -> StartupError:
    if error.errno == errno.EADDRINUSE:
        return StartupError(
            f"Port {port} is in use ({where}).",
            param="--port",
            advice=f"Choose another with --port, such as --port {port + 1}, or stop what listens there.",
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return StartupError(
            f"Port {port} needs privileges that this process does not have.",
            param="--port",
            advice="Choose a port of 1024 or more with --port.",
        )
    return StartupError(
        f"Cannot listen on {where}: {error.strerror}.",
        param="--host",
        advice="Use an address of this machine with --host, or 0.0.0.0 for all of them.",
    )
