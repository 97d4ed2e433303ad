"""Attention by torch's operators at the borders of tiles, windows, groups and blocks; what a cache takes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.kernels import attention, dense, torch_attention
from penstock.kernels.attention import KVCache, KVCacheSpec, Span, StepLayout
from penstock.kernels.limits import DECODE_PADDING, workspace_bytes
from penstock.kernels.quantization import GROUP, Quantized, dequantize, quantize, quantize_activations
from penstock.kernels.reference import paged_attention, write_kv
from penstock.kernels.torch_attention import TorchAttention

CPU = torch.device("cpu")
SPEC = KVCacheSpec(num_layers=1, num_kv_heads=2, head_dim=4, block_size=4, dtype=torch.float32)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- tiles and windows ----


@given(
    count=st.integers(1, 14),
    offset=st.integers(0, 13),
    window=st.none() | st.integers(1, 30),
    tile=st.sampled_from([1, 4, 5, 64]),
)
@settings(max_examples=70)
def test_each_query_sees_the_keys_before_it_within_its_window(
    count: int, offset: int, window: int | None, tile: int
) -> None:
    """However the queries are cut into tiles, and whatever masks earlier calls have left."""
    heads, group, dim = 2, 3, 4
    q, keys, values = (
        randn(heads, group, count, dim, seed=1),
        randn(heads, offset + count, dim, seed=2),
        randn(heads, offset + count, dim, seed=3),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense, "QUERY_TILE", tile)
        prefill = dense.Prefill(torch.float32, CPU)
        assert prefill.nbytes == 0
        got = torch.empty(heads, group, count, dim)
        for width in (window, None, 3, window):  # the last one finds what the first one left
            prefill(q, keys, values, offset, width, 0.5, got)
    for i in range(count):
        last = offset + i
        seen = slice(0 if window is None else max(0, last - window + 1), last + 1)
        scores = torch.einsum("hgd,hkd->hgk", q[:, :, i], keys[:, seen]) * 0.5
        want = torch.einsum("hgk,hkd->hgd", scores.softmax(-1), values[:, seen])
        assert torch.allclose(got[:, :, i], want, atol=1e-5)


def test_masks_are_made_once_for_a_window_and_grow_rarely() -> None:
    prefill = dense.Prefill(torch.float32, CPU)
    tile = dense.QUERY_TILE
    band = prefill._band(None, 5)
    assert band.shape == (tile, 1024 + tile)
    assert prefill._band(None, 1024) is band
    assert prefill._band(None, 1025).shape == (tile, 2048 + tile)
    windowed = prefill._band(7, 10_000)
    assert windowed.shape == (tile, 6 + tile)
    assert prefill._band(7, 5) is windowed
    assert prefill.nbytes == 4 * tile * (2048 + tile + 6 + tile)


spans = st.lists(st.tuples(st.integers(0, 17), st.sampled_from([1, 1, 2, 3, 9])), min_size=1, max_size=6)


@given(spans=spans, window=st.none() | st.integers(1, 12), group_bytes=st.sampled_from([1, 300, 1 << 20]))
@settings(max_examples=50)
def test_spans_of_any_kind_agree_with_the_specification(
    spans: list[tuple[int, int]], window: int | None, group_bytes: int
) -> None:
    """What is stale in the caches is NaN, but for blocks that an earlier step has opened, and cleared."""
    size = SPEC.block_size
    free = iter(range(1, 200))
    layout = StepLayout(
        [Span(s, n, [next(free) for _ in range(-(-(s + n) // size))]) for s, n in spans], size
    )
    total = layout.num_tokens
    q, k, v = randn(total, 4, 4, seed=1), randn(total, 2, 4, seed=2), randn(total, 2, 4, seed=3)
    keys, values = torch.full((2, 200, 2, size, 4), float("nan"))
    for number, span in enumerate(layout.spans):
        if span.start % size:
            keys[int(span.blocks[span.start // size])] = values[int(span.blocks[span.start // size])] = 0.0
        slots = [int(span.blocks[p // size]) * size + p % size for p in range(span.start)]
        write_kv(
            randn(span.start, 2, 4, seed=9 + number), randn(span.start, 2, 4, seed=99), keys, values, slots
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(torch_attention.DECODE_GROUP_BYTES, "cpu", group_bytes)
        step = TorchAttention(SPEC, CPU).prepare(layout)
        mine = (keys.clone(), values.clone())
        for _ in range(2):  # two layers share what was prepared
            got = step(q, k, v, *mine, scale=0.5, window=window)
    write_kv(k, v, keys, values, layout.slots.tolist())
    want = paged_attention(q, keys, values, layout, 0.5, window)
    assert torch.allclose(got, want, atol=1e-5)


@given(widths=st.lists(st.integers(1, 40), max_size=12).map(sorted), most=st.integers(1, 60))
def test_decode_rows_are_grouped_within_memory_and_padding(widths: list[int], most: int) -> None:
    backend = TorchAttention(SPEC, CPU)
    piece = 2 * 4 * 4 * 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(torch_attention.DECODE_GROUP_BYTES, "cpu", most * piece + piece - 1)
        groups = backend._cut(widths)
    assert [row for first, last, _ in groups for row in range(first, last)] == list(range(len(widths)))

    def fits(first: int, last: int) -> bool:
        padded = max(widths[first:last]) * (last - first)
        return padded <= most and padded <= DECODE_PADDING * sum(widths[first:last])

    for first, last, widest in groups:
        assert widest == max(widths[first:last])
        assert last - first == 1 or fits(first, last)
        assert last == len(widths) or not fits(first, last + 1), "one more would have had room"


# ---- caches ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("blocks", [1, 5])
def test_a_cache_begins_at_a_line_of_memory_and_is_zero(dtype: torch.dtype, blocks: int) -> None:
    spec = replace(SPEC, num_layers=3, dtype=dtype)
    cache = KVCache(spec, blocks, CPU)
    assert len(cache.layers) == 3
    for keys, values in cache.layers:
        for tensor in (keys, values):
            assert tensor.shape == (blocks, 2, 4, 4)
            assert tensor.dtype == dtype
            assert tensor.data_ptr() % attention._ALIGNMENT == 0
            assert not tensor.any()
            tensor.fill_(1.0)  # and is ours to its last element
    assert cache.nbytes == blocks * 4 * spec.bytes_per_token == 2 * 3 * blocks * 2 * 4 * 4 * dtype.itemsize


def test_a_cache_of_another_device_is_its_own() -> None:
    cache = KVCache(SPEC, 2, torch.device("meta"))
    assert {tensor.device.type for layer in cache.layers for tensor in layer} == {"meta"}
    assert cache.layers[0][0].shape == (2, 2, 4, 4)


@pytest.mark.parametrize(
    ("span", "why"),
    [
        (Span(0, 0, [1]), "span 1: start 0, tokens 0; need >= 0 and >= 1"),
        (Span(-1, 2, [1]), "span 1: start -1, tokens 2"),
        (Span(0, 5, [1]), "span 1: 1 blocks of 4 do not cover 5 positions"),
        (Span(4, 1, [1]), "do not cover 5 positions"),
    ],
)
def test_spans_that_cannot_be_are_named(span: Span, why: str) -> None:
    StepLayout([Span(0, 4, [1]), Span(3, 1, [1]), Span(0, 1, [1])], 4)
    with pytest.raises(ValueError, match=why):
        StepLayout([Span(0, 1, [0]), span], 4)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_workspace_is_of_long_contexts_or_of_a_group(device: str) -> None:
    sizes = {"max_model_len": 100, "kv_heads": 3, "head_dim": 5, "dtype_bytes": 2}
    group = {"cpu": 2 << 20, "cuda": 256 << 20}[device]
    masks = 512 * (3 * 100 + 512) * 2
    assert workspace_bytes(**sizes, device=device) == 2 * group + masks
    long = 1 << 30
    masks = 512 * (3 * long + 512) * 2
    assert workspace_bytes(**sizes | {"max_model_len": long}, device=device) == 2 * 2 * long * 15 + masks


# ---- numbers of quantisation ----


def test_eight_bits_number_by_number() -> None:
    weight = torch.tensor([[127.0, -127.0, 1.4, -1.6, 0.0], [0.0] * 5, [254.0, 1.0, 3.0, -5.0, 2.0]])
    for scheme in ("int8", "w8a8"):
        found = quantize(weight, scheme)
        assert found.values.tolist() == [[127, -127, 1, -2, 0], [0] * 5, [127, 0, 2, -2, 1]]
        assert found.scales.tolist() == [[1.0], [1.0], [2.0]]
        assert (found.zeros, found.group) == (None, GROUP)
        assert dequantize(found, torch.float32)[2].tolist() == [254.0, 0.0, 4.0, -4.0, 2.0]
        whole = quantize(weight, scheme, None)
        assert (whole.scales.tolist(), whole.group) == ([1.0, 1.0, 2.0], None)
        assert torch.equal(whole.values, found.values)


def test_four_bits_number_by_number() -> None:
    weight = torch.tensor(
        [[15.0, 0.0, 1.0, 7.4], [-5.0, 10.0, 0.4, 0.0], [-15.0, -1.0, -2.0, -3.0], [0.0] * 4]
    )
    found = quantize(weight, "int4", group=4)
    assert found.zeros is not None
    assert found.scales.flatten().tolist() == [1.0, 1.0, 1.0, 1.0]
    assert found.zeros.flatten().tolist() == [0, 5, 15, 0]
    assert found.values.tolist() == [[15, 0, 1, 7], [0, 15, 5, 5], [0, 14, 13, 12], [0, 0, 0, 0]]
    assert dequantize(found, torch.bfloat16).tolist() == [
        [15.0, 0.0, 1.0, 7.0],
        [-5.0, 10.0, 0.0, 0.0],
        [-15.0, -1.0, -2.0, -3.0],
        [0.0] * 4,
    ]


def test_a_group_that_is_not_full_has_a_scale_of_its_own() -> None:
    weight = torch.tensor([[15.0, 0.0, 30.0, 2.0, 4.0]])
    found = quantize(weight, "int4", group=2)
    assert found.group == 2
    assert found.scales.tolist() == [[1.0, 2.0, pytest.approx(4 / 15, rel=0.01)]]
    assert found.values.tolist() == [[15, 0, 15, 1, 15]]
    assert quantize(weight, "int4").group == Quantized(weight, weight).group == GROUP == 128


def test_activations_number_by_number() -> None:
    x = torch.zeros(2, GROUP + 1)
    x[0, 0], x[0, 1], x[0, GROUP] = 127.0, 1.4, 3.0
    x[1, :3] = torch.tensor([-254.0, 3.0, 1.0])
    got = quantize_activations(x)
    assert got.shape == x.shape
    assert got[0, [0, 1, 2, GROUP]].tolist() == [127.0, 1.0, 0.0, 3.0]
    assert got[1, :3].tolist() == [-254.0, 4.0, 0.0]
    assert quantize_activations(x.bfloat16()).dtype == torch.float32
