"""Norms, rotations and gates in one pass each, where torch's operators take three to eight.

They round where the specification rounds, and so agree with it but for the order of sums.
"""

from __future__ import annotations

import torch

from penstock.kernels.operations import Rotation

from .binding import Library
from .tensors import IS_BF16


class Elementwise:
    """The kernels for one dtype: every tensor has it, and a dense last dimension."""

    __slots__ = ("_dtype", "_is_bf16", "_library")

    def __init__(self, library: Library, dtype: torch.dtype) -> None:
        """dtype: float32 or bfloat16."""
        self._library = library
        self._dtype = dtype
        self._is_bf16 = IS_BF16[dtype]

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x / rms(x) · weight: [..., n] and [n] → [..., n]."""
        self._check(x)
        x = x.contiguous()
        out, width = torch.empty_like(x), x.shape[-1]
        self._library.rms_norm(
            x.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            x.numel() // width,
            width,
            eps,
            torch.get_num_threads(),
            self._is_bf16,
        )
        return out

    def rotate(
        self, x: torch.Tensor, rotation: Rotation, weight: torch.Tensor | None, eps: float
    ) -> torch.Tensor:
        """In place: the RMS norm of every head, if there is a weight, then the rotation.

        Args:
            x: [T, heads, D], heads side by side: strides (any, D, 1).
            rotation: cos and sin, dense.
            weight: [heads, D], dense.

        Raises ValueError for other strides.
        """
        self._check(x)
        cos, sin = rotation
        tokens, heads, dim = x.shape
        if x.stride(2) != 1 or x.stride(1) != dim or not (cos.is_contiguous() and sin.is_contiguous()):
            raise ValueError(f"rotation of strides {x.stride()}; need (any, {dim}, 1)")
        self._library.norm_rotate(
            x.data_ptr(),
            x.stride(0),
            None if weight is None else weight.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            tokens,
            heads,
            dim,
            cos.shape[-1],
            eps,
            torch.get_num_threads(),
            self._is_bf16,
        )
        return x

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) · up: [T, 2n], gate first → [T, n]."""
        self._check(gate_up)
        gate_up = gate_up.contiguous()
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty((rows, width), dtype=gate_up.dtype)
        self._library.silu_mul(
            gate_up.data_ptr(), out.data_ptr(), rows, width, torch.get_num_threads(), self._is_bf16
        )
        return out

    def _check(self, x: torch.Tensor) -> None:
        """Raises ValueError for numbers that the kernels would misread."""
        if x.dtype != self._dtype:
            raise ValueError(f"a tensor of {x.dtype}; these kernels were chosen for {self._dtype}")
