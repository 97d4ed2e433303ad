"""Quantisation of weights: what the integers of a matrix mean. The specification that fast kernels follow.

    int8    w ≈ scale · q                    q in [-127, 127]; on a CPU one bfloat16 scale per output
                                             channel and group of 128 inputs (64 where asked); on a GPU one
                                             float32 per channel: products would have to end sums for more
    w8a8    the same weights                 and activations x ≈ scale · q, one scale per token and group of
                                             128 inputs: as llama.cpp's Q8_0 has it for groups of 32
    int4    w ≈ scale · (q - zero)           q and zero in [0, 15], one bfloat16 scale and one zero per output
                                             channel and group of 128 inputs (64 where asked)

    fp8     w ≈ scale · q                    q in float8_e4m3fn (±448, three bits of mantissa), one float32
                                             scale per output channel; and activations x ≈ scale · q,
                                             one scale per token

All round to nearest: no calibration data, made while a checkpoint is read. The range of a group of int4
always includes 0, so that a zero weight stays zero.

Knows plain tensors. Knows nothing of layouts in memory: see kernels/cpu/csrc/linear.h.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

#: Inputs that share a scale and a zero in int4, and a scale of activations in w8a8.
GROUP = 128
INTEGERS = ("int8", "w8a8", "int4")
SCHEMES = (*INTEGERS, "fp8")
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


@dataclass(frozen=True, slots=True)
class Quantized:
    """A quantised [N, K] matrix.

    Attributes:
        values: int8: int8 [N, K]; int4: uint8 [N, K], one value per byte; fp8: float8_e4m3fn [N, K].
        scales: with groups bfloat16 [N, ceil(K / group)]; without, and fp8: float32 [N].
        zeros: int4: uint8 [N, ceil(K / group)].
        group: inputs per scale; None: all of a channel.
    """

    values: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None
    group: int | None = GROUP


def quantize(weight: torch.Tensor, scheme: str, group: int | None = GROUP) -> Quantized:
    """Quantise [N, K] by one of SCHEMES. Raises ValueError for another one.

    group: inputs that share a scale; None: of int8 and w8a8 all of a channel.
    """
    if scheme in ("int8", "w8a8"):
        return _quantize_int8(weight.float(), group)
    if scheme == "int4":
        return _quantize_int4(weight.float(), group or GROUP)
    if scheme == "fp8":
        return Quantized(*quantize_fp8(weight), group=None)
    raise ValueError(f"scheme {scheme!r}; choose from {', '.join(SCHEMES)}")


def dequantize(matrix: Quantized, dtype: torch.dtype) -> torch.Tensor:
    """The [N, K] weight that the integers stand for, rounded once to `dtype`."""
    values, depth = matrix.values.float(), matrix.values.shape[1]
    if matrix.group is None:
        return (values * matrix.scales[:, None]).to(dtype)
    scales = matrix.scales.float().repeat_interleave(matrix.group, 1)[:, :depth]
    if matrix.zeros is not None:
        values -= matrix.zeros.float().repeat_interleave(matrix.group, 1)[:, :depth]
    return (values * scales).to(dtype)


def rounded_activations(x: torch.Tensor, scheme: str | None) -> torch.Tensor:
    """x [T, K] as a scheme sees it, in float32: rounded by w8a8 and fp8, itself by all others."""
    if scheme == "w8a8":
        return quantize_activations(x)
    if scheme == "fp8":
        values, scales = quantize_fp8(x)
        return values.float() * scales[:, None]
    return x.float()


def quantize_activations(x: torch.Tensor) -> torch.Tensor:
    """x [T, K] as w8a8 sees it: rounded to eight bits by groups of GROUP, and back to float32."""
    rows, depth = x.shape
    grouped = _in_groups(x.float(), GROUP)
    most = grouped.abs().amax(2, keepdim=True)
    inverse = torch.tensor(127.0) / most  # a number over a tensor would be the reciprocal, times the number
    # below the smallest, the inverse is no number; such groups are zero
    values = (grouped * inverse).round().where(most >= 127.0 * torch.finfo().tiny, torch.zeros(()))
    return (values * (most / 127.0)).view(rows, -1)[:, :depth]


def quantize_fp8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(float8_e4m3fn [R, K], float32 scales [R]) of rows [R, K]: of a weight, or of activations.

    A row's largest number becomes 448; a row of zeros has the scale 1. What is not finite stays so: a
    scale of infinity or NaN makes the whole row NaN.
    """
    wide = rows.float()
    scales = wide.abs().amax(1) / FP8_MAX
    # below the smallest normal number the quotient is no number; such rows are zero
    scales = torch.where(scales < torch.finfo().tiny, 1.0, scales)
    return (wide / scales[:, None]).to(FP8), scales


