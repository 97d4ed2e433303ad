"""Attention in both directions: tables against the specification, and that against a softmax."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.kernels.attention import AttentionBackend, KVCache, KVCacheSpec, Span, StepLayout
from penstock.kernels.reference import ReferenceAttention

from .tables import CPU, DTYPES, TABLES, table


def layout_of(lengths: list[int], block_size: int) -> StepLayout:
    spans, first = [], 0
    for length in lengths:
        count = -(-length // block_size)
        spans.append(Span(0, length, range(first, first + count)))
        first += count
    return StepLayout(spans, block_size, causal=False)


def attended(
    backend: AttentionBackend,
    spec: KVCacheSpec,
    layout: StepLayout,
    heads: int,
    seed: int = 0,
    fill: float = 0.0,
) -> torch.Tensor:
    """The backend's output for random inputs, in a cache that holds something else before."""
    generator = torch.Generator().manual_seed(seed)
    total = layout.num_tokens
    fused = torch.randn(total, heads + 2 * spec.num_kv_heads, spec.head_dim, generator=generator).to(
        spec.dtype
    )
    q, k, v = fused.split([heads, spec.num_kv_heads, spec.num_kv_heads], dim=1)
    cache = KVCache(spec, sum(len(span.blocks) for span in layout.spans), CPU)
    for tensor in cache.layers[0]:
        tensor.fill_(fill)
    return backend.prepare(layout)(q, k, v, *cache.layers[0], scale=0.3)


def test_the_specification_is_a_softmax_over_the_whole_prompt() -> None:
    spec = KVCacheSpec(1, 2, 8, 4, torch.float32)
    layout = layout_of([7, 1, 4], 4)
    out = attended(ReferenceAttention(spec), spec, layout, 4)
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(12, 8, 8, generator=generator)
    q, k, v = fused[:7, :4], fused[:7, 4:6], fused[:7, 6:]
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, 1)) * 0.3
    want = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.repeat_interleave(2, 1))
    torch.testing.assert_close(out[:7], want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TABLES)
@settings(max_examples=8, deadline=None)
@given(
    lengths=st.lists(st.one_of(st.integers(1, 20), st.integers(120, 140)), min_size=1, max_size=4),
    heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    dim=st.sampled_from([8, 32, 40]),
    block_size=st.sampled_from([4, 128]),
    seed=st.integers(0, 99),
)
def test_every_table_agrees_with_the_specification(
    name: str,
    dtype: torch.dtype,
    lengths: list[int],
    heads: tuple[int, int],
    dim: int,
    block_size: int,
    seed: int,
) -> None:
    spec = KVCacheSpec(1, heads[1], dim, block_size, dtype)
    layout = layout_of(lengths, block_size)
    want = attended(ReferenceAttention(spec), spec, layout, heads[0], seed)
    got = attended(table(name, dtype).attention(spec), spec, layout, heads[0], seed)
    atol = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got, want, atol=atol, rtol=atol)


@pytest.mark.parametrize("name", TABLES)
def test_what_an_earlier_step_left_in_the_cache_is_not_seen(name: str) -> None:
    spec = KVCacheSpec(1, 2, 32, 16, torch.float32)
    layout = layout_of([5, 130], 16)
    backend = table(name, torch.float32).attention(spec)
    clean = attended(backend, spec, layout, 2)
    dirty = attended(backend, spec, layout, 2, fill=torch.nan)
    assert torch.equal(clean, dirty)


@pytest.mark.parametrize("name", ["reference", *TABLES])
def test_a_window_is_refused(name: str) -> None:
    spec = KVCacheSpec(1, 1, 8, 4, torch.float32)
    backend = ReferenceAttention(spec) if name == "reference" else table(name, torch.float32).attention(spec)
    x = torch.zeros(3, 1, 8)
    cache = KVCache(spec, 1, CPU)
    with pytest.raises(ValueError, match="window 2"):
        backend.prepare(layout_of([3], 4))(x, x, x, *cache.layers[0], scale=1.0, window=2)


def test_a_part_of_a_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="whole prompts"):
        StepLayout([Span(1, 2, [0])], 4, causal=False)
