"""The RMS norm of heads, their rotation, and keys and values on their way into the cache.

A program takes one token and a few of its heads. A head of D elements, of which R are rotated, is read in
three parts: [0, R/2), [R/2, R) and the rest.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .numeric_kernels import rounded


@triton.jit(do_not_specialize=["heads", "query_heads", "kv_heads", "block_size"])
def rotate(
    x,  # [T, heads, D], of strides (x_stride, D, 1): heads of queries, of keys and, with WRITE, of values
    weight,  # [query heads + key heads, D], if NORM
    cos,  # [T, R]
    sin,  # [T, R], its first half negated
    out,  # [T, query heads (without WRITE: all heads), D], of stride out_stride; may be x
    key_cache,  # [blocks, kv_heads, block_size, D], if WRITE: where keys go
    value_cache,  # the same: where values go
    slots,  # int32 [T]; below 0 for what goes nowhere
    heads,
    query_heads,
    kv_heads,
    block_size,
    x_stride,
    out_stride,
    eps,
    D: tl.constexpr,
    R: tl.constexpr,
    HALF: tl.constexpr,  # a power of two, at least R / 2
    REST: tl.constexpr,  # a power of two, at least D - R; 0 if they are equal
    HEADS: tl.constexpr,  # heads of a program, a power of two
    NORM: tl.constexpr,
    WRITE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    here = head < heads
    half = tl.arange(0, HALF)
    in_half = half < R // 2
    at = x + token * x_stride + (head * D)[:, None]
    mask = here[:, None] & in_half[None, :]
    first = tl.load(at + half[None, :], mask=mask, other=0.0)
    second = tl.load(at + R // 2 + half[None, :], mask=mask, other=0.0)
    kind = first.dtype
    rotated = first.to(tl.float32)
    partner = second.to(tl.float32)
    if REST:
        tail = tl.arange(0, REST)
        in_tail = tail < D - R
        tail_mask = here[:, None] & in_tail[None, :]
        rest = tl.load(at + R + tail[None, :], mask=tail_mask, other=0.0)
        others = rest.to(tl.float32)
    if NORM:
        # values are not normed: their result is thrown away below
        normed_heads = here & (head < query_heads + kv_heads)
        weights = weight + (head * D)[:, None]
        weight_mask = normed_heads[:, None] & in_half[None, :]
        total = tl.sum(rotated * rotated, 1) + tl.sum(partner * partner, 1)
        if REST:
            total += tl.sum(others * others, 1)
        factor = (1.0 / tl.sqrt_rn(total / D + eps))[:, None]
        own = tl.load(weights + half[None, :], mask=weight_mask, other=0.0).to(tl.float32)
        rotated = rounded(rounded(rotated * factor, kind).to(tl.float32) * own, kind).to(tl.float32)
        own = tl.load(weights + R // 2 + half[None, :], mask=weight_mask, other=0.0).to(tl.float32)
        partner = rounded(rounded(partner * factor, kind).to(tl.float32) * own, kind).to(tl.float32)
        if REST:
            tail_weight = normed_heads[:, None] & in_tail[None, :]
            own = tl.load(weights + R + tail[None, :], mask=tail_weight, other=0.0).to(tl.float32)
            others = rounded(rounded(others * factor, kind).to(tl.float32) * own, kind).to(tl.float32)
    cosine = tl.load(cos + token * R + half, mask=in_half, other=0.0).to(tl.float32)[None, :]
    sine = tl.load(sin + token * R + half, mask=in_half, other=0.0).to(tl.float32)[None, :]
    turned = rounded(rotated * cosine, kind).to(tl.float32) + rounded(partner * sine, kind).to(tl.float32)
    cosine = tl.load(cos + token * R + R // 2 + half, mask=in_half, other=0.0).to(tl.float32)[None, :]
    sine = tl.load(sin + token * R + R // 2 + half, mask=in_half, other=0.0).to(tl.float32)[None, :]
    other = rounded(partner * cosine, kind).to(tl.float32) + rounded(rotated * sine, kind).to(tl.float32)
    turned = rounded(turned, kind)
    other = rounded(other, kind)
    to_out = here
    if WRITE:
        to_out = here & (head < query_heads)
        slot = tl.load(slots + token)
        if slot >= 0:
            block = slot // block_size  # of 32 bits: one of 64 is a call of a hundred instructions
            offset = slot - block * block_size
            is_key = here & (head >= query_heads) & (head < query_heads + kv_heads)
            is_value = here & (head >= query_heads + kv_heads)
            key_head = (block.to(tl.int64) * kv_heads + head - query_heads) * block_size + offset
            to_key = key_cache + (key_head * D)[:, None]
            to_value = value_cache + ((key_head - kv_heads * block_size) * D)[:, None]
            key_mask = is_key[:, None] & in_half[None, :]
            value_mask = is_value[:, None] & in_half[None, :]
            tl.store(to_key + half[None, :], turned, mask=key_mask)
            tl.store(to_key + R // 2 + half[None, :], other, mask=key_mask)
            tl.store(to_value + half[None, :], first, mask=value_mask)
            tl.store(to_value + R // 2 + half[None, :], second, mask=value_mask)
            if REST:
                key_tail = is_key[:, None] & in_tail[None, :]
                tl.store(to_key + R + tail[None, :], rounded(others, kind), mask=key_tail)
                tl.store(to_value + R + tail[None, :], rest, mask=is_value[:, None] & in_tail[None, :])
    to = out + token * out_stride + (head * D)[:, None]
    out_mask = to_out[:, None] & in_half[None, :]
    tl.store(to + half[None, :], turned, mask=out_mask)
    tl.store(to + R // 2 + half[None, :], other, mask=out_mask)
    if REST:
        tl.store(to + R + tail[None, :], rounded(others, kind), mask=to_out[:, None] & in_tail[None, :])


@triton.jit(do_not_specialize=["kv_heads", "block_size"])
def write_kv(
    k,  # [T, kv_heads, D], of strides (k_stride, D, 1)
    v,  # [T, kv_heads, D], of strides (v_stride, D, 1)
    key_cache,  # [blocks, kv_heads, block_size, D]
    value_cache,
    slots,  # int32 [T]; below 0 for what goes nowhere
    kv_heads,
    block_size,
    k_stride,
    v_stride,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEADS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    if slot >= 0:
        block = slot // block_size
        offset = slot - block * block_size
        head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
        at = tl.arange(0, BLOCK_D)
        mask = (head < kv_heads)[:, None] & (at < D)[None, :]
        source = (head * D)[:, None] + at[None, :]
        to = (((block.to(tl.int64) * kv_heads + head) * block_size + offset) * D)[:, None] + at[None, :]
        tl.store(key_cache + to, tl.load(k + token * k_stride + source, mask=mask), mask=mask)
        tl.store(value_cache + to, tl.load(v + token * v_stride + source, mask=mask), mask=mask)
