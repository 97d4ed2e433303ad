"""Requests to one other server in HTTP/1.1: connections that stay open, answers read piece by piece.

    Client ── request ──▶ a free connection, else a new one ──▶ Answer: status, headers, pieces ──▶ free again

For a relay, whose every request is one: aiohttp's client takes 250 µs of CPU for a request and 730 for one
with 16 chunks, this one 50 and 260 (one core of an EPYC, the same server). Parsing is httptools', as on the
server's side. What a relay must not have is not there: redirects, cookies, proxies, content codings (an
answer that has one although it was not asked for is refused), a second try behind the caller's back.

    fault                                            exception
    no address, refused, TLS, time over              ConnectFailed: nothing was sent
    the connection ended before the head             Disconnected
    … before the end of the body                     Incomplete, after all pieces that had come
    no HTTP/1, both framings, a head over 64 KiB     NotHttp

Deadlines for answers are the caller's. A connection goes back when its answer has come whole, and is cut when
the caller leaves before that.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Mapping
from functools import cache
from typing import Any
from urllib.parse import urlsplit

import aiohappyeyeballs
import httptools

from penstock.core.errors import StartupError

_MOST_HEAD = 64 << 10
"""Bytes of a head, interim ones (1xx) included, and of trailers."""
_MOST_FIELDS = 256
_HELD = 256 << 10
"""Bytes that nobody has read; beyond them the server has to wait."""
_STAGGER = 0.25
"""Seconds until the next address is tried beside one that does not answer (RFC 8305, 5)."""
_OWN = frozenset({"content-length", "transfer-encoding", "connection"})


class RequestFailed(Exception):
    """There is no answer, or not all of it."""


class ConnectFailed(RequestFailed):
    """There is no connection: nothing was sent. The cause is the operating system's, or a TimeoutError."""


class Disconnected(RequestFailed):
    """The connection has ended before the head; the cause, if there is one, is the operating system's."""


class Incomplete(RequestFailed):
    """The connection has ended before the end of the body."""


class NotHttp(RequestFailed):
    """What came is no answer that can be read."""


