"""Paged attention through plain torch operations, on CPU and CUDA.

    T rows ─┬─ decode rows (1 token): sorted by context, cut into groups of similar length; per group one
            │  gather of whole block pieces into [n, KVH, L, D] and two batched matrix products
            └─ prefill chunks: one by one through scaled_dot_product_attention, in query tiles; from the
               batch's own k and v when nothing precedes the chunk, else over the gathered context

A group is small enough for its gathered keys to stay in the processor's cache (`DECODE_GROUP_BYTES`), and its
padding is bounded (`DECODE_PADDING`), so one long context neither pads the others nor pushes them out.

Isolation: a block's stale tail is never visible, but 0 · NaN is NaN. When a step opens a block without
filling it, the values of that block are cleared first; padding repeats the row's own first block.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from .attention import KVCacheSpec, Span, StepLayout
from .limits import DECODE_GROUP_BYTES, DECODE_PADDING, QUERY_TILE


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    """Decode rows [first, first + count) in sorted order, padded to `length` keys."""

    first: int
    count: int
    length: int
    pieces: torch.Tensor
    """int64 [count * KVH * blocks]: rows of a cache seen as [num_blocks * KVH, block_size * D]."""
    hidden: torch.Tensor
    """bool [count, 1, 1, length]: keys that the row must not see."""


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A prefill chunk: flat rows [first, last), at positions from `start`."""

    first: int
    last: int
    start: int
    origin: int
    """Position of the first key that is looked at."""
    pieces: torch.Tensor | None
    """int64 [KVH * blocks] as in _DecodeGroup, or None when the batch's own k and v are all there is."""
    skip: int
    """Keys of the first gathered block that lie before `origin`."""


