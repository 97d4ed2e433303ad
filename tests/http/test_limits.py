"""Limits of connections: bytes, counts and times, on real sockets; and who may stay, without any."""

from __future__ import annotations

import contextlib
import http.client
import logging
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from penstock.core.errors import StartupError
from penstock.http.config import HttpConfig
from penstock.http.limits import RESERVE, Connections, Limits, OccasionalLog

from .conftest import listening
from .live import PATIENCE, Live, parse, until_closed

GET = b"GET /health HTTP/1.1\r\nHost: x\r\n"
POST = b"POST /echo HTTP/1.1\r\nHost: x\r\n"

# ---- bytes and counts ----


@pytest.fixture(scope="module")
def small() -> Iterator[Live]:
    with listening(max_header_bytes=4096, max_header_count=20) as server:
        yield server


OVERSIZED = {
    "one long value": (431, GET + b"A: " + b"x" * 5000 + b"\r\n\r\n"),
    "a long value without end": (431, GET + b"A: " + b"x" * 500_000),
    "a long name without end": (431, GET + b"x" * 500_000),
    "many headers": (431, GET + b"a:b\r\n" * 20 + b"\r\n"),
    "many headers without end": (431, GET + b"a:b\r\n" * 100_000),
    "a long URL": (414, b"GET /" + b"x" * 5000 + b" HTTP/1.1\r\nHost: x\r\n\r\n"),
    "a long URL without end": (414, b"GET /" + b"x" * 500_000),
    "a long query without end": (414, b"GET /?" + b"x" * 500_000),
    "a trailer without end": (
        431,
        POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nA: " + b"x" * 500_000,
    ),
    "many trailers": (
        431,
        POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n" + b"a:b\r\n" * 100_000,
    ),
    "a chunk's extension without end": (431, POST + b"Transfer-Encoding: chunked\r\n\r\n2;" + b"x" * 500_000),
}


@pytest.mark.parametrize(("status", "data"), OVERSIZED.values(), ids=OVERSIZED.keys())
def test_headers_that_are_too_large(small: Live, status: int, data: bytes) -> None:
    answer = parse(small.raw(data))
    assert answer.status == status
    assert answer.error["reason"] == {431: "headers_too_large", 414: "uri_too_long"}[status]
    assert "--max-header-" in answer.error["message"]
    assert answer.headers["connection"] == "close"


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_the_limit_is_the_same_however_the_bytes_arrive(small: Live, size: int) -> None:
    """Parsed in pieces, a value is put together anew with each."""
    with small.connect() as connection:
        for data, status in ((b"x" * 3000, 200), (b"x" * 6000, 431)):
            request = GET + b"A: " + data + b"\r\n\r\n"
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                for start in range(0, len(request), size):
                    connection.sendall(request[start : start + size])
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            answer.read()
            assert answer.status == status


def test_as_many_headers_as_are_allowed(small: Live) -> None:
    rest = b"a:b\r\n" * 18 + b"Connection: close\r\n\r\n"
    assert small.raw(GET + rest).startswith(b"HTTP/1.1 200 ")


# ---- times ----

SOON = {"timeout_keep_alive": 1, "timeout_headers": 0.2, "timeout_body": 0.2, "timeout_send": 0.2}


@pytest.fixture(scope="module")
def hasty() -> Iterator[Live]:
    with listening(**SOON) as server:
        yield server


def test_who_sends_nothing_is_closed_without_a_word(hasty: Live) -> None:
    with hasty.connect() as connection:
        assert until_closed(connection) == b""


def test_an_idle_connection_is_closed_even_if_it_sends_empty_lines(hasty: Live) -> None:
    with hasty.connect() as connection:
        connection.sendall(GET + b"\r\n")
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        assert answer.read() == b"{}"
        connection.sendall(b"\r\n")  # uvicorn's timer ends here
        assert until_closed(connection) == b""


@pytest.mark.parametrize("before", [b"", GET + b"\r\n"], ids=["first", "second"])
@pytest.mark.parametrize("start", [b"G", b"GET /hea", GET, GET + b"A: b"])
def test_headers_that_do_not_end(hasty: Live, before: bytes, start: bytes) -> None:
    received = hasty.raw(before, start)
    if before:
        received = received[received.index(b"{}") + 2 :]
    answer = parse(received)
    assert (answer.status, answer.error["reason"]) == (408, "request_timeout")
    assert "--timeout-headers" in answer.error["message"]


@pytest.mark.parametrize(
    "start",
    [
        b"Content-Length: 10\r\n\r\n",
        b"Content-Length: 10\r\n\r\n{",
        b"Transfer-Encoding: chunked\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n2",
        b"Transfer-Encoding: chunked\r\n\r\n2\r\n{",
        b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nA: b",
    ],
)
def test_bodies_that_do_not_end(hasty: Live, start: bytes) -> None:
    answer = parse(hasty.raw(POST + start))
    assert (answer.status, answer.error["reason"]) == (408, "request_timeout")
    assert "--timeout-body" in answer.error["message"]


