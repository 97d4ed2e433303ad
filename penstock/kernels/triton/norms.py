"""Norms of rows: the hosts of norm_kernels."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .launch import OPTIONS
from .registry import ACTIVATION_TYPES, Configuration

#: The widest row that one program holds; wider ones are for another table.
MOST = 1 << 14
_LEAST = 1 << 10


def block(n: int) -> int:
    """Elements of a program for rows of n."""
    return max(_LEAST, 1 << (n - 1).bit_length())


def warps(size: int) -> int:
    """For a program of so many elements: 8 to 32 of them per thread."""
    return min(16, max(1, size // 512))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See Operations.rms_norm. Rows of at most MOST elements."""
    rows = _rows(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_rms_norm(rows, rows, weight, out, eps, add=False)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """residual += x, rounded; then the RMS norm of it. x [T, n]; residual [T, n], dense, changed."""
    out = torch.empty_like(residual)
    _launch_rms_norm(_rows(x), residual, weight, out, eps, add=True)
    return out


def _launch_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, out: Tensor, eps: float, *, add: bool
) -> None:
    from . import norm_kernels

    n = x.shape[1]
    size = block(n)
    if len(x):
        norm_kernels.rms_norm[(len(x),)](
            x,
            residual,
            weight,
            out,
            n,
            x.stride(0),
            eps,
            BLOCK=size,
            ADD=add,
            num_warps=warps(size),
            **OPTIONS,
        )


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """See Operations.layer_norm. Rows of at most MOST elements."""
    from . import norm_kernels

    rows = _rows(x)
    n = rows.shape[1]
    size = block(n)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if len(rows):
        norm_kernels.layer_norm[(len(rows),)](
            rows, weight, bias, out, n, rows.stride(0), eps, BLOCK=size, num_warps=warps(size), **OPTIONS
        )
    return out


def _rows(x: Tensor) -> Tensor:
    """As [rows, n], elements side by side."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _sizes() -> Iterator[int]:
    size = _LEAST
    while size <= MOST:
        yield size
        size *= 2


def rms_norm_configurations() -> Iterator[Configuration]:
    """Every dtype, every power of two, with and without the sum."""
    for dtype in ACTIVATION_TYPES:
        for size in _sizes():
            for add in (False, True):
                yield Configuration(
                    label=f"{dtype} · row {size}{' · sum' if add else ''}",
                    signature={
                        **dict.fromkeys(("x", "residual", "weight", "out"), f"*{dtype}"),
                        "n": "i32",
                        "x_stride": "i32",
                        "eps": "fp32",
                        "BLOCK": "constexpr",
                        "ADD": "constexpr",
                    },
                    constants={"BLOCK": size, "ADD": add},
                    num_warps=warps(size),
                    divisible=("n", "x_stride"),
                    traits={"dtype": dtype, "row": size, "add": add},
                )


def layer_norm_configurations() -> Iterator[Configuration]:
    """Every dtype and every power of two."""
    for dtype in ACTIVATION_TYPES:
        for size in _sizes():
            yield Configuration(
                label=f"{dtype} · row {size}",
                signature={
                    **dict.fromkeys(("x", "weight", "bias", "out"), f"*{dtype}"),
                    "n": "i32",
                    "x_stride": "i32",
                    "eps": "fp32",
                    "BLOCK": "constexpr",
                },
                constants={"BLOCK": size},
                num_warps=warps(size),
                divisible=("n", "x_stride"),
                traits={"dtype": dtype, "row": size},
            )
