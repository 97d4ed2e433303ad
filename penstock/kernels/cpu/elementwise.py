"""Norms, rotations and gates in one pass each, where torch's operators take three to eight.

They round where the specification rounds, and so agree with it but for the order of sums.
"""

from __future__ import annotations

import torch

from penstock.kernels.operations import Activation, Rotation

from .binding import Library
from .tensors import IS_BF16

#: Activations that there are kernels for, with their numbers in csrc/rows.h.
KINDS: dict[Activation, int] = {"silu": 0, "gelu": 1, "gelu_tanh": 2}


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

    def gate(self, kind: Activation, gate_up: torch.Tensor) -> torch.Tensor:
        """activation(gate) · up, for one of KINDS: [T, 2n], gate first → [T, n]."""
        return self._activated(kind, gate_up, gated=True)

    def activation(self, kind: Activation, x: torch.Tensor) -> torch.Tensor:
        """Of each element, for one of KINDS: [..., n] → [..., n]. Torch's bits depend on where in memory an
        element lies: the last few of a tensor, or of a thread's share, are computed by another formula."""
        return self._activated(kind, x, gated=False)

    def _activated(self, kind: Activation, x: torch.Tensor, *, gated: bool) -> torch.Tensor:
        self._check(x)
        x = x.contiguous()
        width = x.shape[-1] // (1 + gated)
        out = torch.empty((*x.shape[:-1], width), dtype=x.dtype)
        self._library.activate(
            x.data_ptr(),
            out.data_ptr(),
            out.numel() // width,
            width,
            KINDS[kind],
            gated,
            torch.get_num_threads(),
            self._is_bf16,
        )
        return out

    def _check(self, x: torch.Tensor) -> None:
        """Raises ValueError for numbers that the kernels would misread."""
        if x.dtype != self._dtype:
            raise ValueError(f"a tensor of {x.dtype}; these kernels were chosen for {self._dtype}")
