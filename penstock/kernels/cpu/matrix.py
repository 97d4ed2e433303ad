"""Weights of linear layers on a CPU, each in the layout that the fastest product of it reads.

    None, bfloat16 on AVX512-BF16      oneDNN's panels, read by our own kernels
    None, on AVX2; float32 beside it;
    batch-invariant                    our own panels, as fast as oneDNN's or faster (docs/performance.md)
    None, elsewhere on x86             oneDNN's panels
    None, elsewhere                    plain rows, torch's table
    int8, w8a8, int4                   our own panels

Our own products promise that the bits of a row depend on it alone; oneDNN's and torch's do not.

Knows dtypes, processors and layouts. Knows nothing of models.
"""

from __future__ import annotations

import functools
import platform

import torch

from penstock.kernels.operations import Matrix
from penstock.kernels.torch_operations import TorchMatrix

from .binding import Library
from .linear import ALL_ROWS, BF16Panels, FloatPanels, IntegerPanels, Panels, agree, has_amx


def matrix(
    library: Library, weight: torch.Tensor, scheme: str | None = None, *, invariant: bool = False
) -> Matrix:
    """The fastest form of a [out, in] weight; if invariant, of those whose rows do not depend on their batch.

    scheme: None, or one of kernels.quantization.SCHEMES. Raises ValueError for another one, and for a dtype
    that it does not compute in.
    """
    if scheme is not None:
        panels = IntegerPanels(library, weight, scheme)
        return _Own(panels) if invariant else _Integers(library, panels, weight.dtype)
    if not invariant:
        return _Packed(library, weight) if can_pack(weight.dtype) else TorchMatrix(weight)
    if (
        can_pack(weight.dtype)
        and weight.dtype == torch.bfloat16
        and BF16Panels.can_read(library, *weight.shape)
    ):
        packed = _Packed(library, weight)
        if packed.panels is not None:
            packed.panels.most_rows = ALL_ROWS
            return packed
    return _Own(FloatPanels(library, weight))


def is_free(library: Library, dtype: torch.dtype) -> bool:
    """Whether nothing is known to be faster than the invariant form of a weight of this dtype.

    Measured (docs/performance.md): on AVX2 (Zen 3) ours are faster than what there is otherwise, for both
    dtypes; on AVX-512 (Zen 5) they are as fast in float32 as oneDNN's, whose primitives are copied to a null
    pointer where memory is refused. With AVX512-BF16 ours are used for bfloat16 anyway, unless there is AMX.
    Other processors have not been measured.
    """
    if dtype == torch.bfloat16 and library.multiplies_bf16:
        return not has_amx()
    return library.isa == "AVX2" or (dtype == torch.float32 and library.isa.startswith("AVX512"))


@functools.cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN's packed linear is there and fast. The operators are private; inductor emits them.

    Over F.linear, measured on two Zen 4 cores: bfloat16 1.3x (1 row), 1.5x (32 rows); float32 1x and 1.7x.
    On other processors than x86 they may end in reference kernels (pytorch#180447).
    """
    ops = torch.ops.mkldnn
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    if not hasattr(ops, "_reorder_linear_weight") or not hasattr(ops, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(ops._is_mkldnn_bf16_supported()))


def _onednn(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return out


class CpuMatrix:
    """A weight that was laid out anew.

    Attributes:
        panels: it as our own kernels read it, if they do.
    """

    copied = True
    nbytes: int
    panels: Panels | None


class _Packed(CpuMatrix):
    """oneDNN's layout. Where our kernels can read it, they compute what they are faster at."""

    def __init__(self, library: Library, weight: torch.Tensor) -> None:
        self.nbytes = weight.nbytes
        self.panels = None
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        if weight.dtype == torch.bfloat16 and BF16Panels.can_read(library, *weight.shape):
            panels = BF16Panels(library, self._packed, *weight.shape)
            if agree(panels, functools.partial(_onednn, packed=self._packed, bias=None), panels.depth):
                self.panels = panels

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self.panels is not None and x.shape[0] <= self.panels.most_rows:
            return self.panels(x, bias)
        return _onednn(x, self._packed, bias)


class _Own(CpuMatrix):
    """Our own panels, for every batch."""

    def __init__(self, panels: FloatPanels | IntegerPanels) -> None:
        self.nbytes = panels.nbytes
        self.panels = panels

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        assert self.panels is not None
        return self.panels(x, bias)


class _Integers(CpuMatrix):
    """Our own panels; with AMX, large batches go through oneDNN with the weight restored on the fly."""

    #: From so many rows on, AMX should save more than restoring the weight costs. Reckoned, not measured.
    _ROWS_FOR_AMX = 64

    def __init__(self, library: Library, panels: IntegerPanels, dtype: torch.dtype) -> None:
        self.nbytes = panels.nbytes
        self.panels: IntegerPanels = panels
        self._restored: torch.Tensor | None = None
        if has_amx() and dtype == torch.bfloat16 and not panels.rounds:
            made = _restorable.cache_info().misses
            self._restored = _restorable(library, panels.columns, panels.depth)
        if self._restored is not None:
            panels.most_rows = self._ROWS_FOR_AMX - 1
            if _restorable.cache_info().misses > made:
                self.nbytes += 2 * panels.columns * panels.depth

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self._restored is not None and x.shape[0] > self.panels.most_rows:
            self.panels.restore(torch.ops.mkldnn.data_ptr(self._restored))
            return _onednn(x, self._restored, bias)
        return self.panels(x, bias)


@functools.cache
def _restorable(library: Library, columns: int, depth: int) -> torch.Tensor | None:
    """oneDNN's packed tensor of this shape, to be overwritten for each use; None if its layout is foreign."""
    if not can_pack(torch.bfloat16) or not BF16Panels.can_read(library, columns, depth):
        return None
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(columns, depth, generator=generator, dtype=torch.bfloat16)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    oracle = functools.partial(_onednn, packed=packed, bias=None)
    return packed if agree(BF16Panels(library, packed, columns, depth), oracle, depth) else None
