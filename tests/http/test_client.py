"""The client of relays: what servers do, right and wrong, byte by byte."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from penstock.core.errors import StartupError
from penstock.http import client as module
from penstock.http.client import Client, ConnectFailed, Disconnected, Incomplete, NotHttp, RequestFailed

from .live import PATIENCE
from .test_tls import certificate

Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Server:
    """Reads a request (its body has no line of its own), and answers with the next of these bytes; an answer
    that ends with `CLOSE` or `RESET` ends the connection so."""

    def __init__(self, answers: list[bytes]) -> None:
        self.answers = answers
        self.requests: list[bytes] = []
        self.connections = 0
        self.left = asyncio.Event()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
                self.requests.append(head + await reader.readexactly(length))
                answer = self.answers.pop(0)
                writer.write(answer.removesuffix(CLOSE).removesuffix(RESET))
                await writer.drain()
                if answer.endswith(RESET):
                    linger = struct.pack("ii", 1, 0)
                    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    writer.transport.abort()
                if answer.endswith((CLOSE, RESET)):
                    break
        self.left.set()
        writer.close()


CLOSE, RESET = b"<close>", b"<reset>"
WHOLE = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Type: Application/JSON; charset=utf-8\r\n\r\n{}"


@contextlib.asynccontextmanager
async def serving(
    *answers: bytes, headers: dict[str, str] | None = None, keep_alive: float = 60.0, path: str = ""
) -> AsyncIterator[tuple[Client, Server]]:
    script = Server(list(answers))
    server = await asyncio.start_server(script, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    client = Client(f"http://127.0.0.1:{port}{path}", headers or {}, timeout=PATIENCE, keep_alive=keep_alive)
    try:
        yield client, script
    finally:
        await client.close()
        server.close()


async def ask(client: Client, body: bytes = b"{}", **headers: str) -> tuple[int, bytes]:
    async with asyncio.timeout(PATIENCE), client.request("POST", "/x", body, headers) as answer:
        read = b""
        while piece := await answer.readany():
            read += piece
        return answer.status, read


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await work()

    asyncio.run(main())


BODIES = {
    "length": WHOLE,
    "chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"1;a=b\r\n{\r\n1\r\n}\r\n0\r\nTrailer: x\r\n\r\n",
    "interim": b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n" + WHOLE,
    "identity": b"HTTP/1.1 200 OK\r\nContent-Encoding: identity\r\nContent-Length: 2\r\n\r\n{}",
}


@pytest.mark.parametrize("name", BODIES)
def test_a_connection_carries_one_answer_after_another(name: str) -> None:
    async def work() -> None:
        async with serving(*[BODIES[name]] * 3) as (client, server):
            for _ in range(3):
                assert await ask(client) == (200, b"{}")
            assert server.connections == 1

    run(work)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}",
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\n\r\n{}" + CLOSE,  # its end is the connection's
        WHOLE + b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n[1]",  # nobody has asked for a second one
        WHOLE + CLOSE,
    ],
    ids=["said so", "old", "until the end", "more than was asked for", "closed"],
)
def test_a_connection_that_cannot_go_on_is_not_used_again(answer: bytes) -> None:
    async def work() -> None:
        async with serving(answer, WHOLE) as (client, server):
            assert await ask(client) == (200, b"{}")
            if answer.endswith(CLOSE):
                await asyncio.wait_for(server.left.wait(), PATIENCE)
                await until(lambda: not client._all)
            assert await ask(client) == (200, b"{}")
            assert server.connections == 2

    run(work)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.001)


def test_what_comes_while_nobody_asks_ends_the_connection() -> None:
    async def work() -> None:
        async with serving(WHOLE, WHOLE) as (client, server):
            assert await ask(client) == (200, b"{}")
            (connection,) = client._all
            connection.data_received(b"HTTP/1.1 408 Request Timeout\r\n\r\n")
            assert await ask(client) == (200, b"{}")
            assert server.connections == 2

    run(work)


def test_an_idle_connection_is_closed_after_a_while() -> None:
    async def work() -> None:
        async with serving(WHOLE, WHOLE, keep_alive=0.02) as (client, server):
            assert await ask(client) == (200, b"{}")
            await asyncio.wait_for(server.left.wait(), PATIENCE)  # nobody asks for it: it is swept
            assert not client._free
            assert await ask(client) == (200, b"{}")
            assert server.connections == 2

    run(work)


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n"
FAULTS: dict[str, tuple[bytes, type[RequestFailed]]] = {
    "nothing": (CLOSE, Disconnected),
    "reset": (RESET, Disconnected),
    "half a head": (b"HTTP/1.1 200 OK\r\nContent-" + CLOSE, Disconnected),
    "only an interim head": (b"HTTP/1.1 100 Continue\r\n\r\n" + CLOSE, Disconnected),
    "half a body": (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n{}" + CLOSE, Incomplete),
    "half a chunk": (CHUNKED + b"\r\n4\r\nab" + CLOSE, Incomplete),
    "no last chunk": (CHUNKED + b"\r\n2\r\nab\r\n" + CLOSE, Incomplete),
    "garbage": (b"\0\1\2 no HTTP\r\n\r\n", NotHttp),
    "HTTP/2": (b"\0\0\x12\x04\0\0\0\0\0", NotHttp),
    "a bad chunk": (CHUNKED + b"\r\nzz\r\nab\r\n", NotHttp),
    "both framings": (CHUNKED + b"Content-Length: 2\r\n\r\n0\r\n\r\n", NotHttp),
    "two lengths": (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}", NotHttp),
    "a coding": (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\nxx", NotHttp),
    "another transfer coding": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n2\r\nxx\r\n0\r\n\r\n",
        NotHttp,
    ),
    "no status": (b"HTTP/1.1 000 X\r\nContent-Length: 2\r\n\r\n{}", NotHttp),
    "no status that there is": (b"HTTP/1.1 999 X\r\nContent-Length: 2\r\n\r\n{}", NotHttp),
    "an upgrade": (b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", NotHttp),
    "an endless field": (b"HTTP/1.1 200 OK\r\nA: " + b"a" * (1 << 20), NotHttp),
    "endless fields": (b"HTTP/1.1 200 OK\r\n" + b"A: a\r\n" * 1000, NotHttp),
    "endless hints": (b"HTTP/1.1 103 Hint\r\n\r\n" * 8000, NotHttp),
    "an endless trailer": (CHUNKED + b"\r\n0\r\nA: " + b"a" * (1 << 20), NotHttp),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_no_whole_answer_is_said_to_be_none(name: str) -> None:
    answer, fault = FAULTS[name]

    async def work() -> None:
        async with serving(answer, WHOLE) as (client, server):
            with pytest.raises(RequestFailed) as caught:
                await ask(client)
            assert type(caught.value) is fault, caught.value
            if name == "reset":
                assert isinstance(caught.value.__cause__, ConnectionResetError)
            assert not client._free
            assert await ask(client) == (200, b"{}")
            assert server.connections == 2

    run(work)


def test_all_that_came_before_a_break_can_be_read() -> None:
    async def work() -> None:
        async with (
            serving(CHUNKED + b"\r\n2\r\nab\r\n1\r\nc\r\n" + CLOSE) as (client, _),
            client.request("POST", "/x", b"", {}) as answer,
        ):
            await until(lambda: not client._all)
            assert await answer.readany() == b"abc"
            with pytest.raises(Incomplete):
                await answer.readany()

    run(work)


def test_a_connection_that_ends_before_it_is_used_is_said_to_have_ended() -> None:
    async def work() -> None:
        async with serving(WHOLE) as (client, _):
            connection = await client.connection()
            connection.cut()
            await until(lambda: not client._all)
            async with asyncio.timeout(PATIENCE):
                with pytest.raises(Disconnected):
                    await connection.ask(b"GET / HTTP/1.1\r\n\r\n")

    run(work)


def test_who_leaves_early_ends_the_connection() -> None:
    async def work() -> None:
        async with serving(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{") as (client, server):
            async with client.request("POST", "/x", b"", {}) as answer:
                assert await answer.readany() == b"{"
            await asyncio.wait_for(server.left.wait(), PATIENCE)

    run(work)


def test_who_gives_up_before_the_head_ends_the_connection() -> None:
    async def work() -> None:
        async with serving(b"") as (client, server):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05), client.request("POST", "/x", b"", {}):
                    raise AssertionError("there is no head")
            await asyncio.wait_for(server.left.wait(), PATIENCE)

    run(work)


def test_a_server_waits_for_a_reader_that_is_slow() -> None:
    size = 64 << 20

    async def work() -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size
        async with serving(head + b"x" * size) as (client, _):
            async with client.request("POST", "/x", b"", {}) as answer:
                (connection,) = client._all
                await until(lambda: connection._paused)
                held = connection._held
                assert held < 2 << 20
                read = 0
                while piece := await answer.readany():
                    read += len(piece)
                assert read == size
            assert client._free

    run(work)


def test_an_answer_to_half_a_request_ends_the_connection() -> None:
    async def early(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(WHOLE)
        with contextlib.suppress(ConnectionError):
            await writer.drain()
            await gone.wait()
        writer.close()

    async def work() -> None:
        server = await asyncio.start_server(early, "127.0.0.1", 0, limit=1024)
        client = Client(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", {})
        assert await ask(client, b"x" * (64 << 20)) == (200, b"{}")
        assert not client._free
        gone.set()
        await client.close()
        server.close()

    gone = asyncio.Event()
    run(work)


def test_the_request_as_it_is_sent() -> None:
    async def work() -> None:
        headers = {"Authorization": "Bearer k", "Accept": "a/b"}
        async with serving(WHOLE, WHOLE, headers=headers, path="/llm/") as (client, server):
            port = client._port
            await ask(client, b"body", accept="c/d")
            await ask(client, b"")
            first = b"authorization: Bearer k\r\nhost: 127.0.0.1:%d\r\n" % port
            assert server.requests[0] == (
                b"POST /llm/x HTTP/1.1\r\n" + first + b"accept: c/d\r\ncontent-length: 4\r\n\r\nbody"
            )
            assert b"accept: a/b\r\n" in server.requests[1]
            assert server.requests[1].endswith(b"content-length: 0\r\n\r\n")

    run(work)


@pytest.mark.parametrize("value", ["a\r\nevil: yes", "a\nevil: yes", "a\r", "a\0b"])
def test_a_header_stays_one_line(value: str) -> None:
    client = Client("http://x", {})
    with pytest.raises(ValueError, match="line break"):
        client.request("POST", "/x", b"", {"a": value})


@pytest.mark.parametrize("name", ["Content-Length", "transfer-encoding", "Connection"])
def test_what_every_request_has_of_its_own_cannot_be_set_for_all(name: str) -> None:
    with pytest.raises(StartupError, match=name.lower()):
        Client("http://x", {name: "1"})


def test_who_cannot_be_reached() -> None:
    async def work() -> None:
        with socket.socket() as taken:  # bound, and nobody listens
            taken.bind(("127.0.0.1", 0))
            client = Client(f"http://127.0.0.1:{taken.getsockname()[1]}", {})
            with pytest.raises(ConnectFailed) as caught:
                await ask(client)
            assert isinstance(caught.value.__cause__, ConnectionRefusedError)

    run(work)


def test_a_server_that_does_not_shake_hands_takes_too_long() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        left.set()
        writer.close()

    async def work() -> None:
        server = await asyncio.start_server(silent, "127.0.0.1", 0)
        client = Client(f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}", {}, timeout=0.05)
        with pytest.raises(ConnectFailed) as caught:
            await ask(client)
        assert isinstance(caught.value.__cause__, TimeoutError)
        await asyncio.wait_for(left.wait(), PATIENCE)
        server.close()

    left = asyncio.Event()
    run(work)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make certificates with")
def test_tls_with_a_certificate_that_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate(tmp_path, "localhost")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")

    async def work() -> None:
        script = Server([WHOLE, WHOLE])
        server = await asyncio.start_server(script, "127.0.0.1", 0, ssl=context)
        port = server.sockets[0].getsockname()[1]
        client = Client(f"https://localhost:{port}", {})
        with pytest.raises(ConnectFailed) as caught:  # signed by itself
            await ask(client)
        assert isinstance(caught.value.__cause__, ssl.SSLCertVerificationError)
        trusting = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))
        monkeypatch.setattr(module, "_tls", lambda: trusting)
        assert [await ask(client), await ask(client)] == [(200, b"{}")] * 2
        assert len(script.requests) == 2
        assert script.requests[0].count(b"host: localhost:%d\r\n" % port) == 1
        with pytest.raises(ConnectFailed):  # another name than the certificate's
            await ask(Client(f"https://127.0.0.1:{port}", {}))
        await client.close()
        server.close()

    run(work)


def test_an_address_of_version_6() -> None:
    async def work() -> None:
        script = Server([WHOLE])
        try:
            server = await asyncio.start_server(script, "::1", 0)
        except OSError:
            pytest.skip("no IPv6 here")
        port = server.sockets[0].getsockname()[1]
        client = Client(f"http://[::1]:{port}", {})
        assert await ask(client) == (200, b"{}")
        assert b"host: [::1]:%d\r\n" % port in script.requests[0]
        await client.close()
        server.close()

    run(work)
