"""The parts that architectures are wired from: plain tensors in small objects, no autograd, no modules.

All activations are [T, …], one row per token of the flattened batch. Casts follow transformers, so that
bfloat16 agrees with it: norms and rotary angles are computed in float32 and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from penstock.core.errors import ModelLoadError
from penstock.kernels.attention import AttentionStep
from penstock.kernels.cpu.elementwise import kernels
from penstock.kernels.linear import matrix

from .config import ModelConfig, RopeConfig

#: Keys and values of one layer: a pair of [num_blocks, KVH, block_size, D].
LayerCache = tuple[torch.Tensor, torch.Tensor]
#: cos and sin of each token's angles, [T, 1, rotary_dim]; the first half of sin is negated.
Rotation = tuple[torch.Tensor, torch.Tensor]


class Linear:
    """x Wᵀ + b."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, scheme: str | None = None
    ) -> None:
        """weight: [out, in], may be released after this call where `copied` says so. bias: [out].

        scheme: how to quantise the weight; see penstock.kernels.quantization.
        """
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self.matrix = matrix(weight, scheme)
        self.copied = self.matrix.copied
        self.nbytes = self.matrix.nbytes + (bias.nbytes if bias is not None else 0)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, in] → [T, out]."""
        return self.matrix(x, self.bias)


class Embedding:
    """Rows of a table."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        self.nbytes = weight.nbytes

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """int64 [T] → [T, hidden]."""
        return F.embedding(token_ids, self.weight)


class RMSNorm:
    """x / rms(x) · w, rounded to x's dtype before the product with w, as transformers does."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        """weight: [..., D]; leading dimensions give each head a weight of its own."""
        self.weight = weight
        self.eps = eps
        self.nbytes = weight.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, ..., D] → the same shape."""
        fused = kernels(x)
        if fused is not None and self.weight.ndim == 1:
            return fused.rms_norm(x, self.weight, self.eps)
        return F.rms_norm(x, (x.shape[-1],), None, self.eps).mul_(self.weight)


class LayerNorm:
    """(x - mean) / std · w + b."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> None:
        self._weight = weight
        self._bias = bias
        self._eps = eps
        self.nbytes = weight.nbytes + bias.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, ..., D] → the same shape."""
        return F.layer_norm(x, self._weight.shape, self._weight, self._bias, self._eps)


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


def rotate(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Rotate the leading rotary_dim dimensions of every head: [T, heads, D] → the same shape, contiguous."""
    cos, sin = rotation
    width = cos.shape[-1]
    turned = x if width == x.shape[-1] else x[..., :width]
    # x·cos + rotate_half(x)·sin: rolling by half swaps the halves, and sin carries the minus
    out = (turned * cos).add_(torch.roll(turned, width // 2, -1).mul_(sin))
    return out if width == x.shape[-1] else torch.cat((out, x[..., width:]), -1)


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


_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_fast": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def activation(config: ModelConfig) -> Callable[[torch.Tensor], torch.Tensor]:
    """The activation function by its name in config.json; ModelLoadError lists the supported ones."""
    if config.activation not in _ACTIVATIONS:
        raise ModelLoadError(
            f"{config.path}: activation {config.activation!r} is not supported.",
            advice=f"Supported: {', '.join(_ACTIVATIONS)}.",
        )
    return _ACTIVATIONS[config.activation]


class GatedMLP:
    """down(act(gate(x)) · up(x)), gate and up as one product."""

    def __init__(self, gate_up: Linear, down: Linear, act: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._gate_up = gate_up
        self._down = down
        self._act = act

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, hidden] → [T, hidden]."""
        gate_up = self._gate_up(x)
        fused = kernels(x)
        if fused is not None and self._act is F.silu:
            return self._down(fused.silu_mul(gate_up))
        gate, up = gate_up.chunk(2, dim=-1)
        return self._down(self._act(gate).mul_(up))


class MLP:
    """down(act(up(x)))."""

    def __init__(self, up: Linear, down: Linear, act: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._up = up
        self._down = down
        self._act = act

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, hidden] → [T, hidden]."""
        return self._down(self._act(self._up(x)))


class Attention:
    """Self-attention over the paged cache, from fused projections laid out [q heads | k heads | v heads]."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        qkv: Linear,
        out: Linear,
        norm: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        """norm: applied to [T, H + KVH, D], queries and keys together, before the rotation."""
        self._heads = config.num_heads
        self._kv_heads = config.num_kv_heads
        self._dim = config.head_dim
        self._scale = config.head_dim**-0.5
        self._window = config.windows[layer]
        self._qkv = qkv
        self._out = out
        self._norm = norm

    def __call__(
        self, x: torch.Tensor, rotation: Rotation, attention: AttentionStep, cache: LayerCache
    ) -> torch.Tensor:
        """[T, hidden] → [T, hidden]; writes the tokens' keys and values to the cache."""
        rotated = self._heads + self._kv_heads
        heads = self._qkv(x).view(x.shape[0], rotated + self._kv_heads, self._dim)
        qk, v = heads[:, :rotated], heads[:, rotated:]
        fused = kernels(x)
        if fused is not None and self._norm is None:
            fused.norm_rotate(qk, rotation)
        elif fused is not None and isinstance(self._norm, RMSNorm):
            fused.norm_rotate(qk, rotation, self._norm.weight, self._norm.eps)
        else:
            qk = rotate(qk if self._norm is None else self._norm(qk), rotation)
        out = attention(
            qk[:, : self._heads],
            qk[:, self._heads :],
            v,
            *cache,
            scale=self._scale,
            window=self._window,
        )
        return self._out(out.view(x.shape[0], -1))
