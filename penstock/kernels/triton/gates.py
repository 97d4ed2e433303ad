"""Activations and gates: the hosts of gate_kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import get_args

import torch
from torch import Tensor

from penstock.kernels.operations import Activation

from .launch import OPTIONS
from .registry import ACTIVATION_TYPES, Configuration

_BLOCK = 1024
_WARPS = 4


def activation(kind: Activation) -> Callable[[Tensor], Tensor]:
    """See Operations.activation."""
    from . import gate_kernels

    def activated(x: Tensor) -> Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        if x.numel():
            grid = (-(-x.numel() // _BLOCK),)
            gate_kernels.activation[grid](
                x, out, x.numel(), KIND=kind, BLOCK=_BLOCK, num_warps=_WARPS, **OPTIONS
            )
        return out

    return activated


def gate(kind: Activation) -> Callable[[Tensor], Tensor]:
    """See Operations.gate."""
    from . import gate_kernels

    def gated(gate_up: Tensor) -> Tensor:
        if gate_up.stride(-1) != 1:
            gate_up = gate_up.contiguous()
        rows, n = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty((rows, n), dtype=gate_up.dtype, device=gate_up.device)
        if out.numel():
            gate_kernels.gate[(rows, -(-n // _BLOCK))](
                gate_up, out, n, gate_up.stride(0), KIND=kind, BLOCK=_BLOCK, num_warps=_WARPS, **OPTIONS
            )
        return out

    return gated


def activation_configurations() -> Iterator[Configuration]:
    """Every dtype and function."""
    return _configurations(("elements",))


def gate_configurations() -> Iterator[Configuration]:
    """Every dtype and function."""
    return _configurations(("n", "x_stride"))


def _configurations(sizes: tuple[str, ...]) -> Iterator[Configuration]:
    """sizes: integers of the kernel."""
    for dtype in ACTIVATION_TYPES:
        for kind in get_args(Activation):
            yield Configuration(
                label=f"{dtype} · {kind}",
                signature={
                    **dict.fromkeys(("x", "out"), f"*{dtype}"),
                    **dict.fromkeys(sizes, "i32"),
                    **dict.fromkeys(("KIND", "BLOCK"), "constexpr"),
                },
                constants={"KIND": kind, "BLOCK": _BLOCK},
                num_warps=_WARPS,
                divisible=sizes,
                traits={"dtype": dtype},
            )
