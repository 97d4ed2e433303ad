"""CPU milliseconds per request of the API process and the engine, served and refused.

    python -m benchmarks.refusals [--requests 6000]

Refused ones find a queue without room behind a request that runs all the time; its steps are in the figure.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import tempfile
from pathlib import Path

import aiohttp

from tests.e2e.server import Server, serving

SMALL = ("--kv-cache-memory-bytes", "16MiB", "--disable-uvicorn-access-log")
FULL = ("--max-num-queued-reqs", "0", "--max-num-seqs", "1")
CONCURRENCY = 256
PROMPT = [5] * 20


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def load(server: Server, requests: int, concurrency: int, max_tokens: int) -> dict[int, int]:
    """Send so many; how often each status came."""
    statuses: dict[int, int] = {}
    body = {"prompt": PROMPT, "max_tokens": max_tokens, "ignore_eos": True}
    numbers = iter(range(requests))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=concurrency)) as session:

        async def send() -> None:
            for _ in numbers:
                async with session.post(f"{server.url}/v1/completions", json=body) as answer:
                    await answer.read()
                    statuses[answer.status] = statuses.get(answer.status, 0) + 1

        await asyncio.gather(*(send() for _ in range(concurrency)))
    return statuses


async def measure(server: Server, requests: int, crowded: bool) -> str:
    """One line of figures."""
    standing = asyncio.create_task(load(server, requests, 1, 1500)) if crowded else None
    await asyncio.sleep(0.5)
    pids = (server.process.pid, server.engine_pid())
    before = [cpu_seconds(pid) for pid in pids]
    statuses = await load(server, requests, CONCURRENCY, 1)
    api, engine = (1e3 * (cpu_seconds(pid) - then) / requests for pid, then in zip(pids, before, strict=True))
    if standing is not None:
        standing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await standing
    return f"{statuses}: API {api:.3f} ms, engine {engine:.3f} ms of CPU each"


def main() -> None:
    """Measure both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=6000)
    requests = parser.parse_args().requests
    for name, flags in (("served", ()), ("refused", FULL)):
        with (
            tempfile.TemporaryDirectory() as folder,
            serving(*SMALL, *flags, log=Path(folder) / "log") as server,
        ):
            print(name, asyncio.run(measure(server, requests, crowded=bool(flags))), flush=True)


if __name__ == "__main__":
    main()
