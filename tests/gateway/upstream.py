"""A fake upstream on a bare socket, so that it can do everything that a server must not do.

    Upstream(script) ── behaviour per request ──▶ answers · faults · what it was asked

A behaviour is a function of the connection and the request; those here are the faults of the matrix. Run as
`python -m tests.gateway.upstream`, it is a process of its own that can be killed: it prints its port.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import sys
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

TOKENS = ("Hello", " from", " the", " upstream")


@dataclass
class Asked:
    """One request."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def streams(self) -> bool:
        return bool(self.body and self.json.get("stream"))


@dataclass
class Wire:
    """The connection that a behaviour writes to."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    asked: Asked
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    """The gateway has closed the connection."""
    go: asyncio.Event = field(default_factory=asyncio.Event)
    complete: bool = False
    """A whole answer was sent, which does not say that the connection ends: it stays open for another. One
    that closed it would race with the gateway, which may send its next request there."""

    async def read_by_client(self) -> None:
        """Wait until the test has said so."""
        await self.go.wait()

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def head(self, status: int, *fields: str, content_type: str = "application/json") -> None:
        lines = [f"HTTP/1.1 {status} X", f"Content-Type: {content_type}", *fields]
        await self.send("\r\n".join(lines).encode() + b"\r\n\r\n")

    async def whole(self, status: int, body: Any, *fields: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        await self.head(status, f"Content-Length: {len(data)}", *fields)
        await self.send(data)
        self.complete = True

    async def stream(self) -> None:
        await self.head(200, "Transfer-Encoding: chunked", content_type="text/event-stream")

    async def chunk(self, data: bytes) -> None:
        await self.send(b"%x\r\n%s\r\n" % (len(data), data))

    def reset(self) -> None:
        """Close with RST."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


Behaviour = Callable[[Wire], Awaitable[None]]

USAGE = {
    "prompt_tokens": 7,
    "completion_tokens": len(TOKENS),
    "total_tokens": 7 + len(TOKENS),
    "prompt_tokens_details": {"cached_tokens": 2},
    "device_seconds": 0.25,
}


def whole_answer(asked: Asked) -> dict[str, Any]:
    message = {"role": "assistant", "content": "".join(TOKENS)}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return {"id": "chatcmpl-1", "object": "chat.completion", "choices": [choice], "usage": USAGE}


def event(payload: Any) -> bytes:
    return b"data: " + json.dumps(payload, separators=(",", ":")).encode() + b"\n\n"


def events(asked: Asked) -> list[bytes]:
    """A whole stream of chat, with usage and the ids of tokens (0, 1, …) where those were asked for; what was
    generated elsewhere is not said again."""
    body = asked.json
    wanted = (body.get("stream_options") or {}).get("include_usage")
    null = {"usage": None} if wanted else {}
    generated = body.get("generated_token_ids", [])
    assert generated == list(range(len(generated)))
    head = {"id": "chatcmpl-1"}
    out = [
        event({**head, "choices": [{"index": 0, "delta": {"content": token}}], **null})
        for token in TOKENS[len(generated) :]
    ]
    out.append(event({**head, "choices": [{"index": 0, "finish_reason": "stop"}], **null}))
    if asked.headers.get("x-penstock-stream-tokens") == "1":
        for number in range(len(out) - 1):
            out[number] = b": tokens %d\n" % (len(generated) + number) + out[number]
        out[-1] = b": tokens \n" + out[-1]
        out[0] = b": prompt 7 2\n" + out[0]
    if wanted:
        count = len(TOKENS) - len(generated)
        usage = {**USAGE, "completion_tokens": count, "total_tokens": 7 + count}
        out.append(event({**head, "choices": [], "usage": usage}))
    return [*out, b"data: [DONE]\n\n"]


async def answer(wire: Wire) -> None:
    """As it should be."""
    if wire.asked.streams:
        await wire.stream()
        for each in events(wire.asked):
            await wire.chunk(each)
        await wire.send(b"0\r\n\r\n")
    else:
        await wire.whole(200, whole_answer(wire.asked))


def status(code: int, *fields: str, body: Any = None) -> Behaviour:
    async def behave(wire: Wire) -> None:
        await wire.whole(code, body or {"error": {"message": f"this is {code}", "code": "x"}}, *fields)

    return behave


async def reset(wire: Wire) -> None:
    """RST instead of an answer."""
    wire.reset()


async def hang_up(wire: Wire) -> None:
    """FIN instead of an answer."""


async def hang(wire: Wire) -> None:
    """No headers, ever."""
    await wire.gone.wait()


async def hang_after_headers(wire: Wire) -> None:
    """Headers, and no body, ever."""
    if wire.asked.streams:
        await wire.stream()
    else:
        await wire.head(200, "Content-Length: 100")
    await wire.gone.wait()


async def stall(wire: Wire) -> None:
    """Two events, and then nothing."""
    await wire.stream()
    for each in events(wire.asked)[:2]:
        await wire.chunk(each)
    await wire.gone.wait()


