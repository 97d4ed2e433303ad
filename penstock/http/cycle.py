"""One exchange on a connection: uvicorn's, with an answer that costs less.

    head + first piece     in one write where they come together: a write is 20 µs, most of it the kernel's
    names of headers       are checked and put into lower case once, not in every answer; values all at once

A head that is followed by nothing goes out by itself, in the loop's next turn.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from uvicorn.protocols.http.httptools_impl import (
    HEADER_RE,
    HEADER_VALUE_RE,
    STATUS_LINE,
    RequestResponseCycle,
)

_starts: dict[bytes, bytes] = {}
"""Name as it was given → the beginning of its line."""
_MOST = 1024
_COPIED = 64 << 10
"""Bytes of a body that are copied behind a head; a longer one is written by itself."""


class Cycle(RequestResponseCycle):
    """See the module. Connections turn uvicorn's into it."""

    head = b""
    """What goes out before anything else."""

    async def send(self, message: Any) -> None:
        """ASGI's."""
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if self.disconnected:
            return
        if not self.response_started:
            if message["type"] != "http.response.start":
                raise RuntimeError(f"an answer begins with http.response.start, not {message['type']}")
            self.response_started = True
            self.waiting_for_100_continue = False
            self.head = self._head(message["status"], [*self.default_headers, *message.get("headers", ())])
            asyncio.get_running_loop().call_soon(self._flush)
            return
        if self.response_complete or message["type"] != "http.response.body":
            raise RuntimeError(f"{message['type']} after the end of an answer, or instead of its body")
        more = message.get("more_body", False)
        self._write(message.get("body", b""), more)
        if more:
            return
        if self.expected_content_length != 0:
            raise RuntimeError("the body is shorter than its Content-Length")
        self.response_complete = True
        self.message_event.set()
        if not self.keep_alive:
            self.transport.close()
        self.on_response()

    def _head(self, status: int, headers: Sequence[tuple[bytes, bytes]]) -> bytes:
        if HEADER_VALUE_RE.search(b"".join([value for _, value in headers])):
            raise RuntimeError("an answer has a header whose value cannot be one")
        lines = [STATUS_LINE[status]]
        closes = False
        for name, value in headers:
            start = _starts.get(name) or _start(name)
            if start == b"content-length: " and self.chunked_encoding is None:
                self.expected_content_length = int(value)
                self.chunked_encoding = False
            elif start == b"transfer-encoding: " and value.lower() == b"chunked":
                self.expected_content_length = 0
                self.chunked_encoding = True
            elif start == b"connection: " and b"close" in map(bytes.strip, value.lower().split(b",")):
                self.keep_alive = False
                closes = True
            lines += (start, value, b"\r\n")
        if not (self.keep_alive or closes):
            lines.append(b"connection: close\r\n")
        if self.chunked_encoding is None and self.scope["method"] != "HEAD" and status not in (204, 304):
            self.chunked_encoding = True
            lines.append(b"transfer-encoding: chunked\r\n")
        lines.append(b"\r\n")
        return b"".join(lines)

    def _write(self, body: bytes, more: bool) -> None:
        head, self.head = self.head, b""
        if self.scope["method"] == "HEAD":
            self.expected_content_length = 0
            body = b""
        elif self.chunked_encoding:
            end = b"" if more else b"0\r\n\r\n"
            body = b"%x\r\n%b\r\n%b" % (len(body), body, end) if body else end
        else:
            self.expected_content_length -= len(body)
            if self.expected_content_length < 0:
                self._put(head)
                raise RuntimeError("the body is longer than its Content-Length")
        if head and len(body) > _COPIED:
            self._put(head)
            head = b""
        self._put(head + body if head else body)

    def _flush(self) -> None:
        head, self.head = self.head, b""
        if not self.disconnected:
            self._put(head)

    def _put(self, data: bytes) -> None:
        if data:
            self.transport.write(data)


def _start(name: bytes) -> bytes:
    if HEADER_RE.search(name):
        raise RuntimeError("an answer has a header whose name cannot be one")
    start = name.lower() + b": "
    if len(_starts) < _MOST:
        _starts[name] = start
    return start
