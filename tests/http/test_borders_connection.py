"""One connection, fed by hand: what it awaits and until when, what it refuses, and how it ends."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.server import ServerState

from penstock.http import connection as module
from penstock.http.config import HttpConfig
from penstock.http.connection import Connection
from penstock.http.exchange import respond
from penstock.http.limits import Connections, Limits
from penstock.http.serve import _uvicorn_config

from .live import Response, parse

GET = b"GET /a?b=c HTTP/1.1\r\nHost: x\r\n"
POST = b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n"


class Transport(asyncio.Transport):
    """Remembers what is done to it."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = b""
        self.ended = ""
        """close or abort."""
        self.eof = False
        self.paused = False
        self.buffered = 0

    def write(self, data: Any) -> None:
        self.sent += bytes(data)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def is_closing(self) -> bool:
        return bool(self.ended)

    def close(self) -> None:
        self.ended = self.ended or "close"

    def abort(self) -> None:
        self.ended = "abort"

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.eof = True

    def get_write_buffer_size(self) -> int:
        return self.buffered

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False


class Wire:
    """A connection with a client that is us. Use it within a running loop."""

    def __init__(self, *, made: bool = True, restrict: Any = None, **options: Any) -> None:
        self.scopes: list[Scope] = []
        self.bodies: list[bytes] = []
        self.left: list[str] = []
        """Paths of requests whose handlers saw the client leave."""
        self.gate = asyncio.Event()
        self.gate.set()
        config = HttpConfig(host="127.0.0.1", **options)
        self.connections = Connections(Limits.of(config, 10), asyncio.get_running_loop().time)
        self.limits = self.connections.limits
        self.state = ServerState()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await self._serve(scope, receive, send)

        self.connection = Connection(
            _uvicorn_config(app, config), self.state, self.connections, "a client", restrict
        )
        self.connections.admit(self.connection)
        self.transport = Transport()
        if made:
            self.connection.connection_made(self.transport)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Reads the body, waits for the gate, answers with the path."""
        self.scopes.append(scope)
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        if message["type"] == "http.disconnect":
            self.left.append(scope["path"])
            return
        self.bodies.append(body)
        gate = asyncio.ensure_future(self.gate.wait())
        leaving = asyncio.ensure_future(receive())
        await asyncio.wait({gate, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not gate.done():
            self.left.append(scope["path"])
        gate.cancel()
        leaving.cancel()
        await respond(send, scope["path"].encode())

    def feed(self, data: bytes) -> None:
        self.connection.data_received(data)

    async def settle(self) -> None:
        """Until no task goes on by itself."""
        for _ in range(20):
            await asyncio.sleep(0)

    @property
    def answers(self) -> int:
        return self.transport.sent.count(b"HTTP/1.1 200 ")

    @property
    def refusal(self) -> Response:
        return parse(self.transport.sent)

    def in_seconds(self) -> float:
        """To the deadline."""
        return self.connection.deadline - asyncio.get_running_loop().time()


def scene(play: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    def run() -> None:
        asyncio.run(asyncio.wait_for(play(), 20))  # type: ignore[arg-type]

    run.__name__ = play.__name__
    run.__doc__ = play.__doc__
    return run


# ---- what is awaited, and until when ----


@scene
async def test_each_part_of_a_request_has_its_time_and_the_answer_has_none() -> None:
    wire = Wire(timeout_keep_alive=7, timeout_headers=20.0, timeout_body=40.0)
    near = pytest.approx
    assert wire.in_seconds() == near(7, abs=1)
    wire.feed(b"G")
    assert wire.in_seconds() == near(20, abs=1)
    wire.feed(GET[1:] + b"Content-Length: 4\r\n\r\n12")
    assert wire.in_seconds() == near(40, abs=1)
    wire.gate.clear()
    wire.feed(b"34")
    assert wire.connection.deadline == math.inf
    await wire.settle()
    assert wire.bodies == [b"1234"]
    wire.gate.set()
    await wire.settle()
    assert wire.answers == 1
    assert wire.in_seconds() == near(7, abs=1)
    assert wire.state.total_requests == 1
    [scope] = wire.scopes
    assert (scope["path"], scope["query_string"], scope["method"]) == ("/a", b"b=c", "GET")
    assert scope["headers"] == [(b"host", b"x"), (b"content-length", b"4")]
    wire.feed(GET + b"\r\n")
    await wire.settle()
    assert (wire.answers, wire.transport.ended) == (2, "")


@scene
async def test_silence_is_ended_without_a_word() -> None:
    wire = Wire()
    wire.connection.expire(0.0)
    assert (wire.transport.sent, wire.transport.ended) == (b"", "close")
    assert wire.connection.deadline == math.inf


@scene
async def test_what_is_not_even_open_is_cut() -> None:
    wire = Wire(made=False)
    assert wire.connection.drained
    assert wire.connection.unsent() == 0
    wire.connection.expire(0.0)
    assert wire.connection.unwanted
    opening = asyncio.ensure_future(asyncio.sleep(60))
    late = Wire(made=False)
    late.connection.opening = opening
    late.connection.cut()
    await asyncio.wait({opening})
    assert opening.cancelled()
    assert not late.connection.unwanted


@pytest.mark.parametrize(
    ("start", "flag", "seconds"), [(GET, "--timeout-headers", "3"), (POST + b"1", "--timeout-body", "4.5")]
)
def test_half_a_request_is_told_which_time_is_over(start: bytes, flag: str, seconds: str) -> None:
    @scene
    async def play() -> None:
        wire = Wire(timeout_headers=3.0, timeout_body=4.5)
        wire.feed(start)
        await wire.settle()
        wire.connection.expire(0.0)
        assert (wire.refusal.status, wire.refusal.error["reason"]) == (408, "request_timeout")
        assert f"within {seconds} s." in wire.refusal.error["message"]
        assert flag in wire.refusal.error["message"]
        assert wire.transport.eof
        assert not wire.transport.ended, "it has a moment to read that"
        assert 0 < wire.in_seconds() <= module._LINGER
        wire.connection.expire(0.0)
        assert wire.transport.ended == "abort"

    play()


@scene
async def test_while_we_do_not_read_nobody_is_late() -> None:
    """An earlier request is answered first."""
    wire = Wire(timeout_headers=3.0, timeout_body=4.5)

    async def busy(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.Event().wait()

    wire.connection.app = busy  # type: ignore[assignment]
    wire.feed(GET + b"\r\n" + POST)
    await wire.settle()
    assert wire.transport.paused
    wire.connection.expire(100.0)
    assert wire.connection.deadline == 104.5
    wire.feed(b"1234" + b"G")
    wire.connection.expire(100.0)
    assert wire.connection.deadline == 103.0
    assert wire.transport.sent == b""


@scene
async def test_a_body_that_nobody_waits_for_may_be_ended() -> None:
    wire = Wire()

    async def early(scope: Scope, receive: Receive, send: Send) -> None:
        await respond(send, b"no")

    wire.connection.app = early  # type: ignore[assignment]
    wire.feed(POST + b"1")
    await wire.settle()
    assert wire.answers == 1
    wire.connection.expire(0.0)
    assert (wire.transport.ended, wire.answers) == ("close", 1)
    # and if it comes after all, the next request is awaited
    again = Wire()
    again.connection.app = early  # type: ignore[assignment]
    again.feed(POST + b"1")
    await again.settle()
    again.feed(b"234" + GET + b"\r\n")
    await again.settle()
    assert (again.answers, again.transport.ended) == (2, "")
    assert again.in_seconds() == pytest.approx(5, abs=1)


@pytest.mark.parametrize("buffered", [0, 500])
def test_what_is_unsent_counts_where_the_server_waits_for_it(buffered: int) -> None:
    @scene
    async def play() -> None:
        wire = Wire()
        wire.transport.buffered = buffered
        assert wire.connection.drained == (buffered == 0)
        assert wire.connection.unsent() == 0
        wire.connection.pause_writing()
        assert wire.connection.unsent() == buffered
        wire.connection.resume_writing()
        assert wire.connection.unsent() == 0
        wire.transport.close()
        assert wire.connection.unsent() == buffered

    play()


# ---- who leaves ----


@scene
async def test_who_has_left_holds_no_place_and_every_handler_hears_of_it() -> None:
    """uvicorn tells the last one of those that were sent ahead; the first is under way."""
    idle = Wire()
    assert len(idle.connections) == 1
    idle.connection.connection_lost(None)
    assert len(idle.connections) == 0
    assert idle.connection.deadline == math.inf
    wire = Wire()
    wire.gate.clear()
    wire.feed(GET + b"\r\n" + GET.replace(b"/a", b"/b") + b"\r\n")
    await wire.settle()
    wire.connection.connection_lost(ConnectionResetError())
    await wire.settle()
    assert wire.left == ["/a"]
    assert len(wire.connections) == 0


@scene
async def test_at_the_end_of_the_server_half_a_request_is_not_waited_for_and_an_answer_is() -> None:
    idle, half, running = Wire(), Wire(), Wire()
    for wire in (idle, half, running):
        wire.gate.clear()
    half.feed(POST + b"1")
    running.feed(GET + b"\r\n")
    await running.settle()
    for wire in (idle, half, running):
        wire.connection.shutdown()
    assert (idle.transport.ended, half.transport.ended, running.transport.ended) == ("close", "close", "")
    running.gate.set()
    await running.settle()
    assert (running.answers, running.transport.ended) == (1, "close")


# ---- limits ----


@pytest.mark.parametrize("more", [0, 1])
def test_a_head_has_as_many_bytes_as_it_may(more: int) -> None:
    """As long as it does not end, all its bytes count."""

    @scene
    async def play() -> None:
        wire = Wire(max_header_bytes=2000)
        start = GET + b"A: "
        wire.feed(start + b"x" * (2000 - len(start) + more))
        if not more:
            assert wire.transport.sent == b""
            return
        assert (wire.refusal.status, wire.refusal.error["reason"]) == (431, "headers_too_large")

    play()


@pytest.mark.parametrize(("more", "status"), [(0, 200), (1, 431)])
@pytest.mark.parametrize("pieces", [False, True])
def test_a_whole_head_is_counted_without_its_request_line(more: int, status: int, pieces: bool) -> None:
    """The URL, and each header with a colon, a space and the end of its line."""

    @scene
    async def play() -> None:
        wire = Wire(max_header_bytes=2000)
        url, host = len(b"/a?b=c"), len(b"Host") + len(b"x") + 4
        head = GET + b"A: " + b"x" * (2000 - url - host - 5 + more) + b"\r\n\r\n"
        for part in (head[:50], head[50:]) if pieces else (head,):
            wire.feed(part)
        await wire.settle()
        assert parse(wire.transport.sent).status == status

    play()


@pytest.mark.parametrize(("length", "status"), [(1000, 431), (1001, 414)])
def test_a_long_url_is_named_as_such_from_half_of_the_limit_on(length: int, status: int) -> None:
    @scene
    async def play() -> None:
        wire = Wire(max_header_bytes=2000)
        wire.feed(b"GET /" + b"x" * (length - 1) + b" HTTP/1.1\r\nHost: x\r\nA: " + b"y" * 2000)
        assert wire.refusal.status == status
        assert "limit of 2000 bytes" in wire.refusal.error["message"]
        assert "--max-header-bytes" in wire.refusal.error["message"]

    play()


@pytest.mark.parametrize(("count", "status"), [(20, 200), (21, 431)])
def test_as_many_headers_as_are_allowed(count: int, status: int) -> None:
    @scene
    async def play() -> None:
        wire = Wire(max_header_count=20)
        wire.feed(GET + b"a: b\r\n" * (count - 1) + b"\r\n")
        await wire.settle()
        assert parse(wire.transport.sent).status == status
        if status != 200:
            assert wire.refusal.error["message"].startswith("There are more than 20 headers.")
            assert "--max-header-count" in wire.refusal.error["message"]

    play()


@scene
async def test_bytes_of_bodies_and_earlier_requests_do_not_count() -> None:
    wire = Wire(max_header_bytes=1024)
    for _ in range(30):
        wire.feed(GET + b"A: " + b"x" * 900 + b"\r\n\r\n")
        await wire.settle()
    wire.feed(b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\n")
    for _ in range(50):
        wire.feed(b"x" * 100)
    await wire.settle()
    assert wire.answers == 31
    assert wire.bodies[-1] == b"x" * 5000


@scene
async def test_sixteen_may_wait_for_an_earlier_answer() -> None:
    wire = Wire()
    wire.gate.clear()
    wire.feed((GET + b"\r\n") * 17)
    await wire.settle()
    assert len(wire.connection.pipeline) == 16
    wire.gate.set()
    for _ in range(17):
        await wire.settle()
    assert (wire.answers, wire.transport.ended) == (17, "")
    over = Wire()
    over.gate.clear()
    over.feed((GET + b"\r\n") * 18)
    await over.settle()
    assert len(over.connection.pipeline) == 0, "nobody knows which of them the client still wants"
    over.gate.set()
    await over.settle()
    assert (over.answers, over.transport.ended) == (1, "close")


# ---- what is refused ----


@scene
async def test_of_a_refused_request_a_bounded_rest_is_read() -> None:
    wire = Wire()
    wire.feed(b"nonsense\r\n\r\n")
    assert wire.refusal.status == 400
    for _ in range(16):
        wire.feed(b"x" * (module._LINGER_BYTES // 16))
    assert wire.transport.ended == ""
    assert wire.transport.sent.count(b"HTTP/1.1 4") == 1
    wire.feed(b"x")
    assert wire.transport.ended == "abort"
    assert 100_000 < module._LINGER_BYTES <= 1 << 20


@scene
async def test_a_refusal_does_not_get_into_an_answer() -> None:
    wire = Wire()
    wire.gate.clear()
    wire.feed(GET + b"\r\n" + b"nonsense\r\n\r\n")
    await wire.settle()
    assert wire.transport.sent == b""
    assert wire.connection.deadline == math.inf
    wire.gate.set()
    await wire.settle()
    answer = parse(wire.transport.sent)
    assert (answer.status, answer.headers["connection"]) == (200, "close")
    assert wire.transport.ended == "close"


@scene
async def test_a_handler_that_reads_a_broken_body_sees_the_client_leave() -> None:
    wire = Wire()
    wire.feed(b"POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n")
    await wire.settle()
    wire.feed(b"no size\r\n")
    await wire.settle()
    assert wire.refusal.status == 400
    assert wire.left == ["/a"]
    assert wire.answers == 0


@scene
async def test_an_answer_that_has_begun_is_cut_where_its_request_breaks() -> None:
    wire = Wire()
    wait = asyncio.Event()

    async def begins(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"begun", "more_body": True})
        await wait.wait()

    wire.connection.app = begins  # type: ignore[assignment]
    wire.feed(b"POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
    await wire.settle()
    wire.feed(b"no size\r\n")
    assert wire.transport.ended == "abort"
    assert b" 400 " not in wire.transport.sent
    wait.set()


@pytest.mark.parametrize(
    ("data", "status", "words"),
    [
        (b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n", 400, "The request target has no path."),
        (b"GET / HTTP/2.0\r\nHost: x\r\n\r\n", 505, "HTTP/2.0 is not spoken here. Use HTTP/1.1."),
        (b"GET / HTTP/1.1\r\n\r\n", 400, "A request has one Host header, this one has 0."),
        (b"GET / HTTP/1.1\r\nHost: x\r\nhost: y\r\n\r\n", 400, "this one has 2."),
        (b"GET / HTTP/1.0\r\nHost: x\r\nHost: x\r\n\r\n", 400, "this one has 2."),
        (b"GET http://x HTTP/1.1\r\nHost: x\r\n\r\n", 400, "The request target has no path."),
        (
            b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n",
            400,
            "HTTP/1.0 has no Transfer-Encoding.",
        ),
        (
            b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
            501,
            "The Transfer-Encoding must be chunked, and nothing else.",
        ),
        (b"\x00\r\n", 400, "This is not valid HTTP/1.1: "),
    ],
)
def test_refusals_say_what_is_wrong(
    data: bytes, status: int, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    @scene
    async def play() -> None:
        wire = Wire()
        wire.state.default_headers.append((b"server", b"penstock"))
        wire.feed(data)
        answer = wire.refusal
        assert answer.status == status
        assert words in answer.error["message"]
        assert answer.headers == {
            "server": "penstock",
            "content-type": "application/json",
            "content-length": str(len(answer.body)),
            "connection": "close",
        }
        assert wire.transport.eof
        assert wire.scopes == []

    play()
    [line] = [record.getMessage() for record in caplog.records if record.name == "penstock.http"]
    assert line.startswith("A request from a client is refused: ")
    assert words in line


@pytest.mark.parametrize("minor", [0, 1])
def test_who_asks_to_go_on_is_told_so_in_http_1_1(minor: int) -> None:
    @scene
    async def play() -> None:
        wire = Wire()
        head = b"POST /a HTTP/1.%d\r\nHost: x\r\nExpect: 100-Continue\r\nContent-Length: 2\r\n\r\n" % minor
        wire.feed(head)
        await wire.settle()
        assert wire.transport.sent.startswith(b"HTTP/1.1 100 Continue\r\n") == bool(minor)
        wire.feed(b"{}")
        await wire.settle()
        assert wire.answers == 1

    play()


@scene
async def test_an_offer_is_taken_out_and_everything_else_stays() -> None:
    wire = Wire()
    wire.feed(
        b"POST /a HTTP/1.1\r\nHost: x\r\nConnection: keep-alive, Upgrade , HTTP2-Settings\r\nUpgrade: h2c\r\n"
        b"HTTP2-Settings: AA\r\nContent-Length: 2\r\n\r\n{}"
    )
    await wire.settle()
    assert wire.answers == 1
    assert wire.bodies == [b"{}"]
    assert wire.scopes[0]["headers"] == [
        (b"host", b"x"),
        (b"connection", b"keep-alive, HTTP2-Settings"),
        (b"http2-settings", b"AA"),
        (b"content-length", b"2"),
    ]
    wire.feed(GET + b"\r\n")
    await wire.settle()
    assert (wire.answers, wire.transport.ended) == (2, "")


@scene
async def test_nothing_is_spoken_after_connect() -> None:
    """The application answers it, once, as it answers any method that it does not know."""
    wire = Wire()
    wire.feed(b"CONNECT /a HTTP/1.1\r\nHost: x\r\n\r\n" + GET + b"\r\n")
    await wire.settle()
    assert [scope["method"] for scope in wire.scopes] == ["CONNECT"]
    assert (wire.answers, wire.transport.ended) == (1, "close")


@scene
async def test_what_is_closing_is_not_written_to() -> None:
    wire = Wire()
    wire.transport.close()
    wire.feed(b"nonsense\r\n\r\n")
    assert (wire.transport.sent, wire.transport.ended) == (b"", "close")


# ---- after an answer ----


@scene
async def test_nothing_runs_that_was_sent_ahead_after_the_last_request() -> None:
    wire = Wire()
    wire.feed(GET + b"Connection: close\r\n\r\n" + GET + b"\r\n")
    await wire.settle()
    assert (len(wire.scopes), wire.answers, wire.transport.ended) == (1, 1, "close")


@scene
async def test_without_keep_alive_the_answer_is_the_end() -> None:
    wire = Wire(timeout_keep_alive=0)
    wire.feed(GET + b"\r\n")
    await wire.settle()
    assert (wire.answers, wire.transport.ended) == (1, "close")


@scene
async def test_beyond_the_limit_there_is_one_answer_and_a_moment_to_read_it() -> None:
    def restrict(app: ASGIApp) -> ASGIApp:
        async def other(scope: Scope, receive: Receive, send: Send) -> None:
            await respond(send, b"restricted")

        return other

    wire = Wire(made=False, restrict=restrict)
    wire.connection.restricted = True
    wire.connection.connection_made(wire.transport)
    wire.feed(GET + b"\r\n")
    await wire.settle()
    answer = parse(wire.transport.sent)
    assert answer.body == b"restricted"
    assert wire.transport.eof
    assert 0 < wire.in_seconds() <= module._LINGER
    wire.feed(GET + b"\r\n")
    await wire.settle()
    assert wire.answers == 1
    wire.connection.expire(0.0)
    assert wire.transport.ended == "abort"
    plain = Wire(restrict=restrict)
    plain.feed(GET + b"\r\n")
    await plain.settle()
    assert parse(plain.transport.sent).body == b"/a"
