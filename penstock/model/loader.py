"""From a model directory to a model that runs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, cast

import torch

from penstock.core.errors import StartupError
from penstock.kernels.operations import Operations

from .bert import Encoder
from .causal_lm import CausalLM
from .config import model_class
from .model_config import ModelConfig
from .pooler import Pooler
from .pooling import PoolingPlan
from .weights import DummyWeights, SafetensorsWeights, Weights

LoadFormat = Literal["auto", "safetensors", "dummy"]


def load_model(
    path: Path,
    config: ModelConfig,
    operations: Operations,
    *,
    load_format: LoadFormat = "auto",
    quantization: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CausalLM:
    """Build the model of `config` with the weights in directory `path`.

    Args:
        operations: of a device, which the weights go to, and of a dtype, which they are converted to.
        load_format: "auto" and "safetensors" read *.safetensors; "dummy" makes seeded random weights.
        quantization: None, or how to store the weights of linear layers: one of the operations' schemes.
        progress: called with (bytes done, bytes in all) while files are read.

    Raises:
        ModelLoadError: naming the file and the tensor, when weights are missing, left over, of another shape
            than the configuration says, truncated or corrupt.
    """
    model = _build(config, _weights(path, config, operations, load_format, quantization, progress))
    assert isinstance(model, CausalLM)  # the caller asks no encoder to generate
    return model


def load_pooling_model(
    path: Path,
    config: ModelConfig,
    operations: Operations,
    plan: PoolingPlan,
    *,
    token_ids: Sequence[int] = (),
    load_format: LoadFormat = "auto",
    quantization: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[CausalLM | Encoder, Pooler]:
    """A model that pools, and what makes vectors of its hidden states; see load_model.

    Args:
        plan: how it pools; see penstock.model.pooling.
        token_ids: of the plan's tokens.
    """
    weights = _weights(path, config, operations, load_format, quantization, progress)
    weights.headless = True
    made: list[Pooler] = []
    model = _build(config, weights, lambda: made.append(Pooler(plan, config, weights, path, token_ids)))
    return model, made[0]


def _weights(
    path: Path,
    config: ModelConfig,
    operations: Operations,
    load_format: LoadFormat,
    quantization: str | None,
    progress: Callable[[int, int], None] | None,
) -> Weights:
    weights: Weights
    if load_format == "dummy":
        weights = DummyWeights(operations, quantization)
    elif load_format in ("auto", "safetensors"):
        weights = SafetensorsWeights(path, operations, progress, quantization, config.fp8)
    else:
        raise StartupError(
            f"Unknown load format {load_format!r}.",
            param="--load-format",
            advice="Choose one of auto, safetensors, dummy.",
        )
    return weights


def _build(
    config: ModelConfig, weights: Weights, then: Callable[[], None] | None = None
) -> CausalLM | Encoder:
    """The model of these weights; `then` takes what it leaves."""
    module, name = model_class(config.architecture)
    build = cast(
        Callable[[ModelConfig, Weights], CausalLM | Encoder], getattr(importlib.import_module(module), name)
    )
    with torch.inference_mode():
        try:
            weights.expect_layers(config.num_layers)
            model = build(config, weights)
            if then is not None:
                then()
            weights.finish(config.tie_word_embeddings)
        finally:
            weights.close()
    return model
