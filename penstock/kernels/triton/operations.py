"""The table "triton": torch's, with everything replaced that has a kernel here."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from penstock.kernels.attention import AttentionBackend, KVCacheSpec
from penstock.kernels.operations import Activation, Operations, Rotation

from . import gates, norms, rotation, sampling
from .attention import MOST_DIM, TritonAttention
from .fallback import Fallback, GuardedAttention
from .stack import create_stack


def triton_operations(plain: Operations) -> Operations | None:
    """plain: torch's table for the same device, which does what no kernel here does, and everything where
    kernels cannot be compiled. None, after a warning, if that shows at once."""
    fallback = Fallback()
    either = fallback

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return (norms if x.shape[-1] <= norms.MOST else plain).rms_norm(x, weight, eps)

    def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return (norms if x.shape[-1] <= norms.MOST else plain).layer_norm(x, weight, bias, eps)

    def rotate(x: Tensor, angles: Rotation, weight: Tensor | None, eps: float) -> Tensor:
        return rotation.rotate(x, angles, weight, eps)

    def activation(kind: Activation) -> Callable[[Tensor], Tensor]:
        return either(gates.activation(kind), plain.activation(kind))

    def gate(kind: Activation) -> Callable[[Tensor], Tensor]:
        return either(gates.gate(kind), plain.gate(kind))

    def attention(spec: KVCacheSpec) -> AttentionBackend:
        if spec.head_dim > MOST_DIM:
            return plain.attention(spec)
        return GuardedAttention(fallback, TritonAttention(spec, plain.device), lambda: plain.attention(spec))

    table = replace(
        plain,
        name="triton",
        rms_norm=either(rms_norm, plain.rms_norm),
        layer_norm=either(layer_norm, plain.layer_norm),
        rotate=either(rotate, plain.rotate),
        activation=activation,
        gate=gate,
        attention=attention,
        sample=either(sampling.sample, plain.sample),
        choose=either(sampling.choose, plain.choose or sampling.choose),
        logprobs=either(sampling.logprobs, plain.logprobs),
        stack=functools.partial(create_stack, fallback),
    )
    row = torch.ones((1, 16), dtype=plain.dtype, device=plain.device)
    table.rms_norm(row, row[0], 1e-6)  # the least kernel: are there a compiler and a launcher at all?
    return None if fallback.failed else table
