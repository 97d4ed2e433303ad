"""The CPU's table of operations: torch's, with everything replaced that the compiled kernels compute."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from penstock.kernels.operations import Activation, Operations
from penstock.kernels.quantization import SCHEMES

from .attention import CpuAttention
from .binding import Library
from .decoder import create_stack
from .elementwise import Elementwise
from .matrix import can_pack, matrix
from .sampling import Sampling


def cpu_operations(library: Library, plain: Operations) -> Operations:
    """plain: torch's table for a CPU, of float32 or bfloat16."""
    elementwise = Elementwise(library, plain.dtype)
    sampling = Sampling(library, plain)

    def gate(kind: Activation) -> Callable[[Tensor], Tensor]:
        return elementwise.silu_mul if kind == "silu" else plain.gate(kind)

    return replace(
        plain,
        name="cpu",
        rms_norm=elementwise.rms_norm,
        rotate=elementwise.rotate,
        gate=gate,
        linear=functools.partial(matrix, library),
        attention=functools.partial(CpuAttention, library),
        sample=sampling.sample,
        logprobs=sampling.logprobs,
        stack=functools.partial(create_stack, library, plain.dtype),
        schemes=SCHEMES,
        multiplies_integers=library.multiplies_integers,
        copies_weights=can_pack(plain.dtype),
    )
