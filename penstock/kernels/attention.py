"""The attention seam: how a step looks to attention, where keys and values live, who computes.

Knows block tables, positions and tensors. Knows nothing of requests, models, scheduling or sampling.

A step is one flattened batch of spans, decode rows (one token) and prefill chunks alike:

    spans         [ A: start 37, 1 token ][ B: start 0, 5 tokens     ][ C: start 16, 3 tokens ]
    flat tokens     a37                     b0   b1   b2   b3   b4      c16  c17  c18
    query_starts    0                       1                           6                       9 (end)

The KV cache is a pair of tensors per layer, head-major, so that one head's part of a block is one contiguous
piece of memory (gathered as a whole, ready as an operand of a matrix product):

    keys, values of a layer: [num_blocks, kv_heads, block_size, head_dim]

                     head 0                    head 1
    block 0   [ slot 0 | 1 | … | 15 ]   [ slot 0 | 1 | … | 15 ]     slot = block * block_size + offset
    block 1   [ 16 | 17 | …    | 31 ]   [ 16 | 17 | …    | 31 ]     position p of a request lies in block
    …                                                               blocks[p // block_size] of its table

Encoders see in both directions: a layout of whole prompts that is not causal. They keep nothing, so one
layer's cache serves all layers, and blocks are given out anew in each step.

Use, once per step and then once per layer:

    backend = operations.attention(spec)
    cache = KVCache(spec, num_blocks, device)
    step = backend.prepare(StepLayout(spans, spec.block_size))
    for keys, values in cache.layers:
        out = step(q, k, v, keys, values, scale=…, window=…)

A call writes k and v of the whole batch to the cache before it reads anything of that layer: spans of one
step may read blocks that another span of the same step writes (a prefix shared between new requests).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

#: Bytes of a cache line.
_ALIGNMENT = 64

#: Block ids of one request. An int64 numpy array or an array('q') is taken without a copy; a list costs one.
BlockTable: TypeAlias = Sequence[int] | npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Span:
    """One request's part of a step: compute positions [start, start + tokens)."""

    start: int
    """Tokens whose keys and values are in the cache already (or are written by this step's other spans)."""
    tokens: int
    """New tokens, at least 1."""
    blocks: BlockTable
    """The request's block table; covers at least start + tokens positions."""


