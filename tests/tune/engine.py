"""An engine whose speed is a known function of how many requests it computes at a time, as a process.

    python engine.py [serve] MODEL --host H --port P --max-num-seqs N …

A token takes BASE + SLOPE x (requests at work) seconds, a request has max_tokens of them, and N may
be at work.
It is vLLM to who starts it: /health, /v1/models, /metrics with vLLM's names, streamed completions. A file
`refuse-above` in FAKE_ENGINE_FOLDER makes it end with status 2 where N is over the number in it.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

from aiohttp import web

BASE, SLOPE = 0.004, 0.002
FOLDER = Path(os.environ.get("FAKE_ENGINE_FOLDER", "."))


def option(name: str, default: str) -> str:
    """The last value of a flag."""
    value = default
    for index, word in enumerate(sys.argv):
        if word == name:
            value = sys.argv[index + 1]
        elif word.startswith(name + "="):
            value = word.partition("=")[2]
    return value


class Engine:
    """Places, and what the metrics tell."""

    def __init__(self, places: int) -> None:
        self.places = asyncio.Semaphore(places)
        self.running = self.waiting = self.finished = 0
        self.sums = {"queue": 0.0, "prefill": 0.0, "decode": 0.0}

    async def metrics(self, request: web.Request) -> web.Response:
        lines = [
            f'vllm:num_requests_running{{engine="0",model_name="fake"}} {self.running}',
            f'vllm:num_requests_waiting{{engine="0",model_name="fake"}} {self.waiting}',
            'vllm:kv_cache_usage_perc{engine="0",model_name="fake"} 0.1',
            f'vllm:request_success_total{{finished_reason="length",model_name="fake"}} {self.finished}',
        ]
        for name, total in self.sums.items():
            full = f"vllm:request_{name}_time_seconds"
            lines += [
                f"# TYPE {full} histogram",
                f'{full}_bucket{{le="+Inf",model_name="fake"}} {self.finished}',
                f'{full}_count{{model_name="fake"}} {self.finished}',
                f'{full}_sum{{model_name="fake"}} {total}',
            ]
        return web.Response(text="\n".join(lines) + "\n")

    async def complete(self, request: web.Request) -> web.StreamResponse:
        now = asyncio.get_running_loop().time
        body = await request.json()
        arrived = now()
        self.waiting += 1
        try:
            await self.places.acquire()
        finally:
            self.waiting -= 1
        self.running += 1
        try:
            admitted = now()
            answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await answer.prepare(request)
            first = 0.0
            for _ in range(body["max_tokens"]):
                await asyncio.sleep(BASE + SLOPE * self.running)
                first = first or now()
                await answer.write(
                    b'data: {"choices": [{"index": 0, "text": "x", "finish_reason": null}]}\n\n'
                )
            for name, seconds in (
                ("queue", admitted - arrived),
                ("prefill", first - admitted),
                ("decode", now() - first),
            ):
                self.sums[name] += seconds
            self.finished += 1
            usage = {"prompt_tokens": 1, "completion_tokens": body["max_tokens"]}
            await answer.write(
                f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n".encode()
            )
            await answer.write_eof()
            return answer
        finally:
            self.running -= 1
            self.places.release()


async def fine(request: web.Request) -> web.Response:
    return web.json_response({"version": "0.32.0", "data": [{"id": "fake", "max_model_len": 4096}]})


def application(places: int) -> web.Application:
    """It, with so many places."""
    engine = Engine(places)
    app = web.Application()
    for path in ("/health", "/readyz", "/livez", "/v1/models", "/version"):
        app.router.add_get(path, fine)
    app.router.add_get("/metrics", engine.metrics)
    app.router.add_post("/v1/completions", engine.complete)
    return app


def main() -> None:
    """Serve until SIGTERM."""
    places = int(option("--max-num-seqs", "64"))
    with (FOLDER / "starts").open("a") as starts:
        starts.write(f"{places}\n")
    limit = FOLDER / "refuse-above"
    if limit.exists() and places > int(limit.read_text()):
        print(f"error: --max-num-seqs {places} needs more memory than there is", flush=True)
        sys.exit(2)
    web.run_app(
        application(places),
        host="127.0.0.1",
        port=int(option("--port", "0")),
        print=None,
        shutdown_timeout=0.2,
    )


if __name__ == "__main__":
    main()
