"""Paged attention through plain torch operations, on CPU and CUDA.

    T rows ─┬─ decode rows (1 token): sorted by context, cut into groups of similar length; per group one
            │  gather of whole block pieces into [n, KVH, L, D]
            └─ prefill chunks: one by one, in query tiles; from the batch's own k and v when nothing precedes
               the chunk, else over the gathered context

A group is small enough for its gathered keys to stay in the processor's cache, and its padding is bounded, so
one long context neither pads the others nor pushes them out (see limits).

How a group or tile is computed is told by `dense`.

Isolation: a block's stale tail is never visible, but NaN shows through any mask (0 · NaN is NaN). When a step
opens a block without filling it, the block is cleared first; padding repeats the row's own first block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from . import dense
from .attention import KVCacheSpec, Span, StepLayout, check_window
from .limits import DECODE_GROUP_BYTES, DECODE_PADDING
from .transfer import on_device


@dataclass(frozen=True, slots=True)
class _Group:
    """Decode rows [first, last) in sorted order, padded to the same number of keys."""

    first: int
    last: int
    pieces: torch.Tensor
    """int64 [rows * KVH * blocks]: rows of a cache seen as [num_blocks * KVH, block_size * D]."""
    hidden: torch.Tensor
    """bool [rows, 1, 1, keys]: what a row must not see."""


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A prefill chunk: flat rows [first, last), positions from `start`."""

    first: int
    last: int
    start: int
    origin: int
    """Position of the first key that any of them sees."""
    pieces: torch.Tensor | None
    """int64 [KVH * blocks] as in _Group; None when the batch's own k and v are all there is."""
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
        self.prefill = dense.Prefill(spec.dtype, device)

    def prepare(self, layout: StepLayout) -> _TorchStep:
        """Sort the spans into decode rows and chunks, and make the indices of the cache writes."""
        return _TorchStep(self, layout)

    def tensor(self, array: npt.NDArray[np.int64] | npt.NDArray[np.bool_]) -> torch.Tensor:
        """The array on the device."""
        return on_device(array, self._device)

    def groups(self, spans: Sequence[Span], window: int | None) -> list[_Group]:
        """Cut decode rows, sorted by context, into groups of bounded bytes and padding."""
        size = self._spec.block_size
        ends = np.array([span.start + 1 for span in spans], np.int64)
        starts = np.zeros_like(ends) if window is None else np.maximum(ends - window, 0)
        first_blocks = starts // size
        widths = -(-ends // size) - first_blocks
        groups = []
        for first, last, width in self._cut(widths.tolist()):
            tables = np.empty((last - first, 1, width), np.int64)
            for row in range(first, last):
                begin, number = int(first_blocks[row]), int(widths[row])
                table = tables[row - first, 0]
                table[:number] = spans[row].blocks[begin : begin + number]
                table[number:] = table[0]
            pieces = tables * self._spec.num_kv_heads + self._heads[:, None]
            positions = first_blocks[first:last, None] * size + np.arange(width * size)
            hidden = (positions < starts[first:last, None]) | (positions >= ends[first:last, None])
            groups.append(
                _Group(first, last, self.tensor(pieces.reshape(-1)), self.tensor(hidden[:, None, None, :]))
            )
        return groups

    def _cut(self, widths: list[int]) -> list[tuple[int, int, int]]:
        """(first, last, widest) of each group of rows that need so many blocks."""
        spec = self._spec
        piece = spec.num_kv_heads * spec.block_size * spec.head_dim * spec.dtype.itemsize
        most = max(1, DECODE_GROUP_BYTES[self._device.type] // piece)
        groups = []
        first = needed = widest = 0
        for row, width in enumerate(widths):
            padded = max(widest, width) * (row + 1 - first)
            if row > first and (padded > most or padded > DECODE_PADDING * (needed + width)):
                groups.append((first, row, widest))
                first, needed, widest = row, 0, 0
            needed, widest = needed + width, max(widest, width)
        if widths:
            groups.append((first, len(widths), widest))
        return groups

    def chunk(self, span: Span, first: int, window: int | None) -> _Chunk:
        """What the chunk at flat row `first` looks at."""
        size, end = self._spec.block_size, span.start + span.tokens
        if span.start == 0:
            return _Chunk(first, first + span.tokens, 0, 0, None, 0)
        origin = 0 if window is None else max(0, span.start - window + 1)
        table = np.asarray(span.blocks[origin // size : -(-end // size)], np.int64)
        pieces = self.tensor((table * self._spec.num_kv_heads + self._heads[:, None]).reshape(-1))
        return _Chunk(first, first + span.tokens, span.start, origin, pieces, origin % size)

    def gather(self, cache: torch.Tensor, pieces: torch.Tensor, half: int, rows: int) -> torch.Tensor:
        """Pieces of the cache as [rows * KVH, keys, D], in workspace half 0 or 1 until its next use."""
        width = self._spec.block_size * self._spec.head_dim
        needed = pieces.numel() * width
        if self._workspace.numel() < 2 * needed:
            self._workspace = torch.empty(2 * needed, dtype=self._spec.dtype, device=self._device)
        begin = half * (self._workspace.numel() // 2)
        out = self._workspace[begin : begin + needed].view(-1, width)
        torch.index_select(cache.view(-1, width), 0, pieces, out=out)
        return out.view(rows * self._spec.num_kv_heads, -1, self._spec.head_dim)


class _TorchStep:
    def __init__(self, backend: TorchAttention, layout: StepLayout) -> None:
        self._backend = backend
        self._layout = layout
        size = layout.block_size
        self._blocks = backend.tensor(layout.slots // size)
        self._offsets = backend.tensor(layout.slots % size)
        opened: list[int] = []
        decode: list[tuple[int, int]] = []
        self._chunks: list[tuple[int, Span]] = []
        for row, span in zip(layout.query_starts, layout.spans, strict=False):
            last, filled = divmod(span.start + span.tokens, size)
            if filled and last * size >= span.start:
                opened.append(int(span.blocks[last]))
            if span.tokens == 1:
                decode.append((span.start, row))
            else:
                self._chunks.append((row, span))
        by_row = dict(zip(layout.query_starts, layout.spans, strict=False))
        rows = [row for _, row in sorted(decode)]
        self._decode = [by_row[row] for row in rows]
        self._in_order = rows == list(range(layout.num_tokens))  # all are decode rows, sorted as they came
        self._decode_rows = backend.tensor(np.array(rows, np.int64))
        self._opened = backend.tensor(np.array(opened, np.int64)) if opened else None
        self._by_window: dict[int | None, tuple[list[_Group], list[_Chunk]]] = {}

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
        check_window(self._layout, window)
        if self._opened is not None:
            key_cache.index_fill_(0, self._opened, 0)
            value_cache.index_fill_(0, self._opened, 0)
        key_cache[self._blocks, :, self._offsets] = k
        value_cache[self._blocks, :, self._offsets] = v
        if window not in self._by_window:
            self._by_window[window] = (
                self._backend.groups(self._decode, window),
                [self._backend.chunk(span, row, window) for row, span in self._chunks],
            )
        groups, chunks = self._by_window[window]
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if self._in_order:
            self._attend_groups(groups, q, key_cache, value_cache, scale, out)
            return out
        if groups:
            queries = q.index_select(0, self._decode_rows)
            decoded = torch.empty_like(queries)
            self._attend_groups(groups, queries, key_cache, value_cache, scale, decoded)
            out.index_copy_(0, self._decode_rows, decoded)
        for chunk in chunks:
            self._attend_chunk(chunk, q, k, v, key_cache, value_cache, scale, window, out)
        return out

    def _attend_groups(
        self,
        groups: list[_Group],
        q: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        """q, out: [n, H, D] of the decode rows in sorted order."""
        kv_heads, dim = key_cache.shape[1], q.shape[2]
        q = q.reshape(len(q), kv_heads, -1, dim)  # [n, KVH, G, D]
        out = out.view(q.shape)
        for group in groups:
            rows = slice(group.first, group.last)
            count = group.last - group.first
            keys = self._backend.gather(key_cache, group.pieces, 0, count)
            values = self._backend.gather(value_cache, group.pieces, 1, count)
            shape = (count, kv_heads, -1, dim)
            dense.decode(q[rows], keys.view(shape), values.view(shape), group.hidden, scale, out[rows])

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
        kv_heads, rows = key_cache.shape[1], slice(chunk.first, chunk.last)
        if chunk.pieces is None:
            keys, values = k[rows].transpose(0, 1), v[rows].transpose(0, 1)
        else:
            total = chunk.start + (chunk.last - chunk.first) - chunk.origin
            seen = slice(chunk.skip, chunk.skip + total)
            keys = self._backend.gather(key_cache, chunk.pieces, 0, 1)[:, seen]
            values = self._backend.gather(value_cache, chunk.pieces, 1, 1)[:, seen]
        shape = (chunk.last - chunk.first, kv_heads, -1, q.shape[2])
        self._backend.prefill(
            q[rows].view(shape).permute(1, 2, 0, 3),
            keys,
            values,
            chunk.start - chunk.origin,
            window,
            scale,
            out[rows].view(shape).permute(1, 2, 0, 3),
            self._layout.causal,
        )
