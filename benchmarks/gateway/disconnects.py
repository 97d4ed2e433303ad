"""Whether the ledger has every device-second of the engine, when clients leave at any moment.

    python -m benchmarks.gateway.disconnects [--requests 1000] [--concurrency 16] [--seed 1]

A real `penstock serve` with the demo model, a real `penstock gateway` before it, and clients that leave:
before there are headers, in the middle of a stream, at its end, or not at all. What the rows say together is
compared with the engine's own counter of the seconds in which its device was busy. Writes results/….json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from benchmarks.common import save, serving
from penstock.gateway.ledger.schema import ledger
from penstock.gateway.ledger.store import Store

KEY = "sk-disconnects"
_SPEC = """
pools: {{box: {{hardware: cpu, price_per_hour: 3.60}}}}
upstreams:
  ours:
    url: {url}/v1
    kind: penstock
    pool: box
    trusts_gateway: true
    api_key_env: ENGINE_KEY
    models: {{demo: {{}}}}
routes: {{small: {{targets: [{{model: demo, upstream: ours}}], retries: 0}}}}
gateway: {{port: 0}}
"""
_QUIET = 2.5
"""Seconds in which nothing changes any more: longer than the gateway takes to ask after a bill."""
_PATIENCE = 300.0


@contextmanager
def gateway(folder: Path, engine: str) -> Iterator[tuple[int, str]]:
    """`penstock gateway` before an engine: its port, and a key. Ends with a complete drain."""
    (folder / "penstock.yaml").write_text(_SPEC.format(url=engine))
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "ENGINE_KEY": KEY}
    with (folder / "gateway.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "penstock", "gateway"],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    try:
        assert process.stdout is not None
        url, key = (process.stdout.readline().split()[-1] for _ in range(2))
        yield int(url.removesuffix("/v1").rpartition(":")[2]), key
    finally:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=60)
        process.kill()
        process.communicate()


async def leave(port: int, key: str, draw: random.Random) -> str:
    """One request whose client leaves somewhere; returns where."""
    words = " ".join(draw.choice(("river", "valve", "gate", "turbine")) for _ in range(draw.randint(1, 60)))
    stream = draw.random() < 0.7
    body = {
        "model": "small",
        "messages": [{"role": "user", "content": words}],
        "max_tokens": draw.randint(1, 60),
        "stream": stream,
    }
    data = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\nConnection: close\r\n\r\n"
    )
    where = draw.choice(("before", "before", "middle", "middle", "end", "stays"))
    if not stream and where in ("middle", "end"):
        where = "before"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(head.encode() + data)
        await writer.drain()
        if where == "before":
            await asyncio.sleep(draw.choice((0.0, 0.05, 0.3)) * draw.random())
        elif where == "middle":
            for _ in range(2 * draw.randint(1, 40)):
                if not await reader.readline():
                    break
        elif where == "end":
            await reader.readuntil(b"data: [DONE]")
        else:
            await reader.read()
    finally:
        writer.transport.abort() if draw.random() < 0.5 else writer.close()
        with suppress(OSError):
            await writer.wait_closed()
    return where


async def crowd(port: int, key: str, requests: int, concurrency: int, seed: int) -> Counter[str]:
    """All of them, so many at a time; how many left where."""
    places: Counter[str] = Counter()
    left = iter(range(requests))

    async def client() -> None:
        for number in left:
            places[await leave(port, key, random.Random(f"{seed}:{number}"))] += 1

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return places


def busy(engine: str) -> float:
    """Seconds in which the engine's device was busy so far."""
    with urllib.request.urlopen(f"{engine}/metrics", timeout=30) as answer:
        for line in answer.read().decode().splitlines():
            if line.startswith("penstock:device_seconds_total{") and 'state="busy"' in line:
                return float(line.rpartition(" ")[2])
    raise AssertionError("the engine does not say how long its device was busy")


def summed(folder: Path) -> dict[str, Any]:
    """What the rows say."""
    store = Store(f"sqlite:///{folder / 'penstock.db'}")
    columns = (ledger.c.device_seconds, ledger.c.lost_device_seconds, ledger.c.settlement, ledger.c.owed)
    with store.reading() as connection:
        rows = connection.execute(sa.select(*columns)).all()
    store.close()
    return {
        "rows": len(rows),
        "settlements": dict(Counter(row.settlement for row in rows)),
        "waiting": sum(row.owed is not None for row in rows),
        "ledger_seconds": sum((row.device_seconds or 0) + row.lost_device_seconds for row in rows) / 1e9,
    }


def measure(requests: int, concurrency: int, seed: int) -> dict[str, Any]:
    """Everything; `difference` is that of the ledger to the engine, as a share of the engine's seconds."""
    with (
        tempfile.TemporaryDirectory() as name,
        serving("demo", "--gateway-key", KEY, "--max-num-seqs", "8") as engine,
    ):
        folder = Path(name)
        before = busy(engine)
        with gateway(folder, engine) as (port, key):
            begun = time.monotonic()
            places = asyncio.run(crowd(port, key, requests, concurrency, seed))
            seconds = time.monotonic() - begun
            told: Any = None
            since = end = time.monotonic()
            while time.monotonic() - since < _QUIET and time.monotonic() - end < _PATIENCE:
                found = (summed(folder), busy(engine))
                if found != told or found[0]["waiting"]:
                    told, since = found, time.monotonic()
                time.sleep(0.2)
        rows = summed(folder)  # the drain has written what there was
        used = busy(engine) - before
    return {
        "requests": requests,
        "left": dict(sorted(places.items())),
        "seconds": round(seconds, 1),
        **rows,
        "engine_seconds": used,
        "difference": rows["ledger_seconds"] / used - 1,
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    result = measure(args.requests, args.concurrency, args.seed)
    print(json.dumps(result, indent=1))
    save("gateway-disconnects", {"arguments": vars(args), **result})


if __name__ == "__main__":
    main()
