"""The step's layout, the cache and the backend factory."""

from __future__ import annotations

from array import array

import numpy as np
import pytest
import torch

from penstock.core.errors import StartupError
from penstock.kernels.attention import KVCache, KVCacheSpec, Span, StepLayout
from penstock.kernels.create import ATTENTION_BACKENDS, create_operations
from penstock.kernels.limits import workspace_bytes
from penstock.kernels.torch_attention import TorchAttention

CPU = torch.device("cpu")
SPEC = KVCacheSpec(num_layers=3, num_kv_heads=2, head_dim=8, block_size=4, dtype=torch.bfloat16)


@pytest.mark.parametrize("table", [list, lambda ids: array("q", ids), lambda ids: np.array(ids, np.int64)])
def test_layout(table: object) -> None:
    make = table  # the forms of a block table that executors may keep
    spans = [
        Span(5, 1, make([7, 3])),  # type: ignore[operator]
        Span(0, 6, make([9, 1])),  # type: ignore[operator]
        Span(4, 2, make([9, 8])),  # type: ignore[operator]
    ]
    layout = StepLayout(spans, 4)
    assert layout.num_tokens == 9
    assert layout.query_starts == [0, 1, 7, 9]
    assert layout.last_rows == [0, 6, 8]
    assert layout.positions.tolist() == [5, 0, 1, 2, 3, 4, 5, 4, 5]
    assert layout.slots.tolist() == [13, 36, 37, 38, 39, 4, 5, 32, 33]


def test_block_tables_may_grow_after_a_step() -> None:
    blocks = array("q", [0, 1])
    layout = StepLayout([Span(0, 7, blocks)], 4)
    TorchAttention(SPEC, CPU).prepare(layout)
    blocks.append(2)  # an array that someone still looks into refuses this


@pytest.mark.parametrize(
    ("span", "why"),
    [
        (Span(0, 0, [0]), "tokens 0"),
        (Span(-1, 1, [0]), "start -1"),
        (Span(3, 2, [0]), "1 blocks of 4 do not cover 5 positions"),
    ],
)
def test_impossible_spans_are_refused(span: Span, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        StepLayout([span], 4)


def test_cache() -> None:
    cache = KVCache(SPEC, 5, CPU)
    assert len(cache.layers) == 3
    for keys, values in cache.layers:
        assert keys.shape == values.shape == (5, 2, 4, 8)
        assert keys.dtype == torch.bfloat16
        assert keys.data_ptr() % 64 == 0
        assert not keys.any()
        assert not values.any()
    assert SPEC.bytes_per_token == 2 * 3 * 2 * 8 * 2
    assert cache.nbytes == 5 * 4 * SPEC.bytes_per_token
    assert cache.nbytes == sum(tensor.nbytes for layer in cache.layers for tensor in layer)


def test_backends() -> None:
    for name in ("torch", "reference"):
        operations = create_operations(CPU, SPEC.dtype, attention=name)
        assert operations.attention(SPEC).name == name
        assert operations.stack is None  # it would go past this backend
    assert ATTENTION_BACKENDS == ("auto", "cpu", "triton", "torch", "reference")
    with pytest.raises(
        StartupError, match=r"'flash'.*Choose one of auto, cpu, triton, torch, reference"
    ) as caught:
        create_operations(CPU, SPEC.dtype, attention="flash")
    assert caught.value.param == "--attention-backend"


def test_workspace_covers_what_a_long_chunk_allocates() -> None:
    spec = KVCacheSpec(1, 2, 16, 16, torch.bfloat16)
    backend = TorchAttention(spec, CPU)
    length = 1 << 15
    cache = KVCache(spec, length // 16, CPU)
    q, kv = torch.randn(200, 4, 16).bfloat16(), torch.randn(200, 2, 16).bfloat16()
    layout = StepLayout([Span(length - 200, 200, range(length // 16))], 16)
    backend.prepare(layout)(q, kv, kv, *cache.layers[0], scale=1.0)
    kept = backend._workspace.nbytes + backend.prefill.nbytes
    bound = workspace_bytes(max_model_len=length, kv_heads=2, head_dim=16, dtype_bytes=2, device="cpu")
    assert kept <= bound <= 4 * kept
