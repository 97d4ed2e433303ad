"""The attention backend "triton": the host of attention_kernels.

    prepare(layout)   a step of any spans: its metadata in one copy, and one more for each window
    reserve(…)        a step of decode rows, whose metadata stay in place: for graphs

Every call starts the same kernels with the same grid: a kernel that writes keys and values, one for decoding
tokens, one for chunks, and a merge. A step that is not reserved leaves out those that have nothing to do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.kernels.attention import KVCacheSpec, StepLayout
from penstock.kernels.transfer import on_device

from .launch import OPTIONS, capability, programs, shared_bytes
from .registry import ACTIVATION_TYPES, HEAD_DIMS, TENSOR_MEMORY, Configuration, device_kind
from .rotation import check_heads, power, write_kv
from .schedule import MERGED, PART, WORKSPACE_BYTES, Shape, Spans, TaskMap, task_map

#: The widest heads that tiles are made for.
MOST_DIM = 256

#: Of shared memory, for kinds of devices; see registry.device_kind.
_BUDGETS = {
    "small": 60 << 10,
    "medium": 96 << 10,
    "large": 160 << 10,
    "largest": 160 << 10,
    TENSOR_MEMORY: 160 << 10,
}


@dataclass(frozen=True, slots=True)
class Tile:
    """How much of a task is computed at once."""

    queries: int
    keys: int
    warps: int
    stages: int


def decode_tile(kind: str, group: int, dim: int, itemsize: int) -> Tile:
    """For spans of one token. On large devices, two programs fit a multiprocessor."""
    queries = 16 if group <= 16 else 64
    if kind == "interpreted":
        return Tile(queries, 32, 4, 1)
    if itemsize == 4:
        return Tile(16, _FLOAT32_KEYS, 4, 3)
    wide = dim > 64 or kind == "medium"
    warps = 8 if queries == 64 and wide else 4  # with four, registers run out
    most = 120 if kind == TENSOR_MEMORY else 110  # there, two stages of 64 rows spill, and three do not
    return _fit(queries, warps, min(_budget(kind, dim), most << 10), power(dim))


def chunk_tile(kind: str, dim: int, itemsize: int) -> Tile:
    """For longer spans."""
    if kind == "interpreted":
        return Tile(32, 32, 4, 1)
    if itemsize == 4:
        rows = 16 if kind == "small" and dim > 128 else 32
        return Tile(rows, _FLOAT32_KEYS, 4 if dim <= 64 else 8, 2)
    many = kind in ("large", "largest", TENSOR_MEMORY) and dim <= 128
    warps = 8 if many or dim > 64 or kind == "medium" else 4  # with four, registers run out
    # and so they do with 128 x 64, but on Hopper
    most_keys = 32 if many and dim > 64 and kind != "largest" else 64
    return _fit(128 if many else 64, warps, _budget(kind, dim), power(dim), most_keys)


def _budget(kind: str, dim: int) -> int:
    """Bytes of shared memory that a tile may take."""
    if kind == TENSOR_MEMORY and dim > 128:
        return 96 << 10  # one stage of 64 rows; for two, there are not enough registers
    return _BUDGETS[kind]


#: Without tensor cores, threads hold their rows and columns of both operands, a whole head long: of twice as
#: many keys, hundreds of bytes per thread are spilled.
_FLOAT32_KEYS = 16


def _fit(queries: int, warps: int, budget: int, width: int, most_keys: int = 64) -> Tile:
    """The first of these tiles, most wanted first, that the budget of shared memory has room for, in 16
    bits."""
    for keys, stages in ((64, 3), (64, 2), (32, 2), (64, 1), (32, 1), (16, 1)):
        if keys <= most_keys and ((2 * keys * stages + queries) * width + queries * keys) * 2 <= budget:
            return Tile(queries, keys, warps, stages)
    return Tile(16, 16, 4, 1)


class TritonAttention:
    """Paged attention of one device; heads of at most MOST_DIM elements."""

    name = "triton"

    def __init__(self, spec: KVCacheSpec, device: torch.device) -> None:
        """Raises ValueError for wider heads."""
        if spec.head_dim > MOST_DIM:
            raise ValueError(f"heads of {spec.head_dim} elements; these kernels take {MOST_DIM} at most")
        self.spec = spec
        self.device = device
        self._kind = device_kind(shared_bytes(device), capability(device))
        self._launchers: dict[int, _Launcher] = {}
        self._parts = _Parts(device)

    def prepare(self, layout: StepLayout) -> TritonStep:
        """Copy what the kernels need of the layout to the device."""
        return TritonStep(self, layout)

    def reserve(self, rows: int, blocks: int) -> ReservedTritonStep:
        """See ReservingBackend."""
        return ReservedTritonStep(self, rows, blocks)

    def launcher(self, heads: int) -> _Launcher:
        """For models with so many query heads."""
        if heads not in self._launchers:
            self._launchers[heads] = _Launcher(self.spec, self.device, heads, self._kind)
        return self._launchers[heads]

    def parts(self, rows: int, kv_heads: int) -> tuple[Tensor, Tensor]:
        """The workspace of all steps, which run one after the other. Where it grows, steps that have the
        smaller one keep it."""
        return self._parts.of(rows, kv_heads, self.spec.head_dim)


class _Parts:
    """Workspace for parts of contexts, which grows."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums = torch.empty(0, dtype=torch.float32, device=device)
        self._weights = torch.empty(0, dtype=torch.float32, device=device)

    def of(self, rows: int, kv_heads: int, dim: int) -> tuple[Tensor, Tensor]:
        """(sums, weights) for so many rows."""
        if self._weights.numel() < rows * kv_heads * 2:
            size = rows * kv_heads * 5 // 4
            self._sums = torch.empty(size * dim, dtype=torch.float32, device=self._device)
            self._weights = torch.empty(size * 2, dtype=torch.float32, device=self._device)
        return self._sums, self._weights