def test_a_body_that_is_answered_before_it_ends_does_not_hold_the_connection(hasty: Live) -> None:
    answer = parse(hasty.raw(POST.replace(b"/echo", b"/nowhere") + b"Content-Length: 10\r\n\r\n{"))
    assert answer.status == 404


def test_slow_bodies_within_the_time_are_served() -> None:
    with listening(**{**SOON, "timeout_body": 30.0}) as server, server.connect() as connection:
        connection.sendall(POST + b"Connection: close\r\nContent-Length: 12\r\n\r\n")
        with server.connect() as silent:  # its end tells that more time has passed than other limits allow
            until_closed(silent)
        connection.sendall(b'{"hello": 1}')
        assert until_closed(connection).startswith(b"HTTP/1.1 200 ")


def test_answers_take_as_long_as_they_take(hasty: Live) -> None:
    """Neither a long wait for an answer, nor one between its parts, is anybody's fault."""
    with hasty.connect() as connection:
        connection.sendall(b"GET /slow?1.6 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        received = until_closed(connection)
    assert received.startswith(b"HTTP/1.1 200 ")
    assert received.endswith(b"0\r\n\r\n")


def test_a_request_sent_ahead_waits_for_its_turn_without_a_deadline(hasty: Live) -> None:
    """Nobody reads its body while the earlier one is answered."""
    with hasty.connect() as connection:
        connection.sendall(b"GET /slow?1.6 HTTP/1.1\r\nHost: x\r\n\r\n")
        body = b'{"long": "' + b"x" * 300_000 + b'"}'
        head = POST + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
        connection.sendall(head + body)
        received = until_closed(connection)
    assert received.count(b"HTTP/1.1 200 ") == 2


@pytest.mark.parametrize("path", [b"/endless", b"/large"])
def test_who_does_not_read_is_cut_off(hasty: Live, path: bytes) -> None:
    with hasty.connect() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(b"GET " + path + b" HTTP/1.1\r\nHost: x\r\n\r\n")
        deadline = time.monotonic() + PATIENCE
        while not hasty.requests:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        while hasty.requests:
            assert time.monotonic() < deadline, "it is still there"
            time.sleep(0.001)


# ---- numbers ----


def held_by(server: Live, count: int) -> list[socket.socket]:
    """Connections in the midst of a request."""
    held = []
    for _ in range(count):
        connection = server.connect()
        connection.sendall(POST + b"Content-Length: 2\r\n\r\n{")
        held.append(connection)
    deadline = time.monotonic() + PATIENCE
    while server.requests < count:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return held


@contextlib.contextmanager
def closing(connections: list[socket.socket]) -> Iterator[None]:
    try:
        yield
    finally:
        for connection in connections:
            connection.close()


def test_the_longest_idle_connection_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.http.limits._HEARING", 0.0)
    with listening(max_connections=4) as server:
        idle = [server.connect() for _ in range(8)]
        with closing(idle):
            assert [until_closed(connection) for connection in idle[:4]] == [b""] * 4
            idle[-1].sendall(GET + b"Connection: close\r\n\r\n")
            assert until_closed(idle[-1]).startswith(b"HTTP/1.1 200 ")


def test_a_byte_behind_an_answer_holds_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.http.limits._HEARING", 0.0)
    with listening(max_connections=4, timeout_headers=PATIENCE) as server:
        holding = [server.connect() for _ in range(4)]
        with closing(holding):
            for connection in holding:
                connection.sendall(GET + b"\r\nG")
                answer = http.client.HTTPResponse(connection)
                answer.begin()
                assert (answer.status, answer.read()) == (200, b"{}")
            assert server.post("/echo", {}).status == 200
            assert until_closed(holding[0]) == b""


def test_probes_are_answered_when_all_connections_are_busy(caplog: pytest.LogCaptureFixture) -> None:
    with listening(max_connections=4, timeout_body=PATIENCE) as server:
        with closing(held_by(server, 4)):
            for path in ("/health", "/health/"):
                assert server.get(path).status == 200
            answer = server.post("/echo", {})
            assert (answer.status, answer.error["reason"]) == (503, "too_many_connections")
            assert answer.headers["retry-after"] == "1"
            # silent ones neither keep a probe out, nor each other
            silent = [server.connect() for _ in range(3 * RESERVE)]
            with closing(silent):
                assert server.get("/health").status == 200
        lines = [record.getMessage() for record in caplog.records if record.name == "penstock.http"]
        assert len([line for line in lines if "All 4 connections are busy" in line]) == 1
        deadline = time.monotonic() + PATIENCE
        while server.post("/echo", {}).status != 200:
            assert time.monotonic() < deadline, "the room is not given back"


def test_one_client_has_only_its_share() -> None:
    per_client = listening(max_connections_per_client=2, timeout_body=PATIENCE)
    with per_client as server, closing(held_by(server, 2)):
        assert server.post("/echo", {}).status == 503
        assert server.get("/health").status == 200
        elsewhere = {"timeout": PATIENCE, "source_address": ("127.0.0.2", 0)}
        with socket.create_connection(("127.0.0.1", server.port), **elsewhere) as other:
            other.sendall(POST + b"Connection: close\r\nContent-Length: 2\r\n\r\n{}")
            assert until_closed(other).startswith(b"HTTP/1.1 200 ")


def test_the_limit_of_open_files_is_raised_and_respected() -> None:
    code = """
import resource
from penstock.http.limits import RESERVE, affordable
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 1024))
found = affordable(10_000)
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (1024, 1024)
assert 800 <= found <= 1024 - RESERVE, found
assert affordable(100) == 100
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
try:
    affordable(10_000)
except ValueError as error:
    assert "ulimit -n" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_header_bytes", 100),
        ("max_header_count", 1),
        ("max_connections", 0),
        ("max_connections_per_client", -1),
        ("timeout_headers", 0),
        ("timeout_body", 0),
        ("timeout_send", 0),
    ],
)
def test_limits_that_cannot_work_are_named(name: str, value: Any) -> None:
    with pytest.raises(StartupError) as caught:
        HttpConfig(**{name: value})
    assert caught.value.param == "--" + name.replace("_", "-")


# ---- the table alone ----


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Stub:
    """A connection that only remembers what became of it."""

    def __init__(self, address: str = "a") -> None:
        self.address = address
        self.restricted = False
        self.deadline = 0.0
        self.expired: list[float] = []
        self.is_cut = False
        self.left = 0

    def expire(self, now: float) -> None:
        self.expired.append(now)

    @property
    def drained(self) -> bool:
        return self.left == 0

    def unsent(self) -> int:
        return self.left

    def cut(self) -> None:
        self.is_cut = True


def table(**limits: Any) -> tuple[Connections, Clock]:
    clock = Clock()
    config = HttpConfig(**limits)
    return Connections(Limits.of(config, config.max_connections), clock), clock


def test_a_loop_that_was_held_up_blames_nobody() -> None:
    connections, clock = table()
    waiting = Stub()
    connections.admit(waiting)
    clock.now = 30.0
    connections.sweep()
    assert not waiting.expired
    for second in range(31, 37):
        clock.now = float(second)
        connections.sweep()
    assert waiting.expired


def test_a_slow_reader_is_none_that_has_stopped() -> None:
    connections, clock = table(timeout_send=10.0)
    slow, stopped = Stub(), Stub()
    for each in (slow, stopped):
        connections.admit(each)
        connections.busy(each)
        each.deadline = float("inf")
        each.left = 10_000
    for second in range(1, 30):
        clock.now = float(second)
        slow.left -= 1
        connections.sweep()
    assert (slow.is_cut, stopped.is_cut) == (False, True)


def test_nobody_loses_an_answer_that_is_half_read_to_a_newcomer() -> None:
    connections, clock = table(max_connections=2)
    reading, silent, new = Stub(), Stub(), Stub()
    for each in (reading, silent):
        connections.admit(each)
        clock.now += 1.0
    reading.left = 10_000
    connections.admit(new)
    assert (reading.is_cut, silent.is_cut, new.restricted) == (False, True, False)
    clock.now += 1.0
    connections.busy(new)
    late = Stub()
    connections.admit(late)
    assert (reading.is_cut, late.restricted) == (False, True)


def test_counts_come_back_to_nothing() -> None:
    connections, _ = table(max_connections=2, max_connections_per_client=2)
    stubs = [Stub(address) for address in "aaabbbccc"]
    for stub in stubs:
        connections.admit(stub)
    for stub in stubs:
        connections.forget(stub)
        connections.forget(stub)
    assert len(connections) == 0
    fresh = Stub("a")
    assert connections.admit(fresh)
    assert not fresh.restricted


def test_one_line_a_minute_with_the_number_of_the_others(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    log = OccasionalLog(clock)
    with caplog.at_level(logging.WARNING):
        for second in range(59):
            clock.now = float(second)
            log.warning("a", "it happened to %s", second)
            log.flush()
        log.warning("b", "another thing")
        clock.now = 61.0
        log.flush()
    assert [record.getMessage() for record in caplog.records] == [
        "it happened to 0",
        "another thing",
        "The same (a) happened 58 more times.",
    ]
