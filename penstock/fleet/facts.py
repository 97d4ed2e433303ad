"""What a model is made of: every weight by shape, and what one token leaves in the KV cache.

    config.json ─▶ architectures/ ───▶ ModelFacts ─┬─ parameters, bytes in any format, bytes of one rank
                                                   ├─ bytes of KV cache for a token, and for a sequence
                                                   └─ FLOP of a token

Pure data and arithmetic. It knows neither devices nor engines.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Split = Literal["ranks", "kv_heads", "whole"]
"""What tensor parallelism does with it: divides it by the ranks (heads, the MLP's middle, also of experts,
the vocabulary); by the KV heads, of which each rank keeps at least one; or nothing, every rank keeps all of
it."""


@dataclass(frozen=True, slots=True)
class Weight:
    """Tensors of one kind and shape."""

    name: str
    rows: int
    """Outputs; the size of a vector."""
    columns: int = 1
    """Inputs; 1 for a vector."""
    copies: int = 1
    """Over all layers and experts."""
    split: Split = "whole"
    used: float = 1.0
    """Share of the copies that one token goes through: chosen experts over all of them."""
    quantized: bool = False
    """Whether quantisation changes it. Embeddings, heads, routers, norms and vision towers keep their
    type."""
    multiplied: bool = True
    """Whether a token of text is multiplied with it; embeddings are looked up, vision towers see images."""

    @property
    def parameters(self) -> int:
        return self.rows * self.columns * self.copies


@dataclass(frozen=True, slots=True)
class KvLayers:
    """Layers that keep the same of a token."""

    layers: int
    heads: int
    """KV heads; 1 for a latent that all heads share."""
    elements: int
    """Numbers of one token, head and layer: key and value, or the latent."""
    window: int | None = None
    """Tokens that a layer with sliding window attention looks back; None is all of them."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """How weights are stored that quantisation changes.

    Bytes of a matrix: rows x columns x bits / 8, and for each group of `group` inputs (0: one for each
    output; -1: one for the matrix) `extra` bytes for scales and zero points.
    """

    name: str
    bits: float
    group: int = -1
    extra: float = 0.0
    minimum_capability: float = 0.0
    """CUDA compute capability from which kernels multiply it."""
    source: str = ""

    def matrix_bytes(self, rows: int, columns: int) -> int:
        """Bytes of one matrix."""
        scales = rows * math.ceil(columns / self.group) if self.group > 0 else (1 if self.group else rows)
        return math.ceil(rows * columns * self.bits / 8 + scales * self.extra)


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("none", 16, source="as published"),
        Scheme("int8", 8, 0, 4, 7.5, "W8A8: a float32 scale for each output"),
        Scheme("fp8", 8, 0, 4, 8.0, "W8A8 with units of its own from 8.9 on; expanded to 16 bits before"),
        Scheme("fp8-block", 8 + 32 / 128**2, -1, 0, 8.9, "DeepSeek's: a float32 scale for each 128 x 128"),
        Scheme("awq", 4, 128, 2.5, 7.5, "4 bits; a 16-bit scale and a 4-bit zero for 128 inputs"),
        Scheme("gptq", 4, 128, 2.5, 6.0, "4 bits; a 16-bit scale and a 4-bit zero for 128 inputs"),
        Scheme("mxfp4", 4, 32, 1, 8.0, "4 bits; an 8-bit exponent for 32 inputs"),
        Scheme("nvfp4", 4, 16, 1, 10.0, "4 bits; an 8-bit scale for 16 inputs"),
    )
}
"""Scheme → how it stores a matrix. int4 is AWQ's layout."""
ALIASES = {
    "int4": "awq",
    "w8a8": "int8",
    "fp16": "none",
    "bf16": "none",
    "bfloat16": "none",
    "float16": "none",
    "fp4": "nvfp4",
}


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """One model. Field names are ModelConfig's where both have them (model/config.py)."""

    name: str
    architecture: str
    kind: Literal["text", "vision-language", "embedding"]
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    context_length: int
    weights: tuple[Weight, ...]
    kv: tuple[KvLayers, ...]
    """Empty for encoders, which keep nothing."""
    attention_width: int
    """Numbers that each (query, key) pair of a layer costs a multiplication: heads x (key + value) / 2."""
    native: str = "none"
    """Scheme that the checkpoint itself has."""
    experts: int = 1
    experts_used: int = 1

    @property
    def parameters(self) -> int:
        """All of them, as transformers counts: tied embeddings once."""
        return sum(weight.parameters for weight in self.weights)

    @property
    def active_parameters(self) -> int:
        """Those that one token of text is multiplied with."""
        return round(sum(weight.parameters * weight.used for weight in self.weights if weight.multiplied))

    def weight_bytes(self, scheme: Scheme, *, tp: int = 1, width: int = 2) -> int:
        """Bytes on one rank of `tp`.

        Args:
            width: bytes of what the scheme leaves alone.
        """
        return sum(self.bytes_of(weight, scheme, tp, width) for weight in self.weights)

    def kv_bytes_per_token(self, width: int = 2, tp: int = 1) -> int:
        """Bytes on one rank of `tp` that a token takes, in all layers. A rank has at least one head."""
        return sum(group.layers * _heads(group, tp) * group.elements * width for group in self.kv)

    def sequence_bytes(self, tokens: int, width: int = 2, tp: int = 1, *, windowed: bool = True) -> int:
        """Bytes on one rank of a sequence of that length.

        Args:
            windowed: whether the engine frees what has left a layer's window (vLLM does, Penstock does not).
        """
        total = 0
        for group in self.kv:
            kept = min(tokens, group.window) if windowed and group.window is not None else tokens
            total += kept * group.layers * _heads(group, tp) * group.elements * width
        return total

    def attention_flops(self, keys: float) -> float:
        """FLOP of one query over so many keys, in all layers: a multiplication and an addition for each of
        the key's numbers, and the value's. Windows are honoured."""
        total = 0.0
        for layers, window in self._spans():
            total += 4.0 * layers * self.attention_width * (min(keys, window) if window else keys)
        return total

    def _spans(self) -> Iterator[tuple[int, int | None]]:
        if not self.kv:
            yield self.num_layers, None
        for group in self.kv:
            yield group.layers, group.window

    def bytes_of(self, weight: Weight, scheme: Scheme, tp: int, width: int) -> int:
        """Bytes of all copies on one rank. Which of its two dimensions is divided makes no difference."""
        ranks = {"ranks": tp, "kv_heads": min(tp, self.num_kv_heads), "whole": 1}[weight.split]
        rows = math.ceil(weight.rows / ranks)
        one = rows * weight.columns * width
        if weight.quantized and scheme.name != "none":
            one = scheme.matrix_bytes(rows, weight.columns)
        return one * weight.copies

    def tp_problem(self, tp: int) -> str | None:
        """Why the model cannot be divided into so many ranks; None if it can."""
        if self.num_heads % tp:
            return f"{self.num_heads} attention heads do not divide by {tp}"
        if self.num_kv_heads % tp and tp % self.num_kv_heads:
            return f"{self.num_kv_heads} KV heads neither divide by {tp} nor divide it"
        return None


def _heads(group: KvLayers, tp: int) -> int:
    return max(1, group.heads // tp)
