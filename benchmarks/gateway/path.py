"""What a request costs in the gateway's event loop, counted: for machines too busy for rates.

    python -m benchmarks.gateway.path [--before CHECKOUT] [--batches N] [--rounds R]

`without` has no route that escalates, `beside` one that is not asked, `verified` one that is and whose
verifier every answer passes; `before` is the code of another checkout, without. Each version runs in a
process of its own, with the door, a meter in memory and a fake upstream in another thread, and plain requests
one after the other without a socket before the door. Counted are calls of functions for a request (exact,
whatever else runs), and its CPU time in the loop's thread: the least of the batches' means, which is what
disturbance adds to.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_SPEC = """
pools: {box: {hardware: L4, price_per_hour: 3.60}}
upstreams:
  ours: {url: "%s", kind: openai, pool: box, models: {m: {context: 8192}}}
routes: {small: {targets: [{model: m, upstream: ours}]%s}%s}
limits: {requests_per_minute: 100000000, dollars_per_day: 1000000}
"""
_ROUTE = ", escalate: {to: [{model: m, upstream: ours}], verifiers: [{length: {max_characters: 100000}}]}"
_BESIDE = f", other: {{targets: [{{model: m, upstream: ours}}]{_ROUTE}}}"
_SPECS = {"verified": (_ROUTE, ""), "beside": ("", _BESIDE)}
_BATCH = 50


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--before", type=Path)
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(asyncio.run(_one(_SPECS.get(args.one, ("", "")), args.batches))))
        return
    found: dict[str, list[dict[str, float]]] = {}
    here = Path.cwd()
    for _ in range(args.rounds):
        versions = [("without", here), ("beside", here), ("verified", here)]
        if args.before is not None:
            versions.append(("before", args.before.resolve()))
        for name, code in versions:
            done = subprocess.run(
                [
                    sys.executable,
                    str(Path(__file__).resolve()),
                    "--one",
                    name,
                    "--batches",
                    str(args.batches),
                ],
                env={**os.environ, "PYTHONPATH": str(code)},
                cwd=code,
                capture_output=True,
                text=True,
                check=True,
            )
            found.setdefault(name, []).append(json.loads(done.stdout))
    least = {
        name: {what: min(each[what] for each in some) for what in ("calls", "cpu_us")}
        for name, some in found.items()
    }
    print(json.dumps(least))
    from benchmarks.common import save

    if args.before is not None:
        sys.argv[1:] = [each.replace(str(args.before), "CHECKOUT") for each in sys.argv[1:]]
    save(
        "gateway-path",
        {"arguments": {"batches": args.batches, "rounds": args.rounds}, "least": least, "rounds": found},
    )


async def _one(routes: tuple[str, str], batches: int) -> dict[str, float]:
    from penstock.gateway.door import Door
    from penstock.gateway.endpoints import ENDPOINTS
    from penstock.gateway.records import Principal
    from penstock.gateway.stations import Stations
    from penstock.spec.load import loads
    from tests.gateway.memory import MemoryKeys, MemoryMeter
    from tests.gateway.upstream import Upstream

    upstream = Upstream().start()
    spec = loads(_SPEC % (upstream.url, *routes))
    meter = MemoryMeter()
    door = Door(spec, MemoryKeys({"k": Principal(key_id="k")}), meter, Stations(spec, None, {}))
    body = json.dumps({"model": "small", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9})

    async def request() -> None:
        told = [{"type": "http.request", "body": body.encode()}]
        gone = asyncio.get_running_loop().create_future()

        async def receive() -> Any:
            return told.pop() if told else await gone

        async def send(message: Any) -> None:
            assert message.get("status", 200) == 200

        headers = [(b"authorization", b"Bearer k"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "headers": headers, "client_request_id": None}
        await door.serve(ENDPOINTS[0], scope, receive, send)

    for _ in range(_BATCH):
        await request()
    times = []
    for _ in range(batches):
        begun = time.thread_time()
        for _ in range(_BATCH):
            await request()
        times.append((time.thread_time() - begun) / _BATCH)
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    for _ in range(_BATCH):
        await request()
    sys.setprofile(None)
    assert all(row.end == "done" for row in meter.rows)
    await door.close()
    upstream.stop()
    return {"calls": round(calls / _BATCH, 1), "cpu_us": round(1e6 * min(times), 1)}


if __name__ == "__main__":
    main()
