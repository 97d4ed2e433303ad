"""RMS norm, with and without the sum before it, and layer norm: one program per row.

Sums are float32. What the specification rounds is rounded here, at the same place.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .numeric_kernels import rounded


@triton.jit
def rms_norm(
    x,  # [rows, n], of stride x_stride
    residual,  # [rows, n], dense: gets residual + x, rounded; read and written only if ADD
    weight,  # [n]
    out,  # [rows, n], dense
    n,
    x_stride,
    eps,
    BLOCK: tl.constexpr,  # a power of two, at least n
    ADD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < n
    value = tl.load(x + row * x_stride + at, mask=inside, other=0.0)
    if ADD:
        before = tl.load(residual + row * n + at, mask=inside, other=0.0)
        value = rounded(before.to(tl.float32) + value.to(tl.float32), value.dtype)
        tl.store(residual + row * n + at, value, mask=inside)
    wide = value.to(tl.float32)
    factor = 1.0 / tl.sqrt_rn(tl.sum(wide * wide, 0) / n + eps)
    normed = rounded(wide * factor, value.dtype).to(tl.float32)
    scale = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * n + at, rounded(normed * scale, value.dtype), mask=inside)


@triton.jit
def layer_norm(
    x,  # [rows, n], of stride x_stride
    weight,  # [n]
    bias,  # [n]
    out,  # [rows, n], dense
    n,
    x_stride,
    eps,
    BLOCK: tl.constexpr,  # a power of two, at least n
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < n
    value = tl.load(x + row * x_stride + at, mask=inside, other=0.0)
    wide = value.to(tl.float32)
    centred = tl.where(inside, wide - tl.sum(wide, 0) / n, 0.0)
    factor = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 0) / n + eps)
    scale = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * n + at, rounded(centred * factor * scale + shift, value.dtype), mask=inside)