@dataclass(frozen=True, slots=True)
class _Tasks:
    """A task map on the device."""

    counts: Tensor
    """int32 [12]: of tasks of decoding tokens, of chunks and of merges, four apart (kernels are compiled for
    pointers to multiples of 16 bytes)."""
    decode: Tensor
    chunks: Tensor
    merges: Tensor
    sums: Tensor
    weights: Tensor
    has: tuple[bool, bool, bool]
    """Which of the three kernels are started."""


class _Launcher:
    """Starts the kernels, for one number of query heads."""

    def __init__(self, spec: KVCacheSpec, device: torch.device, heads: int, kind: str) -> None:
        if heads % spec.num_kv_heads:
            raise ValueError(f"{heads} query heads are not a multiple of {spec.num_kv_heads} heads of keys")
        self._spec = spec
        self._heads = heads
        group = heads // spec.num_kv_heads
        self._decode = decode_tile(kind, group, spec.head_dim, spec.dtype.itemsize)
        self._chunk = chunk_tile(kind, spec.head_dim, spec.dtype.itemsize)
        self._grid = (programs(device),)
        self.shape = Shape(
            kv_heads=spec.num_kv_heads,
            group=group,
            dim=spec.head_dim,
            decode_queries=self._decode.queries,
            chunk_queries=self._chunk.queries,
            keys=max(self._decode.keys, self._chunk.keys),
            programs=self._grid[0],
        )

    def __call__(
        self,
        q: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        tables: Tensor,
        tasks: _Tasks,
        scale: float,
        window: int | None,
    ) -> Tensor:
        from . import attention_kernels

        spec, shape = self._spec, self.shape
        out = torch.empty((len(q), self._heads, spec.head_dim), dtype=q.dtype, device=q.device)
        width = power(spec.head_dim)
        kinds = ((0, self._decode, tasks.decode), (1, self._chunk, tasks.chunks))
        for place, tile, records in kinds:
            if tasks.has[place]:
                attention_kernels.attend[self._grid](
                    q,
                    key_cache,
                    value_cache,
                    out,
                    tasks.sums,
                    tasks.weights,
                    records,
                    tasks.counts[4 * place :],
                    tables,
                    q.stride(0),
                    shape.kv_heads,
                    shape.group,
                    window or 0,
                    spec.block_size,
                    spec.block_size.bit_length() - 1,
                    scale * math.log2(math.e),
                    D=spec.head_dim,
                    BLOCK_D=width,
                    POWER=spec.block_size.bit_count() == 1,
                    QUERIES=tile.queries,
                    KEYS=tile.keys,
                    WINDOWED=window is not None,
                    num_warps=tile.warps,
                    num_stages=tile.stages,
                    **OPTIONS,
                )
        if tasks.has[2]:
            attention_kernels.merge[self._grid](
                tasks.sums,
                tasks.weights,
                out,
                tasks.merges,
                tasks.counts[8:],
                shape.kv_heads,
                shape.group,
                D=spec.head_dim,
                BLOCK_D=width,
                ROWS=MERGED,
                num_warps=_MERGE_WARPS,
                **OPTIONS,
            )
        return out


