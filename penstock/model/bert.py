"""BERT, RoBERTa and XLM-RoBERTa: encoders with learnt positions and norms behind the residuals.

    word + position + type ─ norm ─▶ x ─┬─ attention ─(+)─ norm ─┬─ MLP ─(+)─ norm ─▶
                                        └───────────────┘        └────────┘

Every position sees all others of its prompt, so prompts are computed whole, and their keys and values are
forgotten with the layer: one layer's cache serves all of them.
"""

from __future__ import annotations

import torch

from penstock.kernels.attention import AttentionStep, KVCache, KVCacheSpec
from penstock.kernels.operations import LayerCache

from .layers import MLP, LayerNorm, activation
from .model_config import ModelConfig
from .weights import Weights


class EncoderLayer:
    """Attention, then an MLP; norms stand behind the residuals."""

    def __init__(self, config: ModelConfig, weights: Weights, number: int) -> None:
        prefix, hidden, middle = f"encoder.layer.{number}", config.hidden_size, config.intermediate_size
        own, eps = f"{prefix}.attention.self", config.norm_eps
        self._heads, self._dim = config.num_heads, config.head_dim
        self._qkv = weights.linear(
            [f"{own}.query", f"{own}.key", f"{own}.value"], hidden, [hidden, hidden, hidden], bias=True
        )
        self._out = weights.linear(f"{prefix}.attention.output.dense", hidden, hidden, bias=True)
        self._attention_norm = weights.layer_norm(f"{prefix}.attention.output.LayerNorm", hidden, eps)
        self._mlp = MLP(
            weights.operations,
            weights.linear(f"{prefix}.intermediate.dense", hidden, middle, bias=True),
            weights.linear(f"{prefix}.output.dense", middle, hidden, bias=True),
            activation(config),
        )
        self._norm = weights.layer_norm(f"{prefix}.output.LayerNorm", hidden, eps)

    def __call__(self, x: torch.Tensor, attention: AttentionStep, cache: LayerCache) -> torch.Tensor:
        """[T, hidden] → [T, hidden]."""
        heads = self._qkv(x).view(x.shape[0], 3 * self._heads, self._dim)
        q, k, v = heads.chunk(3, dim=1)
        attended = attention(q, k, v, *cache, scale=self._dim**-0.5)
        x = self._attention_norm(self._out(attended.view(x.shape[0], -1)).add_(x))
        return self._norm(self._mlp(x).add_(x))


class Encoder:
    """Token ids to hidden states. Built by penstock.model.loader.load_encoder."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        hidden, types = config.hidden_size, config.raw.get("type_vocab_size")
        self.config = config
        self.operations = weights.operations
        self.dtype = weights.operations.dtype
        self.device = weights.operations.device
        self.types = types if isinstance(types, int) else 2
        """How many token types there are."""
        name = "embeddings"
        self._words = weights.embedding(f"{name}.word_embeddings", config.vocab_size, hidden)
        self._positions = weights.embedding(
            f"{name}.position_embeddings", config.max_position_embeddings, hidden
        )
        self._types = weights.tensor(f"{name}.token_type_embeddings.weight", self.types, hidden)
        self._norm: LayerNorm = weights.layer_norm(f"{name}.LayerNorm", hidden, config.norm_eps)
        self._layers = weights.layers(config.num_layers, lambda i: EncoderLayer(config, weights, i))
        self.num_parameters = weights.parameters
        self.weight_bytes = weights.nbytes
        self.read_bytes = weights.nbytes - self._words.nbytes - self._positions.nbytes
        """Bytes that a step reads: of embeddings only its rows."""

    def cache_spec(self, block_size: int) -> KVCacheSpec:
        """Shape of the cache of one layer."""
        config = self.config
        return KVCacheSpec(1, config.num_kv_heads, config.head_dim, block_size, self.dtype)

    @torch.inference_mode()
    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        attention: AttentionStep,
        cache: KVCache,
        types: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states of the last layer.

        Args:
            token_ids, positions: int64 [T], the step's flattened batch of whole prompts.
            attention: prepared for a layout of such prompts, in both directions.
            cache: of one layer, overwritten by each.
            types: int64 [T], token types; all 0 by default.

        Returns:
            [T, hidden] in the model's dtype.
        """
        x = self._words(token_ids) + self._positions(positions + self.config.position_offset)
        x += self._types[0] if types is None else self._types.index_select(0, types)
        x = self._norm(x)
        (own,) = cache.layers
        for layer in self._layers:
            x = layer(x, attention, own)
        return x
