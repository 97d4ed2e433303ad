"""The specification: every entry of the table of operations in plain torch, float32 inside, slow on purpose.

Every other table must agree with this one; `--attention-backend reference` finds out whether a fast kernel is
at fault. Shapes are told by Operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .attention import KVCacheSpec, StepLayout, check_window
from .operations import Activation, Draw, Likelihood, Operations, Rotation
from .quantization import GROUP, SCHEMES, dequantize, quantize, rounded_activations


def reference_operations(device: torch.device, dtype: torch.dtype) -> Operations:
    """The table of the specification. It has no stack: that is defined by the single calls."""
    return Operations(
        name="reference",
        device=device,
        dtype=dtype,
        embed=embed,
        rms_norm=rms_norm,
        layer_norm=layer_norm,
        rotate=rotate,
        activation=activation,
        gate=gate,
        linear=ReferenceMatrix,
        attention=ReferenceAttention,
        sample=sample,
        logprobs=logprobs,
        schemes=SCHEMES,
    )


def embed(token_ids: Tensor, table: Tensor) -> Tensor:
    """The rows of these tokens."""
    return torch.stack([table[token] for token in token_ids.tolist()])


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean(x²) + eps), rounded; times weight."""
    wide = x.float()
    return (wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()).to(x.dtype) * weight


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / √(variance + eps) · weight + bias."""
    wide = x.float()
    centred = wide - wide.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return (normed * weight.float() + bias.float()).to(x.dtype)


def rotate(x: Tensor, rotation: Rotation, weight: Tensor | None, eps: float) -> Tensor:
    """Pairs (x[i], x[i + R/2]) turned by the token's angle i; each product is rounded."""
    if weight is not None:
        x = rms_norm(x, weight, eps)
    cos, sin = rotation
    first, second, rest = x.tensor_split([cos.shape[-1] // 2, cos.shape[-1]], dim=-1)
    turned = torch.cat((first, second), -1) * cos + torch.cat((second, first), -1) * sin
    return torch.cat((turned, rest), -1)


def activation(kind: Activation) -> Callable[[Tensor], Tensor]:
    """The function of this name, rounded once."""
    function = _ACTIVATIONS[kind]
    return lambda x: function(x.float()).to(x.dtype)


_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": lambda x: x * torch.erfc(-x / math.sqrt(2)) / 2,
    "gelu_tanh": lambda x: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: x.clamp(min=0),
}


def gate(kind: Activation) -> Callable[[Tensor], Tensor]:
    """activation(gate), rounded; times up."""
    activate = activation(kind)

    def gated(gate_up: Tensor) -> Tensor:
        left, up = gate_up.chunk(2, dim=-1)
        return activate(left) * up

    return gated


class ReferenceMatrix:
    """x Wᵀ + b, with the weight that a quantised one stands for, and the activations that a scheme sees."""

    def __init__(self, weight: Tensor, scheme: str | None = None, group: int | None = GROUP) -> None:
        """weight: [out, in]. group: see quantize. Raises ValueError for an unknown scheme."""
        self.copied = scheme is not None
        self._weight = weight
        self._scheme = scheme
        if scheme is not None:
            self._weight = dequantize(quantize(weight, scheme, group), torch.float32)
        self.nbytes = self._weight.nbytes

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See Matrix."""
        out = rounded_activations(x, self._scheme) @ self._weight.float().T
        return (out if bias is None else out + bias.float()).to(x.dtype)


def write_kv(
    k: Tensor,
    v: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Sequence[int],
) -> None:
    """Store keys and values of T tokens.

    Args:
        k, v: [T, KVH, D].
        key_cache, value_cache: [num_blocks, KVH, block_size, D].
        slots: T of them; slot = block * block_size + offset.
    """
    block_size = key_cache.shape[2]
    for row, slot in enumerate(slots):
        block, offset = divmod(slot, block_size)
        key_cache[block, :, offset] = k[row]
        value_cache[block, :, offset] = v[row]


def paged_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    layout: StepLayout,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """softmax(scale · q Kᵀ) V for each token over the positions that it may see.

    Args:
        q: [T, H, D]; query head h reads KV head h // (H // KVH).
        key_cache, value_cache: [num_blocks, KVH, block_size, D], holding everything up to each span's end.
        window: position p sees (p - window, p]; None sees [0, p], or the whole span where the layout is not
            causal.

    Returns:
        [T, H, D] in q's dtype.
    """
    block_size = layout.block_size
    group = q.shape[1] // key_cache.shape[1]
    out = torch.empty_like(q)
    for span, row in zip(layout.spans, layout.query_starts, strict=False):
        table = torch.from_numpy(np.array(span.blocks, np.int64)).to(q.device)
        for token in range(span.tokens):
            position = span.start + token
            first = 0 if window is None else max(0, position - window + 1)
            last = position if layout.causal else span.tokens - 1
            seen = torch.arange(first, last + 1, device=q.device)
            blocks, offsets = table[seen // block_size], seen % block_size
            keys = key_cache[blocks, :, offsets].float().repeat_interleave(group, dim=1)  # [S, H, D]
            values = value_cache[blocks, :, offsets].float().repeat_interleave(group, dim=1)
            scores = torch.einsum("hd,shd->hs", q[row + token].float(), keys) * scale
            out[row + token] = torch.einsum("hs,shd->hd", scores.softmax(-1), values).to(q.dtype)
    return out


class ReferenceAttention:
    """The specification as an attention backend."""

    name = "reference"

    def __init__(self, spec: KVCacheSpec) -> None:
        """spec: of the caches, which say it themselves."""

    def prepare(self, layout: StepLayout) -> _ReferenceStep:
        """Nothing to prepare."""
        return _ReferenceStep(layout)


class _ReferenceStep:
    def __init__(self, layout: StepLayout) -> None:
        self._layout = layout

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        *,
        scale: float,
        window: int | None = None,
    ) -> Tensor:
        check_window(self._layout, window)
        write_kv(k, v, key_cache, value_cache, self._layout.slots.tolist())
        return paged_attention(q, key_cache, value_cache, self._layout, scale, window)


def sample(logits: Tensor, draws: Sequence[Draw]) -> tuple[list[int], list[float]]:
    """Row by row, over all tokens in order."""
    largest = [float(row.max()) for row in logits.float()]
    tokens = [
        _draw(row, draw) if math.isfinite(most) else 0
        for row, draw, most in zip(logits.float(), draws, largest, strict=True)
    ]
    return tokens, largest


def _draw(row: Tensor, draw: Draw) -> int:
    """The token of one row [V] that has a distribution."""
    if draw.temperature == 0:
        return int(row.argmax())
    weights = ((row - row.max()) / draw.temperature).exp()
    in_order = draw.top_k > 0 or draw.top_p < 1
    order = row.argsort(descending=True, stable=True) if in_order else torch.arange(len(row)).to(row.device)
    if 0 < draw.top_k < len(row):
        weights[row < row[order[draw.top_k - 1]]] = 0
    weights[weights < draw.min_p] = 0
    # in double a weight of less than 1e-16 is lost behind one of 1, however many of them there are
    mass = weights[order].cpu().numpy().astype(np.longdouble)
    if draw.top_p < 1:
        before = mass.cumsum() - mass
        mass[before >= draw.top_p * mass.sum()] = 0
    cumulative = mass.cumsum()
    (exceeding,) = (cumulative > draw.uniform * cumulative[-1]).nonzero()
    place = exceeding[0] if len(exceeding) else mass.nonzero()[0][-1]
    return int(order[place])


def logprobs(logits: Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[Likelihood]:
    """Row by row, over all tokens in order."""
    found = []
    for row, token, count in zip(logits.float(), tokens, counts, strict=True):
        values = row.log_softmax(-1)
        best = row.argsort(descending=True, stable=True)[:count]
        rank = int((row >= row[token]).sum())
        found.append(Likelihood(float(values[token]), rank, best.tolist(), values[best].tolist()))
    return found
