"""The one-pass kernels against the torch code of the layers that they stand in for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from penstock.kernels.cpu import library
from penstock.kernels.cpu.elementwise import Elementwise, kernels
from penstock.kernels.cpu.library import available
from penstock.model.layers import GatedMLP, Linear, RMSNorm, rotate

pytestmark = pytest.mark.skipif(
    available(wait_seconds=120) is None, reason="no C++ compiler, or PENSTOCK_CPU_KERNELS=0"
)

DTYPES = [torch.float32, torch.bfloat16]


def fused(dtype: torch.dtype) -> Elementwise:
    found = kernels(torch.empty(0, dtype=dtype))
    assert found is not None
    return found


def without_kernels(monkeypatch: pytest.MonkeyPatch, work: Callable[[], torch.Tensor]) -> torch.Tensor:
    with monkeypatch.context() as context:
        context.setattr(library._State, "library", None)
        return work()


def assert_same(got: torch.Tensor, want: torch.Tensor, atol: float = 1e-6) -> None:
    """Equal but for the order of sums: bfloat16 differs hardly ever, and by one unit in the last place."""
    assert got.dtype == want.dtype
    if want.dtype == torch.bfloat16:
        assert (got != want).float().mean() <= 0.01
        torch.testing.assert_close(got, want, atol=atol, rtol=2**-7)
    else:
        torch.testing.assert_close(got, want, atol=1e-6, rtol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 100, 128, 1024, 1037])
@pytest.mark.parametrize("rows", [1, 77])
def test_rms_norm(
    dtype: torch.dtype, width: int, rows: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(width)
    norm = RMSNorm(torch.rand(width, generator=generator).to(dtype) + 0.5, 1e-6)
    x = (torch.randn(rows, width, generator=generator) * 3).to(dtype)
    assert_same(norm(x), without_kernels(monkeypatch, lambda: norm(x)))
    strided = torch.stack([x, x], dim=-1)[..., 0]
    assert torch.equal(norm(strided), norm(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [16, 64, 80, 128])
@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("normed", [True, False])
def test_norm_and_rotation_in_place(
    dtype: torch.dtype, dim: int, share: float, normed: bool, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(dim)
    tokens, heads, width = 37, 6, int(dim * share)
    angles = torch.randn(tokens, 1, width // 2, generator=generator)
    cos, sin = angles.cos(), angles.sin()
    rotation = torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)
    projection = torch.randn(tokens, heads + 2, dim, generator=generator).to(dtype)
    weight = torch.rand(heads, dim, generator=generator).to(dtype) + 0.5
    qk = projection[:, :heads]
    norm = RMSNorm(weight, 1e-6)
    want = without_kernels(monkeypatch, lambda: rotate(norm(qk) if normed else qk, rotation))
    rest = projection[:, heads:].clone()
    fused(dtype).norm_rotate(qk, rotation, weight if normed else None, 1e-6)
    assert_same(qk, want, atol=2**-7)  # a unit of what the rotation may cancel
    assert torch.equal(projection[:, heads:], rest)


def test_heads_that_are_not_side_by_side_are_refused() -> None:
    x = torch.randn(3, 8, 2).transpose(1, 2)
    with pytest.raises(ValueError, match="strides"):
        fused(torch.float32).norm_rotate(x, (torch.ones(3, 1, 8), torch.ones(3, 1, 8)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 100, 3072])
def test_silu_mul(dtype: torch.dtype, width: int, threads: int) -> None:
    x = (torch.randn(9, 2 * width, generator=torch.Generator().manual_seed(width)) * 20).to(dtype)
    gate, up = x.chunk(2, dim=-1)
    assert_same(fused(dtype).silu_mul(x), F.silu(gate) * up)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes_of_silu(dtype: torch.dtype) -> None:
    gate = torch.tensor([0.0, -0.0, 88.0, -88.0, 200.0, -200.0, 1e30, -1e30, torch.nan, torch.inf]).to(dtype)
    got = fused(dtype).silu_mul(torch.cat((gate, torch.ones_like(gate)))[None])[0]
    torch.testing.assert_close(got, F.silu(gate), atol=1e-30, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("act", [F.silu, F.gelu])
def test_a_gated_mlp_agrees_with_itself(act: object, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    mlp = GatedMLP(
        Linear(torch.randn(96, 32, generator=generator)),
        Linear(torch.randn(32, 48, generator=generator)),
        act,  # type: ignore[arg-type]
    )
    x = torch.randn(5, 32, generator=generator)
    torch.testing.assert_close(mlp(x), without_kernels(monkeypatch, lambda: mlp(x)), atol=1e-4, rtol=1e-5)


def test_other_dtypes_are_left_to_torch() -> None:
    assert kernels(torch.empty(0, dtype=torch.float16)) is None
    assert kernels(torch.empty(0, device="meta")) is None
