"""A tiny tokenizer, the fake engine, and the real application on a real socket."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import openai
import pytest
import uvicorn

from penstock.engine.messages import Add
from penstock.http.connection import Connection
from penstock.http.serve import bind
from penstock.server.app import create_app
from penstock.server.config import ServerConfig
from penstock.text.chat_template import ChatTemplate
from penstock.text.tokenizer import Tokenizer

from .fake_engine import PATIENCE, FakeEngine
from .tiny import MODEL, REPLY, make_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture(scope="session")
def says(tokenizer: Tokenizer) -> Callable[[str], Callable[[Add], list[int]]]:
    """A reply for the fake engine: always this text."""
    return lambda text: lambda _: tokenizer.encode(text, add_special_tokens=False)


class LiveServer:
    """The application behind uvicorn, in a thread."""

    def __init__(self, engine: FakeEngine, app: Any, config: ServerConfig) -> None:
        self.engine = engine
        self.app = app
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
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            connection.request(method, path, data, {"Content-Type": "application/json", **(headers or {})})
            answer = connection.getresponse()
            return Response(answer.status, dict(answer.getheaders()), answer.read())
        finally:
            connection.close()

    def get(self, path: str) -> Response:
        return self.request("GET", path)

    def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> Response:
        return self.request("POST", path, body, headers)

    def events(self, path: str, body: dict[str, Any]) -> list[Any]:
        """The events of a stream, decoded; `[DONE]` is checked and left out."""
        answer = self.post(path, {**body, "stream": True})
        assert answer.status == 200, answer.body
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = answer.body.decode().split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""]
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=PATIENCE)

    def _run(self) -> None:
        asyncio.run(self._server.serve(sockets=[self._socket]))


class Call:
    """A chat request whose answer is read piece by piece, or not at all."""

    def __init__(self, port: int, body: dict[str, Any]) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        headers = {"Content-Type": "application/json"}
        self._connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        self._answer: http.client.HTTPResponse | None = None

    def __enter__(self) -> Call:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    @property
    def answer(self) -> http.client.HTTPResponse:
        if self._answer is None:
            self._answer = self._connection.getresponse()
        return self._answer

    def read_until(self, mark: bytes) -> None:
        seen = b""
        while mark not in seen:
            piece = self.answer.read1()
            assert piece
            seen += piece

    def rest(self) -> tuple[int, bytes]:
        return self.answer.status, self.answer.read()

    def leave(self) -> None:
        if self._answer is not None:
            self._answer.close()
        if self._connection.sock is not None:
            with suppress(OSError):  # the server may have closed it already
                self._connection.sock.shutdown(socket.SHUT_RDWR)
        self._connection.close()


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


@contextmanager
def running(
    tokenizer: Tokenizer,
    reply: Callable[[Add], list[int]],
    *,
    engine: FakeEngine | None = None,
    **options: Any,
) -> Iterator[LiveServer]:
    """A server; options of create_app, and of ServerConfig."""
    app_options = {
        name: options.pop(name)
        for name in ("default_sampling", "scheduling_policy", "monotonic", "version")
        if name in options
    }
    template = options.pop("template", None) or ChatTemplate.from_tokenizer(tokenizer)
    options.setdefault("served_model_name", (MODEL, "alias/of-tiny"))
    config = ServerConfig(host="127.0.0.1", port=0, **options)
    engine = engine or FakeEngine(reply)
    server = LiveServer(engine, create_app(engine, tokenizer, template, config, **app_options), config)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def _shared(tokenizer: Tokenizer, says: Any) -> Iterator[LiveServer]:
    with running(tokenizer, says(REPLY)) as server:
        yield server


@pytest.fixture
def server(_shared: LiveServer, says: Any) -> LiveServer:
    """The server with default options, its engine reset: it answers REPLY."""
    _shared.engine.reset(says(REPLY))
    return _shared


@pytest.fixture
def engine(server: LiveServer) -> FakeEngine:
    return server.engine


@pytest.fixture
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client
