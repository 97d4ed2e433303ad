"""Listening on a Unix socket: who may have it, what a crash leaves, and that nothing is left."""

from __future__ import annotations

import asyncio
import http.client
import os
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from penstock.core.errors import StartupError
from penstock.http.bind import address, bind
from penstock.http.config import HttpConfig
from penstock.http.serve import Server
from penstock.http.unix import UnixSocket

from .conftest import make_app
from .live import PATIENCE


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=PATIENCE)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(self._path)


def test_a_server_on_a_unix_socket(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "penstock.access")
    path = tmp_path / "penstock.sock"
    config = HttpConfig(uds=str(path), max_connections_per_client=1)
    sock = bind(config)
    assert address(config, sock) == f"unix:{path}"
    server = Server(make_app(config), config)
    sock.listen()
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[sock])), daemon=True)
    thread.start()
    held = UnixConnection(str(path))  # clients have no addresses here: none is one client's second one
    held.request("GET", "/health")
    assert held.getresponse().read() == b"{}"
    connection = UnixConnection(str(path))
    connection.request("POST", "/echo", b'{"a": 1}')
    assert connection.getresponse().read() == b'{"a":1}'
    held.close()
    connection.close()
    server.should_exit = True
    thread.join(PATIENCE)
    assert not list(tmp_path.iterdir())
    assert 'unix - "POST /echo HTTP/1.1" 200' in caplog.text


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o755), (0o007, 0o770), (0o077, 0o700)])
def test_the_umask_says_who_may_connect(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        sock = UnixSocket(str(tmp_path / "s"))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == mode
    assert stat.S_IMODE((tmp_path / "s.lock").stat().st_mode) & 0o077 == 0
    sock.close()


def test_the_second_of_two_servers_is_refused_also_before_the_first_listens(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    first = UnixSocket(path)
    with pytest.raises(StartupError, match="another server has it") as caught:
        UnixSocket(path)
    assert caught.value.param == "--uds"
    first.listen()
    with pytest.raises(StartupError, match="another server has it"):
        UnixSocket(path)
    assert Path(path).is_socket()
    first.close()
    UnixSocket(path).close()


def test_a_socket_that_somebody_else_listens_on_stays(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        with pytest.raises(StartupError, match="another process listens there"):
            UnixSocket(str(path))
        assert path.is_socket()


def test_what_a_crash_leaves_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    code = f"""
import os
from penstock.http.unix import UnixSocket
UnixSocket({str(path)!r}).listen()
os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert {each.name for each in tmp_path.iterdir()} == {"s", "s.lock"}
    sock = UnixSocket(str(path))
    sock.listen()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    sock.close()
    assert not list(tmp_path.iterdir())


def test_a_lock_file_that_vanishes_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who had the path removes the lock file at the end, perhaps between our opening and our locking it."""
    import fcntl

    real, path = fcntl.flock, tmp_path / "s"
    left = [True]

    def flock(descriptor: int, operation: int) -> None:
        if left:
            left.pop()
            (tmp_path / "s.lock").unlink()
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    sock = UnixSocket(str(path))
    with pytest.raises(StartupError, match="another server has it"):
        UnixSocket(str(path))
    sock.close()


def test_a_successors_socket_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    first = UnixSocket(str(path))
    path.unlink()
    path.write_text("of somebody else")
    first.close()
    first.close()
    assert path.read_text() == "of somebody else"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("file", "something else than a socket"),
        ("link", "something else than a socket"),
        ("missing/s", "No such file or directory"),
        ("x" * 200, "longer than 107 bytes"),
        ("file/s", "Not a directory"),
    ],
)
def test_paths_that_cannot_be_had(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to("file")
    with pytest.raises(StartupError, match=message) as caught:
        bind(HttpConfig(uds=str(tmp_path / name)))
    assert "--uds" in str(caught.value)
    assert (tmp_path / "file").read_text() == "precious"
    assert {each.name for each in tmp_path.iterdir()} == {"file", "link"}


def test_an_empty_path_is_refused() -> None:
    with pytest.raises(StartupError, match="--uds"):
        HttpConfig(uds="")


def test_addresses_as_people_write_them() -> None:
    for host, shown in (("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "localhost")):
        config = HttpConfig(host=host, port=0)
        sock = bind(config)
        assert address(config, sock) == f"http://{shown}:{sock.getsockname()[1]}"
        sock.close()
