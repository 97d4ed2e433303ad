"""Arithmetic that all kernels share.

Triton's interpreter falls short of bfloat16 in two ways (seen in 3.6 and 3.9): float32 is cut off instead of
rounded to it, and products of it are wrong. Both are mended here, for the interpreter alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Whether this process interprets kernels instead of compiling them.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """float32 → dtype, to the nearest, of two the even one."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        even = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = tl.where(value == value, even.to(tl.float32, bitcast=True), value)
    return value.to(dtype)


@triton.jit
def product(a, b, acc):
    """acc + a · b, acc in float32."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc=acc, input_precision="ieee")
