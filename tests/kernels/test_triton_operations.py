"""Triton's norms, rotation and gates against the specification."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from penstock.kernels import reference
from penstock.kernels.operations import Activation

from .test_operations import assert_near, assert_same, normal, turn
from .triton import DEVICE, DTYPES, needs_triton, quiet, table

pytestmark = [needs_triton, quiet, pytest.mark.parametrize("dtype", DTYPES)]


def here(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return normal(*shape, dtype=dtype, seed=seed, scale=scale).to(DEVICE)


@pytest.mark.parametrize(("rows", "width"), [(1, 8), (3, 100), (2, 1037), (0, 16)])
def test_rms_norm(dtype: torch.dtype, rows: int, width: int) -> None:
    x = here(rows, width, dtype=dtype, scale=3)
    weight = here(width, dtype=dtype, seed=1).abs() + 0.5
    norm = table(dtype).rms_norm
    assert_same(norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))
    strided = torch.stack([x, x], dim=-1)[..., 0]
    assert torch.equal(norm(strided, weight, 1e-6), norm(x, weight, 1e-6))


@pytest.mark.parametrize("shape", [(2, 48), (2, 3, 16)], ids=str)
def test_layer_norm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight, bias = (
        here(*size, dtype=dtype, seed=i) for i, size in enumerate((shape, shape[-1:], shape[-1:]))
    )
    got = table(dtype).layer_norm(x, weight, bias, 1e-5)
    assert_same(got, reference.layer_norm(x, weight, bias, 1e-5), atol=2**-9)


def test_rows_that_are_too_wide_for_a_program_are_computed_all_the_same(dtype: torch.dtype) -> None:
    x, weight = here(1, 40_000, dtype=dtype), here(40_000, dtype=dtype, seed=1)
    operations = table(dtype)
    assert_same(operations.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))
    got = operations.layer_norm(x, weight, weight, 1e-6)
    assert_same(got, reference.layer_norm(x, weight, weight, 1e-6), atol=2**-7)


@pytest.mark.parametrize(("dim", "width"), [(16, 16), (80, 32), (96, 96)])
@pytest.mark.parametrize("normed", [True, False])
def test_norm_and_rotation(dtype: torch.dtype, dim: int, width: int, normed: bool) -> None:
    tokens, heads = 3, 5
    cos, sin = turn(tokens, width, dtype)
    rotation = cos.to(DEVICE), sin.to(DEVICE)
    projection = here(tokens, heads + 2, dim, dtype=dtype, seed=dim)
    weight = here(heads, dim, dtype=dtype, seed=1).abs() + 0.5 if normed else None
    want = reference.rotate(projection[:, :heads].clone(), rotation, weight, 1e-6)
    rest = projection[:, heads:].clone()
    got = table(dtype).rotate(projection[:, :heads], rotation, weight, 1e-6)
    assert_same(got, want, atol=2**-7)  # a unit of what the rotation may cancel
    assert torch.equal(projection[:, heads:], rest)


def test_heads_that_do_not_lie_side_by_side_are_refused(dtype: torch.dtype) -> None:
    x = here(3, 2, 8, dtype=dtype).transpose(0, 1).contiguous().transpose(0, 1)
    cos, sin = turn(3, 8, dtype)
    with pytest.raises(ValueError, match="strides"):
        table(dtype).rotate(x, (cos.to(DEVICE), sin.to(DEVICE)), None, 0.0)


@pytest.mark.parametrize("kind", get_args(Activation))
def test_activation_and_gate(dtype: torch.dtype, kind: Activation) -> None:
    x = here(2, 1100, dtype=dtype, scale=4)
    operations = table(dtype)
    assert_near(operations.activation(kind)(x), reference.activation(kind)(x))
    narrow = x[:, :100]  # rows with something between them
    assert_near(operations.gate(kind)(narrow), reference.gate(kind)(narrow))
    assert_near(operations.gate(kind)(x), reference.gate(kind)(x))


def test_extremes_of_silu(dtype: torch.dtype) -> None:
    gate = torch.tensor([0.0, -0.0, 88.0, -88.0, 200.0, -200.0, 6e4, -6e4, torch.nan, torch.inf]).to(dtype)
    got = table(dtype).gate("silu")(torch.cat((gate, torch.ones_like(gate)))[None].to(DEVICE))[0]
    torch.testing.assert_close(
        got.cpu(), reference.gate("silu")(torch.cat((gate, torch.ones_like(gate)))[None])[0], equal_nan=True
    )
