"""What batch invariance costs: our products against those that would be taken without it, by turns.

    python -m benchmarks.batch_invariance

One thread, and the processor's time of that thread, so that a shared machine disturbs less. A ratio below 1
says that the invariant product is faster. Shapes are those of a 0.6B model (qkv, gate and up, down) and of
the demo's.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from benchmarks.common import save
from penstock.kernels.cpu.library import available
from penstock.kernels.cpu.matrix import CpuMatrix, can_pack, matrix
from penstock.kernels.operations import Matrix

SHAPES = {"0.6B": [(4096, 1024), (6144, 1024), (1024, 3072)], "demo": [(512, 256), (256, 512)]}
ROWS = (1, 8, 32, 256)
TURNS = 7
#: Multiplications of one timing, about.
WORK = 3e7


def seconds(product: Matrix, x: torch.Tensor, times: int) -> float:
    """Of one call, on average."""
    started = time.thread_time()
    for _ in range(times):
        product(x, None)
    return (time.thread_time() - started) / times


def compare(columns: int, depth: int, rows: int, dtype: torch.dtype) -> dict[str, Any]:
    """Medians of both, and how they relate; whether the other's bits depend on the batch."""
    library = available()
    assert library is not None, "the CPU kernels are not available"
    weight = (torch.randn(columns, depth) * depth**-0.5).to(dtype)
    x = torch.randn(rows, depth).to(dtype)
    products = [matrix(library, weight, invariant=True), matrix(library, weight, invariant=False)]
    assert isinstance(products[0], CpuMatrix)
    times = max(1, round(WORK / (columns * depth * rows)))
    taken: list[list[float]] = [[], []]
    for _ in range(TURNS):
        for product, mine in zip(products, taken, strict=True):
            mine.append(seconds(product, x, times))
    ours, other = (statistics.median(mine) for mine in taken)
    depends = [
        bool((product(x, None) != torch.cat([product(row[None], None) for row in x])).any())
        for product in products
    ]
    return {
        "columns": columns,
        "depth": depth,
        "rows": rows,
        "dtype": str(dtype).removeprefix("torch."),
        "without": "oneDNN" if can_pack(dtype) else "torch",
        "invariant_ms": 1e3 * ours,
        "without_ms": 1e3 * other,
        "ratio": ours / other,
        "invariant_depends_on_batch": depends[0],
        "without_depends_on_batch": depends[1],
    }


def main() -> None:
    """Measure, print and save."""
    torch.set_num_threads(1)
    results = []
    for model, shapes in SHAPES.items():
        for columns, depth in shapes:
            for dtype in (torch.float32, torch.bfloat16):
                for rows in ROWS:
                    results.append({"model": model, **compare(columns, depth, rows, dtype)})
                    print({key: results[-1][key] for key in ("columns", "depth", "rows", "dtype", "ratio")})
    library = available()
    assert library is not None
    save(
        f"batch_invariance_{library.isa.lower().replace('-', '_')}",
        {
            "isa": library.isa,
            "threads": 1,
            "turns": TURNS,
            "unit": "processor time of one thread",
            "results": results,
        },
    )


if __name__ == "__main__":
    main()
