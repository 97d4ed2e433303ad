"""Linear layers with integer weights on GPUs: the host of quantized_kernels. It packs, checks, chooses tiles.

    rows of x     tile: outputs x rows      parts
    1 to 16       64 x 16                   as many as fill the device, each of four groups of inputs or more
    17 to 32      64 x 32                   likewise
    33 to 64      128 x 64                  likewise
    65 and more   128 x 128                 one; 128 x 64 where it is mma that multiplies, out of registers

The weight's way from memory is the limit up to some hundred rows; then it is arithmetic. What a tile has
under way from memory (its stages) is what fits into a multiprocessor's shared memory. Nothing of this is
measured: no GPU was at hand; benchmarks/gpu/run.py compares it with bfloat16.

Before Ampere, Triton's products use no tensor cores, and spill (docs/gpu.md): there the weight is restored to
16 bits for each product, which saves memory and costs speed. So it is where there is no Triton.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from penstock.kernels.quantization import FP8, GROUP, quantize, quantize_fp8

from .fallback import Fallback
from .launch import OPTIONS, capability
from .registry import Configuration

SCHEMES = ("int8", "int4")
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
"""Of activations that products are compiled for."""
SHARED_MEMORY = {
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,
    "gfx942": 64 << 10,
}
"""Architecture → bytes that one block may have. CUDA C++ Programming Guide, "Technical Specifications per
Compute Capability"; AMD CDNA 3 ISA, "LDS"."""
_FEW_REGISTERS = ("sm_80", "sm_86", "sm_89", "sm_120")
"""Where products come from registers (mma), and are added up in them."""
_MOST_PARTS = 16
_LEAST_GROUPS = 4
"""Of a part: fewer inputs would be summed faster than their sums are written and read again."""
_SUM_BLOCK = 1024
_WIDEST = 1 << 15
"""Row that one program rounds to fp8; twice that, and its threads spill."""
_NARROWEST = 1 << 10
_CHUNK = 1 << 24
"""Elements that are quantised at a time: the temporary memory is some 16 bytes for each."""


@dataclass(frozen=True, slots=True)
class Tile:
    """How a product is cut."""

    outs: int
    rows: int
    parts: int
    warps: int
    stages: int


def architecture(known: tuple[int, int] | None) -> str:
    """The one of SHARED_MEMORY whose choices a device gets, by the memory that it has. None is AMD's."""
    if known is None:
        return "gfx942"
    if known[0] in (9, 10, 12):
        return f"sm_{known[0]}0"
    return "sm_80" if known in ((8, 0), (8, 7)) else "sm_86"


