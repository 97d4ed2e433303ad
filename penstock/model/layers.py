"""The parts that architectures are wired from: plain tensors in small objects, no autograd, no modules.

Each part takes what it needs from the device's table of operations, once, when it is made. All activations
are [T, …], one row per token of the flattened batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from penstock.core.errors import ModelLoadError
from penstock.files import shown
from penstock.kernels.attention import AttentionStep
from penstock.kernels.operations import Activation, LayerCache, Operations, Product, Rotation

from .model_config import ModelConfig, RopeConfig
from .watch import Watch


@dataclass(slots=True)
class Step:
    """One pass through the model, as its layers see it."""

    rotation: Rotation
    """Of all tokens."""
    attention: AttentionStep
    watch: Watch | None = None
    layer: int | None = None
    """The number of the layer that computes now, if one does."""

    def seen(self, part: str, out: torch.Tensor) -> torch.Tensor:
        """`out`, after whoever watches this pass has looked at it. part: in words, without the layer."""
        if self.watch is not None:
            self.watch.look(part if self.layer is None else f"{part} of layer {self.layer}", out)
        return out


class Linear:
    """x Wᵀ + b."""

    def __init__(
        self,
        operations: Operations,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        scheme: str | None = None,
    ) -> None:
        """weight: [out, in], may be released after this call where `copied` says so. bias: [out].

        scheme: how to quantise the weight; see penstock.kernels.quantization.
        """
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self.matrix = operations.linear(weight, scheme)
        self.copied = self.matrix.copied
        self.nbytes = self.matrix.nbytes + (bias.nbytes if bias is not None else 0)

    @property
    def product(self) -> Product:
        """For whoever multiplies himself."""
        return self.matrix, self.bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, in] → [T, out]."""
        return self.matrix(x, self.bias)


class Embedding:
    """Rows of a table."""

    def __init__(self, operations: Operations, weight: torch.Tensor) -> None:
        self.weight = weight
        self.nbytes = weight.nbytes
        self._embed = operations.embed

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """int64 [T] → [T, hidden]."""
        return self._embed(token_ids, self.weight)


class RMSNorm:
    """x / rms(x) · w."""

    def __init__(self, operations: Operations, weight: torch.Tensor, eps: float) -> None:
        self.weight = weight
        self._eps = eps
        self._norm = operations.rms_norm

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, ..., D] → the same shape."""
        return self._norm(x, self.weight, self._eps)


class LayerNorm:
    """(x - mean) / std · w + b."""

    def __init__(self, operations: Operations, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> None:
        self._weight = weight
        self._bias = bias
        self._eps = eps
        self._norm = operations.layer_norm

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, ..., D] → the same shape."""
        return self._norm(x, self._weight, self._bias, self._eps)


class Rotary:
    """Rotary position embedding (arXiv 2104.09864), in the half-split layout of all supported checkpoints."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self._frequencies, self._factor = rotary_frequencies(
            config.rope, config.rotary_dim, config.max_position_embeddings
        )
        self._frequencies = self._frequencies.to(device)

    def __call__(self, positions: torch.Tensor, dtype: torch.dtype) -> Rotation:
        """The rotation of tokens at int64 positions [T], for all layers of a step.

        Angles are computed in float32, for these positions only: no table, so no memory per context length.
        """
        angles = positions[:, None].float() * self._frequencies
        cos, sin = angles.cos().mul_(self._factor), angles.sin().mul_(self._factor)
        return (
            torch.cat((cos, cos), -1).to(dtype).unsqueeze(1),
            torch.cat((-sin, sin), -1).to(dtype).unsqueeze(1),
        )


def rotary_frequencies(rope: RopeConfig, dim: int, max_positions: int) -> tuple[torch.Tensor, float]:
    """Angle per position of each pair of dimensions, float32 [dim / 2], and a factor on cos and sin.

    llama3: Llama 3.1's piecewise interpolation by wavelength. yarn: arXiv 2309.00071, with attention scaling
    0.1 ln(factor) + 1. Formulas as in transformers' modeling_rope_utils.
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    frequencies = 1.0 / rope.theta**exponents
    scaling = rope.scaling
    if rope.type == "linear":
        return frequencies / scaling["factor"], 1.0
    if rope.type == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        smooth = ((turns - low) / (high - low)).clamp(0, 1)  # 0: interpolated, 1: as trained
        return (1 - smooth) * frequencies / scaling["factor"] + smooth * frequencies, 1.0
    if rope.type == "yarn":
        return _yarn_frequencies(rope, frequencies, dim, max_positions)
    return frequencies, 1.0


