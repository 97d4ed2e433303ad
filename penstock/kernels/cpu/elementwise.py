"""Norms, rotations and activations in one pass each, where torch's operators take three to eight.

They round where penstock/model/layers.py rounds, and so agree with it but for the order of sums. Layers ask
`kernels(x)` at each call and do without when there is nothing for x: another device or dtype, or no library.
"""

from __future__ import annotations

import torch

from .library import Library
from .tensors import IS_BF16, library_for


def kernels(x: torch.Tensor) -> Elementwise | None:
    """The kernels for tensors like x, or None."""
    library = library_for(x)
    return None if library is None else Elementwise(library, IS_BF16[x.dtype])


class Elementwise:
    """The kernels for one dtype: every tensor has it, and a dense last dimension."""

    __slots__ = ("_is_bf16", "_library")

    def __init__(self, library: Library, is_bf16: int) -> None:
        self._library = library
        self._is_bf16 = is_bf16

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x / rms(x) · weight: [..., n] and [n] → [..., n]."""
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

    def norm_rotate(
        self,
        x: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        weight: torch.Tensor | None = None,
        eps: float = 0.0,
    ) -> None:
        """In place: the RMS norm of every head, if there is a weight, then the rotation.

        Args:
            x: [T, heads, D], heads side by side: strides (any, D, 1).
            rotation: cos and sin, [T, 1, rotary_dim], dense, as penstock.model.layers.Rotary gives them.
            weight: [heads, D], dense.

        Raises ValueError for other strides.
        """
        cos, sin = rotation
        tokens, heads, dim = x.shape
        if x.stride(2) != 1 or x.stride(1) != dim or not (cos.is_contiguous() and sin.is_contiguous()):
            raise ValueError(f"norm_rotate of strides {x.stride()}; need (any, {dim}, 1)")
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

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) · up: [T, 2n], gate first → [T, n]."""
        gate_up = gate_up.contiguous()
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty((rows, width), dtype=gate_up.dtype)
        self._library.silu_mul(
            gate_up.data_ptr(), out.data_ptr(), rows, width, torch.get_num_threads(), self._is_bf16
        )
        return out
