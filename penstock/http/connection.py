"""One connection: uvicorn's httptools protocol, with two things that it gets wrong put right.

    Upgrade: h2c    a client's offer (curl --http2, Java's HttpClient) to go on in HTTP/2. A server that does
                    not know the protocol ignores the header (RFC 9110, 7.8); httptools skips the body
    half a request  when the server ends, nobody waits for the rest of a body: the connection is closed, and
                    the handler that reads it sees the client leave

It knows uvicorn's protocol and httptools' parser; it knows nothing of the application.
"""

from __future__ import annotations

import contextlib

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class Connection(HttpToolsProtocol):
    """See the module."""

    def data_received(self, data: bytes) -> None:
        """Feed the parser; a request with an offer is fed once more, without the offer."""
        self._unset_keepalive_if_required()
        while data:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                if not self._offered():  # CONNECT: nothing here answers it
                    self._refuse()
                    return
                data = self._head_without_offer() + data[upgrade.args[0] :]
                self.parser = httptools.HttpRequestParser(self)  # the old one is past its message
                with contextlib.suppress(AttributeError):  # httptools < 0.6.3; as uvicorn sets it
                    self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            except httptools.HttpParserError:
                self._refuse()
                return

    def on_headers_complete(self) -> None:
        """The head is there: the request begins, unless it comes again without its offer."""
        if not self._offered():
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The body is there."""
        if not self._offered():
            super().on_message_complete()

    def shutdown(self) -> None:
        """The server ends: close when idle or still reading a request, else after the response."""
        cycle = self.cycle
        if cycle is not None and cycle.more_body and not cycle.response_started:
            self.transport.close()
        else:
            super().shutdown()

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

    def _refuse(self) -> None:
        message = "Invalid HTTP request received."
        self.logger.warning(message)
        self.send_400_response(message)
