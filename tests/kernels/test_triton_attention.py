"""Triton's paged attention against the specification, and what its task map promises."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.kernels.attention import AttentionStep, ReservingBackend, Span, StepLayout
from penstock.kernels.reference import ReferenceAttention
from penstock.kernels.triton import schedule
from penstock.kernels.triton.attention import TritonAttention

from .test_attention import Step, make_step
from .triton import DEVICE, DTYPES, needs_triton, quiet

pytestmark = [needs_triton, quiet]


def run(step: Step, prepared: AttentionStep) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(output, keys, values) of Triton's kernels, on copies."""
    keys, values = step.keys.clone().to(DEVICE), step.values.clone().to(DEVICE)
    q, k, v = (x.to(DEVICE) for x in (step.q, step.k, step.v))
    out = prepared(q, k, v, keys, values, scale=0.3, window=step.window)
    return out.cpu(), keys.cpu(), values.cpu()


def assert_agrees(step: Step, prepared: AttentionStep | None = None) -> None:
    """The specification's output and cache, NaN in what no span may see included."""
    want, want_keys, want_values = step.run(ReferenceAttention(step.spec))
    backend = TritonAttention(step.spec, DEVICE)
    got, keys, values = run(step, prepared or backend.prepare(step.layout))
    assert torch.isfinite(want).all()
    atol = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}[step.spec.dtype]
    torch.testing.assert_close(got, want, atol=atol, rtol=atol)
    torch.testing.assert_close(keys, want_keys, atol=0, rtol=0, equal_nan=True)
    torch.testing.assert_close(values, want_values, atol=0, rtol=0, equal_nan=True)


MIXED = [(30, 1), (0, 5), (50, 1), (40, 9), (0, 1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 7])
def test_a_mixed_step(dtype: torch.dtype, window: int | None) -> None:
    assert_agrees(make_step(MIXED, block_size=16, dim=64, kv_heads=1, window=window, dtype=dtype))


@pytest.mark.parametrize("dim", [8, 80, 96, 128, 256])
def test_sizes_of_heads(dim: int) -> None:
    assert_agrees(make_step([(30, 1), (3, 5)], dim=dim, kv_heads=1, dtype=torch.float16))


@pytest.mark.parametrize("group", [1, 3, 5, 7, 8, 16, 71])
def test_groups(group: int) -> None:
    """A tile of queries holds a part of a token's heads, all of them, or those of several tokens."""
    assert_agrees(make_step([(30, 1), (3, 5)], kv_heads=1, group=group))


@pytest.mark.parametrize("block_size", [1, 3, 16, 64])
def test_sizes_of_blocks(block_size: int) -> None:
    assert_agrees(make_step([(70, 1), (3, 5)], kv_heads=1, block_size=block_size))


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("group", [2, 20])
def test_long_contexts_are_read_in_parts(
    monkeypatch: pytest.MonkeyPatch, window: int | None, group: int
) -> None:
    monkeypatch.setattr(schedule, "PART", 16)
    lengths = [(30, 1), (70, 1), (80, 5)]
    step = make_step(lengths, kv_heads=1, group=group, window=window, dtype=torch.float16)
    shape = TritonAttention(step.spec, DEVICE).launcher(group).shape
    mapped = schedule.task_map(schedule.Spans.of(step.layout), window, shape)
    assert len(mapped.merges) > 1
    assert_agrees(step)


@st.composite
def steps(draw: st.DrawFn) -> Step:
    shared = draw(st.integers(0, 2))
    block_size = draw(st.sampled_from([1, 3, 16]))
    lengths = draw(
        st.lists(st.tuples(st.integers(0, 40), st.sampled_from([1, 1, 9])), min_size=1, max_size=4)
    )
    if shared:  # the first span writes the blocks in this very step; others read them
        lengths[0] = (0, shared * block_size + draw(st.integers(0, 5)))
        lengths += [(shared * block_size, draw(st.integers(1, 9)))]
    return make_step(
        lengths,
        block_size=block_size,
        kv_heads=draw(st.sampled_from([1, 2])),
        group=draw(st.sampled_from([1, 2, 5])),
        window=draw(st.one_of(st.none(), st.integers(1, 45))),
        shared=shared,
        seed=draw(st.integers(0, 2**16)),
    )


@settings(max_examples=6)
@given(step=steps())
def test_any_mix_of_spans(step: Step) -> None:
    assert_agrees(step)


# ------------------------------------------------------------------------------------------- steps of graphs


