"""A connection that breaks after so many bytes: a TCP proxy in front of a real server.

gateway ──▶ Cutter ──▶ server        the next streams are cut where `plan` says, everything else goes through
"""

from __future__ import annotations

import contextlib
import re
import select
import socket
import struct
import threading
from dataclasses import dataclass
from typing import Literal

How = Literal["close", "reset", "stall"]


@dataclass(frozen=True)
class Cut:
    """One break."""

    at: int
    """Bytes of the answer's body that come through."""
    how: How = "close"


class Cutter:
    """Connections of one request each, in threads."""

    def __init__(self, port: int) -> None:
        self._behind = port
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self.plan: list[Cut] = []
        """Of the next generating requests, in order."""
        self.cuts = 0
        """That were made: an answer may be shorter."""
        self._threads: list[threading.Thread] = []
        self._open: set[socket.socket] = set()
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(10)
        for each in list(self._open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._socket.accept()
                thread = threading.Thread(target=self._serve, args=(client,), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            self._open.add(client)
            try:
                self._exchange(client)
            finally:
                self._open.discard(client)

    def _exchange(self, client: socket.socket) -> None:
        request = _request(client)
        if not request:
            return
        cut = self.plan.pop(0) if request.startswith(b"POST") and self.plan else None
        with socket.create_connection(("127.0.0.1", self._behind)) as server:
            self._open.add(server)
            line, _, rest = request.partition(b"\r\n")
            server.sendall(line + b"\r\nConnection: close\r\n" + rest)
            try:
                self._answer(server, client, cut)
            finally:
                self._open.discard(server)

    def _answer(self, server: socket.socket, client: socket.socket, cut: Cut | None) -> None:
        head, body = b"", 0
        while piece := self._read(server, client):
            if b"\r\n\r\n" not in head:
                head += piece
                if b"\r\n\r\n" not in head:
                    continue
                start, _, piece = head.partition(b"\r\n\r\n")
                client.sendall(start + b"\r\n\r\n")
            if cut is not None and body + len(piece) > cut.at:
                client.sendall(piece[: cut.at - body])
                self.cuts += 1
                self._break(client, cut.how)
                return
            body += len(piece)
            client.sendall(piece)

    def _read(self, server: socket.socket, client: socket.socket) -> bytes:
        """What the server says next; b"" at its end, or when the client has left."""
        readable, _, _ = select.select([server, client], [], [])
        return server.recv(65536) if server in readable else b""

    def _break(self, client: socket.socket, how: How) -> None:
        if how == "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
        elif how == "stall":
            with contextlib.suppress(OSError):
                while client.recv(65536):
                    pass


def _request(client: socket.socket) -> bytes:
    """One whole request; b"" where there is none."""
    data = b""
    while piece := client.recv(65536):
        data += piece
        head, end, body = data.partition(b"\r\n\r\n")
        if end:
            size = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
            if len(body) >= int(size[1] if size else 0):
                return data
    return b""
