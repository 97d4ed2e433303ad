"""The fast attention paths against the specification in reference.py."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.kernels import dense
from penstock.kernels.attention import KVCacheSpec, Span, StepLayout
from penstock.kernels.limits import QUERY_TILE
from penstock.kernels.reference import ReferenceAttention
from penstock.kernels.torch_attention import TorchAttention

CPU = torch.device("cpu")


@dataclass(repr=False)
class Step:
    """A step, its inputs, and a cache in which everything but the spans' contexts is NaN."""

    spec: KVCacheSpec
    layout: StepLayout
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    window: int | None

    def __repr__(self) -> str:
        spans = [(span.start, span.tokens, list(span.blocks)) for span in self.layout.spans]
        return f"Step({self.spec}, spans={spans}, window={self.window})"

    def run(self, backend: TorchAttention | ReferenceAttention) -> tuple[torch.Tensor, ...]:
        """(output, keys, values), on copies."""
        keys, values = self.keys.clone(), self.values.clone()
        step = backend.prepare(self.layout)
        out = step(self.q, self.k, self.v, keys, values, scale=0.3, window=self.window)
        return out, keys, values


def make_step(
    lengths: list[tuple[int, int]],
    *,
    block_size: int = 4,
    kv_heads: int = 2,
    group: int = 2,
    dim: int = 8,
    window: int | None = None,
    shared: int = 0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Step:
    """A step of spans (start, tokens). Every span whose start is shared * block_size, and which is not the
    first, shares that many leading blocks with the first span, which must cover them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    needed = [-(-(start + tokens) // block_size) for start, tokens in lengths]
    free = list(range(sum(needed) + 3))
    random.Random(seed).shuffle(free)
    spec = KVCacheSpec(1, kv_heads, dim, block_size, dtype)
    keys = torch.full((len(free), kv_heads, block_size, dim), torch.nan).to(dtype)
    values = keys.clone()
    spans: list[Span] = []
    for (start, tokens), count in zip(lengths, needed, strict=True):
        follows = bool(spans) and shared > 0 and start == shared * block_size
        head = list(spans[0].blocks[:shared]) if follows else []
        table = head + [free.pop() for _ in range(count - len(head))]
        for position in range(0 if not follows else start, start):
            block, offset = table[position // block_size], position % block_size
            keys[block, :, offset] = normal(kv_heads, dim)
            values[block, :, offset] = normal(kv_heads, dim)
        if not follows:
            for block in table[: -(-start // block_size)]:  # opened by an earlier step, which cleared it
                keys[block] = keys[block].nan_to_num(0.0)
                values[block] = values[block].nan_to_num(0.0)
        spans.append(Span(start, tokens, table))
    layout = StepLayout(spans, block_size)
    total = layout.num_tokens
    fused = normal(total, (group + 2) * kv_heads, dim)  # as models give it: slices of one projection
    q, k, v = torch.tensor_split(fused, [group * kv_heads, (group + 1) * kv_heads], dim=1)
    return Step(spec, layout, q, k, v, keys, values, window)


def assert_agrees(step: Step, atol: float) -> None:
    """The fast path gives the specification's output and leaves the specification's cache."""
    want, want_keys, want_values = step.run(ReferenceAttention(step.spec))
    got, keys, values = step.run(TorchAttention(step.spec, CPU))
    assert torch.isfinite(want).all()
    torch.testing.assert_close(got, want, atol=atol, rtol=atol)
    for cache, expected in ((keys, want_keys), (values, want_values)):
        stale = expected.isnan()  # may be cleared; nothing else may change
        assert torch.equal(cache[~stale], expected[~stale])
        assert (cache[stale].isnan() | (cache[stale] == 0)).all()


@st.composite
def steps(draw: st.DrawFn) -> Step:
    block_size = draw(st.sampled_from([1, 3, 4, 16]))
    shared = draw(st.integers(0, 3))
    lengths = draw(
        st.lists(
            st.tuples(st.integers(0, 40), st.one_of(st.just(1), st.integers(1, 20))), min_size=1, max_size=7
        )
    )
    if shared:  # the first span writes the blocks in this very step; others read them
        lengths[0] = (0, shared * block_size + draw(st.integers(0, 5)))
        lengths += [(shared * block_size, draw(st.integers(1, 9))) for _ in range(draw(st.integers(1, 3)))]
    return make_step(
        lengths,
        block_size=block_size,
        kv_heads=draw(st.sampled_from([1, 2, 3])),
        group=draw(st.sampled_from([1, 2, 5])),
        window=draw(st.one_of(st.none(), st.integers(1, 45))),
        shared=shared,
        seed=draw(st.integers(0, 2**16)),
    )


@settings(max_examples=60, deadline=None)
@given(step=steps())
def test_any_mix_of_spans_agrees_with_the_reference(step: Step) -> None:
    assert_agrees(step, 1e-5)


@pytest.mark.parametrize("window", [None, 5, 150, 700])
@pytest.mark.parametrize("start", [0, 37])
def test_chunks_longer_than_a_tile(window: int | None, start: int) -> None:
    tokens = QUERY_TILE + 70
    step = make_step([(start, tokens), (90, 1)], block_size=16, kv_heads=1, window=window)
    assert_agrees(step, 1e-5)


@pytest.mark.parametrize("window", [None, 20])
def test_bfloat16(window: int | None) -> None:
    lengths = [(30, 1), (0, 50), (99, 1), (40, 17), (1, 1)]
    step = make_step(lengths, dim=32, window=window, dtype=torch.bfloat16, block_size=16)
    assert_agrees(step, 2e-2)


def test_one_long_context_does_not_pad_the_others() -> None:
    step = make_step([(10, 1), (4000, 1), (12, 1), (11, 1)], block_size=16, kv_heads=1, group=1)
    backend = TorchAttention(step.spec, CPU)
    spans = sorted(step.layout.spans, key=lambda span: span.start)
    groups = backend.groups(spans, None)
    assert [(group.first, group.last) for group in groups] == [(0, 3), (3, 4)]
    assert [group.hidden.shape[-1] for group in groups] == [16, 4016]
    assert_agrees(step, 1e-5)


@settings(deadline=None)
@given(
    starts=st.lists(st.integers(0, 3000), min_size=1, max_size=40), window=st.sampled_from([None, 64, 1000])
)
def test_padding_of_decode_groups_is_bounded(starts: list[int], window: int | None) -> None:
    size = 16
    spec = KVCacheSpec(1, 8, 128, size, torch.bfloat16)
    spans = [Span(start, 1, range(start // size + 1)) for start in sorted(starts)]
    groups = TorchAttention(spec, CPU).groups(spans, window)
    assert [group.first for group in groups] == [0, *(group.last for group in groups[:-1])]
    assert groups[-1].last == len(spans)
    for group in groups:
        padded = group.pieces.numel() // spec.num_kv_heads
        visible = int((~group.hidden).sum())
        # a block more on either side of a row's keys, and a quarter of padding
        assert padded <= 1.25 * (visible / size + 2 * (group.last - group.first))


def test_a_windowed_layer_reads_only_the_window() -> None:
    step = make_step([(999, 1), (900, 30)], block_size=16, window=40)
    backend = TorchAttention(step.spec, CPU)
    (group,) = backend.groups([step.layout.spans[0]], 40)
    assert group.hidden.shape[-1] == 48  # positions 960 to 999 lie in 3 blocks
    chunk = backend.chunk(step.layout.spans[1], 1, 40)
    assert chunk.origin == 861
    assert chunk.pieces is not None
    assert chunk.pieces.numel() == 2 * (58 - 53 + 1)
    assert_agrees(step, 1e-5)


def test_decode_without_anything_hidden() -> None:
    q, keys, values = torch.randn(3, 2, 4, 8), torch.randn(3, 2, 9, 8), torch.randn(3, 2, 9, 8)
    out = torch.empty_like(q)
    dense.decode(q, keys, values, torch.zeros(3, 1, 1, 9, dtype=torch.bool), 0.5, out)
    want = torch.softmax(0.5 * q @ keys.transpose(-1, -2), -1) @ values
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)


def test_the_same_step_serves_layers_with_and_without_a_window() -> None:
    step = make_step([(30, 1), (8, 9)])
    backend = TorchAttention(step.spec, CPU)
    prepared = backend.prepare(step.layout)
    for window in (None, 3, None, 3):
        step.window = window
        keys, values = step.keys.clone(), step.values.clone()
        got = prepared(step.q, step.k, step.v, keys, values, scale=0.3, window=window)
        torch.testing.assert_close(got, step.run(ReferenceAttention(step.spec))[0], atol=1e-5, rtol=1e-5)
