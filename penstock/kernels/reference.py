"""The specification of paged attention: plain loops, float32, one query at a time.

Every other backend must agree with this one; `ReferenceAttention` also stands behind
`--attention-backend reference`, to find out whether a fast kernel is at fault.
"""

from __future__ import annotations

import numpy as np
import torch

from .attention import KVCacheSpec, StepLayout


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """Store keys and values of T tokens.

    Args:
        k, v: [T, KVH, D].
        key_cache, value_cache: [num_blocks, KVH, block_size, D].
        slots: int64 [T]; slot = block * block_size + offset.
    """
    block_size = key_cache.shape[2]
    for row, slot in enumerate(slots.tolist()):
        block, offset = divmod(slot, block_size)
        key_cache[block, :, offset] = k[row]
        value_cache[block, :, offset] = v[row]


def paged_attention(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    metadata: StepLayout,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """softmax(scale · q Kᵀ) V for each token over the positions that it may see.

    Args:
        q: [T, H, D]; query head h reads KV head h // (H // KVH).
        key_cache, value_cache: [num_blocks, KVH, block_size, D], holding everything up to each span's end.
        window: position p sees (p - window, p]; None sees [0, p].

    Returns:
        [T, H, D] in q's dtype.
    """
    block_size = metadata.block_size
    group = q.shape[1] // key_cache.shape[1]
    out = torch.empty_like(q)
    for span, row in zip(metadata.spans, metadata.query_starts, strict=False):
        table = torch.from_numpy(np.array(span.blocks, np.int64)).to(q.device)
        for token in range(span.tokens):
            position = span.start + token
            first = 0 if window is None else max(0, position - window + 1)
            seen = torch.arange(first, position + 1, device=q.device)
            blocks, offsets = table[seen // block_size], seen % block_size
            keys = key_cache[blocks, :, offsets].float().repeat_interleave(group, dim=1)  # [S, H, D]
            values = value_cache[blocks, :, offsets].float().repeat_interleave(group, dim=1)
            scores = torch.einsum("hd,shd->hs", q[row + token].float(), keys) * scale
            out[row + token] = torch.einsum("hs,shd->hd", scores.softmax(-1), values).to(q.dtype)
    return out


class ReferenceAttention:
    """The specification as an attention backend."""

    name = "reference"

    def __init__(self, spec: KVCacheSpec, device: torch.device) -> None:
        self._device = device

    def prepare(self, layout: StepLayout) -> _ReferenceStep:
        """Nothing to prepare but the slots."""
        return _ReferenceStep(layout, torch.from_numpy(layout.slots).to(self._device))


class _ReferenceStep:
    def __init__(self, layout: StepLayout, slots: torch.Tensor) -> None:
        self._layout = layout
        self._slots = slots

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        *,
        scale: float,
        window: int | None = None,
    ) -> torch.Tensor:
        write_kv(k, v, key_cache, value_cache, self._slots)
        return paged_attention(q, key_cache, value_cache, self._layout, scale, window)