class Connection(asyncio.Protocol):
    """One connection with one request at a time."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._parser: Any = httptools.HttpResponseParser(self)
        self._paused = False
        self._closed = False
        self.complete = True
        """Whether nothing is awaited."""
        self._reusable = True
        self._until_close = False
        self._failure: RequestFailed | None = None
        self._pieces: list[bytes] = []
        self._held = self._pending = self._fields = 0
        self.idle_since = 0.0
        self.status = 0
        """0 until the head is there."""
        self.headers: dict[str, str] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It stands, TLS included."""
        self._transport: Any = transport  # uvloop's is no asyncio.Transport

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        self._closed = True
        self._parser = None  # which holds this, too
        self._client.forget(self)
        if self.complete:
            return
        if not self.status:
            failure: RequestFailed = Disconnected()
            failure.__cause__ = exc
            self._failure = self._failure or failure
        elif self._until_close and exc is None:
            self.complete, self._reusable = True, False
        else:
            self._failure = self._failure or Incomplete()
        self._wake()

    def data_received(self, data: bytes) -> None:
        """Feed the parser."""
        if self.complete:  # nobody has asked
            self.cut()
            return
        self._pending += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._refuse("an upgrade that was not asked for")
        except httptools.HttpParserError as error:
            self._refuse(str(error.__context__ or error))
        if self._pending > _MOST_HEAD:
            self._refuse("a head without an end")
        if self._held > _HELD and not self._paused and not self._closed:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    # ---- the parser ----

    def on_message_begin(self) -> None:
        """The first byte of a head."""
        if self.complete:
            raise ValueError("more answers than requests")
        self.headers = {}

    def on_header(self, name: bytes, value: bytes | None) -> None:
        """One field; trailers are dropped."""
        if self.status:
            return
        self._fields += 1
        if self._fields > _MOST_FIELDS:
            raise ValueError(f"more than {_MOST_FIELDS} header fields")
        key, text = name.decode("latin-1").lower(), (value or b"").decode("latin-1")
        self.headers[key] = f"{self.headers[key]}, {text}" if key in self.headers else text

    def on_headers_complete(self) -> None:
        """The head is there, unless it is an interim one."""
        status = self._parser.get_status_code()
        if 100 <= status < 200:
            return
        headers = self.headers
        if not 200 <= status < 600:
            raise ValueError(f"the status {status}")
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise ValueError("a content coding that was not asked for")
        if headers.get("transfer-encoding", "chunked").lower() != "chunked":
            raise ValueError("a transfer coding that was not asked for")
        self._until_close = "content-length" not in headers and "transfer-encoding" not in headers
        self.status = status
        self._pending = 0

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        self._pending = 0
        self._held += len(body)
        self._pieces.append(body)

    def on_message_complete(self) -> None:
        """The body is there."""
        if self.status:
            self.complete = True
            self._reusable = bool(self._parser.should_keep_alive())

    # ---- one exchange ----

    async def ask(self, request: bytes) -> None:
        """Send a request, and wait for the head of its answer. Raises RequestFailed."""
        if self._closed:  # between its beginning and now; nobody would say so again
            raise Disconnected
        self.complete = self._until_close = False
        self._failure = None
        self._pieces = []
        self.status = self._held = self._pending = self._fields = 0
        self._transport.write(request)
        while not self.status:
            if self._failure is not None:
                raise self._failure
            await self._wait()

    async def read(self) -> bytes:
        """What has come of the body, once something has; b"" at its end. Raises Incomplete, NotHttp."""
        pieces = self._pieces
        while not pieces:
            if self.complete:
                return b""
            if self._failure is not None:
                raise self._failure
            await self._wait()
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        self._held = 0
        if self._paused:
            self._paused = False
            if not self._closed:
                self._transport.resume_reading()
        return data

    @property
    def is_free(self) -> bool:
        """Whether it can carry another request."""
        return self.complete and self._reusable and not (self._paused or self._transport.is_closing())

    @property
    def is_sending(self) -> bool:
        """Whether a part of the request has still to go out."""
        return bool(self._transport.get_write_buffer_size())

    def cut(self) -> None:
        """Close it now."""
        self._transport.abort()

    def close(self) -> None:
        """Close it."""
        self._transport.close()

    def _refuse(self, why: str) -> None:
        self._reusable = False
        if not self.complete:
            self._failure = self._failure or NotHttp(why)
        self.cut()

    async def _wait(self) -> None:
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Answer:
    """One exchange: `async with` sends the request and waits for the head."""

    __slots__ = ("_client", "_connection", "_request", "headers", "status")

    status: int
    headers: Mapping[str, str]
    """Names in lower case; fields that stand more than once are joined by commas."""

    def __init__(self, client: Client, request: bytes) -> None:
        self._client = client
        self._request = request

    async def __aenter__(self) -> Answer:
        connection = self._connection = await self._client.connection()
        try:
            await connection.ask(self._request)
        except BaseException:
            connection.cut()
            raise
        self.status, self.headers = connection.status, connection.headers
        return self

    async def __aexit__(self, *_: object) -> None:
        self._client.release(self._connection)

    @property
    def content_type(self) -> str:
        """Without parameters, in lower case."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    async def readany(self) -> bytes:
        """What has come of the body, once something has; b"" at its end. Raises RequestFailed."""
        return await self._connection.read()


class Client:
    """One server. Belongs to the event loop in which it is first used."""

    def __init__(
        self, url: str, headers: Mapping[str, str], *, timeout: float = 5.0, keep_alive: float = 4.0
    ) -> None:
        """Raises StartupError where `headers` has one that every request has of its own.

        Args:
            url: http or https, with a path or without.
            headers: of every request; its own win.
            timeout: seconds until a connection stands, TLS included.
            keep_alive: seconds for which an idle one is kept.
        """
        parts = urlsplit(url)
        self._tls = parts.scheme == "https"
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if self._tls else 80)
        self._path = parts.path.rstrip("/")
        self._timeout, self._keep_alive = timeout, keep_alive
        own = {name.lower(): value for name, value in headers.items()}
        if bad := _OWN & own.keys():
            raise StartupError(f"The header {min(bad)} cannot be sent to {url}: every request has its own.")
        own.setdefault("host", parts.netloc.encode("idna").decode())
        self._own = own
        self._heads: dict[str, str] = {}
        self._free: list[Connection] = []
        self._all: set[Connection] = set()
        self._sweeping: asyncio.TimerHandle | None = None
        self._closed: asyncio.Event | None = None

    def request(self, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        """One exchange. Raises ValueError where a header has a line of its own in it.

        Args:
            path: behind the URL's; it stands in the request as it is.
            headers: of this request, names in lower case.
        """
        if self._own.keys().isdisjoint(headers):
            fixed = self._heads.get(method + path)
            if fixed is None:
                fixed = f"{method} {self._path}{path} HTTP/1.1\r\n{_lines(self._own)}"
                if len(self._heads) < 64:
                    self._heads[method + path] = fixed
        else:
            own = {name: value for name, value in self._own.items() if name not in headers}
            fixed = f"{method} {self._path}{path} HTTP/1.1\r\n{_lines(own)}"
        head = f"{fixed}{_lines(headers)}content-length: {len(body)}\r\n\r\n"
        return Answer(self, head.encode() + body)

    async def close(self) -> None:
        """End all connections."""
        if self._sweeping is not None:
            self._sweeping.cancel()
        self._closed = asyncio.Event()
        for connection in self._all:
            connection.cut()
        if self._all:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closed.wait(), 1.0)

    # ---- connections ----

    async def connection(self) -> Connection:
        """One that carries a request now: the one used last, of those that are free, or a new one. Raises
        ConnectFailed."""
        loop = asyncio.get_running_loop()
        while self._free:
            connection = self._free.pop()
            if connection.is_free and loop.time() - connection.idle_since < self._keep_alive:
                return connection
            connection.close()
        try:
            async with asyncio.timeout(self._timeout):
                return await self._connect(loop)
        except (OSError, UnicodeError) as error:  # TimeoutError and all of TLS are OSErrors
            raise ConnectFailed from error

    def release(self, connection: Connection) -> None:
        """Its exchange is over."""
        if not connection.complete or self._closed is not None:
            connection.cut()
        elif not connection.is_free or connection.is_sending:  # an answer to half a request
            connection.close()
        else:
            loop = asyncio.get_running_loop()
            connection.idle_since = loop.time()
            self._free.append(connection)
            if self._sweeping is None:
                self._sweeping = loop.call_later(self._keep_alive, self._sweep, loop)

    def forget(self, connection: Connection) -> None:
        """It is gone."""
        self._all.discard(connection)
        if self._closed is not None and not self._all:
            self._closed.set()

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        """Close what has been idle for long; the oldest stand first."""
        old = loop.time() - self._keep_alive
        keep = [each for each in self._free if each.idle_since > old and each.is_free]
        for each in self._free:
            if each.idle_since <= old:
                each.close()
        self._free = keep
        self._sweeping = loop.call_later(self._keep_alive, self._sweep, loop) if keep else None

    async def _connect(self, loop: asyncio.AbstractEventLoop) -> Connection:
        addresses = await loop.getaddrinfo(
            self._host, self._port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
        )
        sock = await aiohappyeyeballs.start_connection(
            addresses, happy_eyeballs_delay=_STAGGER, interleave=1, loop=loop
        )
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _, connection = await loop.create_connection(
                lambda: Connection(self),
                sock=sock,
                ssl=_tls() if self._tls else None,
                server_hostname=self._host if self._tls else None,
            )
        except BaseException:
            sock.close()
            raise
        self._all.add(connection)
        return connection


def _lines(headers: Mapping[str, str]) -> str:
    lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    if not lines.count("\r") == lines.count("\n") == len(headers) or "\0" in lines:
        raise ValueError("a header has a line break in it")
    return lines


@cache
def _tls() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context
