"""Linear layers: one call, x Wᵀ + b, behind which the weight lies as its device reads it fastest.

    matrix(weight, None)               CUDA, other processors    plain rows, F.linear
                                       x86                       oneDNN's panels, read by our own kernels too
    matrix(weight, "int8" | …)         CPU                       our own panels

Knows dtypes, devices and layouts. Knows nothing of models.
"""

from __future__ import annotations

import functools
import platform
from typing import Protocol

import torch
import torch.nn.functional as F

from .cpu import library
from .cpu.linear import BF16Panels, IntegerPanels, Panels, agree, has_amx


class Matrix(Protocol):
    """The weight of a linear layer.

    Attributes:
        nbytes: that the weight takes, scales included.
        copied: whether the memory of the given weight is not needed any more.
    """

    nbytes: int
    copied: bool

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """[T, in] → [T, out]; bias: [out]."""
        ...

    def panels(self, dtype: torch.dtype) -> Panels | None:
        """The weight for inputs of this dtype as our own kernels read it, if they do."""
        ...


def matrix(weight: torch.Tensor, scheme: str | None = None) -> Matrix:
    """The fastest form of a [out, in] weight on its device.

    scheme: None, or one of kernels.quantization.SCHEMES. Raises ValueError for another one, for a dtype that
    it does not compute in, and where there are no kernels to compute with.
    """
    if scheme is not None:
        found = library.available(library.PATIENCE) if weight.device.type == "cpu" else None
        if found is None:
            raise ValueError(f"{scheme} on {weight.device} needs the CPU kernels")
        return _Integers(found, IntegerPanels(found, weight, scheme), weight.dtype)
    if can_pack(weight.dtype, weight.device):
        return _Packed(weight)
    return _Plain(weight)


@functools.cache
def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether oneDNN's packed linear is there and fast. The operators are private; inductor emits them.

    Over F.linear, measured on two Zen 4 cores: bfloat16 1.3x (1 row), 1.5x (32 rows); float32 1x and 1.7x.
    On other processors than x86 they may end in reference kernels (pytorch#180447).
    """
    ops = torch.ops.mkldnn
    if device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return False
    if not hasattr(ops, "_reorder_linear_weight") or not hasattr(ops, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(ops._is_mkldnn_bf16_supported()))


def _onednn(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return out


class _Plain:
    copied = False

    def __init__(self, weight: torch.Tensor) -> None:
        self.nbytes = weight.nbytes
        self._weight = weight

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, self._weight, bias)

    def panels(self, dtype: torch.dtype) -> None:
        return None


class _Packed:
    """oneDNN's layout. Where our kernels can read it, they compute what they are faster at."""

    copied = True

    def __init__(self, weight: torch.Tensor) -> None:
        self.nbytes = weight.nbytes
        self._shape = weight.shape
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        self._panels: BF16Panels | None = None
        self._decided = weight.dtype != torch.bfloat16

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        panels = self.panels(x.dtype)
        if panels is not None and x.shape[0] <= panels.most_rows:
            return panels(x, bias)
        return _onednn(x, self._packed, bias)

    def panels(self, dtype: torch.dtype) -> Panels | None:
        if not self._decided:
            self._decide()
        return self._panels if dtype == torch.bfloat16 else None

    def _decide(self) -> None:
        """At the first call, when it is known whether there is a library."""
        found = library.loaded()
        if found is not None and BF16Panels.can_read(found, *self._shape):
            panels = BF16Panels(found, self._packed, *self._shape)
            if agree(panels, functools.partial(_onednn, packed=self._packed, bias=None), self._shape[1]):
                self._panels = panels
        self._decided = True


class _Integers:
    """Our own panels; with AMX, large batches go through oneDNN with the weight restored on the fly."""

    copied = True
    #: From so many rows on, AMX should save more than restoring the weight costs. Reckoned, not measured.
    _ROWS_FOR_AMX = 64

    def __init__(self, found: library.Library, panels: IntegerPanels, dtype: torch.dtype) -> None:
        self.nbytes = panels.nbytes
        self._panels = panels
        self._restored: torch.Tensor | None = None
        if has_amx() and dtype == torch.bfloat16 and not panels.rounds:
            made = _restorable.cache_info().misses
            self._restored = _restorable(found, panels.columns, panels.depth)
        if self._restored is not None:
            panels.most_rows = self._ROWS_FOR_AMX - 1
            if _restorable.cache_info().misses > made:
                self.nbytes += 2 * panels.columns * panels.depth

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self._restored is not None and x.shape[0] > self._panels.most_rows:
            self._panels.restore(torch.ops.mkldnn.data_ptr(self._restored))
            return _onednn(x, self._restored, bias)
        return self._panels(x, bias)

    def panels(self, dtype: torch.dtype) -> Panels | None:
        return self._panels if dtype in self._panels.dtypes else None


@functools.cache
def _restorable(found: library.Library, columns: int, depth: int) -> torch.Tensor | None:
    """oneDNN's packed tensor of this shape, to be overwritten for each use; None if its layout is foreign."""
    if not can_pack(torch.bfloat16, torch.device("cpu")) or not BF16Panels.can_read(found, columns, depth):
        return None
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(columns, depth, generator=generator, dtype=torch.bfloat16)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    oracle = functools.partial(_onednn, packed=packed, bias=None)
    return packed if agree(BF16Panels(found, packed, columns, depth), oracle, depth) else None
