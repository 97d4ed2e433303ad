"""Whether the gateway's memory stays as it is: resident bytes over many requests.

    python -m benchmarks.gateway.memory [--requests 200000] [--concurrency C] [--block N]

Blocks of requests, plain and streamed in turns, through a gateway with keys, limits, meter and ledger on;
after each, its resident memory. What counts is the slope after the first tenth, in which caches and arenas
fill.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.common import save

from .processes import gateway, load, upstream


def measure(requests: int, block: int, concurrency: int) -> list[tuple[int, int]]:
    """(Requests so far, resident bytes) after each block. Raises RuntimeError where one was not answered."""
    marks = []
    with (
        tempfile.TemporaryDirectory() as folder,
        upstream(0.0) as fake,
        gateway(fake.port, Path(folder)) as door,
    ):
        marks.append((0, door.memory))
        for number in range(requests // block):
            stream = ["--stream"] if number % 2 else []
            how = ["--concurrency", str(concurrency), "--warm", "0", "--requests", str(block)]
            result = load(door, *how, *stream)
            if result["outcomes"] != {"200": block}:
                raise RuntimeError(f"answers: {result['outcomes']}, {result['failures']}")
            marks.append(((number + 1) * block, door.memory))
    return marks


def slope(marks: list[tuple[int, int]]) -> float:
    """Bytes for each request, by least squares."""
    count = len(marks)
    x = sum(at for at, _ in marks) / count
    y = sum(size for _, size in marks) / count
    return sum((at - x) * (size - y) for at, size in marks) / sum((at - x) ** 2 for at, _ in marks)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=200_000)
    parser.add_argument("--block", type=int, default=5000)
    parser.add_argument("--concurrency", type=int, default=100)
    args = parser.parse_args()
    marks = measure(args.requests, args.block, args.concurrency)
    for at, size in marks:
        print(f"{at:8d} requests: {size / 2**20:7.1f} MiB")
    late = [mark for mark in marks if mark[0] >= args.requests // 10]
    found = slope(late)
    print(f"{found:.1f} bytes for each request after the first {late[0][0]}")
    save("gateway_memory", {"arguments": vars(args), "marks": marks, "bytes_per_request": round(found, 2)})


if __name__ == "__main__":
    main()
