"""Paged attention: tasks of a list, and the merge of contexts that several tasks read.

A tile of queries is made of flat rows, of one span and one head of keys: row r is query head r % group of the
span's token r // group, so that products have enough rows even where every token decodes.

Task and merge records are described in schedule.py. Softmax runs in float32, to the base 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .numeric_kernels import product, rounded


@triton.jit(do_not_specialize=["kv_heads", "group", "window", "block_size", "block_bits"])
def attend(
    q,  # [T, kv_heads * group, D], of strides (q_stride, D, 1)
    key_cache,  # [blocks, kv_heads, block_size, D]
    value_cache,
    out,  # [T, kv_heads * group, D], dense
    sums,  # float32 [rows, kv_heads, D]: of parts of contexts, not divided yet
    weights,  # float32 [rows, kv_heads, 2]: largest score and sum of weights of these parts
    tasks,  # int32 [n, 8]
    counts,  # int32: how many tasks there are
    tables,  # int32: block ids of all spans
    q_stride,
    kv_heads,
    group,
    window,  # a token sees so many positions, up to its own, if WINDOWED
    block_size,
    block_bits,  # its logarithm, if POWER
    scale,  # of scores, times log2 e
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,  # a power of two, at least D
    POWER: tl.constexpr,  # whether blocks have a power of two of tokens: a division is many instructions
    QUERIES: tl.constexpr,  # rows of a tile
    KEYS: tl.constexpr,  # keys of a tile
    WINDOWED: tl.constexpr,
):
    total = tl.load(counts) * kv_heads
    at_d = tl.arange(0, BLOCK_D)
    in_d = at_d < D
    for place in range(tl.program_id(0), total, tl.num_programs(0)):
        task = tasks + (place // kv_heads) * 8
        head = place % kv_heads
        first_token = tl.load(task).to(tl.int64)  # flat row of the span
        start = tl.load(task + 1)
        tokens = tl.load(task + 2)
        table = tables + tl.load(task + 3)
        first_row = tl.load(task + 4)
        begin = tl.load(task + 5)
        end = tl.load(task + 6)
        part = tl.load(task + 7)
        row = first_row + tl.arange(0, QUERIES)
        token = row // group
        real = row < tokens * group
        query_head = head * group + row - token * group
        query_at = (first_token + token) * q_stride + query_head * D
        query_mask = real[:, None] & in_d[None, :]
        queries = tl.load(q + query_at[:, None] + at_d[None, :], mask=query_mask, other=0.0)
        position = start + token
        largest = tl.full([QUERIES], float("-inf"), tl.float32)
        total_weight = tl.zeros([QUERIES], tl.float32)
        acc = tl.zeros([QUERIES, BLOCK_D], tl.float32)
        for tile in range(begin, end, KEYS):
            key = tile + tl.arange(0, KEYS)
            inside = key < end
            if POWER:
                number = key >> block_bits
                offset = key & (block_size - 1)
            else:
                number = key // block_size
                offset = key - number * block_size
            block = tl.load(table + number, mask=inside, other=0).to(tl.int64)
            key_at = ((block * kv_heads + head) * block_size + offset) * D
            # what lies behind the end may be NaN, which no weight of 0 would hide
            keys = tl.load(
                key_cache + key_at[None, :] + at_d[:, None], mask=inside[None, :] & in_d[:, None], other=0.0
            )
            values = tl.load(
                value_cache + key_at[:, None] + at_d[None, :], mask=inside[:, None] & in_d[None, :], other=0.0
            )
            scores = product(queries, keys, tl.zeros([QUERIES, KEYS], tl.float32)) * scale
            seen = inside[None, :] & (key[None, :] <= position[:, None])
            if WINDOWED:
                seen = seen & (key[None, :] > position[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
            now_largest = tl.maximum(largest, tl.max(scores, 1))
            shift = tl.where(now_largest == float("-inf"), 0.0, now_largest)
            share = tl.exp2(scores - shift[:, None])
            fade = tl.exp2(largest - shift)
            total_weight = total_weight * fade + tl.sum(share, 1)
            acc = product(rounded(share, values.dtype), values, acc * fade[:, None])
            largest = now_largest
        if part < 0:
            attended = rounded(acc / tl.where(real, total_weight, 1.0)[:, None], queries.dtype)
            out_at = ((first_token + token) * (kv_heads * group) + query_head) * D
            tl.store(out + out_at[:, None] + at_d[None, :], attended, mask=query_mask)
        else:
            part_at = (part + tl.arange(0, QUERIES)).to(tl.int64) * kv_heads + head
            tl.store(sums + (part_at * D)[:, None] + at_d[None, :], acc, mask=query_mask)
            tl.store(weights + part_at * 2, largest, mask=real)
            tl.store(weights + part_at * 2 + 1, total_weight, mask=real)


@triton.jit(do_not_specialize=["kv_heads", "group"])
def merge(
    sums,  # as of attend
    weights,
    out,
    merges,  # int32 [n, 6]
    counts,  # int32: how many merges there are
    kv_heads,
    group,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    total = tl.load(counts) * kv_heads
    at_d = tl.arange(0, BLOCK_D)
    in_d = at_d < D
    for place in range(tl.program_id(0), total, tl.num_programs(0)):
        record = merges + (place // kv_heads) * 6
        head = place % kv_heads
        first_token = tl.load(record).to(tl.int64)
        first_row = tl.load(record + 1)
        rows = tl.load(record + 2)
        part = tl.load(record + 3)
        stride = tl.load(record + 4)
        parts = tl.load(record + 5)
        number = tl.arange(0, ROWS)
        real = number < rows
        mask = real[:, None] & in_d[None, :]
        largest = tl.full([ROWS], float("-inf"), tl.float32)
        total_weight = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
        for i in range(parts):
            part_at = (part + i * stride + number).to(tl.int64) * kv_heads + head
            own_largest = tl.load(weights + part_at * 2, mask=real, other=float("-inf"))
            own_weight = tl.load(weights + part_at * 2 + 1, mask=real, other=0.0)
            own = tl.load(sums + (part_at * D)[:, None] + at_d[None, :], mask=mask, other=0.0)
            now_largest = tl.maximum(largest, own_largest)
            shift = tl.where(now_largest == float("-inf"), 0.0, now_largest)
            fade = tl.exp2(largest - shift)
            share = tl.exp2(own_largest - shift)
            total_weight = total_weight * fade + own_weight * share
            acc = acc * fade[:, None] + own * share[:, None]
            largest = now_largest
        row = first_row + number
        token = row // group
        out_at = ((first_token + token) * (kv_heads * group) + head * group + row - token * group) * D
        attended = rounded(acc / tl.where(real, total_weight, 1.0)[:, None], out.dtype.element_ty)
        tl.store(out + out_at[:, None] + at_d[None, :], attended, mask=mask)
