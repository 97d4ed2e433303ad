"""The socket, and a server without an engine, as a gateway is one."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from penstock.core.errors import PenstockError, StartupError, Unavailable
from penstock.http.bind import bind
from penstock.http.config import HttpConfig
from penstock.http.serve import serve

from .conftest import make_app
from .live import Response, exchange

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


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
@pytest.mark.parametrize("used", [False, True])
def test_a_port_is_taken_from_the_beginning_and_answers_at_the_end(host: str, used: bool) -> None:
    """While a model loads, nobody else can have the port, and no client can connect; `used`: whether
    connections of an earlier server are still in TIME_WAIT there."""
    first = bind(HttpConfig(host="127.0.0.1", port=0))
    port = first.getsockname()[1]
    if used:
        first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as a listener does
        first.listen()
        first.setblocking(True)
        with socket.create_connection(("127.0.0.1", port)) as client:
            first.accept()[0].close()  # who closes first waits
            assert not client.recv(1)
        first.close()
        first = bind(HttpConfig(host="127.0.0.1", port=port))
    with first:
        with pytest.raises(StartupError, match=f"Port {port} is in use"):
            bind(HttpConfig(host=host, port=port))
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), 5)


def reusable(port: int) -> socket.socket:
    """Bound, and in nobody's way until it listens."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", port))
    return sock


@pytest.mark.parametrize("uvloop", [True, False])
def test_of_two_servers_on_one_port_the_second_is_refused(
    uvloop: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sockets that others have made may both be bound, and only one can listen. uvloop does not tell."""
    monkeypatch.setattr("penstock.http.serve._LAST_WORDS", 0.05)
    first = HttpConfig(host="127.0.0.1", port=0)
    factory = None
    if uvloop:
        factory = pytest.importorskip("uvloop").new_event_loop

    async def start(
        config: HttpConfig, sock: socket.socket, worker: Upstreams, on_started: Callable[[], None]
    ) -> int:
        app = make_app(config)
        return await serve(app, config, worker, sock, on_started=on_started, handle_signals=False)

    async def both() -> None:
        started, never = asyncio.Event(), asyncio.Event()
        one = reusable(0)
        port = one.getsockname()[1]
        second = HttpConfig(host="127.0.0.1", port=port)
        other = reusable(port)
        serving = asyncio.create_task(start(first, one, upstreams := Upstreams(), started.set))
        await started.wait()
        with pytest.raises(StartupError, match=f"Port {port} is in use"):
            await start(second, other, Upstreams(), never.set)
        assert not never.is_set()
        assert other.fileno() == -1
        assert (await asyncio.to_thread(exchange, port, "GET", "/health")).status == 200
        upstreams.failure = Unavailable("enough")
        await serving

    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(both())


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


def test_a_server_without_an_engine(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.http.serve._LAST_WORDS", 0.05)
    config = HttpConfig(host="127.0.0.1", port=0, api_key=("k",))
    upstreams = Upstreams()
    sock = bind(config)
    port = sock.getsockname()[1]

    async def post(path: str, body: bytes, key: str) -> Response:
        return await asyncio.to_thread(exchange, port, "POST", path, body, {"Authorization": f"Bearer {key}"})

    async def life() -> tuple[list[Response], int]:
        started = asyncio.Event()
        serving = asyncio.create_task(
            serve(
                make_app(config),
                config,
                upstreams,
                sock,
                name="gateway",
                on_started=started.set,
                handle_signals=False,
            )
        )
        await started.wait()
        answers = [
            await post("/echo/", b'{"hello": "you"}', "k"),
            await post("/echo", b"{", "k"),
            await post("/echo", b"{}", "x"),
            await post("/nowhere", b"{}", "k"),
        ]
        upstreams.failure = Unavailable("nobody is left")
        return answers, await serving

    (echoed, *refused), status = asyncio.run(life())
    assert (echoed.status, echoed.json) == (200, {"hello": "you"})
    assert [(answer.status, answer.error["code"], answer.error.get("reason")) for answer in refused] == [
        (400, 400, "invalid_json"),
        (401, "invalid_api_key", None),
        (404, 404, None),
    ]
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
