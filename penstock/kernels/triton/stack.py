"""All layers of models that are wired like Llama, with the kernels that single calls have no place for.

    x ─▶ norm ─▶ qkv ─▶ norm of heads, rotation, keys and values into the cache ─▶ attention ─▶ out
      ─▶ x +, norm ─▶ gate, up ─▶ silu · ─▶ down ─▶ x +, norm of the next layer ─▶ …

Four or five kernels per layer beside the four products, where single calls start ten. Every sum and product
is rounded where single calls round it, so that the bits are theirs.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from penstock.kernels.attention import AttentionStep
from penstock.kernels.operations import LayerCache, LayerWeights, Rotation, ascending
from penstock.kernels.transfer import on_device

from . import gates, norms, rotation
from .attention import Step
from .fallback import Fallback, GuardedStep


class TritonStack:
    """The layers of one model, behind the seam Stack: see create_stack."""

    def __init__(self, fallback: Fallback, layers: Sequence[LayerWeights], eps: float, scale: float) -> None:
        """eps: of all norms. scale: of attention scores."""
        self._fallback = fallback
        self._layers = layers
        self._eps, self._scale = eps, scale
        self._gate = gates.gate("silu")
        self._proven = False
        """Whether all kernels were compiled once."""

    def run(
        self,
        x: Tensor,
        angles: Rotation,
        step: AttentionStep,
        caches: Sequence[LayerCache],
        wanted: Sequence[int] | None = None,
    ) -> Tensor | None:
        """See Stack. None for other attention kernels, and once a kernel could not be compiled."""
        fast = step.fast if isinstance(step, GuardedStep) else step
        if self._fallback.failed or not isinstance(fast, Step) or not x.is_contiguous():
            return None
        if len(caches) != len(self._layers):
            raise ValueError(f"caches of {len(caches)} layers for a model of {len(self._layers)}")
        rows = None
        if wanted is not None and len(chosen := ascending(wanted, len(x))) < len(x):
            rows = on_device(chosen, x.device)
        if self._proven:
            return self._compute(x, angles, fast, caches, rows)
        before = x.clone()
        try:
            done = self._compute(x, angles, fast, caches, rows)
        except Exception as error:
            self._fallback.take(error)
            x.copy_(before)
            return None
        self._proven = True
        return done

    def _compute(
        self, x: Tensor, angles: Rotation, step: Step, caches: Sequence[LayerCache], rows: Tensor | None
    ) -> Tensor:
        """rows: of the result; all by default."""
        eps = self._eps
        normed = norms.rms_norm(x, self._layers[0].attention_norm, eps)
        following = [layer.attention_norm for layer in self._layers[1:]]
        for number, (layer, cache) in enumerate(zip(self._layers, caches, strict=True)):
            weight, bias = layer.qkv
            kv_heads, dim = cache[0].shape[1], cache[0].shape[3]
            heads = weight(normed, bias).view(len(x), -1, dim)
            count = heads.shape[1] - 2 * kv_heads
            step.check_rows(len(x))
            rotation.rotate_and_write(heads, angles, layer.head_norm, eps, count, cache, step.slots)
            attended = step.attend(heads[:, :count], *cache, scale=self._scale, window=layer.window)
            attended = attended.view(len(x), -1)
            if rows is not None and number == len(following):  # of the last layer, not all are needed
                x, attended = x.index_select(0, rows), attended.index_select(0, rows)
            weight, bias = layer.out
            normed = norms.add_rms_norm(weight(attended, bias), x, layer.mlp_norm, eps)
            weight, bias = layer.gate_up
            active = self._gate(weight(normed, bias))
            weight, bias = layer.down
            out = weight(active, bias)
            if number < len(following):
                normed = norms.add_rms_norm(out, x, following[number], eps)
            else:
                x.add_(out)
        return x


def create_stack(
    fallback: Fallback, layers: Sequence[LayerWeights], eps: float, scale: float
) -> TritonStack | None:
    """The stack of these layers; None where there is none, or rows are too wide for a program."""
    if not layers or len(layers[0].attention_norm) > norms.MOST:
        return None
    return TritonStack(fallback, layers, eps, scale)
