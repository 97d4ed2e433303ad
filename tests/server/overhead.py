"""What the API process spends on a streamed token: `python -m tests.server.overhead [streams] [tokens]`.

Streams run against the real application behind the real uvicorn, with an engine that answers at once; clients
read from another process. Printed is the processor time of the server process per token, and what that makes
of one engine step in which every stream gets one token. Not a test: timings have no place in the suite.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import time
from multiprocessing import Process
from typing import Any

import uvicorn
from msgspec.structs import replace

from penstock.http.bind import bind
from penstock.server.app import create_app
from penstock.server.config import ServerConfig
from penstock.text.chat_template import ChatTemplate
from penstock.text.tokenizer import Tokenizer

from .fake_engine import INFO, FakeEngine
from .tiny import make_tokenizer

WORDS = "The penstock brings water to the turbine under pressure. "


def read_streams(port: int, streams: int, body: dict[str, Any]) -> None:
    """Clients: open all streams, then read them to the end."""
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    sockets = [socket.create_connection(("127.0.0.1", port)) for _ in range(streams)]
    for sock in sockets:
        sock.sendall(head + data)

    async def drain(sock: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=sock)
        tail = b""
        while b"data: [DONE]" not in tail:
            received = await reader.read(1 << 16)
            if not received:
                raise ConnectionError("a stream ended early")
            tail = (tail + received)[-100:]
        writer.close()

    async def everyone() -> None:
        await asyncio.gather(*(drain(sock) for sock in sockets))

    asyncio.run(everyone())


async def measure(tokenizer: Tokenizer, streams: int, tokens: int, extra: dict[str, Any]) -> float:
    """Seconds of processor time per token."""
    script = tokenizer.encode(WORDS * (tokens // len(WORDS) + 1), add_special_tokens=False)
    engine = FakeEngine(lambda _: script, info=replace(INFO, max_model_len=tokens + 100))
    config = ServerConfig(host="127.0.0.1", port=0, served_model_name=("tiny",))
    app = create_app(engine, tokenizer, ChatTemplate.from_tokenizer(tokenizer), config)
    server = uvicorn.Server(
        uvicorn.Config(app, log_config=None, lifespan="off", ws="none", access_log=False, http="httptools")
    )
    sock = bind(config)
    port = sock.getsockname()[1]
    running = asyncio.create_task(server.serve(sockets=[sock]))
    while not server.started:
        await asyncio.sleep(0.01)
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True, "max_tokens": tokens, **extra}
    clients = Process(target=read_streams, args=(port, streams, body))
    clients.start()
    started = time.process_time()
    while clients.is_alive():
        await asyncio.sleep(0.02)
    spent = time.process_time() - started
    server.should_exit = True
    await running
    if clients.exitcode != 0:
        raise RuntimeError("the clients failed")
    return spent / (streams * tokens)


def main() -> None:
    """Measure the usual shapes of a stream."""
    streams = int(sys.argv[1]) if len(sys.argv) > 1 else 32
    tokens = int(sys.argv[2]) if len(sys.argv) > 2 else 512
    tokenizer = make_tokenizer()
    try:
        import uvloop

        factory = uvloop.new_event_loop
    except ImportError:
        factory = None
    every = {"include_usage": True, "continuous_usage_stats": True}
    for name, extra in (
        ("chat", {}),
        ("chat, usage in every chunk", {"stream_options": every}),
        ("chat, 5 logprobs", {"logprobs": True, "top_logprobs": 5}),
        ("chat, a stop string", {"stop": "never there"}),
    ):
        with asyncio.Runner(loop_factory=factory) as runner:
            cost = runner.run(measure(tokenizer, streams, tokens, extra))
        step = cost * streams * 1e3
        print(f"{name:28} {cost * 1e6:7.1f} µs per token · {step:6.2f} ms per step of {streams}")


if __name__ == "__main__":
    main()
