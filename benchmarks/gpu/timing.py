"""How fast a device copies and multiplies, and how long something takes on it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Limits:
    """Measured on this very device."""

    copy: float
    """Bytes/s, read and written together."""
    product: float
    """FLOP/s of a large matrix product."""


#: Bytes that are written to have nothing else left in a second-level cache: five times an H100's.
SPOIL = 256 << 20


def on_gpu(device: torch.device) -> bool:
    """Whether it computes by itself; AMD's are "cuda" to torch, too."""
    return device.type == "cuda"


def seconds_of(
    work: Callable[[], object], device: torch.device, *, least: int = 5, flush: bool = False
) -> float:
    """The median of some runs, by events on the stream where there is one.

    flush: whether to fill the second-level cache with something else before each.
    """
    work()
    taken = []
    spoil = torch.empty(SPOIL, dtype=torch.int8, device=device) if flush and on_gpu(device) else None
    began = time.monotonic()
    while len(taken) < least or (time.monotonic() - began < 0.1 and len(taken) < 50):
        if spoil is not None:
            spoil.zero_()
        if on_gpu(device):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            work()
            last.record()
            last.synchronize()
            taken.append(first.elapsed_time(last) / 1e3)
        else:
            started = time.perf_counter()
            work()
            taken.append(time.perf_counter() - started)
    return sorted(taken)[len(taken) // 2]


def copy_rate(device: torch.device, size: int) -> float:
    """Bytes/s of copying so many bytes, read and written."""
    source = torch.zeros(size, dtype=torch.int8, device=device)
    out = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: out.copy_(source), device)


def product_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of the product of two square matrices of random numbers: zeros would draw less power."""
    a, b = (torch.randn((size, size), device=device).to(dtype) for _ in range(2))
    return 2.0 * size**3 / seconds_of(lambda: a @ b, device)