_MERGE_WARPS = 4


class Step:
    """What both kinds of steps share: the call."""

    def __init__(self, backend: TritonAttention) -> None:
        self.backend = backend
        self.slots: Tensor
        """int32 [T]: where keys and values of each token go."""
        self._tables: Tensor
        self._by_window: dict[tuple[int, int | None], _Tasks] = {}

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        *,
        scale: float,
        window: int | None = None,
    ) -> Tensor:
        """See AttentionStep. Raises ValueError for what the kernels would misread."""
        self.check_rows(len(k))
        write_kv(k, v, (key_cache, value_cache), self.slots)
        return self.attend(q, key_cache, value_cache, scale=scale, window=window)

    def check_rows(self, rows: int) -> None:
        """Raises ValueError for more than the step has."""
        if rows > len(self.slots):
            raise ValueError(f"{rows} rows for a step of {len(self.slots)}")

    def attend(
        self, q: Tensor, key_cache: Tensor, value_cache: Tensor, *, scale: float, window: int | None
    ) -> Tensor:
        """The same where the step's keys and values are in the cache already."""
        spec = self.backend.spec
        check_heads(q, "q")
        for cache in (key_cache, value_cache):
            if not cache.is_contiguous() or cache.shape[1:] != (
                spec.num_kv_heads,
                spec.block_size,
                spec.head_dim,
            ):
                raise ValueError(
                    f"a cache of shape {list(cache.shape)} and strides {list(cache.stride())}; need a dense "
                    f"[blocks, {spec.num_kv_heads}, {spec.block_size}, {spec.head_dim}]"
                )
        launcher = self.backend.launcher(q.shape[1])
        at = q.shape[1], window
        if at not in self._by_window:
            self._by_window[at] = self._tasks(launcher, window)
        return launcher(q, key_cache, value_cache, self._tables, self._by_window[at], scale, window)

    def _tasks(self, launcher: _Launcher, window: int | None) -> _Tasks:
        raise NotImplementedError


class TritonStep(Step):
    """A step of any spans."""

    def __init__(self, backend: TritonAttention, layout: StepLayout) -> None:
        super().__init__(backend)
        self._spans = Spans.of(layout)
        rows = layout.num_tokens
        base = _aligned(rows)
        numbers = np.empty(base + sum(len(span.blocks) for span in layout.spans), np.int32)
        numbers[:rows] = layout.slots
        _fill_tables(numbers[base:], layout)
        both = on_device(numbers, backend.device)
        self.slots, self._tables = both[:rows], both[base:]

    def _tasks(self, launcher: _Launcher, window: int | None) -> _Tasks:
        mapped = task_map(self._spans, window, launcher.shape)
        room = _aligned(mapped.merges.size)
        both = on_device(_flat(mapped, room), self.backend.device)
        ends = np.cumsum((_COUNTS, room, mapped.decode.size)).tolist()
        counts, merges, decode, chunks = both.tensor_split(ends)
        workspace = self.backend.parts(mapped.part_rows, launcher.shape.kv_heads)
        has = (len(mapped.decode) > 0, len(mapped.chunks) > 0, len(mapped.merges) > 0)
        return _Tasks(counts, decode, chunks, merges, *workspace, has)


