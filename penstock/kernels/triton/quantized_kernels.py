"""Products with integer weights, sums of their parts, and activations rounded to fp8.

Outputs are the rows of the tile and tokens its columns: a tensor core may have its first operand in
registers, where the integers become numbers, and only the second must lie in shared memory. So the same
kernel serves one row and thousands, and on Hopper it is wgmma in both cases.

    values   int8   [groups, outs, 128]      one byte per input
             int4   [groups, outs, 64]       byte j has input j of its group in the low half, j + 64 in the
             high one

Whatever a tile reads of a group lies in one piece of memory. Inputs beyond the last are zeros of x.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .numeric_kernels import INTERPRETED, product, rounded


@triton.jit
def as_number(integer, dtype: tl.constexpr):
    """int8 → dtype, exact. The interpreter takes the bits for bfloat16 if it is not told otherwise."""
    return integer.to(tl.float32).to(dtype) if INTERPRETED else integer.to(dtype)


@triton.jit(do_not_specialize=["rows", "groups", "groups_per_part"])
def quantized_product(
    x,  # [rows, ins], of stride x_stride
    values,  # see above
    scales,  # int8: float32 [outs]; int4: bfloat16 [groups, outs]
    zeros,  # int4: uint8 [groups, outs]; of int8 never read
    bias,  # [outs], if BIASED
    out,  # [rows, outs]; float32 [parts, rows, outs] if PARTS
    rows,
    outs,
    ins,
    x_stride,
    groups,
    groups_per_part,
    BITS: tl.constexpr,  # 8 or 4
    BLOCK_OUT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BIASED: tl.constexpr,
    PARTS: tl.constexpr,  # whether each program sums a part of the inputs; the rest is sum_of_parts
):
    # programs that run side by side read the same weights for up to eight tiles of rows
    tile, part = tl.program_id(0), tl.program_id(1)
    across = tl.cdiv(outs, BLOCK_OUT)
    down = tl.cdiv(rows, BLOCK_ROWS)
    band = tile // (8 * across)
    height = tl.minimum(down - band * 8, 8)
    inside = tile - band * 8 * across
    row = (band * 8 + inside % height) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (inside // height) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    wanted = column < outs
    there = row < rows
    from_row = x + row.to(tl.int64) * x_stride

    acc = tl.zeros((BLOCK_OUT, BLOCK_ROWS), tl.float32)
    first = part * groups_per_part
    for group in range(first, tl.minimum(first + groups_per_part, groups)):
        place = group * outs + column.to(tl.int64)
        if BITS == 8:
            depth = tl.arange(0, 128)
            at = values + place[:, None] * 128 + depth[None, :]
            weight = tl.load(at, mask=wanted[:, None], other=0)
            depth = group * 128 + depth
            given = (depth < ins)[:, None] & there[None, :]
            token = tl.load(from_row[None, :] + depth[:, None], mask=given, other=0.0)
            acc = product(as_number(weight, token.dtype), token, acc)
        else:
            depth = tl.arange(0, 64)
            at = values + place[:, None] * 64 + depth[None, :]
            pair = tl.load(at, mask=wanted[:, None], other=0)
            zero = tl.load(zeros + place, mask=wanted, other=0).to(tl.int8)
            scale = tl.load(scales + place, mask=wanted, other=0.0).to(tl.float32)
            depth = group * 128 + depth
            given = (depth < ins)[:, None] & there[None, :]
            token = tl.load(from_row[None, :] + depth[:, None], mask=given, other=0.0)
            weight = as_number((pair & 15).to(tl.int8) - zero[:, None], token.dtype)
            sums = product(weight, token, tl.zeros((BLOCK_OUT, BLOCK_ROWS), tl.float32))
            given = (depth + 64 < ins)[:, None] & there[None, :]
            token = tl.load(from_row[None, :] + depth[:, None] + 64, mask=given, other=0.0)
            weight = as_number((pair >> 4).to(tl.int8) - zero[:, None], token.dtype)
            acc += product(weight, token, sums) * scale[:, None]
    if BITS == 8:
        acc *= tl.load(scales + column, mask=wanted, other=0.0)[:, None]
    if BIASED:
        acc += tl.load(bias + column, mask=wanted, other=0.0).to(tl.float32)[:, None]
    place = row.to(tl.int64)[None, :] * outs + column[:, None]
    kept = there[None, :] & wanted[:, None]
    if PARTS:
        tl.store(out + part.to(tl.int64) * rows * outs + place, acc, mask=kept)
    else:
        tl.store(out + place, rounded(acc, out.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=["parts"])
def sum_of_parts(
    sums,  # float32 [parts, size]
    bias,  # [outs], if BIASED
    out,  # [size], size = rows · outs
    size,
    outs,
    parts,
    BLOCK: tl.constexpr,
    BIASED: tl.constexpr,
):
    """Always in the same order, so that equal requests beside equal ones get equal bytes."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    acc = tl.zeros((BLOCK,), tl.float32)
    for _ in range(parts):
        acc += tl.load(sums + at, mask=inside, other=0.0)
        sums += size
    if BIASED:
        acc += tl.load(bias + at % outs, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, rounded(acc, out.dtype.element_ty), mask=inside)


@triton.jit
def as_fp8(value):
    """float32 → float8_e4m3fn, to the nearest, of two the even one, which the interpreter does not do."""
    if INTERPRETED:
        bits = value.to(tl.uint32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & 0xFFF00000).to(tl.float32, bitcast=True)
        small = (value + 24576.0) - 24576.0  # 1.5 · 2^(23 - 9): steps of 2^-9
        small = tl.where(tl.abs(value) < 0.015625, small, normal)
        value = tl.where(value == value, small, value)
    return value.to(tl.float8e4nv)


@triton.jit
def round_to_fp8(
    x,  # [rows, n], of stride x_stride
    out,  # float8_e4m3fn [rows, n]
    scales,  # float32 [rows]
    n,
    x_stride,
    BLOCK: tl.constexpr,  # a power of two, at least n
):
    """One row: its largest number becomes 448."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < n
    value = tl.load(x + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    # NaN must come out as NaN, which a maximum may drop: a sum keeps it, and infinity less infinity is one
    broken = tl.sum(value - value, 0)
    scale = tl.div_rn(tl.max(tl.abs(value), 0), 448.0) + broken
    scale = tl.where(scale < 1.1754943508222875e-38, 1.0, scale)
    tl.store(scales + row, scale)
    value = tl.div_rn(value, tl.broadcast_to(scale, value.shape))
    tl.store(out + row * n + at, as_fp8(value), mask=inside)
