"""Llama (2 and 3.x), Mistral and Qwen2: one wiring, told apart by the configuration.

    x ─┬─ norm ─ attention ─(+)─┬─ norm ─ gated MLP ─(+)─
       └─────────────────────┘  └─────────────────────┘

Mistral has a sliding window; Qwen2 has biases on q, k and v, and sliding windows in its upper layers.
"""

from __future__ import annotations

import torch

from penstock.kernels.operations import LayerCache, LayerWeights

from .causal_lm import CausalLM
from .layers import Attention, GatedMLP, Step, activation
from .model_config import ModelConfig
from .weights import Weights


class LlamaLayer:
    """Attention, then a gated MLP, each behind an RMS norm and beside a residual."""

    def __init__(self, config: ModelConfig, weights: Weights, number: int) -> None:
        prefix, hidden = f"model.layers.{number}", config.hidden_size
        q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        self._attention_norm = weights.rms_norm(f"{prefix}.input_layernorm", hidden, config.norm_eps)
        qkv = weights.linear(
            [f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj"],
            hidden,
            [q, kv, kv],
            config.attention_bias,
        )
        out = weights.linear(f"{attention}.o_proj", q, hidden, config.output_bias)
        head_norm = self._head_norm(config, weights, attention)
        self._attention = Attention(weights.operations, config, number, qkv, out, head_norm=head_norm)
        self._mlp_norm = weights.rms_norm(f"{prefix}.post_attention_layernorm", hidden, config.norm_eps)
        middle = config.intermediate_size
        gate_up = weights.linear(
            [f"{mlp}.gate_proj", f"{mlp}.up_proj"], hidden, [middle, middle], config.mlp_bias
        )
        down = weights.linear(f"{mlp}.down_proj", middle, hidden, config.mlp_bias)
        self._mlp = GatedMLP(weights.operations, gate_up, down, activation(config))
        self.weights = LayerWeights(
            attention_norm=self._attention_norm.weight,
            qkv=qkv.product,
            head_norm=head_norm,
            out=out.product,
            mlp_norm=self._mlp_norm.weight,
            gate_up=gate_up.product,
            down=down.product,
            window=config.windows[number],
        )

    def _head_norm(self, config: ModelConfig, weights: Weights, attention: str) -> torch.Tensor | None:
        """Weights [q heads + k heads, D] of an RMS norm of each head, where the architecture has one."""
        return None

    def __call__(self, x: torch.Tensor, step: Step, cache: LayerCache) -> torch.Tensor:
        """See Layer."""
        x = x + step.seen("the attention", self._attention(self._attention_norm(x), step, cache))
        return x.add_(step.seen("the mlp", self._mlp(self._mlp_norm(x))))


class LlamaForCausalLM(CausalLM):
    """Llama, Mistral, Qwen2."""

    layer_class: type[LlamaLayer] = LlamaLayer

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        embedding = weights.embedding("model.embed_tokens", config.vocab_size, config.hidden_size)
        layers = weights.layers(config.num_layers, lambda i: self.layer_class(config, weights, i))
        norm = weights.rms_norm("model.norm", config.hidden_size, config.norm_eps)
        if config.tie_word_embeddings:
            head = weights.tied_head(embedding)
        else:
            head = weights.head("lm_head", config.hidden_size, config.vocab_size)
        stack = None
        make = weights.operations.stack
        if make is not None and activation(config) == "silu":
            stack = make([layer.weights for layer in layers], config.norm_eps, config.head_dim**-0.5)
        super().__init__(
            config, weights, embedding=embedding, layers=[*layers], norm=norm, head=head, stack=stack
        )
