"""The arithmetic of models and of sampling, one table of operations for each device.

    operations            the seam: what an entry takes and gives; model and sampling know this module alone
    create                which table a device gets
    attention             the shared part of attention: a step's layout, the KV cache
    quantization          what the integers of a quantised weight mean
    reference             the specification: every entry once more, slow and plain
    torch_operations      torch's operators on any device; torch_attention and torch_sampling are parts of it
    cpu/                  C++, for float32 and bfloat16 on a CPU
    triton/               Triton, for GPUs

Each table passes the same differential tests against `reference`.
"""

from __future__ import annotations


def start_build() -> None:
    """Have the CPU's kernels compiled in the background, unless they are there: a start waits less for them.

    Needs no torch, so it can run before torch is imported.
    """
    from .cpu.library import start_build

    start_build()
