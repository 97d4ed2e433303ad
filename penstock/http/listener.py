"""Accepting connections, within their limits.

asyncio and uvloop accept whatever comes, as much of it at once as waits, and know of a TLS client only once
it has shaken hands; here a connection is admitted, counted and given its deadline before a byte is read.
It knows sockets and who admits; it does not know what is spoken on a connection.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable

from .connection import Connection
from .limits import Connections
from .peers import CHECKS, PAUSE
from .tls import Certificates

logger = logging.getLogger("penstock.http")

_AT_ONCE = 64
"""Connections accepted before the loop goes on to something else."""
_PAUSE = 0.02
"""Seconds without accepting when there is no room, or the system has no descriptor left."""
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Listener:
    """A listening socket, which other processes may have as well (`peers`). Has what uvicorn asks of an
    `asyncio.Server`."""

    def __init__(
        self,
        sock: socket.socket,
        connections: Connections,
        make: Callable[[str], Connection],
        tls: Certificates | None,
        backlog: int,
    ) -> None:
        """Listen. Raises OSError if someone else does already.

        Args:
            make: a connection, from the client's address.
            backlog: connections that may wait to be accepted.
        """
        # its connections that have ended must not be in the way of the next server (`bind.claim`)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # here, since uvloop's create_server does not tell of a listen that fails
        sock.listen(backlog)
        sock.setblocking(False)
        self._sock = sock
        self._connections = connections
        self._make = make
        self._tls = tls
        self._loop = asyncio.get_running_loop()
        self._opening: dict[Connection, asyncio.Task[None]] = {}
        self._pause: asyncio.TimerHandle | None = None
        self._left = 0
        """How often what waits was left to other processes."""
        if connections.peers is not None:
            connections.peers.tell(len(connections))
        self._listen()
        self._sweeper = self._loop.call_later(connections.limits.interval, self._sweep)

    def close(self) -> None:
        """Accept no more."""
        if self._connections.peers is not None:
            self._connections.peers.leave()
            self._connections.peers = None
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._sock)
        for connection in list(self._opening):
            connection.cut()

    async def wait_closed(self) -> None:
        """The end of a server: connections need not be looked after any more."""
        self._sweeper.cancel()

    def _listen(self) -> None:
        self._loop.add_reader(self._sock, self._accept)

    def _wait(self, seconds: float = _PAUSE) -> None:
        self._loop.remove_reader(self._sock)
        self._pause = self._loop.call_later(seconds, self._listen)

    def _leaves_to_peers(self) -> bool:
        """Whether another process has fewer connections, and gets some time to take the one that waits."""
        peers = self._connections.peers
        if peers is None or self._left == CHECKS or peers.fewest:
            self._left = 0
            return False
        self._left += 1
        return True

    def _sweep(self) -> None:
        self._sweeper = self._loop.call_later(self._connections.sweep(), self._sweep)

    def _accept(self) -> None:
        for _ in range(_AT_ONCE):
            if not self._connections.receptive:
                self._wait()
                return
            if self._leaves_to_peers():
                self._wait(PAUSE)
                return
            try:
                client, address = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _EXHAUSTED:
                    raise
                self._connections.log.warning(
                    "accept", "Connections wait to be accepted: %s.", error.strerror
                )
                self._wait()
                return
            client.setblocking(False)
            connection = self._make(address[0] if isinstance(address, tuple) else "")
            if not self._connections.admit(connection):
                client.close()
                continue
            self._opening[connection] = self._loop.create_task(self._open(client, connection))

    async def _open(self, client: socket.socket, connection: Connection) -> None:
        context, handshake = None, {}
        if self._tls is not None:
            context = self._tls.context
            handshake = {"ssl_handshake_timeout": self._connections.limits.headers}
        try:
            if not connection.unwanted:  # from here on, the socket is the transport's
                connection.opening = asyncio.current_task()
                await self._loop.connect_accepted_socket(lambda: connection, client, ssl=context, **handshake)
            else:
                client.close()
        except (OSError, asyncio.CancelledError):  # no TLS, or none in time, or no room for it any more
            self._connections.forget(connection)
        finally:
            connection.opening = None
            del self._opening[connection]
