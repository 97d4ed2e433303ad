"""Sizes of attention's temporary memory: plain numbers, so that the memory plan needs no torch."""

from __future__ import annotations

#: Bytes of gathered keys in one group of decode rows. On CPU a share of the last-level cache.
DECODE_GROUP_BYTES = {"cpu": 2 << 20, "cuda": 256 << 20}
#: Gathered blocks over needed blocks, at most, in one group.
DECODE_PADDING = 1.25
#: Queries of a prefill chunk that are computed at once on CPU: within these bounds, by SCORE_BYTES.
QUERY_TILE = (32, 128)
#: Bytes of such a tile's float32 scores, over all heads.
SCORE_BYTES = 32 << 20
#: Queries of a masked call of scaled_dot_product_attention on CUDA.
FUSED_QUERY_TILE = 512


def query_tile(heads: int, keys: int) -> int:
    """Queries of a CPU tile that looks at up to this many keys."""
    least, most = QUERY_TILE
    return max(least, min(most, SCORE_BYTES // (4 * heads * keys)))


def workspace_bytes(
    *, max_model_len: int, heads: int, kv_heads: int, head_dim: int, dtype_bytes: int, device: str
) -> int:
    """Most memory that attention takes beside its inputs and outputs.

    Gathered keys and values; then on CPU keys, scores and probabilities in float32, on CUDA the mask of a
    tile and the table that it is cut from.
    """
    elements = max(max_model_len * kv_heads * head_dim, DECODE_GROUP_BYTES[device] // dtype_bytes)
    gathered = 2 * elements * dtype_bytes
    if device == "cpu":
        scores = 4 * heads * max_model_len * query_tile(heads, max_model_len)
        return gathered + 4 * elements + 2 * scores
    return gathered + FUSED_QUERY_TILE * (3 * max_model_len + FUSED_QUERY_TILE) * dtype_bytes
