"""The attention backend "cpu": keys and values are read in place, by the kernels in csrc.

A step is cut once into units of work of balanced cost (see csrc/attention.h); then each layer is one call,
which writes the step's keys and values to the cache and attends. Nothing is gathered. What lies beyond a
context is never read, so a block's stale tail cannot leak, whatever it holds.

Knows float32 and bfloat16. The bits of a row depend on its query and on the keys and values that it sees: not
on the rest of the batch, on how many tokens its span has, on blocks, or on the number of threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from penstock.kernels.attention import KVCacheSpec, StepLayout, check_window

from .binding import AttentionArguments, Library
from .scratch import Scratch
from .tensors import IS_BF16, dense

_UNIT, _GROUP = 9, 2  # int32 words of struct Unit and struct Group


class CpuAttention:
    """The backend "cpu". Its steps share scratch memory: they run one after the other."""

    name = "cpu"

    def __init__(self, library: Library, spec: KVCacheSpec) -> None:
        """spec: of float32 or bfloat16."""
        self.library = library
        self.spec = spec
        self.is_bf16 = IS_BF16[spec.dtype]
        self.scratch, self.partials = Scratch(), Scratch()

    def prepare(self, layout: StepLayout) -> CpuStep:
        """Flatten the block tables. The work is cut at the first call, when the number of heads is known."""
        return CpuStep(self, layout)


class CpuStep:
    """One step's attention: a call per layer, or the plan for who goes through all layers at once."""

    def __init__(self, backend: CpuAttention, layout: StepLayout) -> None:
        self._backend = backend
        self._layout = layout
        size, spans = layout.block_size, layout.spans
        needed = [-(-(span.start + span.tokens) // size) for span in spans]
        tables = [np.asarray(span.blocks[:count]) for span, count in zip(spans, needed, strict=True)]
        self._tables = np.concatenate(tables, dtype=np.int32, casting="same_kind")
        self._table_at = np.cumsum([0, *needed[:-1]], dtype=np.int64)
        self._starts = np.array([span.start for span in spans], np.int32)
        self._lengths = np.array([span.tokens for span in spans], np.int32)
        self._rows = np.array(layout.query_starts, np.int32)
        self._blocks = range(int(self._tables.min()), int(self._tables.max()) + 1)
        self.threads = torch.get_num_threads()
        self._plans: dict[tuple[int, int | None], _Plan] = {}

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
        a = self.arguments(q.shape[1] // key_cache.shape[1], (window,), scale)[window]
        q, k, v = dense(q), dense(k), dense(v)
        self._check(q, k, v, key_cache, value_cache)
        out = torch.empty(q.shape, dtype=q.dtype)
        backend = self._backend
        a.q, a.k, a.v, a.out = q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()
        a.keys, a.values = key_cache.data_ptr(), value_cache.data_ptr()
        a.q_token, a.q_head, _ = q.stride()
        a.k_token, a.k_head, _ = k.stride()
        a.v_token, a.v_head, _ = v.stride()
        backend.library.attention(a, backend.is_bf16)
        return out

    def arguments(
        self, heads: int, windows: Iterable[int | None], scale: float
    ) -> dict[int | None, AttentionArguments]:
        """By window, what layers of this kind are called with, but for inputs, output and caches.

        Valid until the next call of this method of any step of the backend: all share their working memory.
        """
        plans = {window: self._plan(heads, window) for window in windows}
        backend = self._backend
        scratch = backend.scratch.address(
            max(self.threads * plan.arguments.scratch_bytes for plan in plans.values())
        )
        partials = backend.partials.address(max(plan.partial_bytes for plan in plans.values()))
        for plan in plans.values():
            a = plan.arguments
            a.scale, a.scratch, a.partials = scale, scratch, partials
        return {window: plan.arguments for window, plan in plans.items()}

    def check_rows(self, rows: int) -> None:
        """Raises ValueError for a batch of another number of tokens than this step's."""
        if rows != self._layout.num_tokens:
            raise ValueError(f"{rows} rows; prepared for {self._layout.num_tokens}")

    def check_caches(self, *caches: torch.Tensor) -> None:
        """Raises ValueError or IndexError for caches that this step would read or write outside of."""
        spec = self._backend.spec
        shape = (spec.num_kv_heads, spec.block_size, spec.head_dim)
        for cache in caches:
            if cache.shape[1:] != shape or cache.dtype != spec.dtype or not cache.is_contiguous():
                raise ValueError(
                    f"cache {tuple(cache.shape)} {cache.dtype}; prepared for [blocks, *{shape}] {spec.dtype}"
                )
            if self._blocks.start < 0 or self._blocks.stop > len(cache):
                raise IndexError(f"blocks {self._blocks} of a cache of {len(cache)}")

    def _check(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *caches: torch.Tensor) -> None:
        """Raises ValueError or IndexError for what would make the kernels read foreign memory."""
        spec, tokens, dtype = self._backend.spec, self._layout.num_tokens, self._backend.spec.dtype
        self.check_caches(*caches)
        for tensor, number in ((k, spec.num_kv_heads), (v, spec.num_kv_heads), (q, q.shape[1])):
            wanted = (tokens, number, spec.head_dim)
            if tensor.shape != wanted or tensor.dtype != dtype:
                raise ValueError(f"{tuple(tensor.shape)} {tensor.dtype}; need {wanted} {dtype}")

    def _plan(self, heads: int, window: int | None) -> _Plan:
        plan = self._plans.get((heads, window))
        if plan is None:
            plan = self._plans[heads, window] = self._make_plan(heads, window)
        return plan

    def _make_plan(self, heads: int, window: int | None) -> _Plan:
        backend, spec = self._backend, self._backend.spec
        a = AttentionArguments(
            starts=_address(self._starts),
            lengths=_address(self._lengths),
            rows=_address(self._rows),
            table_at=_address(self._table_at),
            tables=_address(self._tables),
            slots=_address(self._layout.slots),
            scratch_bytes=backend.library.scratch_bytes(backend.is_bf16, heads, spec.head_dim),
            spans=len(self._layout.spans),
            tokens=self._layout.num_tokens,
            kv_heads=spec.num_kv_heads,
            heads=heads,
            dim=spec.head_dim,
            block_size=spec.block_size,
            window=window or 0,
            threads=self.threads,
            both=not self._layout.causal,
        )
        return _Plan(backend.library, a)


class _Plan:
    """Units, groups and lots of a step, in memory that lives as long as the arguments that point to it."""

    def __init__(self, library: Library, arguments: AttentionArguments) -> None:
        self.arguments = a = arguments
        sizes = (ctypes.c_int64 * 4)()
        room = 64 + 2 * _UNIT * a.kv_heads * a.spans
        while True:
            self._words = np.empty(room, np.int32)
            library.plan(a, _address(self._words), room, sizes)
            a.num_units, a.num_groups, a.num_lots, rows = sizes
            needed = _UNIT * a.num_units + _GROUP * a.num_groups + a.num_lots + 1
            if needed <= room:
                break
            room = needed
        self._remaining = np.empty(max(1, a.num_groups), np.int32)
        a.units = _address(self._words)
        a.groups = a.units + 4 * _UNIT * a.num_units
        a.lots = a.groups + 4 * _GROUP * a.num_groups
        a.remaining = _address(self._remaining)
        self.partial_bytes = 4 * rows * (a.dim + 2)


def _address(array: npt.NDArray[Any]) -> int:
    return array.ctypes.data
