"""Attention over keys and values that lie contiguously: what the paged kernel does with what it gathered.

Shapes: KVH heads of keys and values, each read by G query heads; D wide.

    decode    q [n, KVH, G, D]   keys, values [n, KVH, L, D]   hidden bool [n, 1, 1, L]      one query per row
    prefill   q [KVH, G, m, D]   keys, values [KVH, L, D]      query i stands at key offset + i

It knows nothing of blocks, spans or caches.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F

from .limits import FUSED_QUERY_TILE, QUERY_TILE, query_tile


class Dense(Protocol):
    """One way to compute both shapes."""

    def decode(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        hidden: torch.Tensor,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        """Write [n, KVH, G, D] to `out` (contiguous)."""
        ...

    def prefill(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        offset: int,
        window: int | None,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        """Write [KVH, G, m, D] to `out`. Query i sees keys (offset + i - window, offset + i]."""
        ...


class FusedDense:
    """scaled_dot_product_attention: flash or memory-efficient kernels on CUDA."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._device = device
        self._bands: dict[int | None, torch.Tensor] = {}

    def decode(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        hidden: torch.Tensor,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        """See Dense. The G heads of a group are the queries of one head."""
        mask = ~hidden
        out.copy_(F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale))

    def prefill(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        offset: int,
        window: int | None,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        """See Dense. KV heads are the batch, so that no key is repeated in memory."""
        group, count = q.shape[1], q.shape[2]
        keys = keys[:, None].expand(-1, group, -1, -1)
        values = values[:, None].expand(-1, group, -1, -1)
        if offset == 0 and (window is None or window >= count):
            out.copy_(F.scaled_dot_product_attention(q, keys, values, is_causal=True, scale=scale))
            return
        tile = FUSED_QUERY_TILE
        band = self._band(window, offset + count)
        own = band.shape[1] - tile  # column of the first query's own key
        for begin in range(0, count, tile):
            end = min(begin + tile, count)
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
        tile = FUSED_QUERY_TILE
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


class MatmulDense:
    """Batched matrix products around a float32 softmax, in memory that is kept from call to call.

    Scores are float32 products of float32 copies: rounding them to bfloat16 would change the output by up to
    1 %. The probabilities are rounded to the dtype of the values, as in flash attention.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[str, torch.Tensor] = {}
        least = torch.full((QUERY_TILE[1], QUERY_TILE[1]), -torch.inf, device=device)
        self._after = least.triu(1)  # -inf where a key is after the query
        self._before = least.tril(-1)

    def decode(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        hidden: torch.Tensor,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        """See Dense."""
        rows, kv_heads, group, dim = q.shape
        length = keys.shape[2]
        scores = self._scores(q.reshape(-1, group, dim), keys.reshape(-1, length, dim), scale)
        scores.view(rows, kv_heads, group, length).masked_fill_(hidden, -torch.inf)
        weights = self._softmax(scores, values.dtype)
        torch.bmm(weights, values.view(-1, length, dim), out=out.view(-1, group, dim))

    def prefill(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        offset: int,
        window: int | None,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        """See Dense. A tile looks at no key after its last query, and masks only the edges."""
        kv_heads, group, count, dim = q.shape
        keys = self._float(keys)
        tile = query_tile(kv_heads * group, keys.shape[1])
        for begin in range(0, count, tile):
            end = min(begin + tile, count)
            rows, first = end - begin, offset + begin
            low = 0 if window is None else max(0, first - window + 1)
            seen = slice(low, offset + end)
            queries = q[:, :, begin:end].reshape(kv_heads, -1, dim)
            scores = self._scores(queries, keys[:, seen], scale)
            by_row = scores.view(kv_heads, group, rows, -1)
            by_row[..., first - low :].add_(self._after[:rows, :rows])
            if window is not None:
                late = low - (first - window + 1)  # queries that still see the first key
                if late < rows:
                    by_row[..., : rows - late].add_(self._before[:rows, late:rows])
            weights = self._softmax(scores, values.dtype)
            result = torch.bmm(weights, values[:, seen])
            out[:, :, begin:end] = result.view(kv_heads, group, rows, dim)

    def _scores(self, q: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
        """scale · q keysᵀ: [b, m, D] and [b, L, D] → float32 [b, m, L], valid until the next call."""
        keys = self._float(keys)
        out = self._buffer("scores", (keys.shape[0], q.shape[1], keys.shape[1]))
        return torch.bmm(q.float() * scale, keys.transpose(1, 2), out=out)

    def _softmax(self, scores: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Probabilities over the last dimension in `dtype`; the scores are lost."""
        weights = torch.softmax(scores, -1, out=self._buffer("weights", tuple(scores.shape)))
        if dtype == torch.float32:
            return weights
        rounded = scores.view(-1).view(dtype)[: scores.numel()].view(scores.shape)
        return rounded.copy_(weights)

    def _float(self, keys: torch.Tensor) -> torch.Tensor:
        """A float32 copy, valid until the next call; float32 is returned as it is."""
        if keys.dtype == torch.float32:
            return keys
        return self._buffer("keys", tuple(keys.shape)).copy_(keys)

    def _buffer(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Float32 memory of this shape: fresh pages for every call would cost more than the arithmetic."""
        needed = 1
        for size in shape:
            needed *= size
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < needed:
            buffer = self._buffers[name] = torch.empty(needed, device=self._device)
        return buffer[:needed].view(shape)
