"""Background work beside real-time traffic, on this machine: a batch beside streams, through a real server.

    python -m benchmarks.background_cpu [--model demo] [--seconds 120] [--slo-ttft-ms 500] [--slo-itl-ms 100]

Three runs on one server: a batch by itself (the offline throughput), streams that arrive at random times at
30 % of that, and both. Told are the P99 of TTFT and ITL against the SLO, and the batch's tokens per second
against the idle share of the offline throughput (target: 60 %). benchmarks/background.py simulates it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from typing import Any

import aiohttp

from .background import percentile
from .common import save, serving

_WORDS = "water pressure gate pipe turbine cache block token step queue request model weight".split()


def _prompt(rng: random.Random) -> str:
    return " ".join(rng.choice(_WORDS) for _ in range(max(4, int(rng.lognormvariate(3.5, 0.5)))))


def _lines(count: int, seed: int) -> bytes:
    rng = random.Random(f"{seed} batch")
    lines = []
    for number in range(count):
        body = {"prompt": _prompt(rng), "max_tokens": rng.randint(16, 64), "ignore_eos": True}
        lines.append({"custom_id": str(number), "method": "POST", "url": "/v1/completions", "body": body})
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


class Server:
    """One, as its clients see it."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self.url, self.session = url, session
        self.ttft: list[float] = []
        self.itl: list[float] = []
        self.tokens = 0

    async def begin(self, content: bytes) -> str:
        """A batch; its id."""
        form = aiohttp.FormData()
        form.add_field("purpose", "batch")
        form.add_field("file", content, filename="in.jsonl")
        async with self.session.post(f"{self.url}/v1/files", data=form) as answer:
            file = (await answer.json())["id"]
        body = {"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "24h"}
        async with self.session.post(f"{self.url}/v1/batches", json=body) as answer:
            return str((await answer.json())["id"])

    async def batch(self, id: str) -> dict[str, Any]:
        async with self.session.get(f"{self.url}/v1/batches/{id}") as answer:
            found: dict[str, Any] = await answer.json()
        return found

    async def ended(self, id: str) -> int:
        """Tokens of a batch's answers, when it has ended."""
        while (batch := await self.batch(id))["status"] not in ("completed", "cancelled"):
            await asyncio.sleep(0.2)
        if batch["output_file_id"] is None:
            return 0
        path = f"{self.url}/v1/files/{batch['output_file_id']}/content"
        async with self.session.get(path) as answer:
            lines = (await answer.read()).splitlines()
        return sum(json.loads(line)["response"]["body"]["usage"]["total_tokens"] for line in lines)

    async def cancel(self, id: str) -> None:
        async with self.session.post(f"{self.url}/v1/batches/{id}/cancel") as answer:
            await answer.read()

    async def stream(self, prompt: str, most: int) -> None:
        """One request that somebody waits for."""
        options = {"include_usage": True}
        body = {
            "prompt": prompt,
            "max_tokens": most,
            "ignore_eos": True,
            "stream": True,
            "stream_options": options,
        }
        begun = last = time.perf_counter()
        first = True
        async with self.session.post(f"{self.url}/v1/completions", json=body) as answer:
            async for line in answer.content:
                if not line.startswith(b"data: {"):
                    continue
                now = time.perf_counter()
                event = json.loads(line[6:])
                if event.get("usage"):
                    self.tokens += event["usage"]["total_tokens"]
                if not event["choices"]:
                    continue
                (self.ttft if first else self.itl).append(now - (begun if first else last))
                first, last = False, now

    async def traffic(self, rate: float, seconds: float, seed: int) -> dict[str, float]:
        """Streams that begin at random times."""
        self.ttft, self.itl, self.tokens = [], [], 0
        rng, begun, at = random.Random(f"{seed} streams"), time.perf_counter(), 0.0
        async with asyncio.TaskGroup() as group:
            while (at := at + rng.expovariate(rate)) < seconds:
                await asyncio.sleep(max(0.0, begun + at - time.perf_counter()))
                group.create_task(self.stream(_prompt(rng), rng.randint(16, 64)))
        return {
            "requests": len(self.ttft),
            "tokens_per_s": self.tokens / (time.perf_counter() - begun),
            "p99_ttft_ms": 1e3 * percentile(self.ttft, 0.99),
            "p99_itl_ms": 1e3 * percentile(self.itl, 0.99),
        }


async def measure(url: str, args: argparse.Namespace) -> dict[str, Any]:
    """The three runs."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
        server = Server(url, session)
        await server.ended(await server.begin(_lines(20, 99)))  # the cost model learns
        begun = time.perf_counter()
        tokens = await server.ended(await server.begin(_lines(args.lines, args.seed)))
        offline = tokens / (time.perf_counter() - begun)
        rate = args.utilisation * offline / (tokens / args.lines)
        alone = await server.traffic(rate, args.seconds, args.seed)
        id = await server.begin(_lines(50_000, args.seed + 1))
        begun = time.perf_counter()
        both = await server.traffic(rate, args.seconds, args.seed)
        await server.cancel(id)
        passed = time.perf_counter() - begun
        background = await server.ended(id) / passed
    idle = 1 - alone["tokens_per_s"] / offline
    return {
        "offline_tokens_per_s": offline,
        "alone": alone,
        "both": both,
        "idle_share": idle,
        "background_tokens_per_s": background,
        "background_of_idle": background / (idle * offline),
        "slo_ms": {"ttft": args.slo_ttft_ms, "itl": args.slo_itl_ms},
        "within_slo": both["p99_ttft_ms"] <= args.slo_ttft_ms and both["p99_itl_ms"] <= args.slo_itl_ms,
    }


def main() -> None:
    """Serve, measure and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--lines", type=int, default=400, help="of the batch by itself")
    parser.add_argument("--utilisation", type=float, default=0.3)
    parser.add_argument("--slo-ttft-ms", type=float, default=500.0)
    parser.add_argument("--slo-itl-ms", type=float, default=100.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        slo = ("--slo-ttft-ms", str(args.slo_ttft_ms), "--slo-itl-ms", str(args.slo_itl_ms))
        with serving(args.model, "--batch-dir", folder, *slo) as url:
            found = asyncio.run(measure(url, args))
    print(json.dumps(found, indent=2))
    save("background_cpu", found)


if __name__ == "__main__":
    main()
