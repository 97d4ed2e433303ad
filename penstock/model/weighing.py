"""Bytes of weights as our engine loads them, from names and shapes alone; see kernels/quantization.py and
kernels/cpu/matrix.py. Who starts engines asks (engine/preview.py), and who plans them (fleet/sizing.py)."""

from __future__ import annotations

import math
from collections.abc import Iterable

_GROUP = 128
"""Inputs are padded to a multiple of it where weights are quantised; each group has a scale."""
_PANEL = 64
"""Outputs are padded to a multiple of it; layers that are fused are padded once, and take less than this."""


def loaded_bytes(
    tensors: Iterable[tuple[str, tuple[int, ...], int]],
    *,
    vocab_size: int,
    hidden_size: int,
    tied: bool,
    scheme: str,
    width: int,
    device: str,
) -> int:
    """Bytes of all weights.

    Args:
        tensors: name, shape, and how many of them there are. What has `embed` in its name is looked up.
        tied: whether the head is the embedding.
        scheme: as --quantization: none, int8, w8a8, int4, fp8.
        width: bytes of an element that is not quantised.
        device: "cpu" or "cuda"; a CPU has a tied embedding twice, once of them packed for products.
    """
    head_scheme = "none" if scheme == "none" else "int8"
    total = 0
    for name, shape, copies in tensors:
        if len(shape) != 2:
            total += copies * math.prod(shape) * width
        elif shape[0] != vocab_size:
            total += copies * linear_bytes(*shape, scheme, width, device)
        elif "head" not in name or "embed" in name:  # looked up, not multiplied
            total += math.prod(shape) * width
        elif not tied:
            total += linear_bytes(*shape, head_scheme, width, device)
    if tied and device == "cpu":
        total += linear_bytes(vocab_size, hidden_size, head_scheme, width, device)
    return total


def linear_bytes(outs: int, ins: int, scheme: str, width: int, device: str) -> int:
    """Bytes of a linear layer's weight. On GPUs outputs are not padded, nor inputs of fp8 to more than 16:
    for layers of published models it makes no difference."""
    padded = -(-ins // _GROUP) * _GROUP
    outs = -(-outs // _PANEL) * _PANEL
    if scheme == "none":
        return outs * ins * width
    if scheme == "int4":
        return outs * (padded // 2 + 3 * padded // _GROUP)  # scale and zero of each group
    if device == "cpu":
        return outs * (padded + 2 * padded // _GROUP)
    return outs * (padded + 4)  # one scale
