"""What every architecture has in common: embedding, a stack of layers, a norm, and an output layer.

Knows tensors and the attention seam; knows nothing of requests, sampling or scheduling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from penstock.kernels.attention import AttentionStep, KVCache, KVCacheSpec
from penstock.kernels.cpu.decoder import DecoderStack, ascending

from .config import ModelConfig
from .layers import Embedding, LayerCache, LayerNorm, Linear, RMSNorm, Rotary, Rotation
from .watch import NonFinite, Watch
from .weights import Weights


class Layer(Protocol):
    """One decoder layer."""

    def __call__(
        self, x: torch.Tensor, rotation: Rotation, attention: AttentionStep, cache: LayerCache
    ) -> torch.Tensor:
        """[T, hidden] → [T, hidden]; writes the tokens' keys and values to the layer's cache."""
        ...


class CausalLM:
    """A decoder-only language model, ready to run. Built by penstock.model.loader.load_model."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        *,
        embedding: Embedding,
        layers: list[Layer],
        norm: RMSNorm | LayerNorm,
        head: Linear,
        stack: DecoderStack | None = None,
    ) -> None:
        """stack: the same layers, for devices that compute all of them in one call."""
        self.config = config
        self.dtype = weights.dtype
        self.device = weights.device
        self.num_parameters = weights.parameters
        """Elements of the checkpoint's tensors, a tied output layer counted once."""
        self.weight_bytes = weights.nbytes
        """Bytes that the weights take in memory, in their packed form and with copies."""
        shared = config.tie_word_embeddings and not head.copied
        self.read_bytes = weights.nbytes - (0 if shared else embedding.nbytes)
        """Bytes of them that a step reads: of the embedding only the rows of its tokens."""
        self._embedding = embedding
        self._layers = layers
        self._stack = stack
        self._norm = norm
        self._head = head
        self._rotary = Rotary(config, weights.device)

    def cache_spec(self, block_size: int) -> KVCacheSpec:
        """Shape of the KV cache that forward wants."""
        config = self.config
        return KVCacheSpec(config.num_layers, config.num_kv_heads, config.head_dim, block_size, self.dtype)

    @torch.inference_mode()
    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        attention: AttentionStep,
        kv_cache: KVCache,
        wanted: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Hidden states after the final norm.

        Args:
            token_ids: int64 [T], the step's flattened batch.
            positions: int64 [T].
            attention: prepared for this step's layout, from a backend made for this cache.
            kv_cache: read and written, for all rows.
            wanted: rows whose hidden states are needed, ascending; all by default.

        Returns:
            [R, hidden] in the model's dtype, of the rows wanted.

        Raises:
            ValueError: rows that are not there, or not in ascending order.
        """
        x = self._embedding(token_ids)
        rotation = self._rotary(positions, x.dtype)
        if self._stack is not None:
            done = self._stack.run(x, rotation, attention, kv_cache.layers, wanted)
            if done is not None:
                return self._norm(done)
        for layer, cache in zip(self._layers, kv_cache.layers, strict=True):
            x = layer(x, rotation, attention, cache)
        if wanted is not None:
            rows = ascending(wanted, len(x))
            if len(rows) < len(x):
                x = x.index_select(0, torch.from_numpy(rows).to(x.device))
        return self._norm(x)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, hidden] → [R, vocab_size] in the model's dtype. Give it only the rows that are sampled."""
        return self._head(hidden)

    @torch.inference_mode()
    def find_non_finite(
        self, token_ids: torch.Tensor, positions: torch.Tensor, attention: AttentionStep, kv_cache: KVCache
    ) -> NonFinite | None:
        """Compute a step as forward does, and the logits of its last row; the first part, in the order of
        computation, whose output has NaN or infinite numbers, or None if there is none.

        A norm belongs to the part that it feeds. "The sum of layer 7" is one whose parts are finite and whose
        output is not: the residual stream has overflowed.
        """
        watch = Watch()
        x = self._embedding(token_ids)
        watch.look("the embedding", x)
        rotation = self._rotary(positions, x.dtype)
        for number, (layer, cache) in enumerate(zip(self._layers, kv_cache.layers, strict=True)):
            with watch.inside(layer, number):
                x = layer(x, rotation, attention, cache)
            watch.look(f"the sum of layer {number}", x, number)
        x = self._norm(x)
        watch.look("the final norm", x)
        last = x.shape[0] - 1
        watch.look("the output layer", self.logits(x[last:]), first_row=last)
        return watch.found
