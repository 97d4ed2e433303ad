"""Triton's products with quantised weights, interpreted on a CPU, against the specification; and how they
are cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.kernels.quantization import GROUP, quantize_fp8
from penstock.kernels.reference import ReferenceMatrix
from penstock.kernels.triton import quantized
from penstock.kernels.triton.fallback import Fallback
from penstock.kernels.triton.quantized import (
    SHARED_MEMORY,
    QuantizedMatrix,
    architecture,
    choose,
    round_to_fp8,
)

quantized_kernels = pytest.importorskip("penstock.kernels.triton.quantized_kernels", exc_type=ImportError)
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION", "ignore:invalid value encountered")
BF16, FP16 = torch.bfloat16, torch.float16


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def specified(weight: torch.Tensor, scheme: str) -> ReferenceMatrix:
    """int8 has one scale per channel here."""
    return ReferenceMatrix(weight, scheme, None if scheme == "int8" else GROUP)


def assert_as_specified(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.dtype == want.dtype
    rounding = 2**-7 if want.dtype == BF16 else 2**-9
    torch.testing.assert_close(got, want, rtol=rounding, atol=2e-4 * float(want.abs().max()))


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(
    ("rows", "outs", "ins"),
    [
        (1, 72, 140),  # nothing is a multiple of anything
        (16, 64, 128),
        (17, 65, 129),
        (3, 40, 2048),  # in parts
        (33, 130, 1100),  # in parts that are not alike
        (64, 128, 256),
        (65, 96, 384),
        (140, 130, 130),
    ],
)
def test_products(scheme: str, dtype: torch.dtype, rows: int, outs: int, ins: int) -> None:
    weight, x = normal(outs, ins, dtype=dtype), normal(rows, ins, dtype=dtype, seed=1)
    matrix, oracle = QuantizedMatrix(weight, scheme), specified(weight, scheme)
    for bias in (None, normal(outs, dtype=dtype, seed=2)):
        assert_as_specified(matrix(x, bias), oracle(x, bias))
    assert matrix.copied


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_many_tiles_of_rows_and_columns(scheme: str) -> None:
    """More than eight tiles of rows: a second band."""
    weight, x = normal(130, 128, dtype=FP16), normal(1100, 128, dtype=FP16, seed=1)
    assert_as_specified(QuantizedMatrix(weight, scheme)(x, None), specified(weight, scheme)(x, None))


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_rows_of_another_matrix(scheme: str) -> None:
    weight, wide = normal(72, 140, dtype=BF16), normal(9, 300, dtype=BF16, seed=1)
    matrix = QuantizedMatrix(weight, scheme)
    for x in (wide[:, 20:160], normal(140, 9, dtype=BF16, seed=2).T):
        assert torch.equal(matrix(x, None), matrix(x.contiguous(), None))
    assert matrix(wide[:0, :140], None).shape == (0, 72)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_the_restored_weight_is_the_one_that_is_meant(scheme: str, dtype: torch.dtype) -> None:
    """What old GPUs multiply with."""
    weight, x = normal(72, 140, dtype=dtype), normal(5, 140, dtype=dtype, seed=1)
    matrix, oracle = QuantizedMatrix(weight, scheme, compiled=False), specified(weight, scheme)
    torch.testing.assert_close(matrix.restored(dtype).float(), oracle._weight, rtol=2**-6, atol=1e-6)
    want = oracle(x, None)
    torch.testing.assert_close(matrix(x, None), want, rtol=2**-5, atol=2e-2 * float(want.abs().max()))


@pytest.mark.parametrize(("scheme", "least"), [("int8", 1.0), ("int4", 0.5)])
def test_bytes_are_those_of_the_integers(scheme: str, least: float) -> None:
    matrix = QuantizedMatrix(normal(64, 1024, dtype=BF16), scheme)
    assert matrix.nbytes == sum(part.nbytes for part in (matrix._values, matrix._scales, matrix._zeros))
    assert 64 * 1024 * least < matrix.nbytes < 64 * 1024 * least * 1.06


def test_large_weights_are_packed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = normal(50, 256, dtype=BF16)
    for scheme in ("int8", "int4"):
        whole = QuantizedMatrix(weight, scheme)
        monkeypatch.setattr(quantized, "_CHUNK", 256 * 7)
        pieces = QuantizedMatrix(weight, scheme)
        monkeypatch.undo()
        for name in ("_values", "_scales", "_zeros"):
            assert torch.equal(getattr(whole, name), getattr(pieces, name))


def test_what_does_not_fit_is_refused() -> None:
    matrix = QuantizedMatrix(normal(8, 128, dtype=BF16), "int8")
    for x in (normal(2, 64, dtype=BF16), normal(2, 128, dtype=torch.float32)):
        with pytest.raises(ValueError, match=r"need \[T, 128\]"):
            matrix(x, None)
    with pytest.raises(ValueError, match=r"w8a8.*int8, int4"):
        QuantizedMatrix(normal(8, 128, dtype=BF16), "w8a8")


def test_a_kernel_that_cannot_be_compiled_leaves_the_restored_weight(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One warning for all weights of a model, and the same results."""

    class Broken:
        def __getitem__(self, grid: object) -> Any:
            raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr(quantized_kernels, "quantized_product", Broken())
    fallback = Fallback()
    weight, x = normal(72, 140, dtype=BF16), normal(5, 140, dtype=BF16, seed=1)
    for scheme in ("int8", "int4"):
        got = QuantizedMatrix(weight, scheme, fallback=fallback)(x, None)
        assert torch.equal(got, QuantizedMatrix(weight, scheme, compiled=False)(x, None))
    assert len(caplog.messages) == 1
    assert "PassManager::run failed" in caplog.text


