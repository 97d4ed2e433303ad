"""Small real engines for tests: random weights, float32, a few layers."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import torch

from penstock.core.cost import Coefficients
from penstock.engine.executor.cuda import CudaStream
from penstock.engine.executor.offload import HostCache
from penstock.engine.executor.stream import HostStream, Stream
from penstock.engine.executor.torch_executor import TorchExecutor
from penstock.kernels.attention import KVCache
from penstock.kernels.create import create_operations
from penstock.model.causal_lm import CausalLM
from penstock.model.config import load_config
from penstock.model.loader import load_model
from tests.model.checkpoints import make_checkpoint

#: Removed when the test process ends.
_made = tempfile.TemporaryDirectory(prefix="penstock-test-")


@cache
def checkpoint(architecture: str = "qwen3", seed: int = 0) -> Path:
    """A directory with a tiny random model; made once per test process."""
    directory = Path(_made.name) / f"{architecture}-{seed}"
    # with tied embeddings a small random model mostly repeats its last token, which would prove little
    return make_checkpoint(directory, architecture, seed=seed, tie_word_embeddings=False)


@cache
def model(architecture: str, device: str) -> CausalLM:
    """Loaded once per test process: executors share it and keep only rows and caches of their own."""
    path = checkpoint(architecture)
    return load_model(path, load_config(path), create_operations(torch.device(device), torch.float32))


def torch_executor(
    num_blocks: int = 64,
    block_size: int = 4,
    device: str = "cpu",
    architecture: str = "qwen3",
    stream: Stream | None = None,
    host_blocks: int = 0,
) -> TorchExecutor:
    """An executor on a tiny random model."""
    loaded, place = model(architecture, device), torch.device(device)
    spec = loaded.cache_spec(block_size)
    attention = loaded.operations.attention(spec)
    cache = KVCache(spec, num_blocks + 1, place)
    stream = stream or (CudaStream(place) if place.type == "cuda" else HostStream())
    host = HostCache(cache, host_blocks, stream, pinned=place.type == "cuda") if host_blocks else None
    return TorchExecutor(loaded, cache, attention, place, Coefficients(), stream=stream, host=host)
