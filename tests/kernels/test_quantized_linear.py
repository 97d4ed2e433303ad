"""Quantised weights on GPUs, as far as a CPU can play one: fp8 by torch's scaled products, and who gets
what."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from penstock.kernels import quantized_linear, scaled
from penstock.kernels.capability import Device
from penstock.kernels.quantization import FP8, dequantize, quantize, quantize_fp8, rounded_activations
from penstock.kernels.quantized_linear import with_quantized_linear
from penstock.kernels.reference import ReferenceMatrix
from penstock.kernels.scaled import ScaledMatrix
from penstock.kernels.torch_operations import TorchMatrix, torch_operations
from penstock.kernels.triton.quantized import QuantizedMatrix

CPU, BF16 = torch.device("cpu"), torch.bfloat16
H100 = Device("cuda", "NVIDIA H100", (9, 0))
A100 = Device("cuda", "NVIDIA A100", (8, 0))
T4 = Device("cuda", "Tesla T4", (7, 5))
ROWS = arrays(
    "float32", st.tuples(st.integers(1, 4), st.integers(1, 70)), elements=st.floats(-1e4, 1e4, width=32)
)
needs_scaled = pytest.mark.skipif(not scaled.multiplies_fp8(), reason="this torch has no scaled products")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


@given(ROWS)
def test_fp8_is_off_by_half_of_its_last_bit(array: object) -> None:
    rows = torch.tensor(array)
    values, scales = quantize_fp8(rows)
    assert values.dtype == FP8
    assert (scales > 0).all()
    got = values.float() * scales[:, None]
    assert torch.equal(got, rounded_activations(rows, "fp8"))
    assert torch.equal(got, dequantize(quantize(rows, "fp8"), torch.float32))
    # three bits of mantissa; below 2^-6 of the type, steps of 2^-9
    bound = torch.maximum(rows.abs() * 2**-4, scales[:, None] * 2**-10) * 1.001
    assert ((got - rows).abs() <= bound).all()
    most = rows.abs().amax(1)
    assert torch.allclose(got.abs().amax(1), most, rtol=1e-6)


def test_what_is_not_finite_stays_so() -> None:
    rows = torch.zeros(3, 4)
    rows[0, 1], rows[1, 2] = torch.nan, torch.inf
    got = rounded_activations(rows, "fp8")
    assert not got[0].isfinite().all()
    assert not got[1].isfinite().all()
    assert (got[2] == 0).all()


@needs_scaled
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "outs", "ins"), [(1, 16, 32), (5, 72, 140), (40, 33, 65), (0, 16, 16)])
def test_scaled_products(rows: int, outs: int, ins: int, bias: bool) -> None:
    weight, x = normal(outs, ins), normal(rows, ins, seed=1)
    vector = normal(outs, seed=2) if bias else None
    got, want = ScaledMatrix(weight)(x, vector), ReferenceMatrix(weight, "fp8")(x, vector)
    assert got.shape == want.shape
    assert got.is_contiguous()
    if rows:
        torch.testing.assert_close(got, want, rtol=2**-7, atol=2e-3 * float(want.abs().max()))


@needs_scaled
def test_both_of_torchs_functions_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, x = ScaledMatrix(normal(32, 64)), normal(3, 64, seed=1)
    public = matrix(x, None)
    if not hasattr(torch, "_scaled_mm") or not hasattr(torch.nn.functional, "scaled_mm"):
        pytest.skip("only one of them is here")
    monkeypatch.delattr(torch.nn.functional, "scaled_mm")
    assert torch.equal(matrix(x, None), public)


@needs_scaled
def test_weights_are_rounded_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = normal(50, 64)
    whole = ScaledMatrix(weight)
    monkeypatch.setattr(scaled, "_CHUNK", 64 * 7)
    pieces = ScaledMatrix(weight)
    assert torch.equal(whole._weight.view(torch.uint8), pieces._weight.view(torch.uint8))
    assert torch.equal(whole._scales, pieces._scales)
    assert whole.nbytes == 64 * 64 + 64 * 4  # outputs padded to 16


@needs_scaled
def test_fp8_refuses_other_shapes_and_types() -> None:
    matrix = ScaledMatrix(normal(16, 32))
    for x in (normal(2, 16), normal(2, 32).half()):
        with pytest.raises(ValueError, match=r"need \[T, 32\] of bfloat16"):
            matrix(x, None)


@pytest.mark.parametrize(
    ("device", "triton", "schemes", "compiled"),
    [
        (H100, True, ("int8", "int4", "fp8"), True),
        (H100, False, ("int8", "int4", "fp8"), False),
        (A100, True, ("int8", "int4"), True),
        (T4, True, ("int8", "int4"), False),
    ],
)
def test_who_multiplies_with_what(
    device: Device,
    triton: bool,
    schemes: tuple[str, ...],
    compiled: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(quantized_linear, "installed", lambda: triton)
    monkeypatch.setattr(quantized_linear, "multiplies_fp8", lambda: True)
    caplog.set_level("INFO")
    table = with_quantized_linear(torch_operations(CPU, BF16), device)
    assert table.schemes == schemes
    assert ("memory for speed" in caplog.text) == (not compiled)
    weight = normal(16, 128)
    assert isinstance(table.linear(weight, None), TorchMatrix)
    for scheme in ("int8", "int4"):
        made = table.linear(weight, scheme)
        assert isinstance(made, QuantizedMatrix)
        assert made._compiled is compiled
    with pytest.raises(ValueError, match=r"w8a8 on .*: it multiplies with int8, int4"):
        table.linear(weight, "w8a8")
    if "fp8" in schemes:
        fp8 = table.linear(weight, "fp8")
        assert isinstance(fp8, ScaledMatrix)
        assert (fp8._rounding is not quantize_fp8) is compiled
