"""An application on a real socket, and one exchange with it."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from penstock.http.config import HttpConfig
from penstock.http.connection import Connection
from penstock.http.serve import bind

PATIENCE = 20.0
"""Seconds after which a wait in a test counts as a hang."""


class Live:
    """An application behind uvicorn, in a thread."""

    def __init__(self, app: ASGIApp, config: HttpConfig) -> None:
        self._socket = bind(config)
        self.port: int = self._socket.getsockname()[1]
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                http=Connection,
                log_config=None,
                lifespan="off",
                ws="none",
                root_path=config.root_path,
            )
        )
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self._socket.listen()  # connections wait in the backlog until the loop runs
        self._thread.start()

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

    def _run(self) -> None:
        asyncio.run(self._server.serve(sockets=[self._socket]))


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
    def error(self) -> dict[str, Any]:
        """The error object, checked for its shape."""
        body = self.json
        assert set(body["error"]) == {"message", "type", "param", "code"}
        assert isinstance(body["error"]["message"], str)
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
