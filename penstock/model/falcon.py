"""Falcon with rotary embeddings: 7B (one KV head), 40B and 180B (KV heads in groups).

Attention and MLP run in parallel, behind two norms or one, or in series:

    parallel:  x ─┬─ norm ─ attention ─(+)─(+)─      serial:  x ─┬─ norm ─ attention ─(+)─┬─ norm ─ MLP ─(+)─
                  ├─ norm ─ MLP ────────┘   │                    └─────────────────────┘  └──────────────┘
                  └─────────────────────────┘
"""

from __future__ import annotations

import torch

from penstock.core.errors import ModelLoadError
from penstock.kernels.operations import LayerCache

from .causal_lm import CausalLM, Layer
from .layers import MLP, Attention, LayerNorm, Step, activation
from .model_config import ModelConfig
from .weights import Weights, ungroup_qkv


class FalconLayer:
    """Attention and MLP, in parallel or in series."""

    def __init__(self, config: ModelConfig, weights: Weights, number: int) -> None:
        prefix, hidden = f"transformer.h.{number}", config.hidden_size
        bias, middle = config.mlp_bias, config.intermediate_size
        qkv = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self._parallel, names = _norms(config)
        norms = [weights.layer_norm(f"{prefix}.{name}", hidden, config.norm_eps) for name in names]
        self._attention_norm: LayerNorm = norms[0]
        self._mlp_norm: LayerNorm | None = norms[1] if len(norms) == 2 else None
        self._attention = Attention(
            weights.operations,
            config,
            number,
            weights.linear(
                f"{prefix}.self_attention.query_key_value", hidden, qkv, bias, order=ungroup_qkv(config)
            ),
            weights.linear(f"{prefix}.self_attention.dense", hidden, hidden, bias),
        )
        self._mlp = MLP(
            weights.operations,
            weights.linear(f"{prefix}.mlp.dense_h_to_4h", hidden, middle, bias),
            weights.linear(f"{prefix}.mlp.dense_4h_to_h", middle, hidden, bias),
            activation(config),
        )

    def __call__(self, x: torch.Tensor, step: Step, cache: LayerCache) -> torch.Tensor:
        """See Layer."""
        normed = self._attention_norm(x)
        attended = step.seen("the attention", self._attention(normed, step, cache))
        if not self._parallel:
            x = attended.add_(x)
        if self._mlp_norm is not None:
            normed = self._mlp_norm(x)
        out = step.seen("the mlp", self._mlp(normed))
        return (out.add_(attended) if self._parallel else out).add_(x)


def _norms(config: ModelConfig) -> tuple[bool, tuple[str, ...]]:
    """(whether attention and MLP run in parallel, names of the norms before them)."""
    raw = config.raw
    if not raw.get("new_decoder_architecture"):
        if raw.get("parallel_attn", True):
            return True, ("input_layernorm",)
        return False, ("input_layernorm", "post_attention_layernorm")
    count = raw.get("num_ln_in_parallel_attn")
    if count not in (None, 1, 2):
        raise ModelLoadError(f"{config.path}: num_ln_in_parallel_attn={count!r}: must be 1 or 2.")
    return True, ("input_layernorm",) if count == 1 else ("ln_attn", "ln_mlp")


class FalconForCausalLM(CausalLM):
    """Falcon."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        hidden, vocab = config.hidden_size, config.vocab_size
        embedding = weights.embedding("transformer.word_embeddings", vocab, hidden)
        layers: list[Layer] = [*weights.layers(config.num_layers, lambda i: FalconLayer(config, weights, i))]
        norm = weights.layer_norm("transformer.ln_f", hidden, config.norm_eps)
        if config.tie_word_embeddings:
            head = weights.tied_head(embedding)
        else:
            head = weights.head("lm_head", hidden, vocab)
        super().__init__(config, weights, embedding=embedding, layers=layers, norm=norm, head=head)