def stages(outs: int, rows: int, bits: int, where: str) -> int:
    """Tiles of weights and activations under way from memory: four at most, of what fits."""
    if where == "gfx942":
        return 2  # a double buffer; nothing is copied to shared memory asynchronously
    one = outs * GROUP * bits // 8 + rows * GROUP * 2
    return max(2, min(4, (SHARED_MEMORY[where] - (8 << 10)) // one))


@lru_cache(4096)
def choose(rows: int, outs: int, groups: int, bits: int, where: str, processors: int) -> Tile:
    """How a product of so many rows is cut on a device with so many multiprocessors."""
    if rows <= 16:
        shape = (64, 16, 4)
    elif rows <= 32:
        shape = (64, 32, 4)
    elif rows <= 64 or where in _FEW_REGISTERS:
        shape = (128, 64, 8)  # with four warps, or with more rows, registers run out
    else:
        shape = (128, 128, 8)
    height, width, warps = shape
    tiles = math.ceil(outs / height) * math.ceil(rows / width)
    parts = 1
    if rows <= 64:
        # two programs on each multiprocessor
        parts = max(1, min(2 * processors // tiles, groups // _LEAST_GROUPS, _MOST_PARTS))
        parts = math.ceil(groups / math.ceil(groups / parts))  # none without a group
    return Tile(height, width, parts, warps, stages(height, width, bits, where))


class QuantizedMatrix:
    """x Wᵀ + b with an integer weight, quantised as penstock.kernels.quantization says, in groups of 128.

    Attributes:
        nbytes: of the packed weight with its scales and zeros.
    """

    copied = True

    def __init__(
        self, weight: Tensor, scheme: str, *, compiled: bool = True, fallback: Fallback | None = None
    ) -> None:
        """weight: [N, K], on the device; not needed afterwards. Raises ValueError for another scheme.

        compiled: whether Triton's kernel multiplies, or torch does, with the weight restored.
        fallback: whether the kernel can be compiled, known to all weights of a model.
        """
        if scheme not in SCHEMES:
            raise ValueError(f"scheme {scheme!r} on {weight.device}; choose from {', '.join(SCHEMES)}")
        self._outs, self._ins = weight.shape
        self._bits = 8 if scheme == "int8" else 4
        self._groups = math.ceil(self._ins / GROUP)
        self._compiled = compiled
        self._fallback = fallback or Fallback()
        self._where, self._processors = _device(weight.device)
        step = max(1, _CHUNK // self._ins)
        parts = [_pack(weight[first : first + step], scheme) for first in range(0, self._outs, step)]
        self._values, self._scales, self._zeros = (
            torch.cat(each, 0 if each[0].dim() == 1 else 1) for each in zip(*parts, strict=True)
        )
        self.nbytes = self._values.nbytes + self._scales.nbytes + self._zeros.nbytes

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """[T, in] → [T, out], in the dtype of x. Raises ValueError for another shape or dtype."""
        _, ins = x.shape
        if ins != self._ins or x.dtype not in TYPES:
            raise ValueError(f"linear of {list(x.shape)} {x.dtype}; need [T, {self._ins}] of {tuple(TYPES)}")
        if self._compiled and not self._fallback.failed:
            try:
                return self._multiply(x, bias)
            except Exception as error:
                self._fallback.take(error)
        return torch.nn.functional.linear(x, self.restored(x.dtype), bias)

    def _multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """By Triton's kernel."""
        from . import quantized_kernels as kernels

        rows = x.shape[0]
        if x.stride(1) != 1:
            x = x.contiguous()
        out = torch.empty((rows, self._outs), dtype=x.dtype, device=x.device)
        if rows == 0:
            return out
        tile = choose(rows, self._outs, self._groups, self._bits, self._where, self._processors)
        partial = tile.parts > 1
        sums = out.new_empty((tile.parts, rows, self._outs), dtype=torch.float32) if partial else out
        tiles = math.ceil(self._outs / tile.outs) * math.ceil(rows / tile.rows)
        kernels.quantized_product[(tiles, tile.parts)](
            x,
            self._values,
            self._scales,
            self._zeros,
            None if partial else bias,
            sums,
            rows,
            self._outs,
            self._ins,
            x.stride(0),
            self._groups,
            math.ceil(self._groups / tile.parts),
            BITS=self._bits,
            BLOCK_OUT=tile.outs,
            BLOCK_ROWS=tile.rows,
            BIASED=bias is not None and not partial,
            PARTS=partial,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **OPTIONS,
        )
        if partial:
            size = out.numel()
            kernels.sum_of_parts[(math.ceil(size / _SUM_BLOCK),)](
                sums,
                bias,
                out,
                size,
                self._outs,
                tile.parts,
                BLOCK=_SUM_BLOCK,
                BIASED=bias is not None,
                **OPTIONS,
            )
        return out

    def restored(self, dtype: torch.dtype) -> Tensor:
        """The weight [N, K] that the integers stand for, rounded twice."""
        if self._bits == 8:
            wide = self._values.to(dtype) * self._scales.to(dtype)[:, None]
        else:
            values = torch.cat((self._values & 15, self._values >> 4), 2).to(dtype)
            wide = (values - self._zeros.to(dtype)[..., None]).mul_(self._scales.to(dtype)[..., None])
        return wide.transpose(0, 1).reshape(self._outs, -1)[:, : self._ins]


def _pack(weight: Tensor, scheme: str) -> tuple[Tensor, Tensor, Tensor]:
    """(values [groups, N, bytes of a group], scales, zeros) of [N, K], as quantized_kernels reads them."""
    rows, ins = weight.shape
    made = quantize(weight, scheme, None if scheme == "int8" else GROUP)
    groups = math.ceil(ins / GROUP)
    values = torch.nn.functional.pad(made.values, (0, groups * GROUP - ins)).view(rows, groups, GROUP)
    values = values.transpose(0, 1)
    if made.zeros is None:
        return values.contiguous(), made.scales, made.scales.new_empty(0, dtype=torch.uint8)
    pairs = values[..., : GROUP // 2] | values[..., GROUP // 2 :] << 4
    return pairs.contiguous(), made.scales.T.contiguous(), made.zeros.T.contiguous()


def round_to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """quantization.quantize_fp8, in one pass over x; of rows that one program cannot hold, by torch."""
    from . import quantized_kernels as kernels

    rows, n = x.shape
    if n > _WIDEST:
        return quantize_fp8(x)
    if x.stride(1) != 1:
        x = x.contiguous()
    out = torch.empty((rows, n), dtype=FP8, device=x.device)
    scales = torch.empty(rows, device=x.device)
    size = _row_block(n)
    if rows:
        warps = _row_warps(size)
        kernels.round_to_fp8[(rows,)](x, out, scales, n, x.stride(0), BLOCK=size, num_warps=warps, **OPTIONS)
    return out, scales


def _row_block(n: int) -> int:
    return max(_NARROWEST, 1 << (n - 1).bit_length())


def _row_warps(size: int) -> int:
    return min(32, max(1, size // 1024))


@lru_cache
def _device(device: torch.device) -> tuple[str, int]:
    """(architecture, multiprocessors); of a CPU, where kernels are interpreted, something small."""
    if device.type != "cuda":
        return "sm_80", 4
    properties = torch.cuda.get_device_properties(device)
    return architecture(capability(device)), properties.multi_processor_count


def product_configurations() -> Iterator[Configuration]:
    """Every dtype, scheme, tile and bias; a trait says which architectures choose it."""
    where: dict[tuple[int, ...], list[str]] = {}
    for bits in (8, 4):
        for name in SHARED_MEMORY:
            for rows in (1, 32, 64, 65):
                tile = choose(rows, 4096, 32, bits, name, 132)
                key = (bits, tile.outs, tile.rows, tile.warps, tile.stages, int(rows <= 64))
                where.setdefault(key, []).append(name)
    for (bits, outs, rows, warps, deep, few), names in where.items():
        for dtype in TYPES.values():
            for biased, parts in ((False, False), (True, False), (False, True)):
                if few or not parts:
                    yield _configuration(bits, outs, rows, warps, deep, names, dtype, biased, parts)


def _configuration(
    bits: int,
    outs: int,
    rows: int,
    warps: int,
    deep: int,
    names: list[str],
    dtype: str,
    biased: bool,
    parts: bool,
) -> Configuration:
    return Configuration(
        label=f"int{bits} · {dtype} · {outs}x{rows}" + " · bias" * biased + " · parts" * parts,
        signature={
            "x": f"*{dtype}",
            "values": "*i8" if bits == 8 else "*u8",
            "scales": "*fp32" if bits == 8 else "*bf16",
            "zeros": "*u8",
            "bias": f"*{dtype}" if biased else "constexpr",
            "out": "*fp32" if parts else f"*{dtype}",
            **dict.fromkeys(("rows", "outs", "ins", "x_stride", "groups", "groups_per_part"), "i32"),
            **dict.fromkeys(("BITS", "BLOCK_OUT", "BLOCK_ROWS", "BIASED", "PARTS"), "constexpr"),
        },
        constants={
            **({} if biased else {"bias": None}),
            "BITS": bits,
            "BLOCK_OUT": outs,
            "BLOCK_ROWS": rows,
            "BIASED": biased,
            "PARTS": parts,
        },
        num_warps=warps,
        num_stages=deep,
        divisible=("outs", "ins", "x_stride"),
        traits={"dtype": dtype, "bits": bits, "tile": (outs, rows), "targets": tuple(names)},
    )


def sum_configurations() -> Iterator[Configuration]:
    """Every dtype, with and without bias."""
    for dtype in TYPES.values():
        for biased in (False, True):
            yield Configuration(
                label=f"{dtype}{' · bias' if biased else ''}",
                signature={
                    "sums": "*fp32",
                    "bias": f"*{dtype}" if biased else "constexpr",
                    "out": f"*{dtype}",
                    **dict.fromkeys(("size", "outs", "parts"), "i32"),
                    **dict.fromkeys(("BLOCK", "BIASED"), "constexpr"),
                },
                constants={**({} if biased else {"bias": None}), "BLOCK": _SUM_BLOCK, "BIASED": biased},
                divisible=("size", "outs"),
                traits={"dtype": dtype},
            )


def fp8_configurations() -> Iterator[Configuration]:
    """Every power of two, for devices that have the type."""
    for size in (1 << n for n in range(_NARROWEST.bit_length() - 1, _WIDEST.bit_length())):
        yield Configuration(
            label=f"row {size}",
            signature={
                "x": "*bf16",
                "out": "*fp8e4nv",
                "scales": "*fp32",
                "n": "i32",
                "x_stride": "i32",
                "BLOCK": "constexpr",
            },
            constants={"BLOCK": size},
            num_warps=_row_warps(size),
            divisible=("n", "x_stride"),
            traits={"dtype": "bf16", "row": size, "targets": ("sm_89", "sm_90", "sm_100", "sm_120")},
        )
