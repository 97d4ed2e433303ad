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
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from penstock.kernels.linear import Matrix

from .attention import CpuStep
from .library import DecoderLayer, DecoderStep, Library, LinearArguments, loaded
from .linear import PANEL
from .scratch import Scratch

#: A weight [out, in] and a bias [out].
Product = tuple[Matrix, torch.Tensor | None]
LayerCache = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer: norm, attention, +, norm, down(silu(gate) · up), +."""

    attention_norm: torch.Tensor
    """[hidden]"""
    qkv: Product
    """Output: [q heads | k heads | v heads]."""
    head_norm: torch.Tensor | None
    """[q heads + k heads, head_dim], of an RMS norm before the rotation."""
    out: Product
    mlp_norm: torch.Tensor
    gate_up: Product
    """Output: [gate | up]."""
    down: Product
    window: int | None
    """Of sliding attention."""


def ascending(wanted: Sequence[int], rows: int) -> npt.NDArray[np.int32]:
    """These rows of so many. Raises ValueError unless they are ascending."""
    chosen = np.array(wanted, np.int32)
    if len(chosen) and (chosen[0] < 0 or chosen[-1] >= rows or (np.diff(chosen) <= 0).any()):
        raise ValueError(f"rows {list(wanted)} of {rows}; need ascending ones")
    return chosen


class DecoderStack:
    """The layers of one model. Steps run one after the other."""

    def __init__(self, layers: Sequence[LayerWeights], eps: float, scale: float) -> None:
        """eps: of all norms. scale: of attention scores."""
        self._layers = layers
        self._eps, self._scale = eps, scale
        self._windows = {layer.window for layer in layers}
        self._buffers: dict[str, Scratch] = defaultdict(Scratch)
        self._array: ctypes.Array[DecoderLayer] | None = None
        self._deepest = 0
        self._products: list[LinearArguments] = []  # what the array points to
        self._most_rows = 0

    def run(
        self,
        x: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        step: object,
        caches: Sequence[LayerCache],
        wanted: Sequence[int] | None = None,
    ) -> torch.Tensor | None:
        """Take x [T, hidden] through all layers, in its memory.

        wanted: rows, ascending; all by default. Returns theirs, [R, hidden]. Raises ValueError for others.

        None: nothing was done, single calls must do it. That is so on other devices, without the library,
        with other attention kernels, for batches that oneDNN multiplies faster, and if gate and up do not
        fill whole panels.
        """
        library = loaded()
        if library is None or not isinstance(step, CpuStep) or not x.is_contiguous():
            return None
        if self._array is None:
            self._prepare(x.dtype)
        if x.shape[0] > self._most_rows:
            return None
        return self._run(library, x, rotation, step, caches, wanted)

    def _prepare(self, dtype: torch.dtype) -> None:
        """Point to the weights, once. Without panels for all of them, no batch is small enough."""
        self._array = array = (DecoderLayer * len(self._layers))()
        limits = []
        for to, layer in zip(array, self._layers, strict=True):
            to.attention_norm, to.mlp_norm = layer.attention_norm.data_ptr(), layer.mlp_norm.data_ptr()
            to.head_norm = None if layer.head_norm is None else layer.head_norm.data_ptr()
            for name in ("qkv", "out", "gate_up", "down"):
                weight, bias = getattr(layer, name)
                panels = weight.panels(dtype)
                if panels is None or (name == "gate_up" and panels.columns % (2 * PANEL)):
                    return
                limits.append(panels.most_rows)
                product = LinearArguments.from_buffer_copy(panels.arguments)
                product.bias = None if bias is None else bias.data_ptr()
                product.is_bf16 = int(dtype == torch.bfloat16)
                product.gated = name == "gate_up"
                self._products.append(product)
                setattr(to, name, ctypes.pointer(product))
                self._deepest = max(self._deepest, product.depth)
        self._most_rows = min(limits)

    def _run(
        self,
        library: Library,
        x: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        step: CpuStep,
        caches: Sequence[LayerCache],
        wanted: Sequence[int] | None,
    ) -> torch.Tensor:
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
        scratch = library.linear_scratch(first[0].kind, rows, self._deepest, step.threads)
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
            layers=None if self._array is None else ctypes.addressof(self._array),
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
        library.decoder(call)
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
