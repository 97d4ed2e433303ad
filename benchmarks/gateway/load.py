"""Load on an OpenAI-compatible URL from a process of its own, with as little as Python can.

    python -m benchmarks.gateway.load --port N [--key K] [--stream] (--concurrency C | --rate R) --requests N

Closed loop: C connections, each with one request after the other. Open loop: R requests a second, whatever
the answers do, each on a connection that is free, or on a new one; times count from when a request was due.
Prints JSON: requests per second, errors, percentiles of the time to the first byte and of the whole answer in
milliseconds, and its own CPU time for a request: where that is near 1 / rate, it is the bottleneck.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections import Counter
from typing import Any

import uvloop

_MESSAGES = [
    {"role": "system", "content": "You are a helpful assistant. " * 8},
    {"role": "user", "content": "What is a penstock? " * 4},
]


class Client(asyncio.Protocol):
    """One connection with one request at a time."""

    def __init__(self) -> None:
        self.done: asyncio.Future[str] | None = None
        self.first = 0.0
        self.closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport  # uvloop's is no asyncio.WriteTransport

    def ask(self, request: bytes) -> asyncio.Future[str]:
        """Send; the future is how it went."""
        self.buffer = b""
        self.first = 0.0
        self.done = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return self.done

    def data_received(self, data: bytes) -> None:
        if self.done is None or self.done.done():
            return
        if not self.buffer:
            self.first = time.perf_counter()
        self.buffer += data
        head, blank, body = self.buffer.partition(b"\r\n\r\n")
        if not blank:
            return
        lower = head.lower()
        if b"transfer-encoding: chunked" in lower:
            whole = body.endswith(b"0\r\n\r\n")
        else:
            length = int(lower.split(b"content-length:")[1].split(b"\r\n")[0])
            whole = len(body) >= length
        if whole:
            status = head[9:12].decode()
            streamed = b"text/event-stream" in lower
            self.done.set_result(status if not streamed or b"data: [DONE]" in body else "cut")

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        if self.done is not None and not self.done.done():
            self.done.set_result("lost")


class Load:
    def __init__(self, args: argparse.Namespace) -> None:
        body = {"model": args.model, "messages": _MESSAGES, "max_tokens": 64}
        if args.stream:
            body["stream"] = True
        data = json.dumps(body).encode()
        key = f"Authorization: Bearer {args.key}\r\n" if args.key else ""
        self.request = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n{key}Content-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\n\r\n".encode()
            + data
        )
        self.port = args.port
        self.free: list[Client] = []
        self.first: list[float] = []
        self.whole: list[float] = []
        self.outcomes: Counter[str] = Counter()
        self.failures: list[str] = []
        """What the first failures said."""

    async def one(self, due: float) -> None:
        while self.free and self.free[-1].closed:
            self.free.pop()
        if self.free:
            client = self.free.pop()
        else:
            loop = asyncio.get_running_loop()
            _, client = await loop.create_connection(Client, "127.0.0.1", self.port)
        outcome = await client.ask(self.request)
        now = time.perf_counter()
        self.outcomes[outcome] += 1
        if outcome != "200" and len(self.failures) < 3:
            self.failures.append(client.buffer[:2000].decode("utf-8", "replace"))
        if outcome == "200":
            self.first.append(client.first - due)
            self.whole.append(now - due)
        if not client.closed:
            self.free.append(client)

    async def closed(self, concurrency: int, count: int) -> None:
        left = count

        async def loop() -> None:
            nonlocal left
            while left > 0:
                left -= 1
                await self.one(time.perf_counter())

        await asyncio.gather(*(loop() for _ in range(concurrency)))

    async def open(self, rate: float, count: int) -> None:
        begin = time.perf_counter()
        tasks = []
        for number in range(count):
            due = begin + number / rate
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            tasks.append(asyncio.ensure_future(self.one(due)))
        await asyncio.gather(*tasks)

    def result(self, seconds: float, cpu: float, warming: int) -> dict[str, object]:
        count = sum(self.outcomes.values())
        return {
            "requests": count,
            "requests_with_warming": count + warming,
            "seconds": round(seconds, 3),
            "per_second": round(self.outcomes["200"] / seconds, 1),
            "outcomes": dict(self.outcomes),
            "failures": self.failures,
            "load_cpu_us": round(1e6 * cpu / max(1, count)),
            "first_ms": _percentiles(self.first),
            "whole_ms": _percentiles(self.whole),
        }


def _percentiles(times: list[float]) -> dict[str, float]:
    ordered = sorted(times)
    if not ordered:
        return {}
    at = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    last = len(ordered) - 1
    return {name: round(1000 * ordered[round(share * last)], 3) for name, share in at.items()}


async def main(args: argparse.Namespace) -> None:
    load = Load(args)
    warming = min(args.warm, args.requests)
    for _ in range(warming):
        await load.one(time.perf_counter())
    load.first, load.whole, load.outcomes = [], [], Counter()
    begin, used = time.perf_counter(), time.process_time()
    if args.rate:
        await load.open(args.rate, args.requests)
    else:
        await load.closed(args.concurrency, args.requests)
    seconds, used = time.perf_counter() - begin, time.process_time() - used
    print(json.dumps(load.result(seconds, used, warming)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--key", default="")
    parser.add_argument("--model", default="small")
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--concurrency", type=int, default=100)
    parser.add_argument("--rate", type=float, default=0.0)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--warm", type=int, default=20)
    uvloop.run(main(parser.parse_args()))
