"""What is told of exchanges, in the log and to others: everything but what is secret."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from penstock.http.config import HttpConfig
from penstock.http.exchange import ClientGone, respond
from penstock.http.exchanges import CLIENT_LEFT, AccessLog, Exchange, Watched
from penstock.http.layers import application, restricted
from penstock.http.paths import Paths

from .conftest import Endpoint, listening
from .live import Live


def lines(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name == "penstock.access"]


@pytest.mark.parametrize(
    ("target", "shown"),
    [
        ("/slow?0&api_key=secret", "GET /slow HTTP/1.1"),
        ("/nowhere", "GET /nowhere HTTP/1.1"),
        ("/no%0d%0aINFO:%20where?key=secret%0a", "GET /no%0D%0AINFO%3A%20where HTTP/1.1"),
        ("/" + "x" * 255 + "?key=secret", "GET /" + "x" * 255 + " HTTP/1.1"),
        ("/" + "x" * 256, "GET /" + "x" * 255 + "… HTTP/1.1"),
        ("/" + "x" * 5000 + "?key=secret", "GET /" + "x" * 255 + "… HTTP/1.1"),
        ("/a?", "GET /a HTTP/1.1"),
        ("/a?b?key=secret", "GET /a HTTP/1.1"),
        ("http://user:secret@x/nowhere", "GET /nowhere HTTP/1.1"),
        ("/no%E2%80%AEhere", "GET /no%E2%80%AEhere HTTP/1.1"),
    ],
)
def test_the_access_log_has_no_secrets_and_one_line_for_a_request(
    server: Live, caplog: pytest.LogCaptureFixture, target: str, shown: str
) -> None:
    with caplog.at_level(logging.INFO, "penstock.access"):
        # which anybody may write
        forwarded = (
            "X-Forwarded-For: 6.6.6.6\r\nX-Forwarded-Proto: gopher\r\nAuthorization: Bearer secret\r\n"
        )
        server.raw(f"GET {target} HTTP/1.1\r\nHost: x\r\n{forwarded}Connection: close\r\n\r\n".encode())
    (record,) = lines(caplog)
    line = record.getMessage()
    assert shown in line
    assert "secret" not in line
    assert line.isprintable()
    assert line.startswith("127.0.0.1:")


def test_a_line_has_its_parts_as_fields(server: Live, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "penstock.access"):
        server.request("POST", "/echo/", {}, {"X-Request-Id": "mine"})
    (record,) = lines(caplog)
    fields = record.fields  # type: ignore[attr-defined]
    assert fields.pop("client").startswith("127.0.0.1:")
    assert fields.pop("duration") >= 0
    assert fields == {
        "method": "POST",
        "path": "/echo/",
        "status": 200,
        "request_id": "mine",
        "finished": True,
    }
    assert record.getMessage().endswith(" mine")


PROBES = ("/health", "/livez", "/readyz", "/ping", "/metrics", "/load")


@pytest.mark.parametrize(
    ("options", "silent", "told"),
    [
        ({}, [*PROBES, "/health/", "/llm/health"], ["/v1/models", "/health/x", "/other/health", "/version"]),
        ({"enable_access_log_for_probes": True}, [], [*PROBES, "/v1/models"]),
        (
            {"disable_access_log_for_endpoints": "/v1/models, /version"},
            [*PROBES, "/v1/models", "/llm/v1/models", "/version"],
            ["/v1/models/x", "/v1"],
        ),
        (
            {"disable_access_log_for_endpoints": "/llm/v1/models", "enable_access_log_for_probes": True},
            ["/llm/v1/models"],
            ["/v1/models", "/health"],
        ),
        ({"disable_access_log_for_endpoints": " , "}, PROBES, ["/", "/v1/models"]),
    ],
)
def test_which_paths_are_logged(
    caplog: pytest.LogCaptureFixture, options: dict[str, Any], silent: list[str], told: list[str]
) -> None:
    paths = Paths([], "/llm")
    log = AccessLog(HttpConfig(**options))
    with caplog.at_level(logging.INFO, "penstock.access"):
        for path in (*silent, *told):
            log(exchange(path=path, normal=paths.normal(path)))
    assert [record.fields["path"] for record in lines(caplog)] == told  # type: ignore[attr-defined]


def exchange(**changes: Any) -> Exchange:
    plain: dict[str, Any] = {
        "client": "unix",
        "method": "GET",
        "path": "/",
        "normal": "/",
        "template": None,
        "version": "1.1",
        "status": 200,
        "seconds": 0.5,
        "request_bytes": 0,
        "response_bytes": 0,
        "whole": True,
        "request_id": None,
    }
    return Exchange(**{**plain, **changes})


def test_no_access_log_at_all(caplog: pytest.LogCaptureFixture) -> None:
    with listening(disable_uvicorn_access_log=True) as server, caplog.at_level(logging.INFO):
        server.get("/nowhere")
    assert not lines(caplog)
    assert "nowhere" not in caplog.text


# ---- what observers hear ----


def observed(
    app: Callable[[Scope, Receive, Send], Awaitable[None]], **scope: Any
) -> tuple[list[Exchange], list[Message]]:
    """The exchanges, and what was sent, of one request to an application behind /v1/models/{name:path}."""
    heard: list[Exchange] = []
    sent: list[Message] = []
    now = iter([10.0, 12.5])
    routes = [Route("/v1/models/{name:path}", Endpoint(app))]
    watched = Watched(app, Paths(routes, "/llm/"), [heard.append], clock=lambda: next(now))
    plain: dict[str, Any] = {"type": "http", "method": "GET", "path": "/llm/v1/models/a/b/", "headers": []}

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    async def run() -> None:
        await watched({**plain, "http_version": "1.1", "client": ("::1", 5), **scope}, receive, send)

    asyncio.run(run())
    return heard, sent


def test_observers_hear_of_route_status_lengths_and_time() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await respond(send, b"{}", status=418)

    (heard,), _ = observed(app, headers=[(b"content-length", b"7")])
    assert (heard.template, heard.normal, heard.path) == (
        "/v1/models/{name:path}",
        "/v1/models/a/b",
        "/llm/v1/models/a/b/",
    )
    assert (heard.status, heard.seconds, heard.request_bytes, heard.response_bytes) == (418, 2.5, 7, 2)
    assert (heard.client, heard.whole, heard.request_id) == ("::1:5", True, None)


@pytest.mark.parametrize("length", [b"-1", b"x", "²".encode(), b""])
def test_lengths_that_are_none(length: bytes) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await respond(send, b"")

    (heard,), _ = observed(app, headers=[(b"content-length", length)], client=None)
    assert (heard.request_bytes, heard.client) == (0, "unix")


def test_a_client_that_leaves_before_the_answer_and_within_it() -> None:
    async def before(scope: Scope, receive: Receive, send: Send) -> None: ...

    async def within(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x", "more_body": True})

    (heard,), _ = observed(before)
    assert (heard.status, heard.whole) == (CLIENT_LEFT, False)
    (heard,), _ = observed(within)
    assert (heard.status, heard.whole) == (200, False)


def test_an_exchange_that_fails_is_told_all_the_same() -> None:
    heard: list[Exchange] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise ClientGone

    async def nothing(*_: Any) -> Any: ...

    watched = Watched(app, Paths([]), [heard.append])
    scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "http_version": "1.1"}
    with pytest.raises(ClientGone):
        asyncio.run(watched(scope, nothing, nothing))
    assert [each.status for each in heard] == [CLIENT_LEFT]


def test_an_exchange_is_told_before_the_client_can_know_that_it_is_over() -> None:
    heard: list[Exchange] = []
    known: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await respond(send, b"")
        raise ClientGone  # is no second exchange

    async def send(message: Message) -> None:
        known.append(len(heard))

    async def nothing(*_: Any) -> Any: ...

    watched = Watched(app, Paths([]), [heard.append])
    scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "http_version": "1.1"}
    with pytest.raises(ClientGone):
        asyncio.run(watched(scope, nothing, send))
    assert (known, len(heard)) == ([0, 1], 1)


def test_what_is_refused_beyond_the_limit_is_told_too() -> None:
    """And only health and metrics are answered there, however they are written."""
    heard: list[Exchange] = []

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        await respond(send, b"")

    routes = [Route(path, Endpoint(answer)) for path in ("/health", "/v1/models", "/load")]
    app = restricted(application(routes, HttpConfig(root_path="/llm"), [heard.append]))

    async def nothing(*_: Any) -> Any: ...

    async def run() -> None:
        for path in ("/health", "/llm/health/", "/v1/models", "/load", "/llm"):
            scope = {"type": "http", "method": "GET", "path": path, "headers": [], "http_version": "1.1"}
            await app(scope, nothing, nothing)

    asyncio.run(run())
    assert [each.status for each in heard] == [200, 200, 503, 503, 503]


# ---- paths ----


@pytest.mark.parametrize(
    ("root", "path", "normal"),
    [
        ("", "/v1/models", "/v1/models"),
        ("", "/v1/models//", "/v1/models"),
        ("", "//", "/"),
        ("/", "/v1/models", "/v1/models"),
        ("/llm", "/llm/v1/models", "/v1/models"),
        ("/llm/", "/llm/v1/models/", "/v1/models"),
        ("/llm", "/v1/models", "/v1/models"),
        ("/llm", "/llm", "/"),
        ("/llm", "/llm/", "/"),
        ("/llm", "/llmx/v1", "/llmx/v1"),
        ("/llm", "/llm/llm/health", "/llm/health"),
        ("/a/b", "/a/b/health", "/health"),
        ("/a/b", "/a/health", "/a/health"),
    ],
)
def test_normal_paths(root: str, path: str, normal: str) -> None:
    assert Paths([], root).normal(path) == normal


@pytest.mark.parametrize("path", ["/llm/echo", "/echo", "/llm/echo/"])
def test_a_root_path_may_be_there_or_not(path: str) -> None:
    with listening(root_path="/llm", api_key=("k",)) as server:
        headers = {"Authorization": "Bearer k"}
        assert server.request("POST", path, {"a": 1}, headers).json == {"a": 1}
        assert server.request("POST", path, {}).status == 401
        assert server.get("/llm/health").status == 200
        assert server.request("GET", "/llm/llm/health", headers=headers).status == 404
