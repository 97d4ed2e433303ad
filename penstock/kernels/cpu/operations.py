"""The CPU's table of operations: torch's, with everything replaced that the compiled kernels compute."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from penstock.kernels.operations import Activation, Operations
from penstock.kernels.quantization import INTEGERS

from .attention import CpuAttention
from .binding import Library
from .decoder import create_stack
from .elementwise import KINDS, Elementwise
from .matrix import can_pack, is_free, matrix
from .sampling import Sampling


def cpu_operations(library: Library, plain: Operations, batch_invariant: bool | None = None) -> Operations:
    """plain: torch's table for a CPU, of float32 or bfloat16.

    batch_invariant: see Operations. False and None keep the promise where nothing is faster without it.
    """
    elementwise = Elementwise(library, plain.dtype)
    sampling = Sampling(library, plain)
    batch_invariant = batch_invariant or is_free(library)

    def gate(kind: Activation) -> Callable[[Tensor], Tensor]:
        return functools.partial(elementwise.gate, kind) if kind in KINDS else plain.gate(kind)

    def activation(kind: Activation) -> Callable[[Tensor], Tensor]:
        return functools.partial(elementwise.activation, kind) if kind in KINDS else plain.activation(kind)

    return replace(
        plain,
        name="cpu",
        rms_norm=elementwise.rms_norm,
        rotate=elementwise.rotate,
        activation=activation,
        gate=gate,
        linear=functools.partial(matrix, library, invariant=batch_invariant),
        attention=functools.partial(CpuAttention, library),
        sample=sampling.sample,
        choose=None,  # nothing here computes by itself
        logprobs=sampling.logprobs,
        stack=functools.partial(create_stack, library, plain.dtype),
        schemes=INTEGERS,
        multiplies_integers=library.multiplies_integers,
        copies_weights=batch_invariant or can_pack(plain.dtype),
        batch_invariant=batch_invariant,
    )
