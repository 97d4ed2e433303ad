"""What benchmarks of single steps share: an executor on this CPU, without a server or a scheduler.

Import it before anything that imports torch: it completes the environment as `penstock serve` does for the
engine's process, and OpenMP reads that once.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from penstock.engine.environment import prepare

prepare(os.environ)

import torch  # noqa: E402

from penstock.engine.executor.torch_executor import TorchExecutor  # noqa: E402
from penstock.engine.hardware import Hardware, inspect_hardware, prior  # noqa: E402
from penstock.kernels.attention import KVCache, KVCacheSpec  # noqa: E402
from penstock.kernels.create import create_operations  # noqa: E402
from penstock.model.causal_lm import CausalLM  # noqa: E402
from penstock.model.config import load_config  # noqa: E402
from penstock.model.loader import load_model  # noqa: E402

BLOCK = 16
"""Tokens per block of the cache."""


@dataclass(frozen=True, slots=True)
class Bench:
    """An executor and what it stands on; `hardware` was measured before the weights were read."""

    executor: TorchExecutor
    model: CausalLM
    cache: KVCache
    spec: KVCacheSpec
    hardware: Hardware


def make_bench(
    path: Path,
    num_blocks: int,
    *,
    threads: int,
    dtype: torch.dtype = torch.bfloat16,
    attention: str = "auto",
    quantization: str | None = None,
) -> Bench:
    """Load the checkpoint at `path` beside a cache of so many blocks."""
    torch.set_num_threads(threads)
    device = torch.device("cpu")
    hardware = inspect_hardware(device, dtype)
    operations = create_operations(device, dtype, attention=attention, quantized=quantization is not None)
    model = load_model(path, load_config(path), operations, quantization=quantization)
    spec = model.cache_spec(BLOCK)
    cache = KVCache(spec, num_blocks + 1, device)
    costs = prior(hardware, model.read_bytes, model.num_parameters, spec.bytes_per_token)
    executor = TorchExecutor(model, cache, operations.attention(spec), device, costs)
    return Bench(executor, model, cache, spec, hardware)
