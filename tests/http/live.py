"""An application on a real socket, and one exchange with it."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Callable
from typing import Any

import uvicorn.server
from starlette.types import ASGIApp

from penstock.http.bind import bind
from penstock.http.config import HttpConfig
from penstock.http.serve import Server

PATIENCE = 20.0
"""Seconds after which a wait in a test counts as a hang."""


class _Asyncio:
    """uvicorn's asyncio, in this process: every hundredth of a second, not every tenth, it looks whether it
    is to end and whether connections have ended. That is 0.15 s less for each of a thousand servers."""

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    async def sleep(self, delay: float) -> None:
        await asyncio.sleep(min(delay, 0.01))


uvicorn.server.asyncio = _Asyncio()


class Live:
    """An application behind the real server, in a thread."""

    def __init__(
        self, app: ASGIApp, config: HttpConfig, on_started: Callable[[], None] | None = None
    ) -> None:
        self._socket = bind(config)
        self.port: int = self._socket.getsockname()[1]
        self._server = Server(app, config, on_started=on_started)
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def requests(self) -> int:
        """Connections on which a request has begun."""
        return sum(each.cycle is not None for each in list(self._server.server_state.connections))

    def start(self) -> None:
        self._socket.listen()  # connections wait in the backlog until the loop runs
        self._thread.start()

    def reload(self) -> None:
        """What SIGHUP does."""
        self._server.reload()

    def look(self) -> None:
        """What it does every second where TLS files are watched."""
        assert self._server._tls is not None
        self._server._tls.look()

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(PATIENCE)

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> Response:
        """One exchange. `body` is sent as JSON unless it is bytes."""
        return exchange(self.port, method, path, body, headers)

    def get(self, path: str) -> Response:
        return self.request("GET", path)

    def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> Response:
        return self.request("POST", path, body, headers)

    def connect(self) -> socket.socket:
        """A bare connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)

    def raw(self, *parts: bytes) -> bytes:
        """Send bytes as they are; everything that comes back until the server closes."""
        with self.connect() as connection:
            for part in parts:
                connection.sendall(part)
            return until_closed(connection)

    def _run(self) -> None:
        asyncio.run(self._server.serve(sockets=[self._socket]))


def until_closed(connection: socket.socket) -> bytes:
    """Everything that comes until the server closes, gently or not."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := connection.recv(65536):
            received += chunk
    return received


def parse(data: bytes) -> Response:
    """The one answer in these bytes, which has a Content-Length."""
    head, _, body = data.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    response = Response(int(status.split()[1]), headers, body)
    assert len(body) == int(response.headers["content-length"]), data
    return response


class Response:
    """A whole HTTP answer; header names in lower case."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status = status
        self.headers = {name.lower(): value for name, value in headers.items()}
        self.body = body

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def reason(self) -> str:
        """What kind of error it is, in one word."""
        error = self.error
        return str(error.get("reason", error["code"]))

    @property
    def error(self) -> dict[str, Any]:
        """The error object, checked for its shape."""
        body = self.json
        assert set(body["error"]) - {"reason"} == {"message", "type", "param", "code"}
        assert isinstance(body["error"]["message"], str)
        # OpenAI's words, or the status; our own words are the reason
        code, status = body["error"]["code"], self.status
        assert isinstance(code, str) if code != status else code >= 400
        assert code == status or "reason" not in body["error"]
        error: dict[str, Any] = body["error"]
        return error


def exchange(
    port: int, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> Response:
    """One exchange with whoever listens there."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request(method, path, data, {"Content-Type": "application/json", **(headers or {})})
        answer = connection.getresponse()
        return Response(answer.status, dict(answer.getheaders()), answer.read())
    finally:
        connection.close()
