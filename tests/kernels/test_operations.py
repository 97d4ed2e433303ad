"""Every table of operations against the specification in reference.py, entry by entry."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F

from penstock.kernels.attention import KVCache, KVCacheSpec, Span, StepLayout
from penstock.kernels.operations import Activation, Operations, Rotation
from penstock.kernels.quantization import SCHEMES

from .tables import CPU, DTYPES, TABLES, specification, table

pytestmark = pytest.mark.parametrize("dtype", DTYPES)
over_tables = pytest.mark.parametrize("name", TABLES)
KINDS = get_args(Activation)
#: A unit in the last place, of the smallest number that has the same one.
ROUNDING = {torch.bfloat16: 2**-7, torch.float16: 2**-10}


def normal(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def assert_same(got: torch.Tensor, want: torch.Tensor, atol: float = 1e-6) -> None:
    """Equal but for the order of sums: 16-bit types differ hardly ever, and by one unit in the last place."""
    assert got.dtype == want.dtype
    if want.dtype != torch.float32:
        assert int((got != want).sum()) <= 0.01 * want.numel()
        torch.testing.assert_close(got, want, atol=atol, rtol=ROUNDING[want.dtype])
    else:
        torch.testing.assert_close(got, want, atol=1e-6, rtol=2e-6)


def assert_near(got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal but for what cancels in 1 + erf and 1 + tanh, before a gate rounds for the second time."""
    assert got.dtype == want.dtype
    rounding = 2e-6 if want.dtype == torch.float32 else 2 * ROUNDING[want.dtype]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=rounding)


