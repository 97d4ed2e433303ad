"""Phi-1, 1.5 and 2: partial rotation, biases everywhere.

Attention and MLP run in parallel, behind one norm:

    x ─┬─ norm ─┬─ attention ─(+)─(+)─
       │        └─ MLP ────────┘   │
       └───────────────────────────┘
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from penstock.kernels.operations import LayerCache

from .causal_lm import CausalLM, Layer
from .layers import MLP, Attention, Step, activation
from .model_config import ModelConfig
from .weights import Weights


class PhiLayer:
    """Parallel attention and MLP."""

    def __init__(self, config: ModelConfig, weights: Weights, number: int) -> None:
        prefix, hidden = f"model.layers.{number}", config.hidden_size
        q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        attention = f"{prefix}.self_attn"
        self._norm = weights.layer_norm(f"{prefix}.input_layernorm", hidden, config.norm_eps)
        self._attention = Attention(
            weights.operations,
            config,
            number,
            weights.linear(
                [f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj"],
                hidden,
                [q, kv, kv],
                bias=True,
            ),
            weights.linear(f"{attention}.dense", q, hidden, bias=True),
            norm=_head_norm(config, weights, attention) if config.raw.get("qk_layernorm") else None,
        )
        self._mlp = MLP(
            weights.operations,
            weights.linear(f"{prefix}.mlp.fc1", hidden, config.intermediate_size, bias=True),
            weights.linear(f"{prefix}.mlp.fc2", config.intermediate_size, hidden, bias=True),
            activation(config),
        )

    def __call__(self, x: torch.Tensor, step: Step, cache: LayerCache) -> torch.Tensor:
        """See Layer."""
        normed = self._norm(x)
        attended = step.seen("the attention", self._attention(normed, step, cache))
        return attended.add_(step.seen("the mlp", self._mlp(normed))).add_(x)


def _head_norm(
    config: ModelConfig, weights: Weights, attention: str
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Layer norm of each head, with one weight for queries and one for keys."""
    dim, eps = config.head_dim, config.norm_eps
    q = weights.layer_norm(f"{attention}.q_layernorm", dim, eps)
    k = weights.layer_norm(f"{attention}.k_layernorm", dim, eps)
    heads = config.num_heads
    return lambda qk: torch.cat((q(qk[:, :heads]), k(qk[:, heads:])), dim=1)


class PhiForCausalLM(CausalLM):
    """Phi."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        hidden, vocab = config.hidden_size, config.vocab_size
        embedding = weights.embedding("model.embed_tokens", vocab, hidden)
        layers: list[Layer] = [*weights.layers(config.num_layers, lambda i: PhiLayer(config, weights, i))]
        norm = weights.layer_norm("model.final_layernorm", hidden, config.norm_eps)
        if config.tie_word_embeddings:
            head = weights.tied_head(embedding, bias="lm_head.bias")
        else:
            head = weights.head("lm_head", hidden, vocab, bias=True)
        super().__init__(config, weights, embedding=embedding, layers=layers, norm=norm, head=head)