async def cut(wire: Wire) -> None:
    """Two events, half of the third, and FIN in the middle of a chunk."""
    first, second, third = events(wire.asked)[:3]
    await wire.stream()
    await wire.chunk(first)
    await wire.chunk(second)
    await wire.send(b"%x\r\n%s" % (len(third), third[:20]))


async def cut_by_reset(wire: Wire) -> None:
    """Two events, and RST."""
    await wire.stream()
    for each in events(wire.asked)[:2]:
        await wire.chunk(each)
    await wire.read_by_client()  # RST overtakes what is still in the buffers
    wire.reset()


async def end_early(wire: Wire) -> None:
    """Two events, and a well-formed end without [DONE]."""
    await wire.stream()
    for each in events(wire.asked)[:2]:
        await wire.chunk(each)
    await wire.send(b"0\r\n\r\n")


async def half_body(wire: Wire) -> None:
    """Half of an answer that is not streamed."""
    data = json.dumps(whole_answer(wire.asked)).encode()
    await wire.head(200, f"Content-Length: {len(data)}")
    await wire.send(data[: len(data) // 2])


async def garbage(wire: Wire) -> None:
    """No HTTP."""
    await wire.send(b"\x00\x01\x02 this is not HTTP at all\r\n\r\n")


async def no_json(wire: Wire) -> None:
    """HTTP, and no JSON in it."""
    await wire.whole(200, b"<html>It works!</html>")


async def no_stream(wire: Wire) -> None:
    """A whole answer, whatever was asked for."""
    await wire.whole(200, whole_answer(wire.asked))


async def error_event(wire: Wire) -> None:
    """A stream whose first event is an error, as engines do that have sent headers."""
    await wire.stream()
    await wire.chunk(event({"error": {"message": "out of memory", "type": "server_error"}}))
    await wire.chunk(b"data: [DONE]\n\n")
    await wire.send(b"0\r\n\r\n")


async def error_later(wire: Wire) -> None:
    """Two events, and then an error."""
    await wire.stream()
    for each in events(wire.asked)[:2]:
        await wire.chunk(each)
    await wire.read_by_client()
    await wire.chunk(event({"error": {"message": "out of memory", "type": "server_error"}}))
    await wire.chunk(b"data: [DONE]\n\n")
    await wire.send(b"0\r\n\r\n")


async def endless(wire: Wire) -> None:
    """Events until the gateway leaves."""
    await wire.stream()
    while not wire.gone.is_set():
        await wire.chunk(events(wire.asked)[0])
        await asyncio.sleep(0.001)


async def no_bills(wire: Wire) -> None:
    """A feed of bills without any: whoever broke is lost with his."""
    await wire.whole(200, {"data": [], "next": "start:0", "lost": 0})


class Upstream:
    """A server in a thread. The script says how it behaves, request by request; after that, it answers."""

    def __init__(self, script: Sequence[Behaviour] = (), default: Behaviour = answer) -> None:
        self.script = list(script)
        self.default = default
        self.asked: list[Asked] = []
        self.left = threading.Event()
        """The gateway has left in the middle of an answer."""
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> Upstream:
        self._thread.start()
        assert self._started.wait(10)
        return self

    def go(self) -> None:
        """The client has read what was sent so far."""
        self._loop.call_soon_threadsafe(self._go.set)

    def hold(self) -> None:
        """What is sent from now on has not been read before `go` is said again."""
        self._loop.call_soon_threadsafe(self._go.clear)

    def stop(self) -> None:
        if not self._thread.is_alive():
            return
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        self._stop, self._go = asyncio.Event(), asyncio.Event()
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._started.set()
        await self._stop.wait()
        server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                while await self._one(reader, writer):
                    pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One exchange; whether the connection can carry another."""
        head = await reader.readuntil(b"\r\n\r\n")
        line, *fields = head.decode("latin-1").rstrip("\r\n").split("\r\n")
        headers = {name.lower(): value for name, value in (each.split(": ", 1) for each in fields)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        method, path, _ = line.split(" ")
        asked = Asked(method, path, headers, body)
        if path.startswith("/v1/bills"):
            behaviour: Behaviour = no_bills
        else:
            self.asked.append(asked)
            behaviour = self.script.pop(0) if self.script else self.default
        wire = Wire(reader, writer, asked, go=self._go)
        watch = asyncio.ensure_future(self._watch(wire))
        try:
            await behaviour(wire)
        except ConnectionError:  # writing may find out before `_watch` does, which then never will
            self._leave(wire)
            raise
        finally:
            watch.cancel()
        return wire.complete or behaviour is answer or getattr(behaviour, "__name__", "behave") == "behave"

    async def _watch(self, wire: Wire) -> None:
        data = b""
        with contextlib.suppress(ConnectionError):
            data = await wire.reader.read(1)
        if not data:
            self._leave(wire)

    def _leave(self, wire: Wire) -> None:
        self.left.set()
        wire.gone.set()


def main() -> None:
    """A process of its own: prints its port, and behaves as its argument says."""
    behaviour = {"endless": endless, "hang": hang, "answer": answer}[sys.argv[1]]
    upstream = Upstream(default=behaviour).start()
    print(upstream.port, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