class StepLayout:
    """Where each token of a step lies; built once per step from plain lists, shared by all layers.

    Attributes:
        causal: whether a position sees those up to itself; else the whole of its span, which is a prompt.
        spans: the spans, in batch order.
        query_starts: first flat row of each span, and the end; length len(spans) + 1.
        positions: int64 [T], position of each token in its sequence.
        slots: int64 [T], cache slot of each token.
        last_rows: flat row of each span's last token (the one whose logits may be sampled).
    """

    __slots__ = ("block_size", "causal", "last_rows", "positions", "query_starts", "slots", "spans")

    def __init__(self, spans: Sequence[Span], block_size: int, *, causal: bool = True) -> None:
        """Raises ValueError for an empty span, a block table that is too short, or a part of a prompt that is
        to be seen in both directions."""
        self.spans = tuple(spans)
        self.causal = causal
        if not causal and any(span.start for span in self.spans):
            raise ValueError("attention in both directions is of whole prompts: every span starts at 0")
        self.block_size = block_size
        self.query_starts = [0]
        for number, span in enumerate(self.spans):
            end = span.start + span.tokens
            if span.tokens < 1 or span.start < 0:
                raise ValueError(
                    f"span {number}: start {span.start}, tokens {span.tokens}; need >= 0 and >= 1"
                )
            if len(span.blocks) * block_size < end:
                raise ValueError(
                    f"span {number}: {len(span.blocks)} blocks of {block_size} do not cover {end} positions"
                )
            self.query_starts.append(self.query_starts[-1] + span.tokens)
        self.last_rows = [row - 1 for row in self.query_starts[1:]]
        self.positions = np.empty(self.num_tokens, np.int64)
        self.slots = np.empty(self.num_tokens, np.int64)
        for span, row in zip(self.spans, self.query_starts, strict=False):
            if span.tokens == 1:  # decode rows are many: plain ints are faster than arrays of one
                block, offset = divmod(span.start, block_size)
                self.positions[row] = span.start
                self.slots[row] = int(span.blocks[block]) * block_size + offset
            else:
                positions = np.arange(span.start, span.start + span.tokens)
                table = np.asarray(span.blocks, np.int64)
                self.positions[row : row + span.tokens] = positions
                self.slots[row : row + span.tokens] = (
                    table[positions // block_size] * block_size + positions % block_size
                )

    @property
    def num_tokens(self) -> int:
        """T, the number of flat rows."""
        return self.query_starts[-1]


def check_window(layout: StepLayout, window: int | None) -> None:
    """Raises ValueError for a window on attention in both directions."""
    if window is not None and not layout.causal:
        raise ValueError(f"window {window}: attention in both directions has none")


@dataclass(frozen=True, slots=True)
class KVCacheSpec:
    """Shape of a model's KV cache, for any number of blocks."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    """Tokens per block."""
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values of one token in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize


class KVCache:
    """Keys and values of all layers: the only memory that grows with the number of served tokens."""

    def __init__(self, spec: KVCacheSpec, num_blocks: int, device: torch.device) -> None:
        """Allocate it, zeroed. On CPU, memory is taken from the system as blocks are first written."""
        self.spec = spec
        self.num_blocks = num_blocks
        shape = (num_blocks, spec.num_kv_heads, spec.block_size, spec.head_dim)
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = [
            (_zeros(shape, spec.dtype, device), _zeros(shape, spec.dtype, device))
            for _ in range(spec.num_layers)
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return self.num_blocks * self.spec.block_size * self.spec.bytes_per_token


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on CPU from calloc, free until a page is touched (torch.zeros writes them all: 2.5 s/GiB)."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    nbytes = math.prod(shape) * dtype.itemsize
    raw = torch.from_numpy(np.zeros(nbytes + _ALIGNMENT, np.uint8))
    offset = -raw.data_ptr() % _ALIGNMENT
    return raw[offset : offset + nbytes].view(dtype).view(shape)


class AttentionStep(Protocol):
    """Attention of one step, ready for every layer."""

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
        """Write the new keys and values, then attend over each span's whole context: causally, or in both
        directions where the layout says so.

        Args:
            q: [T, H, D]; query head h reads KV head h // (H // KVH).
            k, v: [T, KVH, D], keys rotated already.
            key_cache, value_cache: this layer's [num_blocks, KVH, block_size, D].
            scale: factor on q·k before the softmax.
            window: sliding window; position p sees (p - window, p]. None sees all of [0, p]. In both
                directions there is none: ValueError.

        Returns:
            [T, H, D], contiguous.
        """
        ...


class AttentionBackend(Protocol):
    """A way to compute attention."""

    name: str

    def prepare(self, layout: StepLayout) -> AttentionStep:
        """Make everything that the layers of one step share: indices, masks, groups."""
        ...


class ReservedStep(AttentionStep, Protocol):
    """A step of decode rows whose metadata stay where they are: a captured graph that calls it for every
    layer computes, when it is replayed, the step that it was last updated to."""

    def update(self, layout: StepLayout) -> None:
        """Take another step: copies are ordered on the current stream, and nothing waits.

        Rows of q, k and v after the layout's own are padding: nothing of them is written to the cache, and
        what comes out for them means nothing.

        Raises:
            ValueError: a span of more than one token, or more rows or blocks than were reserved.
        """
        ...


@runtime_checkable
class ReservingBackend(AttentionBackend, Protocol):
    """A backend whose kernels are started alike for all steps of so many rows: graphs can capture them."""

    def reserve(self, rows: int, blocks: int) -> ReservedStep | None:
        """A step for up to so many decode rows, whose block tables have so many entries together.

        None where the kernels turned out not to be what a graph can capture.

        Call it once with every window that the model has before it is captured: what a window needs is
        allocated at its first call.
        """
        ...