def test_a_reserved_step_is_the_step_that_it_was_updated_to() -> None:
    """With rows of padding behind it, other tensors than before, and windows that come late."""
    first = make_step([(30, 1), (99, 1), (0, 1)], kv_heads=1)
    backend = TritonAttention(first.spec, DEVICE)
    assert isinstance(backend, ReservingBackend)
    reserved = backend.reserve(rows=6, blocks=64)
    for seed, lengths in enumerate(([(30, 1), (99, 1), (0, 1)], [(5, 1)], [(7, 1)] * 6)):
        for window in (None, 9):
            step = make_step(lengths, kv_heads=1, window=window, seed=seed)
            addresses = [tensor.data_ptr() for tensor in (reserved.slots, reserved._tables)]
            reserved.update(step.layout)
            assert addresses == [tensor.data_ptr() for tensor in (reserved.slots, reserved._tables)]
            assert_agrees(step, reserved)
            padding = 6 - len(lengths)
            want = step.run(ReferenceAttention(step.spec))
            step.q, step.k, step.v = (
                torch.cat((x, x[:1].expand(padding, -1, -1))) for x in (step.q, step.k, step.v)
            )
            out, keys, values = run(step, reserved)
            torch.testing.assert_close(out[: len(lengths)], want[0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(keys, want[1], atol=0, rtol=0, equal_nan=True)
            torch.testing.assert_close(values, want[2], atol=0, rtol=0, equal_nan=True)


def test_a_reserved_step_takes_no_more_than_was_reserved() -> None:
    spec = make_step([(0, 1)]).spec
    reserved = TritonAttention(spec, DEVICE).reserve(rows=2, blocks=5)
    for spans in ([Span(0, 2, [1])], [Span(0, 1, [1])] * 3, [Span(0, 1, range(6))]):
        with pytest.raises(ValueError, match="reserved are 2 of one token and 5 blocks"):
            reserved.update(StepLayout(spans, spec.block_size))


# ------------------------------------------------------------------------------------------------ task maps


SHAPES = st.builds(
    schedule.Shape,
    kv_heads=st.sampled_from([1, 2, 8]),
    group=st.sampled_from([1, 4, 7, 71]),
    dim=st.just(128),
    decode_queries=st.sampled_from([16, 64]),
    chunk_queries=st.sampled_from([32, 128]),
    keys=st.sampled_from([16, 64]),
    programs=st.sampled_from([1, 264]),
)


@settings(max_examples=60)
@given(
    lengths=st.lists(
        st.tuples(st.integers(0, 40_000), st.one_of(st.just(1), st.integers(1, 300))), min_size=1, max_size=9
    ),
    window=st.one_of(st.none(), st.integers(1, 5000)),
    shape=SHAPES,
)
def test_every_key_is_read_once_for_every_row(
    lengths: list[tuple[int, int]], window: int | None, shape: schedule.Shape
) -> None:
    size = 16
    layout = StepLayout([Span(start, n, range((start + n) // size + 1)) for start, n in lengths], size)
    spans = schedule.Spans.of(layout)
    mapped = schedule.task_map(spans, window, shape)
    read: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    for queries, tasks in ((shape.decode_queries, mapped.decode), (shape.chunk_queries, mapped.chunks)):
        sizes = (tasks[:, 6] - tasks[:, 5]).tolist()
        assert sizes == sorted(sizes, reverse=True), "the longest come first"
        for row, start, tokens, table, first, begin, end, part in tasks.tolist():
            place = layout.query_starts.index(row)
            assert (start, tokens, table) == (*lengths[place], spans.tables[place])
            assert begin < end <= start + tokens
            assert first % queries == 0
            read.setdefault((row, first), []).append((begin, end, part))
    merged = {
        (row, first): (n, part, stride, parts)
        for row, first, n, part, stride, parts in mapped.merges.tolist()
    }
    taken: list[tuple[int, int]] = []
    for (start, tokens), row in zip(lengths, layout.query_starts, strict=False):
        queries = shape.decode_queries if tokens == 1 else shape.chunk_queries
        flat = tokens * shape.group
        for first in range(0, flat, queries):
            rows = min(queries, flat - first)
            pieces = sorted(read.pop((row, first)))
            low = start + first // shape.group
            high = start + (first + rows - 1) // shape.group
            needed = 0 if window is None else max(0, low - window + 1)
            assert needed - shape.keys < pieces[0][0] <= needed
            assert pieces[-1][1] == high + 1
            assert all(one[1] == next_[0] for one, next_ in itertools.pairwise(pieces))
            if len(pieces) == 1:
                assert pieces[0][2] == -1
                continue
            base = pieces[0][2]
            assert [part for _, _, part in pieces] == [base + i * rows for i in range(len(pieces))]
            taken.append((base, base + rows * len(pieces)))
            for skipped in range(0, rows, schedule.MERGED):
                count = min(schedule.MERGED, rows - skipped)
                assert merged.pop((row, first + skipped)) == (count, base + skipped, rows, len(pieces))
    assert not read
    assert not merged
    taken.sort()
    assert all(one[1] <= next_[0] for one, next_ in itertools.pairwise(taken)), "parts overlap"
    assert mapped.part_rows == (taken[-1][1] if taken else 0)
    assert shape.part_bytes(mapped.part_rows) <= schedule.WORKSPACE_BYTES


def test_one_long_context_keeps_a_device_busy() -> None:
    shape = schedule.Shape(8, 4, 128, 16, 128, 64, 264)
    for span in (Span(100_000, 1, range(7000)), Span(100_000, 32, range(7000))):
        mapped = schedule.task_map(schedule.Spans.of(StepLayout([span], 16)), None, shape)
        tasks = mapped.decode if span.tokens == 1 else mapped.chunks
        assert len(tasks) * shape.kv_heads > 0.9 * 264
        sizes = tasks[:, 6] - tasks[:, 5]
        assert sizes.max() < 4 * 1024 + 64


def test_programs_share_out_uneven_contexts_evenly() -> None:
    """Round robin over tasks, the longest first: no program reads much more than the mean."""
    rng = random.Random(0)
    starts = [rng.choice((50, 700, 3000, 30_000)) + rng.randrange(200) for _ in range(64)]
    layout = StepLayout([Span(start, 1, range(start // 16 + 1)) for start in starts], 16)
    shape = schedule.Shape(8, 4, 128, 16, 128, 64, 264)
    tasks = schedule.task_map(schedule.Spans.of(layout), None, shape).decode
    loads = [0] * shape.programs
    for place in range(len(tasks) * shape.kv_heads):
        _, _, _, _, _, begin, end, _ = tasks[place // shape.kv_heads].tolist()
        loads[place % shape.programs] += end - begin
    assert max(loads) < 1.15 * sum(loads) / len(loads)


# ------------------------------------------------------------------------------------------ batch invariance


def test_a_decoding_row_does_not_depend_on_its_company(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its context is cut by its own length: bit for bit the same result alone, and beside anything."""
    monkeypatch.setattr(schedule, "PART", 16)
    step = make_step([(40, 1), (0, 5), (90, 1), (40, 9)], kv_heads=1, dtype=torch.float16)
    whole, _, _ = run(step, TritonAttention(step.spec, DEVICE).prepare(step.layout))
    for place in (0, 2):
        span, row = step.layout.spans[place], step.layout.query_starts[place]
        one = StepLayout([span], step.spec.block_size)
        q, k, v = (x[row : row + 1] for x in (step.q, step.k, step.v))
        alone = Step(step.spec, one, q, k, v, step.keys, step.values, None)
        got, _, _ = run(alone, TritonAttention(step.spec, DEVICE).prepare(one))
        assert torch.equal(got[0], whole[row])


# ----------------------------------------------------------------------------------------------- bad input


def test_what_the_kernels_would_misread_is_refused() -> None:
    step = make_step([(3, 1)], kv_heads=2, group=2)
    backend = TritonAttention(step.spec, DEVICE)
    prepared = backend.prepare(step.layout)
    keys = step.keys.to(DEVICE)
    q, k, v = (x.to(DEVICE) for x in (step.q, step.k, step.v))
    with pytest.raises(ValueError, match="need a dense"):
        prepared(q, k, v, keys[:, :, :2], keys, scale=1.0)
    with pytest.raises(ValueError, match="3 query heads are not a multiple of 2"):
        prepared(q[:, :3], k, v, keys, keys, scale=1.0)
    with pytest.raises(ValueError, match="2 rows for a step of 1"):
        prepared(q, k.expand(2, -1, -1), v.expand(2, -1, -1), keys, keys, scale=1.0)
    with pytest.raises(ValueError, match="heads of 512 elements"):
        TritonAttention(make_step([(0, 1)], dim=512).spec, DEVICE)
