"""What an engine will take of memory, before it is started: from its configuration and its files' headers.

    EngineConfig ─▶ model directory ─▶ ModelConfig, names and shapes of tensors ─▶ Need

No torch, and no weights are read: the process that is about to start several engines asks. Weights are
reckoned from shapes and types; what packing adds on a device is an estimate, of at most some percent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from penstock.core.errors import ModelLoadError
from penstock.files import shown
from penstock.kernels.capability import Device, resolve_dtype
from penstock.model.checkpoint import find_safetensors
from penstock.model.config import load_config
from penstock.model.hub import resolve_model
from penstock.model.memory import kv_bytes_per_token, plan_memory
from penstock.model.model_config import ModelConfig
from penstock.model.pooling import pooling_plan
from penstock.model.together import Need
from penstock.model.weighing import loaded_bytes

from .config import EngineConfig, graph_sizes, step_limits
from .encoder_budget import budget

_PROCESS = {"cpu": 400 << 20, "cuda": 700 << 20}
"""Measured: API process 60 MiB, engine 180 and for a moment 190 more, templates 20, keeper 10. On CUDA: of
the device, for its context and its libraries, and assumed."""
_PLENTY = 1 << 62


def preview(config: EngineConfig, *, device: str, name: str, replicas: int = 1) -> Need:
    """What one replica takes. Downloads the model if it is to come from a hub.

    Args:
        device: "cpu" or "cuda".
        name: what the table calls it.

    Raises:
        StartupError subclasses, as the engine's start would.
    """
    path = resolve_model(config.model, config.revision, config.download_dir)
    model = load_config(path, config.hf_overrides)
    width = 4 if _dtype(config.dtype, model, device) == "float32" else 2
    if not model.causal:
        return _encoder(config, path, model, width, device=device, name=name, replicas=replicas)
    seqs, tokens = step_limits(config, device)
    length = config.max_model_len
    block = kv_bytes_per_token(model, width) * config.block_size
    plan = plan_memory(
        model,
        weight_bytes=_weights(path, model, config, width, device),
        dtype_bytes=width,
        device=device,
        available_bytes=_PLENTY,
        total_bytes=_PLENTY,
        utilization=1.0,
        max_model_len=length,
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        block_size=config.block_size,
        graph_rows=graph_sizes(config, device, seqs),
        offload_bytes=int(config.kv_offloading_size * 2**30),
    )
    # auto: the longest that fits, so a block will do
    blocks = 1 if length == -1 else math.ceil(plan.max_model_len / config.block_size)
    return Need(
        name=name,
        replicas=replicas,
        process=_PROCESS[device],
        weights=plan.weights,
        activations=plan.activations,
        beside=plan.graphs + (plan.offload if device == "cpu" else 0),
        least=blocks * block,
        most=max(blocks * block, plan.kv_cache),
        block=block,
        given=config.kv_cache_memory_bytes,
    )


def _encoder(
    config: EngineConfig, path: Path, model: ModelConfig, width: int, *, device: str, name: str, replicas: int
) -> Need:
    """An encoder has no KV cache."""
    plan = pooling_plan(
        path, model, runner=config.runner, convert=config.convert, pooler=config.pooler_config
    )
    assert plan is not None  # nothing else can be done with one
    weights = _weights(path, model, config, width, device)
    taken = budget(config, model, plan.info, weights=weights, width=width, device=device, available=_PLENTY)
    return Need(
        name=name,
        replicas=replicas,
        process=_PROCESS[device],
        weights=taken.weights,
        activations=taken.step,
        least=0,
        most=0,
        block=1,
    )


def _dtype(wanted: str, model: ModelConfig, device: str) -> str:
    """As the engine chooses it; on a GPU without bfloat16 it is float16, which takes as many bytes."""
    return resolve_dtype(wanted, model.dtype, Device(device)).dtype


def _weights(path: Path, model: ModelConfig, config: EngineConfig, width: int, device: str) -> int:
    """Bytes of all weights as loaded."""
    shapes = _shapes(model) if config.load_format == "dummy" else _tensors(path)
    return loaded_bytes(
        ((name, shape, 1) for name, shape in shapes),
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        tied=model.tie_word_embeddings,
        scheme=config.quantization,
        width=width,
        device=device,
    )


def _shapes(model: ModelConfig) -> Iterable[tuple[str, tuple[int, ...]]]:
    """The tensors that random weights stand for; biases and norms are no weight to speak of."""
    hidden, inner = model.hidden_size, model.intermediate_size
    q, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    layer = [(q, hidden), (kv, hidden), (kv, hidden), (hidden, q)]
    layer += [(inner, hidden), (inner, hidden), (hidden, inner)]
    yield "embed", (model.vocab_size, hidden)
    yield "lm_head", (model.vocab_size, hidden)
    for shape in model.num_layers * layer:
        yield "layer", shape


def _tensors(path: Path) -> Iterable[tuple[str, tuple[int, ...]]]:
    """Name and shape of each tensor."""
    from safetensors import SafetensorError, safe_open

    _, files = find_safetensors(path)
    for file in files:
        try:
            with safe_open(file, framework="np") as opened:
                for name in opened.keys():  # noqa: SIM118
                    yield name, tuple(opened.get_slice(name).get_shape())
        except (SafetensorError, OSError, ValueError) as error:
            raise ModelLoadError(
                f"{shown(file)} cannot be read: {error}.", advice="Download it again."
            ) from error
