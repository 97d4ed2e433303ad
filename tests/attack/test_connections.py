"""Connections that want to hold or to fill the server: silent, half-sent, too large, too many.

Times are shortened by flags; how each limit works is tested in `tests/http/test_limits.py`.
"""

from __future__ import annotations

import contextlib
import http.client
import select
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tests.e2e.server import Server, serving

from .harness import PATIENCE, attacked, error_of, post, withstands

REQUEST = {"prompt": "What is a KV cache?", "max_tokens": 4}
POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
HALF = POST + b"Content-Length: 100\r\n\r\n{"


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = ("--timeout-keep-alive", "1", "--timeout-headers", "1", "--timeout-body", "1")
    with serving("demo", *flags, log=tmp_path_factory.mktemp("hasty") / "log") as server:
        yield server


@pytest.fixture
def narrow(tmp_path: Path) -> Iterator[Server]:
    """1,024 descriptors, and no time limit that would help."""
    flags = ("--timeout-keep-alive", "60", "--timeout-headers", "60", "--timeout-body", "60")
    with serving("demo", *flags, log=tmp_path / "log", open_files=1024) as server:
        yield server


@contextlib.contextmanager
def connected(server: Server, count: int, data: bytes) -> Iterator[list[socket.socket]]:
    """Connections that send this and then nothing."""
    with contextlib.ExitStack() as stack:
        held = []
        for _ in range(count):
            one = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), PATIENCE))
            with contextlib.suppress(OSError):  # refused already
                one.sendall(data)
            held.append(one)
        yield held


def wait_until_closed(held: Iterable[socket.socket]) -> None:
    """Until the server has closed every one of them."""
    poll = select.poll()
    open_ = {one.fileno(): one for one in held}
    for number in open_:
        poll.register(number, select.POLLIN)
    deadline = time.monotonic() + PATIENCE
    while open_:
        assert time.monotonic() < deadline, f"{len(open_)} connections are still open"
        for number, _ in poll.poll(1000):
            try:
                ended = not open_[number].recv(65536)
            except OSError:
                ended = True
            if ended:
                poll.unregister(number)
                del open_[number]


def works(server: Server) -> bool:
    return post(server, "/v1/completions", REQUEST)[0] == 200


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\r\n",
        b"POST /v1/comp",
        POST,
        POST + b"Content-Length: 100\r\n\r\n",
        HALF,
        POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{",
    ],
    ids=["silent", "empty lines", "half a line", "half a head", "no body", "half a body", "half a chunk"],
)
def test_a_thousand_who_do_not_go_on(hasty: Server, data: bytes) -> None:
    def attack() -> None:
        with connected(hasty, 1000, data) as held:
            wait_until_closed(held)

    withstands(hasty, attack)
    assert works(hasty)


MB = 1 << 20

ENORMOUS = {
    "a header of 175 MB": (431, POST + b"A: ", b"x" * MB, 175),
    "100 MB of headers": (431, POST, b"a: b\r\n" * (MB // 6), 100),
    "a URL of 100 MB": (414, b"GET /", b"x" * MB, 100),
    "a trailer of 100 MB": (431, POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\nA: ", b"x" * MB, 100),
}


@pytest.mark.parametrize(("status", "head", "piece", "times"), ENORMOUS.values(), ids=ENORMOUS.keys())
def test_enormous_headers(hasty: Server, status: int, head: bytes, piece: bytes, times: int) -> None:
    def attack() -> None:
        with connected(hasty, 1, head) as (one,):
            with contextlib.suppress(OSError):  # it does not listen to the end
                for _ in range(times):
                    one.sendall(piece)
            with contextlib.suppress(OSError):
                answer = http.client.HTTPResponse(one)
                answer.begin()
                assert answer.status == status

    withstands(hasty, attack)
    assert works(hasty)


def scrape(server: Server) -> None:
    status, page = server.get("/metrics")
    assert status == 200
    assert "vllm:num_requests_running" in page


def test_more_idle_connections_than_descriptors(narrow: Server) -> None:
    def attack() -> None:
        with connected(narrow, 1100, b""):
            for _ in range(20):
                scrape(narrow)
                assert works(narrow)  # the idle ones make room

    withstands(narrow, attack)
    assert narrow.log.count("the longest idle one is closed") == 1


def test_more_busy_connections_than_descriptors(narrow: Server) -> None:
    """Nobody can be closed; what is kept in reserve answers probes, and says 503 to the rest."""

    def attack() -> None:
        with connected(narrow, 1100, HALF):
            for _ in range(20):
                scrape(narrow)
            with contextlib.ExitStack() as more:  # in place of probes that had a place meanwhile, and left
                for _ in range(100):
                    refused = post(narrow, "/v1/completions", REQUEST)
                    if refused[0] != 200:
                        break
                    more.enter_context(connected(narrow, 1, HALF))
                assert refused[0] == 503
                assert error_of(refused)["reason"] == "too_many_connections"
        deadline = time.monotonic() + PATIENCE
        while not works(narrow):
            assert time.monotonic() < deadline, "the connections are not given back"

    withstands(narrow, attack)
    assert narrow.log.count("only health and metrics are answered") == 1
    assert attacked(narrow, lambda: None).failed == 0
