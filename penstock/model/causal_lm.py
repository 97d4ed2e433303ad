"""What every architecture has in common: embedding, a stack of layers, a norm, and an output layer.

Knows tensors and the table of operations; knows nothing of devices, requests, sampling or scheduling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from penstock.kernels.attention import AttentionStep, KVCache, KVCacheSpec
from penstock.kernels.operations import LayerCache, Stack, ascending
from penstock.kernels.transfer import on_device

from .layers import Embedding, LayerNorm, Linear, RMSNorm, Rotary, Step
from .model_config import ModelConfig
from .watch import NonFinite, Watch
from .weights import Weights


class Layer(Protocol):
    """One decoder layer."""

    def __call__(self, x: torch.Tensor, step: Step, cache: LayerCache) -> torch.Tensor:
        """[T, hidden] → [T, hidden]; writes the tokens' keys and values to the layer's cache.

        Shows the step what comes out of "the attention" and of "the mlp", before anything is added to it.
        """
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
        head: Linear | None,
        stack: Stack | None = None,
    ) -> None:
        """head: None for a model that pools. stack: the same layers, where the device computes all of them in
        one call."""
        self.config = config
        self.operations = weights.operations
        self.dtype = weights.operations.dtype
        self.device = weights.operations.device
        self.num_parameters = weights.parameters
        """Elements of the checkpoint's tensors, a tied output layer counted once."""
        self.weight_bytes = weights.nbytes
        """Bytes that the weights take in memory, in their packed form and with copies."""
        shared = head is not None and config.tie_word_embeddings and not head.copied
        self.read_bytes = weights.nbytes - (0 if shared else embedding.nbytes)
        """Bytes of them that a step reads: of the embedding only the rows of its tokens."""
        self._embedding = embedding
        self._layers = layers
        self._stack = stack
        self._norm = norm
        self._head = head
        self._rotary = Rotary(config, self.device)

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
        watch: Watch | None = None,
    ) -> torch.Tensor:
        """Hidden states after the final norm.

        Args:
            token_ids: int64 [T], the step's flattened batch.
            positions: int64 [T].
            attention: prepared for this step's layout, from a backend made for this cache.
            kv_cache: read and written, for all rows.
            wanted: rows whose hidden states are needed, ascending; all by default.
            watch: is shown what every part computes; the layers then run one by one.

        Returns:
            [R, hidden] in the model's dtype, of the rows wanted.

        Raises:
            ValueError: rows that are not there, or not in ascending order.
        """
        step = Step(self._rotary(positions, self.dtype), attention, watch)
        x = step.seen("the embedding", self._embedding(token_ids))
        if self._stack is not None and watch is None:
            done = self._stack.run(x, step.rotation, attention, kv_cache.layers, wanted)
            if done is not None:
                return self._norm(done)
        for number, (layer, cache) in enumerate(zip(self._layers, kv_cache.layers, strict=True)):
            step.layer = number
            x = step.seen("the sum", layer(x, step, cache))
        step.layer = None
        if wanted is not None:
            rows = ascending(wanted, len(x))
            if len(rows) < len(x):
                x = x.index_select(0, on_device(rows, x.device))
        return step.seen("the final norm", self._norm(x))

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, hidden] → [R, vocab_size] in the model's dtype. Give it only the rows that are sampled.

        Raises ValueError for a model without an output layer.
        """
        if self._head is None:
            raise ValueError("the model pools: it has no output layer")
        return self._head(hidden)

    @torch.inference_mode()
    def find_non_finite(
        self, token_ids: torch.Tensor, positions: torch.Tensor, attention: AttentionStep, kv_cache: KVCache
    ) -> NonFinite | None:
        """Compute a step, and the logits of its last row; the first part, in the order of computation, whose
        output has NaN or infinite numbers, or None if there is none."""
        watch = Watch()
        hidden = self.forward(token_ids, positions, attention, kv_cache, watch=watch)
        last = hidden.shape[0] - 1
        if self._head is not None:
            watch.look("the output layer", self.logits(hidden[last:]), first_row=last)
        return watch.found
