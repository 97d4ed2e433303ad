"""Qwen3: Llama's wiring with an RMS norm on each query and key head before the rotation."""

from __future__ import annotations

import torch

from .llama import LlamaForCausalLM, LlamaLayer
from .model_config import ModelConfig
from .weights import Weights


class Qwen3Layer(LlamaLayer):
    """A Llama layer with q/k norms."""

    def _head_norm(self, config: ModelConfig, weights: Weights, attention: str) -> torch.Tensor:
        q = weights.tensor(f"{attention}.q_norm.weight", config.head_dim)
        k = weights.tensor(f"{attention}.k_norm.weight", config.head_dim)
        return torch.cat((q.expand(config.num_heads, -1), k.expand(config.num_kv_heads, -1)))


class Qwen3ForCausalLM(LlamaForCausalLM):
    """Qwen3."""

    layer_class = Qwen3Layer
