"""GPT-NeoX and Pythia: partial rotation; q, k and v fused per head.

Attention and MLP run in parallel or in series:

    parallel:  x ─┬─ norm ─ attention ─(+)─(+)─      serial:  x ─┬─ norm ─ attention ─(+)─┬─ norm ─ MLP ─(+)─
                  ├─ norm ─ MLP ────────┘   │                    └─────────────────────┘  └──────────────┘
                  └─────────────────────────┘
"""

from __future__ import annotations

import torch

from penstock.kernels.operations import LayerCache

from .causal_lm import CausalLM, Layer
from .layers import MLP, Attention, Step, activation
from .model_config import ModelConfig
from .weights import Weights, ungroup_qkv


class GPTNeoXLayer:
    """Attention and MLP, each behind a layer norm of its own."""

    def __init__(self, config: ModelConfig, weights: Weights, number: int) -> None:
        prefix, hidden = f"gpt_neox.layers.{number}", config.hidden_size
        bias, eps = config.attention_bias, config.norm_eps
        self._parallel = config.raw.get("use_parallel_residual", True)
        self._attention_norm = weights.layer_norm(f"{prefix}.input_layernorm", hidden, eps)
        self._mlp_norm = weights.layer_norm(f"{prefix}.post_attention_layernorm", hidden, eps)
        self._attention = Attention(
            weights.operations,
            config,
            number,
            weights.linear(
                f"{prefix}.attention.query_key_value", hidden, 3 * hidden, bias, order=ungroup_qkv(config)
            ),
            weights.linear(f"{prefix}.attention.dense", hidden, hidden, bias),
        )
        self._mlp = MLP(
            weights.operations,
            weights.linear(f"{prefix}.mlp.dense_h_to_4h", hidden, config.intermediate_size, bias=True),
            weights.linear(f"{prefix}.mlp.dense_4h_to_h", config.intermediate_size, hidden, bias=True),
            activation(config),
        )

    def __call__(self, x: torch.Tensor, step: Step, cache: LayerCache) -> torch.Tensor:
        """See Layer."""
        attended = step.seen("the attention", self._attention(self._attention_norm(x), step, cache))
        if self._parallel:
            return step.seen("the mlp", self._mlp(self._mlp_norm(x))).add_(attended).add_(x)
        x = attended.add_(x)
        return step.seen("the mlp", self._mlp(self._mlp_norm(x))).add_(x)


class GPTNeoXForCausalLM(CausalLM):
    """GPT-NeoX."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        hidden, vocab = config.hidden_size, config.vocab_size
        embedding = weights.embedding("gpt_neox.embed_in", vocab, hidden)
        layers: list[Layer] = [*weights.layers(config.num_layers, lambda i: GPTNeoXLayer(config, weights, i))]
        norm = weights.layer_norm("gpt_neox.final_layer_norm", hidden, config.norm_eps)
        if config.tie_word_embeddings:
            head = weights.tied_head(embedding)
        else:
            head = weights.linear(_head_name(weights), hidden, vocab)
        super().__init__(config, weights, embedding=embedding, layers=layers, norm=norm, head=head)


def _head_name(weights: Weights) -> str:
    """The output layer was called embed_out until transformers 5."""
    return "embed_out" if weights.has("embed_out.weight") else "lm_head"