def _yarn_frequencies(
    rope: RopeConfig, frequencies: torch.Tensor, dim: int, max_positions: int
) -> tuple[torch.Tensor, float]:
    scaling = rope.scaling
    factor = scaling["factor"]
    original = scaling.get("original_max_position_embeddings") or max_positions

    def dimension(turns: float) -> float:
        """Where the trained context makes this many turns."""
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(scaling.get("beta_fast") or 32), dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / ((high - low) or 0.001)).clamp(0, 1)

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    attention = scaling.get("attention_factor")
    if attention is None:
        mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
        attention = magnitude(mscale) / magnitude(all_dim) if mscale and all_dim else magnitude(1)
    return frequencies / factor * ramp + frequencies * (1 - ramp), float(attention)


#: Names in config.json → what they mean.
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def activation(config: ModelConfig) -> Activation:
    """The activation function by its name in config.json; ModelLoadError lists the supported ones."""
    if config.activation not in _ACTIVATIONS:
        raise ModelLoadError(
            f"{config.path}: activation {shown(config.activation)} is not supported.",
            advice=f"Supported: {', '.join(_ACTIVATIONS)}.",
        )
    return _ACTIVATIONS[config.activation]


class GatedMLP:
    """down(act(gate(x)) · up(x)), gate and up as one product."""

    def __init__(self, operations: Operations, gate_up: Linear, down: Linear, kind: Activation) -> None:
        self._gate_up = gate_up
        self._down = down
        self._gate = operations.gate(kind)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, hidden] → [T, hidden]."""
        return self._down(self._gate(self._gate_up(x)))


class MLP:
    """down(act(up(x)))."""

    def __init__(self, operations: Operations, up: Linear, down: Linear, kind: Activation) -> None:
        self._up = up
        self._down = down
        self._activate = operations.activation(kind)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, hidden] → [T, hidden]."""
        return self._down(self._activate(self._up(x)))


class Attention:
    """Self-attention over the paged cache, from fused projections laid out [q heads | k heads | v heads]."""

    def __init__(
        self,
        operations: Operations,
        config: ModelConfig,
        layer: int,
        qkv: Linear,
        out: Linear,
        *,
        head_norm: torch.Tensor | None = None,
        norm: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        """What is done to queries and keys together, [T, H + KVH, D], before the rotation:

        head_norm: weights [H + KVH, D] of an RMS norm of each head.
        norm: any other one.
        """
        self._heads = config.num_heads
        self._kv_heads = config.num_kv_heads
        self._dim = config.head_dim
        self._scale = config.head_dim**-0.5
        self._window = config.windows[layer]
        self._qkv = qkv
        self._out = out
        self._norm = norm
        self._head_norm = head_norm
        self._eps = config.norm_eps
        self._rotate = operations.rotate

    def __call__(self, x: torch.Tensor, step: Step, cache: LayerCache) -> torch.Tensor:
        """[T, hidden] → [T, hidden]; writes the tokens' keys and values to the cache."""
        rotated = self._heads + self._kv_heads
        heads = self._qkv(x).view(x.shape[0], rotated + self._kv_heads, self._dim)
        qk, v = heads[:, :rotated], heads[:, rotated:]
        if self._norm is not None:
            qk = self._norm(qk)
        qk = self._rotate(qk, step.rotation, self._head_norm, self._eps)
        out = step.attention(
            qk[:, : self._heads],
            qk[:, self._heads :],
            v,
            *cache,
            scale=self._scale,
            window=self._window,
        )
        return self._out(out.view(x.shape[0], -1))
