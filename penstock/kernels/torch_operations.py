"""The table of torch's operators, for any device and dtype: what has no kernels is taken from here."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .operations import Activation, Operations, Rotation
from .torch_attention import TorchAttention
from .torch_sampling import choose, logprobs, sample


def torch_operations(device: torch.device, dtype: torch.dtype) -> Operations:
    """The table for `device`. It quantises nothing, and has no stack."""
    return Operations(
        name="torch",
        device=device,
        dtype=dtype,
        embed=F.embedding,
        rms_norm=_rms_norm,
        layer_norm=_layer_norm,
        rotate=_rotate,
        activation=_ACTIVATIONS.__getitem__,
        gate=_gate,
        linear=TorchMatrix,
        attention=functools.partial(TorchAttention, device=device),
        sample=sample,
        choose=choose,
        logprobs=logprobs,
    )


class TorchMatrix:
    """The weight as it came."""

    copied = False

    def __init__(self, weight: Tensor, scheme: str | None = None) -> None:
        """weight: [out, in], kept. Raises ValueError for any scheme."""
        if scheme is not None:
            raise ValueError(f"{scheme} on {weight.device} needs the CPU kernels")
        self.nbytes = weight.nbytes
        self._weight = weight

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See Matrix."""
        return F.linear(x, self._weight, bias)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), None, eps).mul_(weight)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def _rotate(x: Tensor, rotation: Rotation, weight: Tensor | None, eps: float) -> Tensor:
    if weight is not None:
        x = _rms_norm(x, weight, eps)
    cos, sin = rotation
    width = cos.shape[-1]
    turned = x if width == x.shape[-1] else x[..., :width]
    # x·cos + rotate_half(x)·sin: rolling by half swaps the halves, and sin carries the minus
    out = (turned * cos).add_(torch.roll(turned, width // 2, -1).mul_(sin))
    return out if width == x.shape[-1] else torch.cat((out, x[..., width:]), -1)


_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


def _gate(kind: Activation) -> Callable[[Tensor], Tensor]:
    activate = _ACTIVATIONS[kind]

    def gated(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return activate(gate).mul_(up)

    return gated
