"""The server's socket, from before a slow start on: bound, so that nobody else has it, and not listening.

It knows addresses, and that TLS files must be usable, and imports nothing that takes time.
"""

from __future__ import annotations

import errno
import socket
from typing import Any

from penstock.core.errors import StartupError

from .config import HttpConfig
from .tls import make_context
from .unix import UnixSocket

_BACKLOG = 2048
"""Connections that wait to be accepted; uvicorn's default."""


def bind(config: HttpConfig) -> socket.socket:
    """The server's socket, bound but not listening yet: call it before a slow start.

    Nobody else can bind the address from now on, while clients are still refused (`claim`).

    Raises StartupError: the port is in use or needs privileges, the host is unknown, a Unix socket cannot be
    had, a TLS file cannot be read.
    """
    if config.ssl_certfile is not None:
        make_context(config)
    if config.uds is not None:
        unix = UnixSocket(config.uds)
        unix.setblocking(False)
        return unix
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
    try:
        claim(sock, address)
    except OSError as error:
        sock.close()
        raise bind_error(where, config.port, error) from error
    sock.setblocking(False)
    return sock


def listen(sock: socket.socket, config: HttpConfig) -> None:
    """Listen on a bound socket at once, for workers that share it. Raises StartupError where somebody else
    does so already."""
    try:
        sock.listen(_BACKLOG)
    except OSError as error:
        raise bind_error(f"{config.host}:{config.port}", config.port, error) from error


def address(config: HttpConfig, sock: socket.socket) -> str:
    """Where a bound socket is reached, as people write it."""
    if config.uds is not None:
        return f"unix:{config.uds}"
    host, port = sock.getsockname()[:2]
    scheme = "https" if config.ssl_certfile else "http"
    shown = "localhost" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"{scheme}://{shown}:{port}"


def claim(sock: socket.socket, address: Any) -> None:
    """Bind, so that no other socket can bind the address while this one does not listen yet.

    With SO_REUSEADDR, two sockets may be bound to one port until one of them listens: two servers started
    together would both load their models first. Without it, a port whose last connections have just ended
    is refused; there it is needed to bind, and not to keep what is bound.

    Raises OSError (EADDRINUSE) if another socket is bound, whether it listens or not.
    """
    try:
        sock.bind(address)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)


def bind_error(where: str, port: int, error: OSError) -> StartupError:
    """What to tell of an address (`where`) that cannot be had."""
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
