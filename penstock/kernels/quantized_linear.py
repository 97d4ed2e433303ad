"""Products with quantised weights on a GPU, added to its table of operations: which form a weight gets there.

none         what the table has
int8, int4   triton/quantized.py; restored for each product where Triton has no products
fp8          scaled.py, activations rounded by a kernel of Triton where there is one
"""

from __future__ import annotations

import logging
from dataclasses import replace

from torch import Tensor

from .capability import Device, has_fp8, has_products
from .operations import Matrix, Operations
from .quantization import quantize_fp8
from .scaled import ScaledMatrix, multiplies_fp8
from .triton import quantized
from .triton.fallback import Fallback
from .triton.launch import installed

logger = logging.getLogger("penstock.kernels")


def with_quantized_linear(table: Operations, known: Device) -> Operations:
    """The table, with `linear` and `schemes` for what the device multiplies with."""
    schemes: tuple[str, ...] = quantized.SCHEMES
    if has_fp8(known) and multiplies_fp8():
        schemes = (*schemes, "fp8")
    compiles = installed() and has_products(known)
    fallback = Fallback()
    rounding = fallback(quantized.round_to_fp8, quantize_fp8)
    plain = table.linear

    def linear(weight: Tensor, scheme: str | None) -> Matrix:
        if scheme is None:
            return plain(weight, None)
        if scheme not in schemes:
            raise ValueError(f"{scheme} on {known}: it multiplies with {', '.join(schemes)}")
        if scheme == "fp8":
            return ScaledMatrix(weight, rounding if compiles else quantize_fp8)
        return quantized.QuantizedMatrix(weight, scheme, compiled=compiles, fallback=fallback)

    if not compiles:
        logger.info("%s: int8 and int4 weights are restored for each product: memory for speed", known)
    return replace(table, linear=linear, schemes=schemes)