class ReservedTritonStep(Step):
    """Decode rows, whose metadata stay where they are: see ReservedStep."""

    def __init__(self, backend: TritonAttention, rows: int, blocks: int) -> None:
        super().__init__(backend)
        self._rows, self._blocks = rows, blocks
        self._spans: Spans | None = None
        self._base = _aligned(rows)
        self._numbers = torch.zeros(self._base + blocks, dtype=torch.int32, device=backend.device)
        self._buffers: dict[tuple[int, int | None], tuple[Tensor, int]] = {}
        self.slots, self._tables = self._numbers[:rows], self._numbers[self._base :]
        self.slots.fill_(-1)

    def update(self, layout: StepLayout) -> None:
        """See ReservedStep."""
        spans = Spans.of(layout)
        rows, blocks = layout.num_tokens, sum(len(span.blocks) for span in layout.spans)
        if rows != len(layout.spans) or rows > self._rows or blocks > self._blocks:
            raise ValueError(
                f"{len(layout.spans)} spans of {rows} tokens and {blocks} blocks; "
                f"reserved are {self._rows} of one token and {self._blocks} blocks"
            )
        numbers = np.full(self._base + blocks, -1, np.int32)
        numbers[:rows] = layout.slots
        _fill_tables(numbers[self._base :], layout)
        self._numbers[: len(numbers)].copy_(on_device(numbers, self.backend.device), non_blocking=True)
        self._spans = spans
        for (heads, window), (buffer, room) in self._buffers.items():
            self._load(self.backend.launcher(heads).shape, window, buffer, room)

    def _tasks(self, launcher: _Launcher, window: int | None) -> _Tasks:
        """Make room for the most tasks that so many rows and blocks can have."""
        shape, device = launcher.shape, self.backend.device
        positions = self._blocks * self.backend.spec.block_size
        parts = min(self._rows * shape.most_parts, positions // PART + self._rows)
        tiles = -(-shape.group // shape.decode_queries)
        room = _aligned(6 * self._rows * tiles * -(-shape.decode_queries // MERGED))
        buffer = torch.zeros(_COUNTS + room + 8 * parts * tiles, dtype=torch.int32, device=device)
        self._buffers[shape.group * shape.kv_heads, window] = buffer, room
        rows = min(parts * shape.group, WORKSPACE_BYTES // shape.part_bytes(1))
        workspace = self.backend.parts(rows, shape.kv_heads)
        counts, merges, decode = buffer.tensor_split((_COUNTS, _COUNTS + room))
        if self._spans is not None:
            self._load(shape, window, buffer, room)
        return _Tasks(counts, decode, decode[:0], merges, *workspace, (True, False, True))

    def _load(self, shape: Shape, window: int | None, buffer: Tensor, room: int) -> None:
        """Copy the map of the current step to where the kernels read it."""
        assert self._spans is not None
        numbers = on_device(_flat(task_map(self._spans, window, shape), room), self.backend.device)
        buffer[: len(numbers)].copy_(numbers, non_blocking=True)


#: Numbers before the merges.
_COUNTS = 12


def _flat(mapped: TaskMap, room: int) -> npt.NDArray[np.int32]:
    """counts | merges, in so many numbers | tasks of decoding tokens | tasks of chunks"""
    tasks = _COUNTS + room
    numbers = np.zeros(tasks + mapped.decode.size + mapped.chunks.size, np.int32)
    numbers[0], numbers[4], numbers[8] = len(mapped.decode), len(mapped.chunks), len(mapped.merges)
    numbers[_COUNTS : _COUNTS + mapped.merges.size] = mapped.merges.reshape(-1)
    numbers[tasks : tasks + mapped.decode.size] = mapped.decode.reshape(-1)
    numbers[tasks + mapped.decode.size :] = mapped.chunks.reshape(-1)
    return numbers


def _fill_tables(tables: npt.NDArray[np.int32], layout: StepLayout) -> None:
    """The block ids of all spans, one after the other."""
    at = 0
    for span in layout.spans:
        tables[at : at + len(span.blocks)] = span.blocks
        at += len(span.blocks)


def _aligned(count: int) -> int:
    """Numbers of 4 bytes up to the next multiple of 16 bytes."""
    return -(-count // 4) * 4


def attend_configurations() -> Iterator[Configuration]:
    """Every dtype, size of heads and kind of device, with and without a window; decoding of groups of up to
    16 heads and of more, and chunks. Blocks of another size than a power of two for the most common model."""
    for dtype in ACTIVATION_TYPES:
        itemsize = 4 if dtype == "fp32" else 2
        for dim in HEAD_DIMS:
            for kind in _BUDGETS:
                tiles = {decode_tile(kind, group, dim, itemsize): "decode" for group in (1, 17)}
                tiles.setdefault(chunk_tile(kind, dim, itemsize), "chunk")
                for tile, what in tiles.items():
                    for windowed in (False, True):
                        yield _attend_configuration(dtype, dim, kind, what, tile, windowed, power_of_two=True)
                        if dtype == "bf16" and dim == 128:
                            yield _attend_configuration(
                                dtype, dim, kind, what, tile, windowed, power_of_two=False
                            )


def _attend_configuration(
    dtype: str, dim: int, kind: str, what: str, tile: Tile, windowed: bool, *, power_of_two: bool
) -> Configuration:
    return Configuration(
        label=f"{dtype} · {what} · head {dim} · tile {tile.queries}x{tile.keys}"
        + (" · window" if windowed else "")
        + ("" if power_of_two else " · any block"),
        signature={
            **dict.fromkeys(("q", "key_cache", "value_cache", "out"), f"*{dtype}"),
            **dict.fromkeys(("sums", "weights"), "*fp32"),
            **dict.fromkeys(("tasks", "counts", "tables"), "*i32"),
            **dict.fromkeys(("q_stride", "kv_heads", "group", "window", "block_size", "block_bits"), "i32"),
            "scale": "fp32",
            **dict.fromkeys(
                ("D", "BLOCK_D", "POWER", "QUERIES", "KEYS", "WINDOWED"),
                "constexpr",
            ),
        },
        constants={
            "D": dim,
            "BLOCK_D": power(dim),
            "POWER": power_of_two,
            "QUERIES": tile.queries,
            "KEYS": tile.keys,
            "WINDOWED": windowed,
        },
        num_warps=tile.warps,
        num_stages=tile.stages,
        divisible=("q_stride",),
        device_kind=kind,
        traits={"dtype": dtype, "head_dim": dim, "kind": what, "window": windowed, "rows": tile.queries},
    )


def merge_configurations() -> Iterator[Configuration]:
    """Every dtype and size of heads."""
    for dtype in ACTIVATION_TYPES:
        for dim in HEAD_DIMS:
            yield Configuration(
                label=f"{dtype} · head {dim}",
                signature={
                    **dict.fromkeys(("sums", "weights"), "*fp32"),
                    "out": f"*{dtype}",
                    **dict.fromkeys(("merges", "counts"), "*i32"),
                    **dict.fromkeys(("kv_heads", "group"), "i32"),
                    **dict.fromkeys(("D", "BLOCK_D", "ROWS"), "constexpr"),
                },
                constants={"D": dim, "BLOCK_D": power(dim), "ROWS": MERGED},
                num_warps=_MERGE_WARPS,
                traits={"dtype": dtype, "head_dim": dim},
            )