def restore_fp8(
    values: torch.Tensor, scales: torch.Tensor, block: tuple[int, int] | None, dtype: torch.dtype
) -> torch.Tensor:
    """The weight [N, K] of a checkpoint that stores it in fp8: value times scale in float32, rounded once.

    Args:
        values: float8_e4m3fn [N, K].
        scales: one number, [N] or [N, 1]; or with blocks [ceil(N / rows), ceil(K / columns)].
        block: (rows, columns) that share a scale.

    Raises:
        ValueError: scales of another shape.
    """
    rows, depth = values.shape
    blocks = None if block is None else (-(-rows // block[0]), -(-depth // block[1]))
    scales = scales.float()
    if block is not None and scales.shape == blocks:
        columns = scales.repeat_interleave(block[1], 1)[:, :depth]
        number = torch.arange(rows, device=values.device) // block[0]
    elif scales.numel() == 1 or scales.shape in ((rows,), (rows, 1)):
        columns = scales.reshape(-1, 1).expand(rows, 1)
        number = torch.arange(rows, device=values.device)
    else:
        also = f", or {list(blocks)}" if blocks else ""
        raise ValueError(f"scales of shape {list(scales.shape)}; need [], [{rows}] or [{rows}, 1]{also}")
    out = torch.empty((rows, depth), dtype=dtype, device=values.device)
    step = max(1, _CHUNK // max(1, depth))
    for first in range(0, rows, step):
        some = slice(first, first + step)
        out[some] = values[some].float().mul_(columns[number[some]])
    return out


_CHUNK = 1 << 24
"""Elements that are restored at a time: the temporary memory is some 8 bytes for each."""


def _quantize_int8(weight: torch.Tensor, group: int | None) -> Quantized:
    grouped = weight[:, None] if group is None else _in_groups(weight, group)
    scales = grouped.abs().amax(2) / 127.0
    if group is not None:
        scales = scales.bfloat16()
    scales[scales == 0] = 1.0
    # a bfloat16 may be a little less than what the greatest needs
    values = (grouped / scales.float()[..., None]).round().clamp(-127.0, 127.0)
    values = values.flatten(1)[:, : weight.shape[1]].to(torch.int8)
    return Quantized(values, scales.flatten() if group is None else scales, group=group)


def _in_groups(weight: torch.Tensor, group: int) -> torch.Tensor:
    """[N, K] → [N, groups, group], with zeros at the end."""
    rows, depth = weight.shape
    return torch.nn.functional.pad(weight, (0, -depth % group)).view(rows, -1, group)


def _quantize_int4(weight: torch.Tensor, group: int) -> Quantized:
    rows, depth = weight.shape
    grouped = _in_groups(weight, group)
    low = grouped.amin(2).clamp(max=0.0)
    high = grouped.amax(2).clamp(min=0.0)
    scales = ((high - low) / 15.0).bfloat16()
    scales[scales == 0] = 1.0
    step = scales.float()
    zeros = (-low / step).round().clamp(max=15.0)
    values = ((grouped / step[..., None]).round() + zeros[..., None]).clamp(0.0, 15.0)
    values = values.view(rows, -1)[:, :depth].to(torch.uint8)
    return Quantized(values, scales, zeros.to(torch.uint8), group)
