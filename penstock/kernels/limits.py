"""Sizes of attention's temporary memory: plain numbers, so that the memory plan needs no torch."""

from __future__ import annotations

#: Bytes of gathered keys in one group of decode rows. On CPU a share of the last-level cache.
DECODE_GROUP_BYTES = {"cpu": 2 << 20, "cuda": 256 << 20}
#: Gathered blocks over needed blocks, at most, in one group.
DECODE_PADDING = 1.25
#: Queries of a masked call of scaled_dot_product_attention.
QUERY_TILE = 512


def workspace_bytes(
    *, max_model_len: int, kv_heads: int, head_dim: int, dtype_bytes: int, device: str
) -> int:
    """Most memory that attention takes beside its inputs and outputs.

    Gathered keys and values; then the mask of a tile and the table that it is cut from, whose length is a
    power of two. The CPU's kernels gather nothing and need less.
    """
    elements = max(max_model_len * kv_heads * head_dim, DECODE_GROUP_BYTES[device] // dtype_bytes)
    gathered = 2 * elements * dtype_bytes
    return gathered + QUERY_TILE * (3 * max_model_len + QUERY_TILE) * dtype_bytes
