"""Which way a model's weights are loaded: to generate, or to pool."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from penstock.core.errors import ModelLoadError
from penstock.kernels.operations import Operations
from penstock.model.bert import Encoder
from penstock.model.causal_lm import CausalLM
from penstock.model.loader import load_model, load_pooling_model
from penstock.model.model_config import ModelConfig
from penstock.model.pooler import Pooler
from penstock.model.pooling import PoolingPlan
from penstock.text.tokenizer import Tokenizer

from .config import EngineConfig


def load_any(
    config: EngineConfig,
    path: Path,
    model: ModelConfig,
    pooling: PoolingPlan | None,
    operations: Operations,
    scheme: str | None,
    progress: Callable[[int, int], None] | None,
) -> tuple[CausalLM | Encoder, Pooler | None]:
    """The model, and what pools its hidden states, if that is what it is for. Raises ModelLoadError."""
    options: dict[str, Any] = {
        "load_format": config.load_format,
        "quantization": scheme,
        "progress": progress,
    }
    if pooling is None:
        return load_model(path, model, operations, **options), None
    ids = token_ids(pooling.tokens, path)
    return load_pooling_model(path, model, operations, pooling, token_ids=ids, **options)


def token_ids(tokens: Sequence[str | int], path: Path) -> list[int]:
    """Of tokens, some of which are named, by the model's tokenizer. Raises ModelLoadError."""
    if not any(isinstance(token, str) for token in tokens):
        return [int(token) for token in tokens]
    tokenizer = Tokenizer.from_directory(path)
    ids: list[int] = []
    for token in tokens:
        id = tokenizer.token_id(token) if isinstance(token, str) else token
        if id is None:
            raise ModelLoadError(
                f"{path}: classifier_from_token names {token!r}, which the tokenizer does not have."
            )
        ids.append(id)
    return ids