def turn(tokens: int, width: int, dtype: torch.dtype) -> Rotation:
    angles = normal(tokens, 1, width // 2, dtype=torch.float32, seed=width)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)


@over_tables
def test_embedding(name: str, dtype: torch.dtype) -> None:
    ids, rows = torch.tensor([3, 0, 3, 9]), normal(10, 24, dtype=dtype)
    assert torch.equal(table(name, dtype).embed(ids, rows), specification(dtype).embed(ids, rows))


@over_tables
@pytest.mark.parametrize("width", [8, 100, 128, 1024, 1037])
@pytest.mark.parametrize("rows", [1, 77])
def test_rms_norm(name: str, dtype: torch.dtype, width: int, rows: int, threads: int) -> None:
    x, weight = normal(rows, width, dtype=dtype, scale=3), normal(width, dtype=dtype, seed=1).abs() + 0.5
    norm = table(name, dtype).rms_norm
    assert_same(norm(x, weight, 1e-6), specification(dtype).rms_norm(x, weight, 1e-6))
    strided = torch.stack([x, x], dim=-1)[..., 0]
    assert torch.equal(norm(strided, weight, 1e-6), norm(x, weight, 1e-6))


@over_tables
@pytest.mark.parametrize("shape", [(5, 48), (3, 4, 16)], ids=str)
def test_layer_norm(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight, bias = (
        normal(*size, dtype=dtype, seed=i) for i, size in enumerate((shape, shape[-1:], shape[-1:]))
    )
    got = table(name, dtype).layer_norm(x, weight, bias, 1e-5)
    assert_same(got, specification(dtype).layer_norm(x, weight, bias, 1e-5), atol=2**-9)


@over_tables
@pytest.mark.parametrize("dim", [16, 64, 80, 128])
@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("normed", [True, False])
def test_norm_and_rotation(
    name: str, dtype: torch.dtype, dim: int, share: float, normed: bool, threads: int
) -> None:
    tokens, heads = 37, 6
    rotation = turn(tokens, int(dim * share), dtype)
    projection = normal(tokens, heads + 2, dim, dtype=dtype, seed=dim)
    weight = normal(heads, dim, dtype=dtype, seed=1).abs() + 0.5 if normed else None
    want = specification(dtype).rotate(projection[:, :heads].clone(), rotation, weight, 1e-6)
    rest = projection[:, heads:].clone()
    got = table(name, dtype).rotate(projection[:, :heads], rotation, weight, 1e-6)
    assert_same(got, want, atol=2**-7)  # a unit of what the rotation may cancel
    assert torch.equal(projection[:, heads:], rest)


@over_tables
@pytest.mark.parametrize("kind", KINDS)
def test_activation(name: str, dtype: torch.dtype, kind: Activation) -> None:
    x = normal(9, 100, dtype=dtype, scale=4)
    got, want = (operations.activation(kind)(x) for operations in (table(name, dtype), specification(dtype)))
    assert_near(got, want)


@over_tables
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [8, 100, 3072])
def test_gate(name: str, dtype: torch.dtype, kind: Activation, width: int, threads: int) -> None:
    x = normal(9, 2 * width, dtype=dtype, seed=width, scale=20 if kind == "silu" else 4)
    got, want = (operations.gate(kind)(x) for operations in (table(name, dtype), specification(dtype)))
    if kind == "silu":
        assert_same(got, want)
    else:
        assert_near(got, want)


@over_tables
@pytest.mark.parametrize("scheme", [None, *SCHEMES])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_linear(name: str, dtype: torch.dtype, scheme: str | None, bias: bool, rows: int) -> None:
    operations = table(name, dtype)
    weight, x = normal(72, 140, dtype=dtype), normal(rows, 140, dtype=dtype, seed=1)
    vector = normal(72, dtype=dtype, seed=2) if bias else None
    if scheme is not None and scheme not in operations.schemes:
        with pytest.raises(ValueError, match=r"needs the CPU kernels|scheme .fp8.*int8, w8a8, int4"):
            operations.linear(weight, scheme)
        return
    matrix = operations.linear(weight, scheme)
    want = specification(dtype).linear(weight, scheme)(x, vector)
    rounding = 2**-7 if dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(matrix(x, vector), want, rtol=rounding, atol=2e-4 * float(want.abs().max()))
    assert matrix.nbytes > 0
    assert matrix.copied == (scheme is not None or operations.copies_weights)


@over_tables
@pytest.mark.parametrize("window", [None, 7])
def test_attention(name: str, dtype: torch.dtype, window: int | None) -> None:
    """The seam; test_attention and test_cpu_attention look into the corners."""
    spec = KVCacheSpec(1, 2, 16, 4, dtype)
    steps = [[Span(0, 9, [3, 0, 5]), Span(0, 3, [1])], [Span(9, 1, [3, 0, 5]), Span(3, 4, [1, 2])]]
    results = []
    for operations in (table(name, dtype), specification(dtype)):
        cache, backend = KVCache(spec, 6, CPU), operations.attention(spec)
        for number, spans in enumerate(steps):
            layout = StepLayout(spans, 4)
            q, k, v = normal(layout.num_tokens, 8, 16, dtype=dtype, seed=number).split([4, 2, 2], dim=1)
            out = backend.prepare(layout)(q, k, v, *cache.layers[0], scale=0.3, window=window)
            results.append((out, *cache.layers[0]))
    for got, want in zip(results[:2], results[2:], strict=True):
        tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(got[0], want[0], atol=tolerance, rtol=tolerance)
        assert all(torch.equal(*caches) for caches in zip(got[1:], want[1:], strict=True))


# ---------------------------------------------------------------------------------------------- the CPU's own


def test_extremes_of_silu(dtype: torch.dtype) -> None:
    gate = torch.tensor([0.0, -0.0, 88.0, -88.0, 200.0, -200.0, 1e30, -1e30, torch.nan, torch.inf]).to(dtype)
    got = table("cpu", dtype).gate("silu")(torch.cat((gate, torch.ones_like(gate)))[None])[0]
    torch.testing.assert_close(got, F.silu(gate), atol=1e-30, rtol=1e-5, equal_nan=True)


def test_what_the_kernels_would_misread_is_refused(dtype: torch.dtype) -> None:
    operations = table("cpu", dtype)
    x, rotation = normal(3, 2, 8, dtype=dtype), turn(3, 8, dtype)
    with pytest.raises(ValueError, match="strides"):
        operations.rotate(x.transpose(0, 1).contiguous().transpose(0, 1), rotation, None, 0.0)
    other = x.half()
    calls: list[tuple[Any, ...]] = [
        (operations.rms_norm, other, other[0, 0], 1e-6),
        (operations.rotate, other, rotation, None, 0.0),
        (operations.gate("silu"), other[0]),
    ]
    for entry, *arguments in calls:
        with pytest.raises(ValueError, match=r"float16; these kernels were chosen for"):
            entry(*arguments)


def test_tables_say_what_they_are(dtype: torch.dtype) -> None:
    for operations in (specification(dtype), *(table(name, dtype) for name in TABLES)):
        assert isinstance(operations, Operations)
        assert (operations.device, operations.dtype) == (CPU, dtype)
    assert [table(name, dtype).name for name in TABLES] == TABLES
