"""Linear layers in fp8: weights and activations in float8_e4m3fn, with a scale for each row of them, by
torch's scaled product; see kernels/quantization.py. GPUs multiply so from compute capability 8.9 on; a CPU
computes the same, slowly, for tests.

    x [T, K] ─▶ rows · scales [T, 1] ─┐
                                      ├─▶ (q_x q_wᵀ) · scale_x · scale_w + b, summed in float32 ─▶ bfloat16
    w [N, K] ─▶ rows · scales [N, 1] ─┘

Both products are padded to multiples of 16, as the tensor cores' instructions want them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from .quantization import FP8, quantize_fp8

_MULTIPLE = 16
_CHUNK = 1 << 24
"""Elements that are quantised at a time: the temporary memory is some 12 bytes for each."""

Rounding: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]
"""x [T, K] → what quantize_fp8 makes of it."""


def multiplies_fp8() -> bool:
    """Whether this torch has scaled products; whether the device has, kernels/capability.py says."""
    return hasattr(F, "scaled_mm") or hasattr(torch, "_scaled_mm")


class ScaledMatrix:
    """x Wᵀ + b in fp8.

    Attributes:
        nbytes: of the weight with its scales.
    """

    copied = True

    def __init__(self, weight: Tensor, rounding: Rounding = quantize_fp8) -> None:
        """weight: [N, K], on the device; not needed afterwards. rounding: of activations."""
        self._outs, self._ins = weight.shape
        self._rounding = rounding
        outs, ins = (math.ceil(n / _MULTIPLE) * _MULTIPLE for n in weight.shape)
        self._weight = torch.zeros((outs, ins), dtype=torch.uint8, device=weight.device).view(FP8)
        self._scales = torch.ones((1, outs), device=weight.device)
        step = max(1, _CHUNK // self._ins)
        for first in range(0, self._outs, step):
            values, scales = quantize_fp8(weight[first : first + step])
            last = first + len(values)
            self._weight.view(torch.uint8)[first:last, : self._ins] = values.view(torch.uint8)
            self._scales[0, first:last] = scales
        self.nbytes = self._weight.nbytes + self._scales.nbytes

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """[T, in] bfloat16 → [T, out]. Raises ValueError for another shape or dtype."""
        rows, ins = x.shape
        if ins != self._ins or x.dtype != torch.bfloat16:
            raise ValueError(f"linear of {list(x.shape)} {x.dtype}; need [T, {self._ins}] of bfloat16")
        if rows == 0:
            return x.new_empty((0, self._outs))
        values, scales = self._rounding(x)
        if values.shape[1] < self._weight.shape[1]:
            padding = (0, self._weight.shape[1] - values.shape[1])
            values = F.pad(values.view(torch.uint8), padding).view(FP8)  # the byte 0 is the number 0
        if bias is not None and self._outs < len(self._weight):
            bias = F.pad(bias, (0, len(self._weight) - self._outs))
        out = scaled_product(values, self._weight.T, scales[:, None], self._scales, bias)
        return out if self._outs == len(self._weight) else out[:, : self._outs].contiguous()


def scaled_product(a: Tensor, b: Tensor, a_scales: Tensor, b_scales: Tensor, bias: Tensor | None) -> Tensor:
    """a [T, K] b [K, N] in fp8, b column by column in memory; scales [T, 1] and [1, N] → bfloat16 [T, N].

    By torch's public function where it is there (2.10 and later), else by the private one that it replaces.
    """
    if hasattr(F, "scaled_mm"):
        by_row = F.ScalingType.RowWise
        return F.scaled_mm(
            a,
            b,
            a_scales,
            by_row,
            b_scales,
            by_row,
            bias=bias,
            output_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
    product: Tensor = torch._scaled_mm(
        a, b, scale_a=a_scales, scale_b=b_scales, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return product
