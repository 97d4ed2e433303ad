"""All layers in one call against the same layers one call after the other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from penstock.kernels.attention import KVCache, Span, StepLayout, create_attention
from penstock.kernels.cpu.library import available
from penstock.model.causal_lm import CausalLM
from penstock.model.config import load_config
from penstock.model.loader import load_model
from tests.model.checkpoints import make_checkpoint

pytestmark = pytest.mark.skipif(
    available(wait_seconds=120) is None, reason="no C++ compiler, or PENSTOCK_CPU_KERNELS=0"
)
CPU = torch.device("cpu")


def steps(model: CausalLM) -> tuple[list[torch.Tensor], list[bool]]:
    """Hidden states of a prompt, of more prompt beside decode, and of decode; whether one call made them."""
    spec = model.cache_spec(4)
    cache, backend = KVCache(spec, 32, CPU), create_attention("cpu", spec, CPU)
    generator = torch.Generator().manual_seed(0)
    first, second, third = list(range(10, 1, -1)), list(range(11, 20)), list(range(20, 24))
    layouts = [
        [Span(0, 19, first), Span(0, 6, second)],
        [Span(19, 1, first), Span(6, 11, second), Span(0, 3, third)],
        [Span(20, 1, first), Span(17, 1, second), Span(3, 1, third)],
        [Span(21, 1, first)],
    ]
    hidden, fused = [], []
    run = model._stack.run if model._stack is not None else None
    if run is not None and model._stack is not None:
        model._stack.run = lambda *arguments: fused.append(run(*arguments)) or fused[-1]  # type: ignore[method-assign]
    for spans in layouts:
        layout = StepLayout(spans, spec.block_size)
        ids = torch.randint(0, model.config.vocab_size, (layout.num_tokens,), generator=generator)
        hidden.append(model.forward(ids, torch.from_numpy(layout.positions), backend.prepare(layout), cache))
    return hidden, fused


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("scheme", [None, "int8", "w8a8", "int4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])
def test_bits_are_those_of_single_calls(
    kind: str, dtype: torch.dtype, scheme: str | None, threads: int, tmp_path: Path
) -> None:
    directory = make_checkpoint(tmp_path, kind, hidden_size=128, intermediate_size=192)
    model = load_model(directory, load_config(directory), dtype, CPU, quantization=scheme)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together, fused = steps(model)
        assert model._stack is not None
        model._stack = None
        one_by_one, _ = steps(model)
    finally:
        torch.set_num_threads(before)
    if scheme is not None:
        assert all(fused)
    for got, want in zip(together, one_by_one, strict=True):
        assert torch.equal(got, want)
        assert got.float().std() > 0.1