class TorchAttention:
    """The backend "torch"."""

    name = "torch"

    def __init__(self, spec: KVCacheSpec, device: torch.device) -> None:
        self._spec = spec
        self._device = device
        self._heads = np.arange(spec.num_kv_heads, dtype=np.int64)
        self._workspace = torch.empty(0, dtype=spec.dtype, device=device)
        self._bands: dict[int | None, torch.Tensor] = {}

    def prepare(self, layout: StepLayout) -> _TorchStep:
        """Sort the spans into decode rows and chunks, and make the indices of the cache writes."""
        return _TorchStep(self, layout)

    def _tensor(self, array: npt.NDArray[np.int64] | npt.NDArray[np.bool_]) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)

    def _decode_groups(self, spans: list[Span], window: int | None) -> list[_DecodeGroup]:
        """Cut spans, sorted by context, into groups of bounded bytes and padding."""
        size = self._spec.block_size
        ends = np.array([span.start + 1 for span in spans], np.int64)
        starts = np.zeros_like(ends) if window is None else np.maximum(ends - window, 0)
        first_blocks = starts // size
        counts = (ends + size - 1) // size - first_blocks
        piece_bytes = self._spec.num_kv_heads * size * self._spec.head_dim * self._spec.dtype.itemsize
        most = max(1, DECODE_GROUP_BYTES[self._device.type] // piece_bytes)
        groups = []
        first = 0
        while first < len(spans):
            last, needed, widest = first, 0, 0
            while last < len(spans):
                width = max(widest, int(counts[last]))
                padded = width * (last + 1 - first)
                if last > first and (padded > most or padded > DECODE_PADDING * (needed + counts[last])):
                    break
                needed, widest, last = needed + int(counts[last]), width, last + 1
            tables = np.empty((last - first, 1, widest), np.int64)
            for row in range(first, last):
                begin, number = int(first_blocks[row]), int(counts[row])
                table = tables[row - first, 0]
                table[:number] = spans[row].blocks[begin : begin + number]
                table[number:] = table[0]
            pieces = tables * self._spec.num_kv_heads + self._heads[:, None]
            positions = first_blocks[first:last, None] * size + np.arange(widest * size)
            hidden = (positions < starts[first:last, None]) | (positions >= ends[first:last, None])
            groups.append(
                _DecodeGroup(
                    first,
                    last - first,
                    widest * size,
                    self._tensor(pieces.reshape(-1)),
                    self._tensor(hidden[:, None, None, :]),
                )
            )
            first = last
        return groups

    def _chunk(self, span: Span, first: int, window: int | None) -> _Chunk:
        size = self._spec.block_size
        if span.start == 0:
            return _Chunk(first, first + span.tokens, 0, 0, None, 0)
        origin = 0 if window is None else max(0, span.start - window + 1)
        blocks = span.blocks[origin // size : (span.start + span.tokens + size - 1) // size]
        table = np.asarray(blocks, np.int64)
        pieces = (table * self._spec.num_kv_heads + self._heads[:, None]).reshape(-1)
        return _Chunk(first, first + span.tokens, span.start, origin, self._tensor(pieces), origin % size)

    def _gather(self, cache: torch.Tensor, pieces: torch.Tensor, half: int) -> torch.Tensor:
        """Rows `pieces` of the cache, in workspace half 0 or 1: valid until the next call with that half."""
        row = self._spec.block_size * self._spec.head_dim
        needed = pieces.numel() * row
        if self._workspace.numel() < 2 * needed:
            self._workspace = torch.empty(2 * needed, dtype=self._spec.dtype, device=self._device)
        begin = half * (self._workspace.numel() // 2)
        out = self._workspace[begin : begin + needed].view(-1, row)
        return torch.index_select(cache.view(-1, row), 0, pieces, out=out)

    def _band(self, window: int | None, prefix: int) -> tuple[torch.Tensor, int]:
        """Additive mask of one query tile, and the column of the first query's own key.

        Row i sees column c when c <= i + prefix (causal) and, with a window, c >= i; prefix is window - 1:

            columns  0 … prefix … prefix + tile - 1
            row 0    . . . . . # # #
            row 1    # . . . . . # #        (# hidden; the left edge only with a window)
        """
        if window is not None:
            prefix = window - 1
        band = self._bands.get(window)
        if band is None or band.shape[1] < prefix + QUERY_TILE:
            if window is None:
                prefix = 1 << max(10, prefix.bit_length())
            diagonal = torch.arange(prefix + QUERY_TILE) - torch.arange(QUERY_TILE)[:, None]
            hidden = diagonal > prefix
            if window is not None:
                hidden |= diagonal < 0
            band = torch.zeros(hidden.shape, dtype=self._spec.dtype).masked_fill_(hidden, -torch.inf)
            band = self._bands[window] = band.to(self._device)
        return band, band.shape[1] - QUERY_TILE


class _TorchStep:
    def __init__(self, backend: TorchAttention, layout: StepLayout) -> None:
        self._backend = backend
        size = layout.block_size
        self._blocks = backend._tensor(layout.slots // size)
        self._offsets = backend._tensor(layout.slots % size)
        opened = []
        decode: list[tuple[int, int]] = []
        self._chunks: list[tuple[int, Span]] = []
        for number, (span, row) in enumerate(zip(layout.spans, layout.query_starts, strict=False)):
            last, filled = divmod(span.start + span.tokens, size)
            if filled and last * size >= span.start:
                opened.append(int(span.blocks[last]))
            if span.tokens == 1:
                decode.append((row, number))
            else:
                self._chunks.append((row, span))
        decode.sort(key=lambda item: layout.spans[item[1]].start)
        self._decode = [layout.spans[number] for _, number in decode]
        rows = [row for row, _ in decode]
        self._in_order = rows == list(range(layout.num_tokens))  # decode rows only, and sorted as they came
        self._decode_rows = backend._tensor(np.array(rows, np.int64))
        self._opened = backend._tensor(np.array(opened, np.int64)) if opened else None
        self._groups: dict[int | None, list[_DecodeGroup]] = {}
        self._prepared: dict[int | None, list[_Chunk]] = {}

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
        if self._opened is not None:
            value_cache.index_fill_(0, self._opened, 0)
        key_cache[self._blocks, :, self._offsets] = k
        value_cache[self._blocks, :, self._offsets] = v
        if self._in_order:
            return self._attend_decode(q, key_cache, value_cache, scale, window)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if self._decode:
            rows = self._decode_rows
            decoded = self._attend_decode(q.index_select(0, rows), key_cache, value_cache, scale, window)
            out.index_copy_(0, rows, decoded)
        if window not in self._prepared:
            self._prepared[window] = [self._backend._chunk(span, row, window) for row, span in self._chunks]
        for chunk in self._prepared[window]:
            self._attend_chunk(chunk, q, k, v, key_cache, value_cache, scale, window, out)
        return out

    def _attend_decode(
        self,
        q: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        """q [n, H, D] of the decode rows in sorted order → [n, H, D]."""
        if window not in self._groups:
            self._groups[window] = self._backend._decode_groups(self._decode, window)
        kv_heads = key_cache.shape[1]
        _, heads, dim = q.shape
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        q = q.reshape(-1, heads // kv_heads, dim)  # [n * KVH, G, D]
        flat = out.view(-1, heads // kv_heads, dim)
        for group in self._groups[window]:
            pairs = slice(group.first * kv_heads, (group.first + group.count) * kv_heads)
            keys = self._backend._gather(key_cache, group.pieces, 0).view(-1, group.length, dim)
            scores = torch.bmm(q[pairs], keys.transpose(1, 2)).float().mul_(scale)
            scores = scores.view(group.count, kv_heads, -1, group.length)
            weights = scores.masked_fill_(group.hidden, -torch.inf).softmax(-1).to(q.dtype)
            values = self._backend._gather(value_cache, group.pieces, 1).view(-1, group.length, dim)
            torch.bmm(weights.view(-1, heads // kv_heads, group.length), values, out=flat[pairs])
        return out

    def _attend_chunk(
        self,
        chunk: _Chunk,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        scale: float,
        window: int | None,
        out: torch.Tensor,
    ) -> None:
        """Fill out[chunk.first : chunk.last]."""
        kv_heads, dim = key_cache.shape[1], q.shape[2]
        group = q.shape[1] // kv_heads
        tokens = chunk.last - chunk.first
        if chunk.pieces is None:
            keys = k[chunk.first : chunk.last].transpose(0, 1)
            values = v[chunk.first : chunk.last].transpose(0, 1)
        else:
            keys = self._backend._gather(key_cache, chunk.pieces, 0).view(kv_heads, -1, dim)[:, chunk.skip :]
            values = self._backend._gather(value_cache, chunk.pieces, 1).view(kv_heads, -1, dim)
            values = values[:, chunk.skip :]
        # KV heads as the batch, the query heads of each as its heads: no key is repeated in memory.
        keys = keys[:, None].expand(-1, group, -1, -1)
        values = values[:, None].expand(-1, group, -1, -1)
        queries = q[chunk.first : chunk.last].view(tokens, kv_heads, group, dim).permute(1, 2, 0, 3)
        result = out[chunk.first : chunk.last].view(tokens, kv_heads, group, dim).permute(1, 2, 0, 3)
        if chunk.start == 0 and (window is None or window >= tokens):
            result.copy_(
                F.scaled_dot_product_attention(
                    queries, keys[:, :, :tokens], values[:, :, :tokens], is_causal=True, scale=scale
                )
            )
            return
        band, own = self._backend._band(window, chunk.start + tokens)
        for begin in range(0, tokens, QUERY_TILE):
            end = min(begin + QUERY_TILE, tokens)
            first = chunk.start + begin  # position of the tile's first query
            low = 0 if window is None else max(0, first - window + 1)
            seen = slice(low - chunk.origin, chunk.start + end - chunk.origin)
            mask = band[: end - begin, own - (first - low) : own + end - begin]
            result[:, :, begin:end] = F.scaled_dot_product_attention(
                queries[:, :, begin:end],
                keys[:, :, seen],
                values[:, :, seen],
                attn_mask=mask.contiguous() if mask.is_cuda else mask,  # CUDA kernels want it aligned
                scale=scale,
            )
