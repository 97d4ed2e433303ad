"""The life of a server process: signals, draining, death. Real signals to a real process."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import Call
from .fake_engine import PATIENCE


class Served:
    """`python -m tests.server.served` and a connection to it; it prints a line at each turn of its life."""

    def __init__(self, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.server.served", *arguments],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self._lines = self._process.stdout
        self._calls: list[Call] = []
        self.port = int(self.line().split()[1])

    def line(self) -> str:
        """The next line that it prints."""
        line = self._lines.readline()
        assert line, self._process.stderr and self._process.stderr.read()
        return line.strip()

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def open(self, body: dict[str, Any]) -> http.client.HTTPResponse:
        """Send a request; its answer is read later."""
        call = Call(self.port, body)
        self._calls.append(call)
        return call.answer

    def get(self, path: str) -> tuple[int, dict[str, Any]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        connection.request("GET", path)
        answer = connection.getresponse()
        body = json.loads(answer.read())
        connection.close()
        return answer.status, body

    def exit_status(self) -> tuple[int, str]:
        _, errors = self._process.communicate(timeout=PATIENCE)
        return self._process.returncode, errors

    def kill(self) -> None:
        for call in self._calls:
            call.leave()
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def serve() -> Iterator[Callable[..., Served]]:
    started: list[Served] = []

    def start(*arguments: str) -> Served:
        started.append(Served(*arguments))
        return started[-1]

    yield start
    for served in started:
        served.kill()


HELLO = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_server_ends_at_once(serve: Callable[..., Served], number: signal.Signals) -> None:
    served = serve()
    assert served.get("/readyz")[0] == 200
    served.signal(number)
    status, errors = served.exit_status()
    assert status == 0
    assert "Traceback" not in errors


def test_a_drain_lets_streams_finish(serve: Callable[..., Served]) -> None:
    served = serve("--pause-at", "2")
    answer = served.open(HELLO)
    assert answer.status == 200
    served.signal(signal.SIGTERM)
    assert served.line() == "draining"
    status, body = served.get("/readyz")
    assert (status, body["error"]["reason"]) == (503, "draining")
    assert served.open(HELLO).status == 503
    served.signal(signal.SIGUSR1)  # the engine goes on
    assert b"data: [DONE]" in answer.read()
    assert served.exit_status()[0] == 0


def test_a_drain_ends_by_the_clock(serve: Callable[..., Served]) -> None:
    served = serve("--pause-at", "2", "--shutdown-timeout", "0.05")
    answer = served.open(HELLO)
    served.signal(signal.SIGTERM)
    text = answer.read()
    assert b'"finish_reason":"abort"' in text
    assert text.endswith(b"data: [DONE]\n\n")
    assert served.exit_status()[0] == 0


@pytest.mark.parametrize("stop_at", [10, 1])
def test_nobody_waits_for_the_rest_of_a_request(serve: Callable[..., Served], stop_at: int) -> None:
    served = serve()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"
    part = head + b"{" if stop_at == 1 else head[:-stop_at]
    with socket.create_connection(("127.0.0.1", served.port), timeout=PATIENCE) as connection:
        connection.sendall(part)
        assert served.get("/readyz")[0] == 200  # the loop has read it
        served.signal(signal.SIGTERM)
        assert connection.recv(1) == b""
        status, errors = served.exit_status()
    assert status == 0
    assert "Traceback" not in errors
    assert "graceful shutdown exceeded" not in errors


def test_a_second_signal_aborts(serve: Callable[..., Served]) -> None:
    served = serve("--pause-at", "2")
    served.open(HELLO)
    served.signal(signal.SIGTERM)
    assert served.line() == "draining"
    served.signal(signal.SIGTERM)
    status, _ = served.exit_status()
    assert status == 1


def test_who_is_cut_off_by_it_is_told_as_json(serve: Callable[..., Served]) -> None:
    served = serve("--pause-at", "0")
    call = Call(served.port, {**HELLO, "stream": False})
    while not served.get("/load")[1]["server_load"]:
        pass
    served.signal(signal.SIGTERM)
    assert served.line() == "draining"
    served.signal(signal.SIGTERM)
    answer = call.answer
    assert (answer.status, answer.headers["content-type"]) == (503, "application/json")
    assert json.loads(answer.read())["error"]["reason"] == "draining"
    assert served.exit_status()[0] == 1


def test_who_reads_a_stream_is_told_by_it(serve: Callable[..., Served]) -> None:
    served = serve("--pause-at", "2")
    answer = served.open(HELLO)
    assert answer.status == 200
    served.signal(signal.SIGTERM)
    assert served.line() == "draining"
    served.signal(signal.SIGTERM)
    *_, last, end = answer.read().split(b"\n\n")
    assert (json.loads(last.removeprefix(b"data: "))["error"]["reason"], end) == ("draining", b"")
    status, errors = served.exit_status()
    assert status == 1
    assert "Traceback" not in errors


def test_a_hangup_harms_nobody(serve: Callable[..., Served]) -> None:
    served = serve("--pause-at", "2")
    answer = served.open(HELLO)
    assert answer.status == 200
    served.signal(signal.SIGHUP)
    assert served.get("/readyz")[0] == 200
    served.signal(signal.SIGUSR1)
    assert b"data: [DONE]" in answer.read()
    served.signal(signal.SIGTERM)
    assert served.exit_status()[0] == 0


def test_a_dead_engine_ends_the_server(serve: Callable[..., Served]) -> None:
    served = serve("--pause-at", "0")
    served.signal(signal.SIGUSR2)  # the engine dies under the request
    answer = served.open({**HELLO, "stream": False})
    assert answer.status == 503
    assert "CUDA error" in json.loads(answer.read())["error"]["message"]
    assert served.get("/health")[0] == 503
    status, errors = served.exit_status()
    assert status == 1
    assert "The engine has died: CUDA error" in errors
