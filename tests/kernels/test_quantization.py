"""What int8 and int4 weights mean."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from penstock.kernels.quantization import dequantize, quantize, quantize_activations

WEIGHTS = arrays(
    "float32", st.tuples(st.integers(1, 5), st.integers(1, 200)), elements=st.floats(-8, 8, width=32)
)


@given(WEIGHTS, st.sampled_from([64, 128, None]))
def test_int8_is_off_by_half_a_step_at_most(array: object, group: int | None) -> None:
    weight = torch.tensor(array)
    quantized = quantize(weight, "int8", group)
    assert quantized.values.dtype == torch.int8
    assert quantized.values.abs().max() <= 127
    error = (dequantize(quantized, torch.float32) - weight).abs()
    step = quantized.scales[:, None]
    if group is not None:
        step = quantized.scales.float().repeat_interleave(group, 1)[:, : weight.shape[1]]
    smallest = torch.finfo().tiny  # below, a bfloat16 has fewer bits
    assert (error <= (step * 0.5001).clamp(min=smallest)).all()
    assert torch.equal(quantize(-weight, "int8", group).values, -quantized.values)


@given(WEIGHTS, st.sampled_from([64, 128]))
def test_int4_is_off_by_a_step_at_most_and_keeps_zero(array: object, group: int) -> None:
    weight = torch.tensor(array)
    quantized = quantize(weight, "int4", group)
    assert quantized.zeros is not None
    assert quantized.values.max() <= 15
    assert quantized.zeros.max() <= 15
    assert quantized.scales.shape == quantized.zeros.shape == (len(weight), -(-weight.shape[1] // group))
    restored = dequantize(quantized, torch.float32)
    step = quantized.scales.float().repeat_interleave(group, 1)[:, : weight.shape[1]]
    # the zero point is rounded, and the step is a bfloat16
    assert ((restored - weight).abs() <= 1.1 * step).all()
    assert (restored[weight == 0] == 0).all()


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_groups_do_not_see_each_other(scheme: str) -> None:
    weight = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    outlier = weight.clone()
    outlier[:, 200] = 1000.0
    first, second = (dequantize(quantize(each, scheme), torch.float32) for each in (weight, outlier))
    assert torch.equal(first[:, :128], second[:, :128])
    assert not torch.equal(first[:, 128:], second[:, 128:])


@given(WEIGHTS)
def test_activations_are_off_by_half_a_step_of_their_group(array: object) -> None:
    x = torch.tensor(array)
    rounded = quantize_activations(x)
    for first in range(0, x.shape[1], 128):
        part, got = x[:, first : first + 128], rounded[:, first : first + 128]
        most = part.abs().amax(1, keepdim=True)
        smallest = 127 * torch.finfo().tiny  # has no inverse
        assert ((got - part).abs() <= (most / 127 * 0.5001).clamp(min=smallest)).all()
        assert (got[part == 0] == 0).all()


def test_activations_without_an_inverse_are_zero() -> None:
    x = torch.tensor([[1e-38, 0.0, -1e-39]])
    assert torch.equal(quantize_activations(x), torch.zeros(1, 3))


def test_unknown_scheme() -> None:
    with pytest.raises(ValueError, match=r"nf4.*int8, w8a8, int4, fp8"):
        quantize(torch.zeros(1, 1), "nf4")
