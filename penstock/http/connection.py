"""One connection: uvicorn's httptools protocol, with limits, and with what it gets wrong put right.

    silence ─▶ head ─▶ body ─▶ answer ─▶ silence       each but the answer with a deadline (`limits`)
                 └──────┴─▶ refused: an error in OpenAI's shape, a moment to read it, closed

    limits          headers are counted before the parser piles them up: it does so in quadratic time
    framing         what a proxy could read otherwise than we do is refused (RFC 9112, 3.2, 6.1 and 11.2)
    garbage         after a request that is being answered: the connection ends after that answer, not in it
    trailers        are dropped (RFC 9110, 6.5.1): uvicorn adds them to the headers of a request that runs
    Upgrade: h2c    a client's offer (curl --http2, Java's HttpClient) to go on in HTTP/2. A server that does
                    not know the protocol ignores the header (RFC 9110, 7.8); httptools skips the body
    half a request  when the server ends, nobody waits for the rest of a body: the connection is closed, and
                    the handler that reads it sees the client leave

It knows uvicorn's protocol and httptools' parser; it knows nothing of the application.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from typing import Any

import httptools
from starlette.types import ASGIApp
from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from penstock.core.errors import PenstockError

from .cycle import Cycle
from .errors import (
    HeadersTooLarge,
    MalformedRequest,
    RequestTimeout,
    UnknownCoding,
    UnknownVersion,
    UriTooLong,
    error_bytes,
)
from .limits import Connections

_PIPELINE = 16
"""Requests that may wait for the answer to an earlier one on their connection."""
_LINGER = 1.0
"""Seconds that a refused client gets to read why: closing while it still sends would lose the answer."""
_LINGER_BYTES = 1 << 20
"""Bytes of a refused request that are read and dropped meanwhile."""


# What is awaited of the client; plain numbers, since every header of every request asks.
_SILENCE = 0
"""A request."""
_HEAD = 1
"""The rest of its headers."""
_BODY = 2
"""The rest of its body."""
_ANSWER = 3
"""Nothing: the server has to act."""
_REFUSED = 4
"""That it reads why, and closes."""


class Connection(HttpToolsProtocol):
    """See the module."""

    restricted = False
    deadline = math.inf
    opening: asyncio.Task[None] | None = None
    """Makes the connection: TLS shakes hands in it."""
    unwanted = False
    """It was cut before that began."""

    def __init__(
        self,
        config: Config,
        state: ServerState,
        connections: Connections,
        address: str = "",
        restrict: Any = None,
    ) -> None:
        """
        Args:
            connections: which admit this one.
            address: the client's.
            restrict: application → the one for connections beyond the limit.
        """
        super().__init__(config, state, {}, _loop=asyncio.get_running_loop())
        self.address = address
        self.limits = connections.limits
        self._all = connections
        self._restrict = restrict
        self._made = False
        self._stage = _SILENCE
        self._pending = 0
        """Bytes since the parser last came to the end of something."""
        self._fault: PenstockError | None = None
        self._answering: RequestResponseCycle | None = None

    # ---- the transport ----

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """It is open, TLS included."""
        super().connection_made(transport)
        self._made = True
        if self.restricted and self._restrict is not None:
            self.app = self._restrict(self.app)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone, for whatever reason."""
        super().connection_lost(exc)
        if self._answering is not None:  # uvicorn tells the last of its pipeline only
            self._answering.disconnected = True
            self._answering.message_event.set()
        self.deadline = math.inf
        self._all.forget(self)

    def data_received(self, data: bytes) -> None:
        """Feed the parser; a request with an offer is fed once more, without the offer."""
        if self._stage == _REFUSED:
            self._pending += len(data)
            if self._pending > _LINGER_BYTES:
                self.cut()
            return
        while data:
            self._pending += len(data)
            try:
                self.parser.feed_data(data)
                data = b""
            except httptools.HttpParserUpgrade as upgrade:
                if not self._offered():  # CONNECT: nothing here answers it
                    self._refuse(MalformedRequest("CONNECT is not served here."))
                    return
                data = self._head_without_offer() + data[upgrade.args[0] :]
                self.parser = httptools.HttpRequestParser(self)  # the old one is past its message
                with contextlib.suppress(AttributeError):  # httptools < 0.6.3; as uvicorn sets it
                    self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            except httptools.HttpParserError as error:
                self._refuse(self._fault or MalformedRequest(f"This is not valid HTTP/1.1: {error}."))
                return
        if self._pending > self.limits.header_bytes and self._stage != _ANSWER:
            self._refuse(self._too_large())

    def shutdown(self) -> None:
        """The server ends: close when idle or still reading a request, else after the response."""
        cycle = self.cycle
        if cycle is not None and cycle.more_body and not cycle.response_started:
            self.transport.close()
        else:
            super().shutdown()

    # ---- the parser ----

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        self._stage = _HEAD
        self.deadline = self.loop.time() + self.limits.headers

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header, or trailer."""
        if self._stage == _HEAD:
            name = name.lower()
            if name == b"expect" and value.lower() == b"100-continue":
                self.expect_100_continue = True
            self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """The head is there: the request begins, unless it comes again without its offer."""
        self._pending = 0
        if self._offered():
            return
        self._check_head()
        self.expect_100_continue &= self.parser.get_http_version() == "1.1"  # RFC 9110, 10.1.1
        if len(self.pipeline) >= _PIPELINE:
            self._fail(MalformedRequest("Too many requests were sent without waiting for an answer."))
        super().on_headers_complete()
        self._stage = _BODY
        self.deadline = self.loop.time() + self.limits.body
        self._all.busy(self)

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        self._pending = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The body is there."""
        self._pending = 0
        if self._offered():
            return
        super().on_message_complete()
        self.deadline = math.inf
        self._stage = _ANSWER
        if self.cycle.response_complete:  # it was answered before it was read
            self._wait_for_request()

    # ---- the answer ----

    def on_response_complete(self) -> None:
        """The answer is written: the next request's turn. uvicorn's own sets a timer each time."""
        self.server_state.total_requests += 1
        self._answering = None
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            self._start_asgi_task(cycle, app)  # type: ignore[arg-type]
        elif self.restricted:
            self._stage = _REFUSED
            self._all.idle(self)
            self._linger()
        elif not self.timeout_keep_alive:
            self.transport.close()
        elif self._stage == _ANSWER:
            self._wait_for_request()
        elif self._stage == _BODY:  # nobody waits for the rest of it
            self._all.idle(self)
        elif self._stage == _HEAD:  # the next request has begun, and is none yet
            self._all.idle(self, awaited=False)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGIApp) -> None:  # type: ignore[override]
        self._answering = cycle
        cycle.__class__ = Cycle  # uvicorn makes its own, by name
        super()._start_asgi_task(cycle, app)  # type: ignore[arg-type]

    # ---- limits ----

    def expire(self, now: float) -> None:
        """The deadline has passed: see `Held`."""
        limits = self.limits
        self.deadline = math.inf
        if not self._made or self._stage == _REFUSED:
            self.cut()
        elif self._stage == _SILENCE or (self._stage == _BODY and self.cycle.response_complete):
            self.transport.close()
        elif self.flow.read_paused:  # it is us who do not read: an earlier request is answered first
            self.deadline = now + (limits.headers if self._stage == _HEAD else limits.body)
        elif self._stage == _HEAD:
            self._refuse(
                RequestTimeout(
                    f"The headers did not arrive within {limits.headers:g} s.",
                    advice="The server's limit is set by --timeout-headers.",
                )
            )
        elif self._stage == _BODY:
            self._refuse(
                RequestTimeout(
                    f"The body did not arrive within {limits.body:g} s.",
                    advice="The server's limit is set by --timeout-body.",
                )
            )

    @property
    def drained(self) -> bool:
        """See `Held`."""
        return not self._made or self.transport.get_write_buffer_size() == 0

    def unsent(self) -> int:
        """Bytes that the client does not take: see `Held`."""
        if not self._made or not (self.flow.write_paused or self.transport.is_closing()):
            return 0
        return self.transport.get_write_buffer_size()

    def cut(self) -> None:
        """Close now: see `Held`."""
        if self._made:
            self.transport.abort()
        elif self.opening is not None:
            self.opening.cancel()
        else:
            self.unwanted = True

    def _wait_for_request(self) -> None:
        self._stage = _SILENCE
        self._all.idle(self)

    # ---- what is refused ----

    def _check_head(self) -> None:
        version = self.parser.get_http_version()
        if version not in ("1.1", "1.0"):
            self._fail(UnknownVersion(f"HTTP/{version} is not spoken here.", advice="Use HTTP/1.1."))
        if len(self.headers) > self.limits.header_count:
            self._fail(
                HeadersTooLarge(
                    f"There are more than {self.limits.header_count} headers.",
                    advice="The server's limit is set by --max-header-count.",
                )
            )
        hosts, size = 0, len(self.url)
        for name, value in self.headers:
            size += len(name) + len(value) + 4  # a colon, a space and the end of the line
            if name == b"host":
                hosts += 1
            elif name == b"transfer-encoding":
                if value.lower() != b"chunked":
                    self._fail(UnknownCoding("The Transfer-Encoding must be chunked, and nothing else."))
                if version == "1.0":
                    self._fail(MalformedRequest("HTTP/1.0 has no Transfer-Encoding."))
        if size > self.limits.header_bytes:
            self._fail(self._too_large())
        if self.url[:1] != b"/" and not _has_path(self.url):
            self._fail(MalformedRequest("The request target has no path."))
        if hosts != 1 and (hosts or version == "1.1"):
            self._fail(MalformedRequest(f"A request has one Host header, this one has {hosts}."))

    def _too_large(self) -> PenstockError:
        limit = self.limits.header_bytes
        advice = "The server's limit is set by --max-header-bytes."
        if self._stage == _HEAD and len(self.url) > limit // 2:
            return UriTooLong(f"The URL with the headers is over the limit of {limit} bytes.", advice=advice)
        return HeadersTooLarge(f"The headers are over the limit of {limit} bytes.", advice=advice)

    def _fail(self, error: PenstockError) -> None:
        """End the parsing, from within one of its callbacks."""
        self._fault = error
        raise error

    def _refuse(self, error: PenstockError) -> None:
        """Answer what is no request, or not a whole one, and close.

        An answer to an earlier request is finished first: nothing may be written into it, and nobody knows
        what the client would take a further one for.
        """
        self._all.log.warning(error.code or "", "A request from %s is refused: %s", self.address, error)
        self._all.busy(self)
        answered = self._stage == _BODY and self.cycle.response_complete
        running = self._answering
        own = self._stage == _BODY and running is self.cycle
        self._stage = _REFUSED
        self.deadline = math.inf
        self._pending = 0
        self.pipeline.clear()
        if running is not None and not own:
            running.keep_alive = False
            self.cycle = running
        elif running is not None and running.response_started:
            self.cut()
        elif answered or self.transport.is_closing():
            self.transport.close()
        else:
            if running is not None:
                running.disconnected = True
                running.message_event.set()
            self._write(error)

    def _write(self, error: PenstockError) -> None:
        body = error_bytes(error)
        fields = [
            *self.server_state.default_headers,
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
        ]
        head = b"".join(name + b": " + value + b"\r\n" for name, value in fields)
        self.transport.write(STATUS_LINE[error.status] + head + b"\r\n" + body)
        self._linger()

    def _linger(self) -> None:
        self._pending = 0
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.deadline = self.loop.time() + _LINGER

    # ---- an offer of another protocol ----

    def _offered(self) -> bool:
        return bool(self.parser.should_upgrade()) and self.parser.get_method() != b"CONNECT"

    def _head_without_offer(self) -> bytes:
        lines = [
            b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        ]
        for name, value in self.headers:
            if name == b"connection":
                value = b",".join(  # also HTTP2-Settings, which belongs to the offer
                    token for token in value.split(b",") if token.strip().lower() != b"upgrade"
                )
            if name != b"upgrade":
                lines.append(name + b": " + value)
        return b"\r\n".join([*lines, b"", b""])


def _has_path(target: bytes) -> bool:
    try:
        return httptools.parse_url(target).path is not None
    except httptools.HttpParserInvalidURLError:
        return False
