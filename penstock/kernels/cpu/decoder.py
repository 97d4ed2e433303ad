"""All decoder layers of a step in one call: csrc/decoder.cpp, for models that are wired like Llama.

A step of 28 layers is otherwise some 300 calls and as many wakings of threads: 5 ms, of 35 for one token.
The results are those of the single calls, to the last bit.

Knows weights and attention plans. Knows nothing of models.
"""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Sequence
from ctypes import c_void_p

import numpy as np
import torch

from penstock.kernels.attention import AttentionStep
from penstock.kernels.operations import LayerCache, LayerWeights, Rotation, ascending

from .attention import CpuStep
from .binding import DecoderLayer, DecoderStep, Library, LinearArguments
from .linear import ALL_ROWS, PANEL
from .matrix import CpuMatrix
from .scratch import Scratch
from .tensors import IS_BF16

#: Fields of LayerWeights and of DecoderLayer.
_PRODUCTS = ("qkv", "out", "gate_up", "down")


def create_stack(
    library: Library, dtype: torch.dtype, layers: Sequence[LayerWeights], eps: float, scale: float
) -> DecoderStack | None:
    """The stack of these layers, or None: if not all of their weights lie in panels, or gate and up do not
    fill whole ones."""
    for layer in layers:
        for name in _PRODUCTS:
            weight, _ = getattr(layer, name)
            if not isinstance(weight, CpuMatrix) or weight.panels is None:
                return None
            if name == "gate_up" and weight.panels.columns % (2 * PANEL):
                return None
    return DecoderStack(library, dtype, layers, eps, scale)


class DecoderStack:
    """The layers of one model, behind the seam Stack: see create_stack."""

    def __init__(
        self, library: Library, dtype: torch.dtype, layers: Sequence[LayerWeights], eps: float, scale: float
    ) -> None:
        """eps: of all norms. scale: of attention scores."""
        self._library = library
        self._layers = layers
        self._eps, self._scale = eps, scale
        self._windows = {layer.window for layer in layers}
        self._buffers: dict[str, Scratch] = defaultdict(Scratch)
        self._array = (DecoderLayer * len(layers))()
        self._products: list[LinearArguments] = []  # what the array points to
        self._most_rows = ALL_ROWS
        for to, layer in zip(self._array, layers, strict=True):
            to.attention_norm, to.mlp_norm = layer.attention_norm.data_ptr(), layer.mlp_norm.data_ptr()
            to.head_norm = None if layer.head_norm is None else layer.head_norm.data_ptr()
            for name in _PRODUCTS:
                weight, bias = getattr(layer, name)
                product = LinearArguments.from_buffer_copy(weight.panels.arguments)
                product.bias = None if bias is None else bias.data_ptr()
                product.is_bf16 = IS_BF16[dtype]
                product.gated = name == "gate_up"
                self._products.append(product)
                setattr(to, name, ctypes.pointer(product))
                self._most_rows = min(self._most_rows, weight.panels.most_rows)
        self._kinds = {product.kind for product in self._products}
        self._deepest = max(product.depth for product in self._products)

    def run(
        self,
        x: torch.Tensor,
        rotation: Rotation,
        step: AttentionStep,
        caches: Sequence[LayerCache],
        wanted: Sequence[int] | None = None,
    ) -> torch.Tensor | None:
        """See Stack. None for other attention kernels, and for batches that oneDNN multiplies faster."""
        if not isinstance(step, CpuStep) or not x.is_contiguous() or x.shape[0] > self._most_rows:
            return None
        rows, hidden = x.shape
        chosen = np.arange(rows, dtype=np.int32) if wanted is None else ascending(wanted, rows)
        cos, sin = rotation
        first = self._products[:4]
        qkv, _, gate_up, _ = (product.columns for product in first)
        attended = first[1].depth
        kv_heads, dim = caches[0][0].shape[1], caches[0][0].shape[3]
        heads = attended // (kv_heads * dim)
        step.check_rows(rows)
        plans = step.arguments(heads, self._windows, self._scale)
        attention = (c_void_p * len(self._layers))(
            *(ctypes.addressof(plans[layer.window]) for layer in self._layers)
        )
        scratch = max(
            self._library.linear_scratch(kind, rows, self._deepest, step.threads) for kind in self._kinds
        )
        addresses = self._addresses(step, caches)
        call = DecoderStep(
            x=x.data_ptr(),
            normed=self._buffer("normed", rows * hidden, x.dtype),
            heads=self._buffer("heads", rows * qkv, x.dtype),
            attended=self._buffer("attended", rows * attended, x.dtype),
            active=self._buffer("active", rows * gate_up // 2, x.dtype),
            wanted=chosen.ctypes.data,
            scratch=self._buffer("scratch", scratch, torch.uint8),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            layers=ctypes.addressof(self._array),
            attention=ctypes.addressof(attention),
            caches=ctypes.addressof(addresses),
            num_layers=len(self._layers),
            rows=rows,
            num_wanted=len(chosen),
            hidden=hidden,
            rotary=cos.shape[-1],
            is_bf16=x.dtype == torch.bfloat16,
            threads=step.threads,
            eps=self._eps,
        )
        self._library.decoder(call)
        return x[: len(chosen)]

    def _addresses(self, step: CpuStep, caches: Sequence[LayerCache]) -> ctypes.Array[c_void_p]:
        """Of keys and values of each layer."""
        if len(caches) != len(self._layers):
            raise ValueError(f"caches of {len(caches)} layers for a model of {len(self._layers)}")
        step.check_caches(*caches[0])  # all caches of a model are alike
        addresses = [tensor.data_ptr() for layer in caches for tensor in layer]
        return (c_void_p * len(addresses))(*addresses)

    def _buffer(self, name: str, count: int, dtype: torch.dtype) -> int:
        """Address of memory for so many elements."""
        return self._buffers[name].address(count * dtype.itemsize)
