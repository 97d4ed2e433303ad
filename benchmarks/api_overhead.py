"""What the API process adds to a token: from the end of the step that made it to its arrival at the client.

    python -m benchmarks.api_overhead [--streams 32]

A real engine serves the 0.6B shape to N concurrent chat streams. The engine stamps every event with the time
at which its step ended (CLOCK_MONOTONIC); the client, a process of its own, stamps every chunk as it arrives.
The difference is everything between: ZeroMQ, detokenising, JSON, SSE, HTTP, and waiting for a core, of which
the engine takes all. Beside it stands the same with prompts so short that the engine is never the bottleneck.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import uvloop

from penstock.core.plan import Event
from penstock.core.request_spec import RequestSpec
from penstock.engine.config import EngineConfig
from penstock.engine.remote import RemoteEngine
from penstock.http.serve import bind, serve
from penstock.server.app import create_app
from penstock.server.config import ServerConfig
from penstock.text.chat_template import ChatTemplate
from penstock.text.tokenizer import Tokenizer

from .checkpoint import write_checkpoint
from .common import MODELS, save

# A bare protocol: what a client library spends on a chunk is not the server's.
_CLIENT = """
import asyncio, json, sys, time
import uvloop

class Stream(asyncio.Protocol):
    def __init__(self, number, tokens, done):
        messages = [{"role": "user", "content": f"stream {number} " + "word " * 20}]
        body = json.dumps({"messages": messages, "stream": True, "max_tokens": tokens, "ignore_eos": True,
                           "temperature": 0}).encode()
        self.request = (b"POST /v1/chat/completions HTTP/1.1\\r\\nHost: x\\r\\nContent-Type: application/json"
                        b"\\r\\nConnection: close\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(body)) + body
        self.times, self.done = [], done

    def connection_made(self, transport):
        transport.write(self.request)

    def data_received(self, data):
        now = time.monotonic()
        self.times += [now] * (data.count(b'"content":"') - data.count(b'"content":""'))

    def connection_lost(self, error):
        self.done.set_result(self.times)

async def main(port, streams, tokens):
    loop = asyncio.get_running_loop()
    results = [loop.create_future() for _ in range(streams)]
    for number, done in enumerate(results):
        await loop.create_connection(lambda: Stream(number, tokens, done), "127.0.0.1", port)
    print(json.dumps(dict(enumerate([await done for done in results]))))

uvloop.run(main(int(sys.argv[1].rsplit(":", 1)[1]), int(sys.argv[2]), int(sys.argv[3])))
"""


class StampedEngine(RemoteEngine):
    """Remembers when the engine made each token of each request."""

    stamps: dict[str, list[float]]

    async def generate(
        self, spec: RequestSpec, on_orphan: Callable[[Event], None] | None = None
    ) -> AsyncGenerator[list[Event], None]:
        """See RemoteEngine.generate."""
        self.stamps.update({name: [] for name in spec.ids})
        async for events in super().generate(spec, on_orphan):
            for event in events:
                self.stamps[event.request] += [event.at] * len(event.tokens)
            yield events


async def measure(model: str, streams: int, tokens: int) -> dict[str, Any]:
    """One run: milliseconds per token."""
    engine = StampedEngine.launch(EngineConfig(model=model, max_model_len=2048), log_level="warning")
    assert isinstance(engine, StampedEngine)
    engine.stamps = {}
    server = None
    try:
        await engine.start()
        tokenizer = Tokenizer.from_directory(Path(engine.info.path))
        config = ServerConfig(
            host="127.0.0.1", port=0, uvicorn_log_level="warning", disable_uvicorn_access_log=True
        )
        sock = bind(config)
        app = create_app(engine, tokenizer, ChatTemplate.from_tokenizer(tokenizer), config)
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        server = asyncio.create_task(serve(app, config, engine, sock, handle_signals=False))
        await asyncio.sleep(0.5)
        await _client(url, 2, 4)
        engine.stamps.clear()
        began = time.monotonic()
        arrivals = await _client(url, streams, tokens)
        seconds = time.monotonic() - began
    finally:
        await engine.close()
        if server is not None:
            server.cancel()
    return _compare(engine.stamps, arrivals, seconds)


async def _client(url: str, streams: int, tokens: int) -> dict[str, list[float]]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _CLIENT, url, str(streams), str(tokens), stdout=subprocess.PIPE
    )
    out, _ = await process.communicate()
    result: dict[str, list[float]] = json.loads(out)
    return result


def _compare(
    stamps: dict[str, list[float]], arrivals: dict[str, list[float]], seconds: float
) -> dict[str, Any]:
    """Pair the k-th token with the k-th chunk; requests are paired in order of their first token."""
    made = sorted(stamps.values(), key=lambda times: times[0])
    came = sorted(arrivals.values(), key=lambda times: times[0])
    added = []
    for engine_times, client_times in zip(made, came, strict=True):
        if len(engine_times) == len(client_times):  # a token without text of its own joins the next chunk
            added += [1e3 * (b - a) for a, b in zip(engine_times, client_times, strict=True)]
    steps = sorted({stamp for times in made for stamp in times})
    gaps = [1e3 * (b - a) for a, b in itertools.pairwise(steps)]
    if not added:
        raise RuntimeError("no stream had one chunk per token: nothing can be compared")
    quantiles = statistics.quantiles(added, n=100)
    return {
        "tokens": len(added),
        "seconds": seconds,
        "step_ms": statistics.median(gaps),
        "added_ms": {
            "mean": statistics.mean(added),
            "p50": quantiles[49],
            "p90": quantiles[89],
            "p99": quantiles[98],
        },
    }


def run(streams: int = 32, tokens: int = 32, rounds: int = 3) -> dict[str, Any]:
    """Medians over rounds, with the 0.6B shape and with a tiny one."""
    result: dict[str, Any] = {"streams": streams}
    for shape in ("qwen3-0.6b", "qwen3-tiny"):
        model = write_checkpoint(MODELS / shape, shape)
        runs = [uvloop.run(measure(str(model), streams, tokens)) for _ in range(rounds)]
        result[shape] = {
            "runs": runs,
            "median": {
                "step_ms": statistics.median(run["step_ms"] for run in runs),
                **{
                    f"added_{name}_ms": statistics.median(run["added_ms"][name] for run in runs)
                    for name in ("mean", "p50", "p90", "p99")
                },
            },
        }
    return result


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    result = run(args.streams, rounds=args.rounds)
    save("api_overhead", result)
    print(
        json.dumps(
            {name: value["median"] for name, value in result.items() if isinstance(value, dict)}, indent=1
        )
    )


if __name__ == "__main__":
    main()
