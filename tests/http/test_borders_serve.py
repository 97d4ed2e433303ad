"""How a server begins and ends, step by step: the socket, signals, a worker that dies, who is accepted."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from penstock.core.errors import PenstockError, StartupError, Unavailable
from penstock.http import listener as listener_module
from penstock.http import serve as module
from penstock.http.bind import bind, bind_error
from penstock.http.config import HttpConfig
from penstock.http.limits import Connections, Limits
from penstock.http.listener import Listener
from penstock.http.peers import Peers
from penstock.http.serve import Lifecycle, Server, _uvicorn_config

from .live import PATIENCE

# ---- the socket ----


@pytest.mark.parametrize(
    ("number", "param", "words"),
    [
        (
            errno.EADDRINUSE,
            "--port",
            "Port 80 is in use (h:80). Choose another with --port, such as --port 81,",
        ),
        (errno.EACCES, "--port", "Port 80 needs privileges that this process does not have. Choose a port"),
        (errno.EPERM, "--port", "Choose a port of 1024 or more with --port."),
        (
            errno.EADDRNOTAVAIL,
            "--host",
            "Cannot listen on h:80: Cannot assign requested address. Use an address",
        ),
    ],
)
def test_why_a_port_cannot_be_had(number: int, param: str, words: str) -> None:
    error = bind_error("h:80", 80, OSError(number, os.strerror(number)))
    assert error.param == param
    assert words in str(error)


def test_a_host_that_is_none_is_named_with_what_would_be_one() -> None:
    with pytest.raises(StartupError) as caught:
        bind(HttpConfig(host="no such host", port=0))
    assert caught.value.param == "--host"
    assert str(caught.value).startswith("--host 'no such host' cannot be resolved: ")
    assert str(caught.value).endswith("0.0.0.0 for all of them, or 127.0.0.1.")
    with pytest.raises(StartupError) as caught:
        bind(HttpConfig(host="192.0.2.1", port=0))  # TEST-NET-1, never assigned
    assert caught.value.param == "--host"


def test_a_port_waits_for_nobody(tmp_path: Path) -> None:
    with bind(HttpConfig(host="127.0.0.1", port=0)) as bound:
        assert bound.getsockname()[0] == "127.0.0.1"
        assert not bound.getblocking()
        with pytest.raises(ConnectionRefusedError):  # it does not listen yet
            socket.create_connection(bound.getsockname(), timeout=PATIENCE)
    missing = str(tmp_path / "cert.pem")
    with pytest.raises(StartupError, match=r"The TLS files cannot be used \(.*cert\.pem, key\): ") as caught:
        bind(HttpConfig(host="127.0.0.1", port=0, ssl_certfile=missing, ssl_keyfile="key"))
    assert caught.value.param == "--ssl-certfile"


# ---- uvicorn ----


def test_uvicorn_is_told_what_the_flags_say() -> None:
    config = HttpConfig(root_path="/llm", timeout_keep_alive=7, ssl_keyfile="k", ssl_certfile="c")
    loggers = [logging.getLogger(name) for name in ("uvicorn", "uvicorn.error")]
    before = [(each.level, list(each.handlers), each.propagate) for each in loggers]
    made = _uvicorn_config(None, config)  # type: ignore[arg-type]
    assert (made.ws, made.lifespan, made.proxy_headers, made.server_header) == ("none", "off", False, False)
    assert made.timeout_keep_alive == 7
    assert not made.is_ssl, "the listener has the context, which changes with its files (`tls`)"
    assert made.timeout_graceful_shutdown == module._FLUSH
    assert made.root_path == "", "a proxy's path is taken off here, once (`paths`)"
    assert not made.access_log, "which has queries in it"
    after = [(each.level, list(each.handlers), each.propagate) for each in loggers]
    assert after == before, "logging stays as it is"


# ---- the end ----


class Upstreams:
    """A worker that is drained when it is told to be."""

    failure: PenstockError | None = None
    load = 3

    def __init__(self, error: Exception | None = None) -> None:
        self.drained: list[float] = []
        self.go = asyncio.Event()
        self._error = error

    async def drain(self, timeout: float) -> None:
        self.drained.append(timeout)
        await self.go.wait()
        if self._error is not None:
            raise self._error

    async def close(self) -> None: ...


def life(worker: Upstreams) -> tuple[Lifecycle, Any]:
    server = SimpleNamespace(should_exit=False, force_exit=False)
    return Lifecycle(cast(Any, server), worker, "engine", 9.0), server


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_the_first_signal_drains_and_the_second_aborts(caplog: pytest.LogCaptureFixture) -> None:
    async def scene() -> None:
        before = asyncio.all_tasks()
        worker = Upstreams()
        lifecycle, server = life(worker)
        lifecycle.stop()
        await settle()
        assert worker.drained == [9.0]
        assert (server.should_exit, server.force_exit, lifecycle.exit_status) == (False, False, 0)
        assert "Draining: 3 running requests get up to 9 s to finish" in caplog.text
        worker.go.set()
        await settle()
        assert (server.should_exit, server.force_exit, lifecycle.exit_status) == (True, False, 0)
        await lifecycle.finish()

        worker = Upstreams()
        lifecycle, server = life(worker)
        for _ in range(3):
            lifecycle.stop()
        await settle()
        assert worker.drained == [9.0]
        assert (server.should_exit, server.force_exit, lifecycle.exit_status) == (True, True, 1)
        assert "Second signal: aborting 3 running requests." in caplog.text
        await lifecycle.finish()
        await settle()
        assert asyncio.all_tasks() == before, "no task is left behind"

    with caplog.at_level(logging.INFO, "penstock.http"):
        asyncio.run(asyncio.wait_for(scene(), PATIENCE))


def test_a_drain_that_fails_ends_the_server_with_an_error(caplog: pytest.LogCaptureFixture) -> None:
    async def scene() -> None:
        worker = Upstreams(RuntimeError("stuck"))
        lifecycle, server = life(worker)
        worker.go.set()
        lifecycle.stop()
        await settle()
        assert (server.should_exit, lifecycle.exit_status) == (True, 1)
        assert "draining failed" in caplog.text

    asyncio.run(asyncio.wait_for(scene(), PATIENCE))


def test_a_dead_worker_leaves_a_moment_for_its_last_words(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    slept: list[float] = []

    async def scene() -> None:
        worker = Upstreams()
        lifecycle, server = life(worker)

        async def sleep(seconds: float) -> None:
            assert not server.should_exit
            slept.append(seconds)
            if len(slept) == 3:
                worker.failure = Unavailable("gone")

        monkeypatch.setattr(module, "asyncio", SimpleNamespace(**{**vars(asyncio), "sleep": sleep}))
        await lifecycle.watch()
        assert (server.should_exit, lifecycle.exit_status) == (True, 1)

    asyncio.run(asyncio.wait_for(scene(), PATIENCE))
    assert slept == [module._POLL] * 3 + [module._LAST_WORDS]
    assert 1 <= module._LAST_WORDS <= 5
    assert "The engine has died: gone" in caplog.text


def test_without_a_signal_there_is_nothing_to_finish() -> None:
    asyncio.run(life(Upstreams())[0].finish())


def test_a_server_that_is_forced_to_end_cancels_what_runs() -> None:
    async def scene() -> None:
        server = Server(None, HttpConfig())  # type: ignore[arg-type]
        started: list[bool] = []
        server._on_started = lambda: started.append(server.started)
        await server.startup(None)
        assert (server.servers, started) == ([], [True])
        ended: list[str] = []

        async def handler() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.append("it had a moment to say goodbye")

        task = asyncio.create_task(handler())
        await settle()
        server.server_state.tasks.add(task)
        server.force_exit = True
        await server.shutdown([])
        assert task.cancelled()
        assert len(ended) == 1

    asyncio.run(asyncio.wait_for(scene(), PATIENCE))


def test_a_server_without_descriptors_names_its_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(wanted: int) -> int:
        raise ValueError("there is no room")

    monkeypatch.setattr(module, "affordable", none)
    with pytest.raises(StartupError, match=r"Cannot serve: there is no room\.") as caught:
        Server(None, HttpConfig())  # type: ignore[arg-type]
    assert caught.value.param == "--max-connections"


# ---- who is accepted ----


class Accepted:
    """What a listener needs of connections, and of one."""

    def __init__(self, address: str = "") -> None:
        self.address = address
        self.unwanted = False
        self.opening: asyncio.Task[None] | None = None
        self.cuts = 0

    def cut(self) -> None:
        self.cuts += 1


class Table:
    """Admits everybody, as long as it is receptive."""

    peers: Peers | None = None

    def __init__(self, *, receptive: bool = True, admits: bool = True) -> None:
        config = HttpConfig(timeout_headers=3.0)
        self.limits = Limits.of(config, 10)
        self.receptive = receptive
        self.admits = admits
        self.admitted: list[Accepted] = []
        self.forgotten: list[Accepted] = []
        self.sweeps = 0

    def admit(self, connection: Accepted) -> bool:
        self.admitted.append(connection)
        return self.admits

    def forget(self, connection: Accepted) -> None:
        self.forgotten.append(connection)

    def sweep(self) -> float:
        self.sweeps += 1
        return 60.0


def listening(sock: socket.socket, table: Table, tls: Any = None) -> Listener:
    return Listener(sock, cast(Connections, table), cast(Any, Accepted), tls, 16)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """How connections are opened; none is."""
    calls: list[dict[str, Any]] = []

    async def connect(self: Any, make: Any, client: socket.socket, **options: Any) -> None:
        calls.append(options)
        client.close()

    monkeypatch.setattr(asyncio.SelectorEventLoop, "connect_accepted_socket", connect)
    return calls


async def until(condition: Any) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it never came")


def test_clients_are_known_by_their_address_where_they_have_one(
    tmp_path: Path, opened: list[dict[str, Any]]
) -> None:
    async def scene() -> None:
        for family, address, name in (
            (socket.AF_INET, ("127.0.0.1", 0), "127.0.0.1"),
            (socket.AF_UNIX, str(tmp_path / "socket"), ""),
        ):
            table = Table()
            with socket.socket(family) as sock, socket.socket(family) as client:
                sock.bind(address)
                listener = listening(sock, table)
                client.setblocking(False)
                await asyncio.get_running_loop().sock_connect(client, sock.getsockname())
                await until(lambda table=table: table.admitted)
                assert [each.address for each in table.admitted] == [name]
                await until(lambda listener=listener: not listener._opening)
                listener.close()
                await listener.wait_closed()
                assert listener._sweeper.cancelled()
        assert opened == [{"ssl": None}] * 2

    asyncio.run(asyncio.wait_for(scene(), PATIENCE))


def test_a_handshake_has_the_time_of_headers(opened: list[dict[str, Any]]) -> None:
    async def scene() -> None:
        tls, table = SimpleNamespace(context=object()), Table()
        with bind(HttpConfig(host="127.0.0.1", port=0)) as sock, socket.socket() as client:
            listener = listening(sock, table, tls)
            client.setblocking(False)
            await asyncio.get_running_loop().sock_connect(client, sock.getsockname())
            await until(lambda: opened)
            assert opened == [{"ssl": tls.context, "ssl_handshake_timeout": 3.0}]
            listener.close()
            await listener.wait_closed()

    asyncio.run(asyncio.wait_for(scene(), PATIENCE))


def test_without_room_nobody_is_accepted_for_a_moment(opened: list[dict[str, Any]]) -> None:
    async def scene() -> None:
        table = Table(receptive=False)
        with bind(HttpConfig(host="127.0.0.1", port=0)) as sock, socket.socket() as client:
            listener = listening(sock, table)
            client.setblocking(False)
            await asyncio.get_running_loop().sock_connect(client, sock.getsockname())
            await until(lambda: listener._pause)
            assert not table.admitted
            table.receptive = True
            await until(lambda: table.admitted)
            listener.close()
            await listener.wait_closed()

    asyncio.run(asyncio.wait_for(scene(), PATIENCE))


def test_who_is_not_admitted_is_closed_and_who_is_opening_is_cut_at_the_end(
    opened: list[dict[str, Any]],
) -> None:
    async def scene() -> None:
        loop = asyncio.get_running_loop()
        table = Table(admits=False)
        with bind(HttpConfig(host="127.0.0.1", port=0)) as sock, socket.socket() as client:
            listener = listening(sock, table)
            client.setblocking(False)
            await loop.sock_connect(client, sock.getsockname())
            assert await loop.sock_recv(client, 1) == b""
            assert opened == []
            held = Accepted()
            task = loop.create_task(asyncio.sleep(0))
            listener._opening[cast(Any, held)] = task
            listener.close()
            assert held.cuts == 1
            await listener.wait_closed()
            await task

    asyncio.run(asyncio.wait_for(scene(), PATIENCE))


def test_without_descriptors_the_listener_waits_and_says_so(
    monkeypatch: pytest.MonkeyPatch, opened: list[dict[str, Any]]
) -> None:
    async def scene() -> None:
        said: list[tuple[Any, ...]] = []
        table = Table()
        table.log = SimpleNamespace(warning=lambda *args: said.append(args))  # type: ignore[attr-defined]
        with bind(HttpConfig(host="127.0.0.1", port=0)) as sock:
            listener = listening(sock, table)
            results: list[Exception] = [OSError(errno.EMFILE, "Too many open files"), BlockingIOError()]

            def accept() -> None:
                raise results.pop(0)

            listener._sock = cast(Any, SimpleNamespace(accept=accept))
            monkeypatch.setattr(listener, "_wait", lambda: said.append(("waits",)))
            listener._accept()
            listener._accept()
            assert said == [
                ("accept", "Connections wait to be accepted: %s.", "Too many open files"),
                ("waits",),
            ]
            results.append(OSError(errno.EINVAL, "Invalid argument"))
            with pytest.raises(OSError, match="Invalid argument"):
                listener._accept()
            listener._sock = sock
            listener.close()
            await listener.wait_closed()

    asyncio.run(asyncio.wait_for(scene(), PATIENCE))
    assert listener_module._PAUSE < 1
