"""The bits of a row depend on it alone: not on its batch, its chunk, the blocks, the threads, or anybody's NaN."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.kernels.attention import KVCache, KVCacheSpec, Span, StepLayout
from penstock.kernels.cpu.attention import CpuAttention
from penstock.kernels.cpu.library import available

LIBRARY = available(wait_seconds=120)
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="no C++ compiler, or PENSTOCK_CPU_KERNELS=0")
CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]


def attend(
    qkv: tuple[torch.Tensor, ...],
    chunks: list[int],
    block_size: int,
    window: int | None,
    threads: int,
    seed: int = 0,
) -> torch.Tensor:
    """A prompt's attention [T, H, D], computed in chunks into blocks that lie in an order of their own."""
    assert LIBRARY is not None
    q, k, v = qkv
    total, before = len(q), torch.get_num_threads()
    blocks = -(-total // block_size)
    order = torch.randperm(blocks + 3, generator=torch.Generator().manual_seed(seed))[:blocks].tolist()
    spec = KVCacheSpec(1, k.shape[1], q.shape[2], block_size, q.dtype)
    cache = KVCache(spec, blocks + 3, CPU).layers[0]
    backend, parts, start = CpuAttention(LIBRARY, spec), [], 0
    torch.set_num_threads(threads)
    try:
        for tokens in chunks:
            rows = slice(start, start + tokens)
            step = backend.prepare(StepLayout([Span(start, tokens, order)], block_size))
            parts.append(step(q[rows], k[rows], v[rows], *cache, scale=q.shape[2] ** -0.5, window=window))
            start += tokens
    finally:
        torch.set_num_threads(before)
    return torch.cat(parts)


def prompt(
    total: int, kv_heads: int, group: int, dim: int, dtype: torch.dtype, seed: int
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    heads = (kv_heads * group, kv_heads, kv_heads)
    return tuple(3 * torch.randn(total, n, dim, generator=generator).to(dtype) for n in heads)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_chunks_blocks_and_threads_change_no_bit_of_attention(data: st.DataObject) -> None:
    dtype, total = (
        data.draw(st.sampled_from(DTYPES)),
        data.draw(st.sampled_from([5, 40, 130, 530, 700, 1100])),
    )
    group, dim = (
        data.draw(st.sampled_from([1, 2, 3, 4, 7, 9])),
        data.draw(st.sampled_from([8, 24, 32, 64, 80])),
    )
    window = data.draw(st.sampled_from([None, None, 1, 33, 200, 515]))
    qkv = prompt(total, data.draw(st.sampled_from([1, 2])), group, dim, dtype, total)
    whole = attend(qkv, [total], 16, window, 1)
    assert whole.isfinite().all()
    chunks, left = [], total
    tail = data.draw(st.integers(0, min(8, total)))  # the last tokens one by one, as in decoding
    while left > tail:
        chunks.append(min(left - tail, data.draw(st.sampled_from([1, 2, 3, 4, 5, 7, 16, 17, 64, 127, 300]))))
        left -= chunks[-1]
    block_size, threads = (
        data.draw(st.sampled_from([1, 3, 16, 20, 32, 128])),
        data.draw(st.sampled_from([1, 2])),
    )
    again = attend(qkv, [*chunks, *[1] * left], block_size, window, threads, seed=7)
    assert torch.equal(again, whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunks", [[600], [300, 300], [100, 450, 50], [597, 1, 1, 1], [598, 2]], ids=str)
@pytest.mark.parametrize("sick", [0, 3, 130, 299, 511, 598])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_position_knows_nothing_of_those_after_it(
    dtype: torch.dtype, chunks: list[int], sick: int, poison: float
) -> None:
    """Keys and values that are NaN leave all earlier positions as they are: others may share their blocks."""
    q, k, v = prompt(600, 2, 2, 32, dtype, 0)
    want = attend((q, k, v), chunks, 16, None, 2)
    k[sick], v[sick] = poison, poison
    got = attend((q, k, v), chunks, 16, None, 2)
    assert torch.equal(got[:sick], want[:sick])
    assert not got[sick:].isfinite().any(-1).any(-1).any()
