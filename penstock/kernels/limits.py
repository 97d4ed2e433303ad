"""Sizes of attention's temporary memory: plain numbers, so that the memory plan needs no torch."""

from __future__ import annotations

#: Bytes of gathered keys in one group of decode rows. On CPU a share of the last-level cache.
DECODE_GROUP_BYTES = {"cpu": 2 << 20, "cuda": 256 << 20}
#: Gathered blocks over needed blocks, at most, in one group.
DECODE_PADDING = 1.25
#: Queries of a prefill chunk that are computed at once: as many as SCORE_BYTES allow, within these bounds.
QUERY_TILE = (32, 256)
#: Bytes of one tile's float32 scores, over all heads.
SCORE_BYTES = 32 << 20


def query_tile(heads: int, keys: int) -> int:
    """Queries of a tile that looks at up to this many keys."""
    least, most = QUERY_TILE
    return max(least, min(most, SCORE_BYTES // (4 * heads * keys)))


def workspace_bytes(
    *, max_model_len: int, heads: int, kv_heads: int, head_dim: int, dtype_bytes: int, device: str
) -> int:
    """Most memory that attention takes beside its inputs and outputs.

    Gathered keys and values, and keys in float32; scores and probabilities; masks.
    """
    elements = max(max_model_len * kv_heads * head_dim, DECODE_GROUP_BYTES[device] // dtype_bytes)
    scores = 4 * heads * max_model_len * query_tile(heads, max_model_len)
    masks = 4 * QUERY_TILE[1] * (2 * max_model_len + QUERY_TILE[1])
    return elements * (2 * dtype_bytes + 4) + 2 * scores + masks
