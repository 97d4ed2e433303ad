"""Attention's task map: which program reads which keys for which queries; made once per step, for all layers.

    span ──▶ tiles of queries (flat rows: token · group + head)  ──▶ parts of their context ──▶ tasks
                                                                      several parts ──▶ merges

    task    first_token | start | tokens | table | first_row | begin | end | part          int32 [n, 8]
    merge   first_token | first_row | rows | part | stride | parts                         int32 [n, 6]

A task reads positions [begin, end) of its span for one tile; `table` is where the span's block ids begin,
`part` the row of the workspace for what comes of it, or -1 where it is the tile's only one. A merge adds up
parts of at most MERGED rows: those at part, part + stride, …

Tasks are in the order of their length, longest first, and programs take every n-th one: with parts of about
equal length, all programs are done at about the same time, and their number need not depend on the step.

How the context of a decoding row is cut depends on its length alone: what comes out does not depend on the
rows beside it (unless the workspace would be too small). Chunks of prompts are cut only where the step has
too few tiles to keep a device busy.

Knows lengths. Knows nothing of tensors or devices.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from penstock.kernels.attention import StepLayout

Ints = npt.NDArray[np.int64]

#: Least positions of one part of a context.
PART = 256
#: Rows of one merge.
MERGED = 16
#: Bytes that parts may take; see kernels/limits.py: the plan of memory has more for attention on a device.
WORKSPACE_BYTES = 384 << 20


@dataclass(frozen=True, slots=True)
class Shape:
    """What the map of a backend depends on, beside the step."""

    kv_heads: int
    group: int
    """Query heads of each of them."""
    dim: int
    decode_queries: int
    """Rows of a tile of a decoding token."""
    chunk_queries: int
    """Rows of a tile of a longer span."""
    keys: int
    """Keys of a tile: parts begin at multiples of it."""
    programs: int
    """That share out the tasks."""

    @property
    def most_parts(self) -> int:
        """Of one context of a decoding row: enough for one row to use most of a device."""
        return min(128, max(32, 256 // self.kv_heads))

    def part_bytes(self, rows: int) -> int:
        """Of so many rows of parts."""
        return rows * self.kv_heads * (self.dim + 2) * 4


@dataclass(frozen=True, slots=True)
class Spans:
    """A layout's numbers, one of each per span."""

    rows: Ints
    """Flat row of the first token."""
    starts: Ints
    tokens: Ints
    tables: Ints
    """Where its block ids begin among those of all spans."""

    @classmethod
    def of(cls, layout: StepLayout) -> Spans:
        """Of every span."""
        lengths = np.array([len(span.blocks) for span in layout.spans], np.int64)
        return cls(
            np.array(layout.query_starts[:-1], np.int64),
            np.array([span.start for span in layout.spans], np.int64),
            np.array([span.tokens for span in layout.spans], np.int64),
            np.cumsum(lengths) - lengths,
        )

    def __getitem__(self, chosen: npt.NDArray[np.bool_]) -> Spans:
        return Spans(self.rows[chosen], self.starts[chosen], self.tokens[chosen], self.tables[chosen])


@dataclass(frozen=True, slots=True)
class TaskMap:
    """Tasks of decoding tokens and of chunks, merges, and the rows of workspace that they need."""

    decode: npt.NDArray[np.int32]
    chunks: npt.NDArray[np.int32]
    merges: npt.NDArray[np.int32]
    part_rows: int


def task_map(spans: Spans, window: int | None, shape: Shape) -> TaskMap:
    """The map of one step, for layers with this window."""
    single = spans.tokens == 1
    decode = _tiles(spans[single], window, shape, shape.decode_queries)
    chunks = _tiles(spans[~single], window, shape, shape.chunk_queries)
    lengths = decode.ends - decode.begins
    parts = np.maximum(PART, _up(-(-lengths // shape.most_parts), shape.keys))
    while shape.part_bytes(decode.part_rows(parts)) > WORKSPACE_BYTES // 2:
        parts *= 2
    decode_tasks, decode_merges, used = decode.tasks(parts, 0)
    lengths = chunks.ends - chunks.begins
    # so many parts of each that there are tasks for everybody, where contexts are long enough
    wanted = max(1, 2 * shape.programs // max(1, len(lengths) * shape.kv_heads))
    parts = np.maximum(4 * PART, _up(-(-lengths // wanted), shape.keys))
    while shape.part_bytes(chunks.part_rows(parts)) > WORKSPACE_BYTES // 2:
        parts *= 2
    chunk_tasks, chunk_merges, used = chunks.tasks(parts, used)
    return TaskMap(decode_tasks, chunk_tasks, np.concatenate((decode_merges, chunk_merges)), used)


@dataclass(frozen=True, slots=True)
class _Tiles:
    """Tiles of queries, and the positions that they read."""

    spans: Spans
    """Of each tile."""
    firsts: Ints
    """First flat row."""
    rows: Ints
    begins: Ints
    ends: Ints

    def part_rows(self, parts: Ints) -> int:
        """Rows of workspace, if contexts are cut into parts of these lengths."""
        counts = -(-(self.ends - self.begins) // parts)
        return int((counts * self.rows)[counts > 1].sum())

    def tasks(self, parts: Ints, used: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], int]:
        """(tasks, merges, rows of workspace in use after that many)."""
        counts = -(-(self.ends - self.begins) // parts)
        needed = np.where(counts > 1, counts * self.rows, 0)
        bases = used + np.cumsum(needed) - needed
        tile, number = _expand(counts)
        begins = self.begins[tile] + number * parts[tile]
        ends = np.minimum(begins + parts[tile], self.ends[tile])
        part = np.where(counts[tile] > 1, bases[tile] + number * self.rows[tile], -1)
        spans = self.spans
        records = np.stack(
            (
                spans.rows[tile],
                spans.starts[tile],
                spans.tokens[tile],
                spans.tables[tile],
                self.firsts[tile],
                begins,
                ends,
                part,
            ),
            axis=1,
        )
        order = np.argsort(begins - ends, kind="stable")
        split = np.flatnonzero(counts > 1)
        piece, number = _expand(-(-self.rows[split] // MERGED))
        tile = split[piece]
        skipped = number * MERGED
        merges = np.stack(
            (
                spans.rows[tile],
                self.firsts[tile] + skipped,
                np.minimum(self.rows[tile] - skipped, MERGED),
                bases[tile] + skipped,
                self.rows[tile],
                counts[tile],
            ),
            axis=1,
        )
        return records[order].astype(np.int32), merges.astype(np.int32), used + int(needed.sum())


def _tiles(spans: Spans, window: int | None, shape: Shape, queries: int) -> _Tiles:
    """All tiles of these spans, of at most so many rows."""
    flat = spans.tokens * shape.group
    span, number = _expand(-(-flat // queries))
    of_tile = Spans(spans.rows[span], spans.starts[span], spans.tokens[span], spans.tables[span])
    firsts = number * queries
    rows = np.minimum(queries, flat[span] - firsts)
    ends = of_tile.starts + (firsts + rows - 1) // shape.group + 1
    begins = np.zeros_like(ends)
    if window is not None:
        begins = np.maximum(0, of_tile.starts + firsts // shape.group + 1 - window)
        begins = begins // shape.keys * shape.keys
    return _Tiles(of_tile, firsts, rows, begins, ends)


def _expand(counts: Ints) -> tuple[Ints, Ints]:
    """(which, number): every number below counts[which], one after the other."""
    which = np.repeat(np.arange(len(counts)), counts)
    return which, np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)


def _up(values: Ints, multiple: int) -> Ints:
    return -(-values // multiple) * multiple
