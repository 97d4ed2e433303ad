"""The socket, and a server without an engine, as a gateway is one."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from penstock.core.errors import PenstockError, StartupError, Unavailable
from penstock.http.body import parse_object, read_body
from penstock.http.config import HttpConfig
from penstock.http.exchange import respond
from penstock.http.layers import application
from penstock.http.serve import bind, serve

# ---- the socket ----


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartupError) as caught:
            bind(HttpConfig(host="127.0.0.1", port=port))
    assert f"Port {port} is in use" in str(caught.value)
    assert f"--port {port + 1}" in str(caught.value)


def test_hosts_that_are_not_ours() -> None:
    with pytest.raises(StartupError, match="--host"):
        bind(HttpConfig(host="192.0.2.1", port=0))  # TEST-NET-1, never assigned
    with pytest.raises(StartupError, match="cannot be resolved"):
        bind(HttpConfig(host="no such host", port=0))


def test_a_port_can_be_bound_again_after_use() -> None:
    first = bind(HttpConfig(host="127.0.0.1", port=0))
    port = first.getsockname()[1]
    first.close()
    bind(HttpConfig(host="127.0.0.1", port=port)).close()


def test_tls_files_are_checked_before_anything_else(tmp_path: Path) -> None:
    broken = tmp_path / "cert.pem"
    broken.write_text("no certificate")
    config = HttpConfig(
        host="127.0.0.1", port=0, ssl_certfile=str(broken), ssl_keyfile=str(tmp_path / "missing.pem")
    )
    with pytest.raises(StartupError, match=r"cert\.pem"):
        bind(config)


# ---- a server of its own ----


class Upstreams:
    """Work that is done elsewhere, until it cannot be."""

    failure: PenstockError | None = None
    load = 0
    closed = False

    async def drain(self, timeout: float) -> None: ...

    async def close(self) -> None:
        self.closed = True


class Greet:
    """An endpoint: {"name"} → {"hello"}."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = parse_object(await read_body(scope, receive, 1000))
        await respond(send, json.dumps({"hello": asked["name"]}).encode())


def exchange(port: int, path: str, body: bytes, key: str) -> tuple[int, dict[str, object]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request("POST", path, body, {"Authorization": f"Bearer {key}"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def test_a_server_without_an_engine(caplog: pytest.LogCaptureFixture) -> None:
    config = HttpConfig(host="127.0.0.1", port=0, api_key=("k",))
    app = application([Route("/greet", Greet(), methods=["POST"])], config)
    upstreams = Upstreams()
    sock = bind(config)
    port = sock.getsockname()[1]

    async def life() -> tuple[list[tuple[int, dict[str, object]]], int]:
        started = asyncio.Event()
        serving = asyncio.create_task(
            serve(
                app,
                config,
                upstreams,
                sock,
                name="gateway",
                on_started=started.set,
                handle_signals=False,
                log_config=None,
            )
        )
        await started.wait()
        answers = [
            await asyncio.to_thread(exchange, port, path, body, key)
            for path, body, key in (
                ("/greet/", b'{"name": "you"}', "k"),
                ("/greet", b"{", "k"),
                ("/greet", b"{}", "x"),
                ("/nowhere", b"{}", "k"),
            )
        ]
        upstreams.failure = Unavailable("nobody is left")
        return answers, await serving

    answers, status = asyncio.run(life())
    assert answers[0] == (200, {"hello": "you"})
    assert [status for status, _ in answers] == [200, 400, 401, 404]
    assert all(set(body) == {"error"} for _, body in answers[1:])
    assert (status, upstreams.closed) == (1, True)
    assert "The gateway has died: nobody is left" in caplog.text


def test_the_room_needs_no_engine() -> None:
    """Nothing of the engine is imported, and what a client reads with needs no web framework."""
    code = """
import sys
import penstock.http.chunks, penstock.http.sse
assert not {"starlette", "uvicorn", "msgspec"} & set(sys.modules)
import penstock.http.layers, penstock.http.serve, penstock.http.body, penstock.http.ids
rooms = {name.split(".")[1] for name in sys.modules if name.startswith("penstock.")}
assert rooms == {"core", "http"}, rooms
"""
    subprocess.run([sys.executable, "-c", code], check=True)
