"""Real PostgreSQL and Redis for tests: on a free port of the loopback, in a temporary folder."""

from __future__ import annotations

import functools
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.ports import free_port

_shared = ExitStack()


def stop() -> None:
    """End what the tests of this process share."""
    _shared.close()
    _postgres_server.cache_clear()


@contextmanager
def postgres() -> Iterator[str]:
    """The URL of an empty database, on a server that all tests of a process share.

    Skips where there is none.
    """
    psycopg = pytest.importorskip("psycopg", reason="the driver of the extra `pg` is not installed")
    server = _postgres_server()
    name = f"test_{secrets.token_hex(4)}"
    with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
        connection.execute(f"create database {name}")
        try:
            yield f"{server}/{name}"
        finally:
            connection.execute(f"drop database {name} with (force)")


@functools.cache
def _postgres_server() -> str:
    """Starts it, until `stop`; its URL without a database."""
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    initdb = shutil.which("initdb") or (str(binaries[-1]) if binaries else None)
    if initdb is None:
        pytest.skip("PostgreSQL is not installed")
    server = Path(initdb).with_name("postgres")
    folder = Path(_shared.enter_context(tempfile.TemporaryDirectory(prefix="penstock-pg-")))
    data = str(folder / "data")
    user: dict[str, int] = {}
    if os.geteuid() == 0:  # it refuses to run as root
        nobody = pwd.getpwnam("nobody")
        user = {"user": nobody.pw_uid, "group": nobody.pw_gid}
        os.chown(folder, nobody.pw_uid, nobody.pw_gid)
    make = [initdb, "-D", data, "-A", "trust", "-U", "penstock", "--no-sync", "-E", "UTF8", "--locale=C"]
    done = subprocess.run(make, capture_output=True, text=True, **user)
    assert done.returncode == 0, done.stderr
    port = free_port()
    with (folder / "log").open("wb") as log:
        command = [str(server), "-D", data, "-p", str(port), "-h", "127.0.0.1", "-k", str(folder), "-F"]
        process = subprocess.Popen(command, stdout=log, stderr=log, **user)
    _shared.callback(process.wait, 20)
    _shared.callback(process.send_signal, signal.SIGINT)  # its fast shutdown: clients are sent away
    await_port(process, port, folder / "log")
    return f"postgresql://penstock@127.0.0.1:{port}"


class Redis:
    """A server that can be stopped and started; it begins empty each time."""

    def __init__(self, binary: str, folder: Path) -> None:
        self._binary, self._folder = binary, folder
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        """Until it accepts connections."""
        log = self._folder / "log"
        flags = ["--bind", "127.0.0.1", "--dir", str(self._folder), "--save", ""]
        with log.open("wb") as file:
            command = [self._binary, "--port", str(self.port), *flags]
            self._process = subprocess.Popen(command, stdout=file, stderr=file)
        await_port(self._process, self.port, log)

    def stop(self) -> None:
        """Its end."""
        self._process.terminate()
        self._process.wait(20)


@contextmanager
def redis_server() -> Iterator[Redis]:
    """A server of its own. Skips where there is none."""
    pytest.importorskip("redis", reason="the client of the extra `redis` is not installed")
    binary = shutil.which("valkey-server") or shutil.which("redis-server")
    if binary is None:
        pytest.skip("neither Valkey nor Redis is installed")
    with tempfile.TemporaryDirectory(prefix="penstock-redis-") as name:
        server = Redis(binary, Path(name))
        try:
            yield server
        finally:
            server.stop()


@contextmanager
def redis() -> Iterator[str]:
    """The URL of one."""
    with redis_server() as server:
        yield server.url


def await_port(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Until the server accepts connections; a minute at most."""
    for _ in range(1200):
        assert process.poll() is None, log.read_text()
        with socket.socket() as client:
            if (
                client.connect_ex(("127.0.0.1", port)) == 0
                and b"accept connections" in log.read_bytes().lower()
            ):
                return
        time.sleep(0.05)
    raise AssertionError(log.read_text())
