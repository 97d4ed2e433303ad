"""A fake upstream that costs as little as Python can: a bare protocol, answers that are bytes.

    python -m benchmarks.gateway.upstream [--gap SECONDS]      prints its port

A request with `"stream":true` gets 16 events in chunks of their own, `gap` seconds apart; any other gets one
JSON answer. Both carry usage, as an engine of ours does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from typing import Any

import uvloop

EVENTS = 16
_USAGE = {
    "prompt_tokens": 32,
    "completion_tokens": EVENTS,
    "total_tokens": 32 + EVENTS,
    "prompt_tokens_details": {"cached_tokens": 16},
    "device_seconds": 0.0125,
}
_HEAD = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}


def _event(payload: object) -> bytes:
    data = b"data: " + json.dumps(payload, separators=(",", ":")).encode() + b"\n\n"
    return b"%x\r\n%s\r\n" % (len(data), data)


def _choice(token: str | None) -> dict[str, object]:
    delta = {} if token is None else {"content": token}
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None if token else "stop"}


_WHOLE = json.dumps(
    {
        **_HEAD,
        "object": "chat.completion",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "word " * EVENTS}}],
        "usage": _USAGE,
    }
).encode()
_PLAIN = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(_WHOLE) + _WHOLE
)
_STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
_EVENTS = [_event({**_HEAD, "choices": [_choice(f"word{i} ")], "usage": None}) for i in range(EVENTS)]
_LAST = (
    _event({**_HEAD, "choices": [_choice(None)], "usage": None})
    + _event({**_HEAD, "choices": [], "usage": _USAGE})
    + b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
)


class Upstream(asyncio.Protocol):
    """One connection: requests one after the other."""

    gap = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport  # uvloop's is no asyncio.WriteTransport
        self.buffer = b""
        self.loop = asyncio.get_running_loop()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = self.buffer[:end].lower()
            at = head.find(b"content-length:")
            length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self.buffer) < end + 4 + length:
                return
            body = self.buffer[end + 4 : end + 4 + length]
            self.buffer = self.buffer[end + 4 + length :]
            if b'"stream":true' in body.replace(b" ", b""):
                self.transport.write(_STREAM)
                self._event(0)
            else:
                self.transport.write(_PLAIN)

    def _event(self, number: int) -> None:
        if self.transport.is_closing():
            return
        if number == EVENTS:
            self.transport.write(_LAST)
            return
        self.transport.write(_EVENTS[number])
        self.loop.call_later(self.gap, self._event, number + 1)


async def main(gap: float) -> None:
    Upstream.gap = gap
    server = await asyncio.get_running_loop().create_server(Upstream, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--gap", type=float, default=0.005)
    uvloop.run(main(parser.parse_args().gap))
