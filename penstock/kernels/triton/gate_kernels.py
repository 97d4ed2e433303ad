"""Functions of single elements, and gates: blocks of elements, one program each."""

from __future__ import annotations

import triton
import triton.language as tl

from .numeric_kernels import rounded


@triton.jit
def _activate(x, KIND: tl.constexpr):
    """The function of this name of float32 numbers."""
    if KIND == "silu":
        return x / (1.0 + tl.exp(-x))
    elif KIND == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":  # (1 + tanh y) / 2 is the logistic function of 2y
        return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    else:
        return tl.where(x < 0, 0.0, x)  # NaN stays


@triton.jit
def activation(x, out, elements, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """x, out: dense, of so many elements."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    value = tl.load(x + at, mask=inside, other=0.0)
    tl.store(out + at, rounded(_activate(value.to(tl.float32), KIND), value.dtype), mask=inside)


@triton.jit
def gate(
    x,  # [rows, 2n], of stride x_stride: gate and up
    out,  # [rows, n], dense
    n,
    x_stride,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    value = tl.load(x + row * x_stride + at, mask=inside, other=0.0)
    up = tl.load(x + row * x_stride + n + at, mask=inside, other=0.0).to(tl.float32)
    active = rounded(_activate(value.to(tl.float32), KIND), value.dtype).to(tl.float32)
    tl.store(out + row * n + at, rounded(active * up, value.dtype), mask=inside)
