"""Products with weights in panels against float64, against each other, and against their specification."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penstock.kernels.cpu import linear as panels_module
from penstock.kernels.cpu import matrix as forms_module
from penstock.kernels.cpu.library import available
from penstock.kernels.cpu.linear import BF16Panels, IntegerPanels, Panels, agree
from penstock.kernels.cpu.matrix import CpuMatrix, can_pack, matrix
from penstock.kernels.operations import Matrix
from penstock.kernels.quantization import INTEGERS as SCHEMES
from penstock.kernels.quantization import dequantize, quantize, quantize_activations

LIBRARY = available(wait_seconds=120)
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="no C++ compiler, or PENSTOCK_CPU_KERNELS=0")
CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(64, 64), (100, 96), (7, 3), (1000, 70), (192, 1024), (130, 4200), (130, 5000)]


def tensors(columns: int, depth: int, rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(columns + depth)
    shapes = ((columns, depth), (columns,), (rows, depth))
    weight, bias, x = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return weight, bias, x


def exact(weight: torch.Tensor, bias: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return x.double() @ weight.double().T + bias.double()


def seen(scheme: str | None, x: torch.Tensor) -> torch.Tensor:
    """Activations as the scheme multiplies them."""
    return quantize_activations(x) if scheme == "w8a8" else x


def assert_near(got: torch.Tensor, want: torch.Tensor, error: float) -> None:
    """Within `error` of the greatest element, and one rounding."""
    rounding = 2.0**-8 if got.dtype == torch.bfloat16 else 0.0
    difference = (got.double() - want).abs()
    assert (difference <= error * want.abs().max() + rounding * want.abs()).all(), difference.max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_integers_are_what_the_specification_says(
    dtype: torch.dtype, scheme: str, shape: tuple[int, int], threads: int
) -> None:
    assert LIBRARY is not None
    weight, bias, x = tensors(*shape, rows=17, dtype=dtype)
    panels = IntegerPanels(LIBRARY, weight, scheme)
    restored = dequantize(quantize(weight, scheme), torch.float32)
    assert_near(panels(x, bias), exact(restored, bias, seen(scheme, x)), 2e-4)
    assert_near(panels(x, None), exact(restored, torch.zeros(1), seen(scheme, x)), 2e-4)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_packing_loses_nothing(scheme: str, group: int, dtype: torch.dtype) -> None:
    """The integers in the panels are exactly those of the specification."""
    assert LIBRARY is not None
    weight, _, _ = tensors(150, 320, 1, dtype)
    weight[3] = 0.0
    weight[4, :128] = 5.0
    weight[5, 128:256] = -5.0
    memory = torch.empty(3 * 64 * 320, dtype=torch.bfloat16)
    IntegerPanels(LIBRARY, weight, scheme, group).restore(memory.data_ptr())
    restored = memory.view(3, 160, 64, 2).permute(0, 2, 1, 3).reshape(192, 320)[:150]
    assert torch.equal(restored, dequantize(quantize(weight, scheme, group), torch.bfloat16))


@given(
    scheme=st.sampled_from(SCHEMES),
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 20),
    magnitude=st.sampled_from([1e-38, 1e-36, 1e-30, 1e-3, 1.0, 1e4, 1e30]),
    seed=st.integers(0, 9),
)
def test_a_row_depends_on_itself_alone(
    scheme: str, dtype: torch.dtype, rows: int, magnitude: float, seed: int
) -> None:
    assert LIBRARY is not None
    weight, bias, _ = tensors(70, 300, 1, dtype)
    generator = torch.Generator().manual_seed(seed)
    x = (magnitude * torch.randn(rows, 300, generator=generator)).to(dtype)
    panels = IntegerPanels(LIBRARY, weight, scheme)
    together = panels(x, bias)
    assert torch.equal(together, torch.cat([panels(row[None], bias) for row in x]))
    restored = dequantize(quantize(weight, scheme), torch.float32)
    assert_near(together, exact(restored, bias, seen(scheme, x)), 2e-4)


def test_an_outlier_costs_its_span_only() -> None:
    """An activation that is 10,000 times greater than the rest leaves other spans of inputs exact."""
    assert LIBRARY is not None
    weight, _, x = tensors(64, 512, 1, torch.float32)
    weight[:, :256] = 0.0
    panels = IntegerPanels(LIBRARY, weight, "int8")
    outlier = x.clone()
    outlier[0, 5] = 1e4
    assert torch.equal(panels(x, None), panels(outlier, None))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_numbers_are_not_hidden(scheme: str, value: float) -> None:
    """A row with NaN or inf in it gives NaN, and only this row."""
    assert LIBRARY is not None
    weight, _, x = tensors(64, 256, 5, torch.float32)
    panels = IntegerPanels(LIBRARY, weight, scheme)
    want = panels(x, None)
    x[2, 200] = value
    got = panels(x, None)
    assert not got[2].isfinite().any()
    fine = [0, 1, 3, 4]
    assert torch.equal(got[fine], want[fine])


def test_what_is_not_supported() -> None:
    assert LIBRARY is not None
    weight, _, x = tensors(64, 64, 2, torch.float32)
    with pytest.raises(ValueError, match="int8, w8a8, int4"):
        IntegerPanels(LIBRARY, weight, "int2")
    with pytest.raises(ValueError, match="in groups of 32"):
        IntegerPanels(LIBRARY, weight, "int4", 32)
    with pytest.raises(ValueError, match=r"linear of \[2, 63\]"):
        IntegerPanels(LIBRARY, weight, "int8")(x[:, :63], None)
    with pytest.raises(ValueError, match="float64"):
        IntegerPanels(LIBRARY, weight, "int8")(x.double(), None)


# ----------------------------------------------------------------------------------------- oneDNN's bfloat16


def onednn(weight: torch.Tensor) -> BF16Panels:
    if not can_pack(torch.bfloat16):
        pytest.skip("oneDNN packs no bfloat16 here")
    assert LIBRARY is not None
    if not BF16Panels.can_read(LIBRARY, *weight.shape):
        pytest.skip("these kernels multiply no bfloat16 here")
    return BF16Panels(LIBRARY, torch.ops.mkldnn._reorder_linear_weight(weight), *weight.shape)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 8, 13, 64])
@pytest.mark.parametrize("shape", [(64, 64), (192, 1024), (128, 8192)], ids=str)
def test_bf16_panels(rows: int, shape: tuple[int, int], threads: int) -> None:
    weight, bias, x = tensors(*shape, rows=rows, dtype=torch.bfloat16)
    panels = onednn(weight)
    got = panels(x, bias)
    assert_near(got, exact(weight, bias, x), 1e-5)
    assert torch.equal(got, torch.cat([panels(row[None], bias) for row in x]))


@pytest.mark.parametrize("scheme", [None, *SCHEMES])
def test_no_rows(scheme: str | None, threads: int) -> None:
    assert LIBRARY is not None
    weight, bias, x = tensors(192, 1024, 0, torch.bfloat16)
    panels = onednn(weight) if scheme is None else IntegerPanels(LIBRARY, weight, scheme)
    assert panels(x, bias).shape == (0, 192)


def test_rows_that_are_not_dense() -> None:
    weight, bias, wide = tensors(64, 128, 6, torch.bfloat16)
    panels = onednn(weight[:, :64].contiguous())
    for x in (wide[:, :64], wide[:, 1:65], wide[:, ::2], wide.flatten()[: 6 * 65].view(6, 65)[:, :64]):
        assert torch.equal(panels(x, bias), panels(x.contiguous(), bias))


def test_a_foreign_layout_is_not_read() -> None:
    weight, _, _ = tensors(128, 128, 1, torch.bfloat16)
    panels = onednn(weight)
    assert agree(panels, lambda x: x @ weight.T, 128)
    louder = weight.clone()
    louder[3] *= 1000  # one loud output hides no other
    louder_panels = onednn(louder)
    assert agree(louder_panels, lambda x: x @ louder.T, 128)
    quiet = louder.clone()
    quiet[[7, 99]] = louder[[99, 7]]
    assert not agree(louder_panels, lambda x: x @ quiet.T, 128)
    swapped = weight.clone()
    swapped[[7, 99]] = weight[[99, 7]]
    assert not agree(panels, lambda x: x @ swapped.T, 128)
    shifted = weight.roll(2, 1)
    assert not agree(panels, lambda x: x @ shifted.T, 128)


@pytest.mark.parametrize("scheme", [None, *SCHEMES])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_form_of_a_matrix_is_the_same_product(
    scheme: str | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With our kernels, with oneDNN alone, without either, and as with AMX: on both sides of its switch."""
    assert LIBRARY is not None
    weight, bias, x = tensors(128, 192, 80, dtype)
    meant = weight if scheme is None else dequantize(quantize(weight, scheme), torch.float32)
    want = exact(meant, bias, seen(scheme, x))
    forms = [matrix(LIBRARY, weight, scheme)]
    if scheme is None:
        with monkeypatch.context() as context:
            context.setattr(BF16Panels, "can_read", lambda *_: False)
            forms.append(matrix(LIBRARY, weight))
            assert panels_of(forms[-1]) is None
            context.setattr(forms_module, "can_pack", lambda dtype: False)
            forms.append(matrix(LIBRARY, weight))
            assert not forms[-1].copied
    forms_module._restorable.cache_clear()
    for module in (forms_module, panels_module):
        monkeypatch.setattr(module, "has_amx", lambda: True)
    forms.append(matrix(LIBRARY, weight, scheme))
    for form in forms:
        for rows in (1, 8, 9, 63, 64, 80):
            # restored weights are rounded to bfloat16
            assert_near(form(x[:rows], bias), want[:rows], 5e-3 if dtype == torch.bfloat16 else 2e-4)
        assert form.nbytes > 0
    found = panels_of(forms[-1])
    if scheme is None:
        assert found is None or found.most_rows == 8
    else:
        assert found is not None
        assert (found.most_rows == 63) == (dtype == torch.bfloat16 and scheme != "w8a8" and _packs())
    forms_module._restorable.cache_clear()


def panels_of(form: Matrix) -> Panels | None:
    return form.panels if isinstance(form, CpuMatrix) else None


def _packs() -> bool:
    assert LIBRARY is not None
    return can_pack(torch.bfloat16) and BF16Panels.can_read(LIBRARY, 128, 192)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_broken_weight_is_not_hidden(scheme: str, value: float) -> None:
    """Its output channel gives NaN or inf, as in the specification, and only this one."""
    assert LIBRARY is not None
    weight, _, x = tensors(64, 256, 5, torch.float32)
    want = IntegerPanels(LIBRARY, weight, scheme)(x, None)
    weight[7, 200] = value
    got = IntegerPanels(LIBRARY, weight, scheme)(x, None)
    assert not got[:, 7].isfinite().any()
    fine = [channel for channel in range(64) if channel != 7]
    assert torch.equal(got[:, fine], want[:, fine])
    assert not dequantize(quantize(weight, scheme), torch.float32)[7].isfinite().all()