def test_an_error_of_the_device_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def __getitem__(self, grid: object) -> Any:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(quantized_kernels, "quantized_product", Gone())
    with pytest.raises(RuntimeError, match="illegal memory access"):
        QuantizedMatrix(normal(8, 128, dtype=BF16), "int8")(normal(2, 128, dtype=BF16), None)


# ---- how products are cut ----


@settings(max_examples=100)
@given(
    rows=st.integers(1, 300),
    outs=st.integers(1, 60_000),
    groups=st.integers(1, 250),
    bits=st.sampled_from([8, 4]),
    where=st.sampled_from(sorted(SHARED_MEMORY)),
    processors=st.integers(1, 160),
)
def test_every_part_has_work_and_every_tile_fits(
    rows: int, outs: int, groups: int, bits: int, where: str, processors: int
) -> None:
    tile = choose(rows, outs, groups, bits, where, processors)
    each = -(-groups // tile.parts)
    assert (tile.parts - 1) * each < groups <= tile.parts * each
    assert tile.parts == 1 or each >= 4
    assert tile.parts == 1 or rows <= 64
    held = tile.stages * (tile.outs * 16 * bits + tile.rows * 256) if where != "gfx942" else 0
    assert held <= SHARED_MEMORY[where]
    known = {
        (c.traits["bits"], *c.traits["tile"], c.num_warps, c.num_stages, c.constants["PARTS"])
        for c in quantized.product_configurations()
        if where in c.traits["targets"]
    }
    assert (bits, tile.outs, tile.rows, tile.warps, tile.stages, tile.parts > 1) in known


def test_few_rows_of_a_small_weight_are_summed_in_parts() -> None:
    h100 = 132
    assert choose(1, 1024, 8, 8, "sm_90", h100).parts == 2  # 0.6B's hidden size: 16 tiles alone
    assert choose(1, 4096, 32, 8, "sm_90", h100).parts == 4
    assert choose(1, 24_576, 32, 8, "sm_90", h100).parts == 1
    assert choose(256, 4096, 32, 8, "sm_90", h100).parts == 1


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_86"),
        ((8, 7), "sm_80"),
        ((8, 9), "sm_86"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_100"),
        ((11, 0), "sm_86"),
        ((12, 0), "sm_120"),
        (None, "gfx942"),
    ],
)
def test_whose_choices_a_device_gets(capability: tuple[int, int] | None, name: str) -> None:
    assert architecture(capability) == name


# ---- fp8 ----


@pytest.mark.parametrize(("rows", "n"), [(1, 16), (7, 300), (3, 4096)])
@pytest.mark.parametrize("scale", [1.0, 1e-4, 3e4])
def test_activations_are_rounded_as_specified(rows: int, n: int, scale: float) -> None:
    x = normal(rows, n, dtype=BF16, seed=n) * scale
    x[0, : n // 2] = 0
    values, scales = round_to_fp8(x)
    want, factors = quantize_fp8(x)
    assert torch.equal(scales, factors)
    assert values.dtype == want.dtype
    assert torch.equal(values.float(), want.float())


def test_rows_that_no_program_holds_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized_kernels, "round_to_fp8", None)
    x = normal(2, (1 << 15) + 16, dtype=BF16)
    for got, want in zip(round_to_fp8(x), quantize_fp8(x), strict=True):
        assert torch.equal(got.float(), want.float())


def test_rows_without_a_scale() -> None:
    x = torch.zeros(3, 64, dtype=BF16)
    x[1, 5] = torch.nan
    x[2, 5] = torch.inf
    values, scales = round_to_fp8(x)
    assert scales[0] == 1.0
    assert (values[0].float() == 0).all()
    for row in (1, 2):
        assert not scales[row].isfinite()
        assert not quantize_fp8(x)[1][row].isfinite()
