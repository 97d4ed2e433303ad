"""Attention over keys and values that lie contiguously: what the paged kernel does with what it gathered.

Shapes: KVH heads of keys and values, each read by G query heads; D wide.

    decode    q [n, KVH, G, D]   keys, values [n, KVH, L, D]   hidden bool [n, 1, 1, L]      one query per row
    prefill   q [KVH, G, m, D]   keys, values [KVH, L, D]      query i stands at key offset + i

Both go through scaled_dot_product_attention: flash or memory-efficient kernels on CUDA. It knows nothing of
blocks, spans or caches.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .limits import QUERY_TILE


def decode(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    hidden: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Write [n, KVH, G, D] to `out`. The G heads of a group are the queries of one head."""
    out.copy_(F.scaled_dot_product_attention(q, keys, values, attn_mask=~hidden, scale=scale))


class Prefill:
    """Chunks of prompts, in tiles of queries, under masks that are kept from call to call."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._device = device
        self._bands: dict[int | None, torch.Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the masks."""
        return sum(band.nbytes for band in self._bands.values())

    def __call__(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        offset: int,
        window: int | None,
        scale: float,
        out: torch.Tensor,
        causal: bool = True,
    ) -> None:
        """Write [KVH, G, m, D] to `out`. Query i sees keys (offset + i - window, offset + i]; all of them,
        where it is not causal (then offset is 0).

        KV heads are the batch, so that no key is repeated in memory.
        """
        group, count = q.shape[1], q.shape[2]
        keys = keys[:, None].expand(-1, group, -1, -1)
        values = values[:, None].expand(-1, group, -1, -1)
        if offset == 0 and (window is None or window >= count):
            out.copy_(F.scaled_dot_product_attention(q, keys, values, is_causal=causal, scale=scale))
            return
        band = self._band(window, offset + count)
        own = band.shape[1] - QUERY_TILE  # column of the first query's own key
        for begin in range(0, count, QUERY_TILE):
            end = min(begin + QUERY_TILE, count)
            low = 0 if window is None else max(0, offset + begin - window + 1)
            seen = slice(low, offset + end)
            mask = band[: end - begin, own - (offset + begin - low) : own + end - begin]
            out[:, :, begin:end] = F.scaled_dot_product_attention(
                q[:, :, begin:end],
                keys[:, :, seen],
                values[:, :, seen],
                attn_mask=mask.contiguous(),  # CUDA kernels want it aligned
                scale=scale,
            )

    def _band(self, window: int | None, prefix: int) -> torch.Tensor:
        """Additive mask of which every tile's mask is a part.

        Row i sees column c when c <= i + prefix and, with a window (then prefix is window - 1), c >= i:

            columns  0 … prefix … prefix + tile - 1
            row 0    . . . . . # # #
            row 1    # . . . . . # #        # hidden; the left edge only with a window
        """
        if window is not None:
            prefix = window - 1
        tile = QUERY_TILE
        band = self._bands.get(window)
        if band is None or band.shape[1] < prefix + tile:
            if window is None:
                prefix = 1 << max(10, prefix.bit_length())  # grows rarely
            diagonal = torch.arange(prefix + tile) - torch.arange(tile)[:, None]
            hidden = diagonal > prefix
            if window is not None:
                hidden |= diagonal < 0
            band = torch.zeros(hidden.shape, dtype=self._dtype).masked_fill_(hidden, -torch.inf)
            band = self._bands[window] = band.to(self._device)
        return band
