"""Sizes of the attention kernels' temporary memory: plain numbers, so that the memory plan needs no torch."""

from __future__ import annotations

#: Bytes of gathered keys in one group of decode rows: a share of the last-level cache on CPU.
DECODE_GROUP_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
#: Gathered blocks over needed blocks, at most, in one decode group.
DECODE_PADDING = 1.25
#: Queries per attention call of a prefill chunk that needs an explicit mask.
QUERY_TILE = 256


def workspace_bytes(
    *, max_model_len: int, kv_heads: int, head_dim: int, dtype_bytes: int, device: str
) -> int:
    """Most memory that attention takes beside its inputs and outputs: gathered keys and values, and masks."""
    context = max_model_len * kv_heads * head_dim * dtype_bytes
    gathered = 2 * max(context, DECODE_GROUP_BYTES[device])
    prefix = 1 << max(10, max_model_len.bit_length())
    masks = QUERY_TILE * (prefix + QUERY_TILE) * dtype_bytes
    return gathered + 2 * masks
