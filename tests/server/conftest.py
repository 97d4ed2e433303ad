"""A tiny tokenizer, the fake engine, and the real application on a real socket."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import openai
import pytest
from starlette.types import ASGIApp

from penstock.server.app import create_app
from penstock.server.batches.desk import Desk
from penstock.server.config import ServerConfig
from penstock.text.chat_template import ChatTemplate
from penstock.text.grammar_check import GrammarCheck
from penstock.text.tokenizer import Tokenizer
from tests.http.live import Live

from .fake_engine import PATIENCE, Asked, FakeEngine
from .tiny import MODEL, REPLY, make_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture(scope="session")
def says(tokenizer: Tokenizer) -> Callable[[str], Callable[[Asked], list[int]]]:
    """A reply for the fake engine: always this text."""
    return lambda text: lambda _: tokenizer.encode(text, add_special_tokens=False)


class LiveServer(Live):
    """The application of an engine."""

    def __init__(
        self,
        engine: FakeEngine,
        app: ASGIApp,
        config: ServerConfig,
        on_started: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(app, config, on_started)
        self.engine = engine

    def events(self, path: str, body: dict[str, Any]) -> list[Any]:
        """The events of a stream, decoded; `[DONE]` is left out; it is there unless the last is an error."""
        answer = self.post(path, {**body, "stream": True})
        assert answer.status == 200, answer.body
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = answer.body.decode().split("\n\n")
        assert lines.pop() == ""
        done = lines[-1] == "data: [DONE]"
        events = [json.loads(line.removeprefix("data: ")) for line in lines[: len(lines) - done]]
        assert done == ("error" not in events[-1])
        return events

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=PATIENCE)


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


@contextmanager
def running(
    tokenizer: Tokenizer,
    reply: Callable[[Asked], list[int]],
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
    desks: list[Desk] = []
    checks: list[GrammarCheck] = []

    def checking(*given: Any) -> GrammarCheck:
        checks.append(GrammarCheck(*given))
        return checks[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("penstock.server.app.GrammarCheck", checking)
        app = create_app(engine, tokenizer, template, config, on_desk=desks.append, **app_options)

    def begin() -> None:
        for desk in desks:
            desk.worker.start()

    server = LiveServer(engine, app, config, begin)
    server.start()
    try:
        yield server
    finally:
        server.stop()
        for desk in desks:
            desk.store.close()
        for check in checks:  # its processes would end with ours, and not before
            check.close()


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
