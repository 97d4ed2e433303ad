"""Linear layers on the CPU whose weights lie in panels; see csrc/linear.h for the layouts and the arithmetic.

    BF16Panels       reads what oneDNN packed, in place: the weight exists once, and oneDNN computes the
                     batches for which the machine has something better (AMX)
    FloatPanels      float32, and bfloat16 for processors that do not multiply it, packed here
    IntegerPanels    int8, w8a8 and int4, packed here

Knows the library and torch's packed tensors. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from penstock.kernels.quantization import GROUP, INTEGERS

from .binding import Library, LinearArguments
from .scratch import Scratch
from .tensors import IS_BF16

PANEL = 64
"""Outputs per panel."""
ALL_ROWS = 1 << 30
"""More than any batch has."""
_BF16, _INT8, _INT4, _FLOAT, _WIDE = range(5)
#: Rows up to which these kernels should beat AMX tiles: the weight's way from memory is the limit then.
#: Reckoned from the rates of both; not measured.
_ROWS_BESIDE_AMX = 8


_scratch = Scratch()


def has_amx() -> bool:
    """Whether the processor multiplies bfloat16 tiles, which oneDNN uses and these kernels do not."""
    return bool(torch.cpu._is_amx_tile_supported())


class Panels:
    """A weight in panels, and the call that multiplies with it.

    Attributes:
        arguments: of the call; the weight's part of it.
        dtypes: of inputs.
        most_rows: up to so many, these kernels are the fastest there are.
    """

    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)
    most_rows = ALL_ROWS

    def __init__(self, library: Library, kind: int, columns: int, depth: int) -> None:
        self._library = library
        self.columns, self.depth = columns, depth
        self.arguments = LinearArguments(columns=columns, depth=depth, kind=kind, group=GROUP)

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """[T, in] → [T, out], in the dtype of x. A row's bits depend on it alone.

        BF16Panels take bfloat16, IntegerPanels float32 as well, FloatPanels what their weight has. Raises
        ValueError for another shape or dtype.
        """
        rows, depth = x.shape
        if depth != self.depth or x.dtype not in self.dtypes:
            raise ValueError(f"linear of {list(x.shape)} {x.dtype}; need [T, {self.depth}] of {self.dtypes}")
        if x.stride(1) != 1 or x.stride(0) % 2:  # pairs are read as words
            x = x.contiguous()
        out = torch.empty((rows, self.columns), dtype=x.dtype)
        a = self.arguments
        a.x, a.out, a.bias = x.data_ptr(), out.data_ptr(), None if bias is None else bias.data_ptr()
        a.x_row, a.out_row, a.rows = x.stride(0), self.columns, rows
        a.is_bf16 = x.dtype == torch.bfloat16
        a.threads = torch.get_num_threads()
        a.scratch = _scratch.address(self._library.linear_scratch(a.kind, rows, depth, a.threads))
        self._library.linear(a)
        return out


class BF16Panels(Panels):
    """x Wᵀ + b with a bfloat16 weight that oneDNN has packed."""

    def __init__(self, library: Library, packed: torch.Tensor, columns: int, depth: int) -> None:
        """packed: the opaque tensor; can_read it, then see whether they agree."""
        super().__init__(library, _BF16, columns, depth)
        self._packed = packed  # owns the memory
        self.arguments.weight = torch.ops.mkldnn.data_ptr(packed)
        self.most_rows = _ROWS_BESIDE_AMX if has_amx() else ALL_ROWS

    @staticmethod
    def can_read(library: Library, columns: int, depth: int) -> bool:
        """Whether panels of this shape, if they are panels, lie in memory as they should: without gaps."""
        readable = library.multiplies_bf16 and depth % PANEL == 0 and columns % PANEL == 0
        return readable and hasattr(torch.ops.mkldnn, "data_ptr")


class FloatPanels(Panels):
    """x Wᵀ + b with a float32 or bfloat16 weight, in float32 arithmetic.

    Attributes:
        nbytes: of the packed weight.
    """

    def __init__(self, library: Library, weight: torch.Tensor) -> None:
        """weight: [N, K], bfloat16 or float32; not needed afterwards. Raises ValueError for another."""
        if weight.dtype not in IS_BF16:
            raise ValueError(f"weight of {weight.dtype}; need one of {tuple(IS_BF16)}")
        weight = weight.contiguous()
        columns, depth = weight.shape
        is_bf16 = IS_BF16[weight.dtype]
        super().__init__(library, _WIDE if is_bf16 else _FLOAT, columns, depth)
        self.dtypes = (weight.dtype,)
        self.nbytes = library.strip_bytes(is_bf16, columns, depth)
        self._values = torch.empty(self.nbytes, dtype=torch.uint8)
        library.pack_strips(weight.data_ptr(), is_bf16, columns, depth, self._values.data_ptr())
        self.arguments.weight = self._values.data_ptr()


def agree(panels: BF16Panels, oracle: Callable[[torch.Tensor], torch.Tensor], depth: int) -> bool:
    """Whether panels computes what oneDNN does, for rows that tell any two orders of the weight apart.

    oneDNN keeps its layouts to itself and chooses them by processor and shape, so it is asked. Every output
    is judged by its own size.
    """
    x = torch.randn(4, depth, generator=torch.Generator().manual_seed(depth)).bfloat16()
    expected = oracle(x).float()
    error = (panels(x, None).float() - expected).abs().amax(0)
    return bool((error <= 0.02 * expected.abs().amax(0) + 1e-30).all())


class IntegerPanels(Panels):
    """x Wᵀ + b with an integer weight, quantised as penstock.kernels.quantization says.

    Attributes:
        nbytes: of the packed weight with its scales.
        rounds: whether activations are rounded to eight bits.
    """

    dtypes = (torch.bfloat16, torch.float32)

    def __init__(self, library: Library, weight: torch.Tensor, scheme: str, group: int = GROUP) -> None:
        """weight: [N, K], bfloat16 or float32, dense; not needed afterwards.

        Raises ValueError for another scheme, group or dtype.
        """
        if scheme not in INTEGERS or group not in (64, 128):
            raise ValueError(
                f"scheme {scheme!r} in groups of {group}; need one of {', '.join(INTEGERS)}, 64 or 128"
            )
        if weight.dtype not in self.dtypes:
            raise ValueError(f"weight of {weight.dtype}; need one of {self.dtypes}")
        columns, depth = weight.shape
        super().__init__(library, _INT4 if scheme == "int4" else _INT8, columns, depth)
        weight = weight.contiguous()
        is_bf16 = int(weight.dtype == torch.bfloat16)
        panels, padded = -(-columns // PANEL), -(-depth // GROUP) * GROUP
        a = self.arguments
        self.rounds = scheme == "w8a8"
        a.parts = 1 if self.rounds else 2
        four = scheme == "int4"
        scales = panels * padded // group * PANEL
        sizes = [panels * PANEL * padded // (1 + four), 2 * scales, scales * four]
        # in one piece: scales lie in the weight's large pages, too, and those of int8 between its values
        self._values, packed, self._zeros = torch.split(torch.empty(sum(sizes), dtype=torch.uint8), sizes)
        self._scales = packed.view(torch.bfloat16)
        shape = weight.data_ptr(), is_bf16, columns, depth, group
        made = self._values.data_ptr(), self._scales.data_ptr()
        if four:
            library.pack_int4(*shape, *made, self._zeros.data_ptr())
        else:
            library.pack_int8(*shape, made[0])
        a.scales, a.zeros, a.group = self._scales.data_ptr(), self._zeros.data_ptr(), group
        a.weight = self._values.data_ptr()
        self.nbytes = self._values.nbytes + self._scales.nbytes + self._zeros.nbytes

    def restore(self, to: int) -> None:
        """Write the weight as bfloat16 panels to this address; the inputs are a multiple of 64."""
        self.arguments.threads = torch.get_num_threads()
        self._library.restore(self.arguments, to)
