"""The bits of a row depend on it alone: not on its batch, chunk, blocks or threads, nor on anybody's NaN."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.errors import StartupError
from penstock.kernels.attention import KVCache, KVCacheSpec, Span, StepLayout
from penstock.kernels.cpu.attention import CpuAttention
from penstock.kernels.cpu.library import available
from penstock.kernels.cpu.linear import FloatPanels
from penstock.kernels.cpu.matrix import is_free, matrix
from penstock.kernels.cpu.operations import cpu_operations
from penstock.kernels.create import create_operations
from penstock.kernels.operations import Draw, Operations
from penstock.kernels.quantization import INTEGERS as SCHEMES
from penstock.kernels.torch_operations import torch_operations

LIBRARY = available(wait_seconds=120)
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="no C++ compiler, or PENSTOCK_CPU_KERNELS=0")
CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]


def attend(
    qkv: tuple[torch.Tensor, ...],
    chunks: list[int],
    block_size: int,
    window: int | None,
    threads: int,
    seed: int = 0,
) -> torch.Tensor:
    """A prompt's attention [T, H, D], computed in chunks into blocks that lie in an order of their own."""
    assert LIBRARY is not None
    q, k, v = qkv
    total, before = len(q), torch.get_num_threads()
    blocks = -(-total // block_size)
    order = torch.randperm(blocks + 3, generator=torch.Generator().manual_seed(seed))[:blocks].tolist()
    spec = KVCacheSpec(1, k.shape[1], q.shape[2], block_size, q.dtype)
    cache = KVCache(spec, blocks + 3, CPU).layers[0]
    backend, parts, start = CpuAttention(LIBRARY, spec), [], 0
    torch.set_num_threads(threads)
    try:
        for tokens in chunks:
            rows = slice(start, start + tokens)
            step = backend.prepare(StepLayout([Span(start, tokens, order)], block_size))
            parts.append(step(q[rows], k[rows], v[rows], *cache, scale=q.shape[2] ** -0.5, window=window))
            start += tokens
    finally:
        torch.set_num_threads(before)
    return torch.cat(parts)


def prompt(
    total: int, kv_heads: int, group: int, dim: int, dtype: torch.dtype, seed: int
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    heads = (kv_heads * group, kv_heads, kv_heads)
    return tuple(3 * torch.randn(total, n, dim, generator=generator).to(dtype) for n in heads)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_chunks_blocks_and_threads_change_no_bit_of_attention(data: st.DataObject) -> None:
    dtype, total = (
        data.draw(st.sampled_from(DTYPES)),
        data.draw(st.sampled_from([5, 40, 130, 530, 700, 1100])),
    )
    group, dim = (
        data.draw(st.sampled_from([1, 2, 3, 4, 7, 9])),
        data.draw(st.sampled_from([8, 24, 32, 64, 80])),
    )
    window = data.draw(st.sampled_from([None, None, 1, 33, 200, 515]))
    qkv = prompt(total, data.draw(st.sampled_from([1, 2])), group, dim, dtype, total)
    whole = attend(qkv, [total], 16, window, 1)
    assert whole.isfinite().all()
    chunks, left = [], total
    tail = data.draw(st.integers(0, min(8, total)))  # the last tokens one by one, as in decoding
    while left > tail:
        chunks.append(min(left - tail, data.draw(st.sampled_from([1, 2, 3, 4, 5, 7, 16, 17, 64, 127, 300]))))
        left -= chunks[-1]
    block_size, threads = (
        data.draw(st.sampled_from([1, 3, 16, 20, 32, 128])),
        data.draw(st.sampled_from([1, 2])),
    )
    again = attend(qkv, [*chunks, *[1] * left], block_size, window, threads, seed=7)
    assert torch.equal(again, whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunks", [[600], [300, 300], [100, 450, 50], [597, 1, 1, 1], [598, 2]], ids=str)
@pytest.mark.parametrize("sick", [0, 3, 130, 299, 511, 598])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_position_knows_nothing_of_those_after_it(
    dtype: torch.dtype, chunks: list[int], sick: int, poison: float
) -> None:
    """Keys and values that are NaN leave all earlier positions as they are: others may share their blocks."""
    q, k, v = prompt(600, 2, 2, 32, dtype, 0)
    want = attend((q, k, v), chunks, 16, None, 2)
    k[sick], v[sick] = poison, poison
    got = attend((q, k, v), chunks, 16, None, 2)
    assert torch.equal(got[:sick], want[:sick])
    assert not got[sick:].isfinite().any(-1).any(-1).any()


# ------------------------------------------------------------------------------------------------- products

SHAPES = [(64, 64), (7, 3), (100, 96), (130, 301), (512, 256), (192, 1024), (130, 4200), (3072, 128)]


def table(dtype: torch.dtype) -> Operations:
    assert LIBRARY is not None
    return cpu_operations(LIBRARY, torch_operations(CPU, dtype), batch_invariant=True)


@pytest.mark.parametrize("scheme", [None, *SCHEMES])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_product_gives_a_row_its_bits_in_any_batch(
    shape: tuple[int, int], dtype: torch.dtype, scheme: str | None, threads: int
) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    weight, bias = torch.randn(shape, generator=generator), torch.randn(shape[0], generator=generator)
    x = torch.randn(64, shape[1], generator=generator).to(dtype)
    product = table(dtype).linear(weight.to(dtype), scheme)
    torch.set_num_threads(1)
    alone = torch.cat([product(row[None], bias.to(dtype)) for row in x])
    torch.set_num_threads(threads)
    for rows in (2, 3, 4, 5, 6, 7, 8, 13, 31, 63):
        assert torch.equal(product(x[1 : rows + 1], bias.to(dtype)), alone[1 : rows + 1])
    sick = x.clone()
    sick[5] = torch.nan
    others = torch.arange(64) != 5
    assert torch.equal(product(sick, bias.to(dtype))[others], alone[others])
    assert not product(sick, None)[5].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float_panels(shape: tuple[int, int], dtype: torch.dtype, threads: int) -> None:
    """Against float64; of the inputs only what a row has is read."""
    assert LIBRARY is not None
    generator = torch.Generator().manual_seed(0)
    weight, wide = (torch.randn(n, shape[1] + 1, generator=generator).to(dtype) for n in (shape[0], 9))
    panels = FloatPanels(LIBRARY, weight[:, 1:])
    assert (
        panels.nbytes == -(-shape[0] // 64) * 64 * -(-shape[1] // (2 if dtype == torch.bfloat16 else 1)) * 4
    )
    for x in (wide[:, :-1], wide[:, 1:], wide[:0, 1:], wide[:1, 1:]):
        want = x.double() @ weight[:, 1:].double().T
        rounding = 2.0**-8 if dtype == torch.bfloat16 else 0.0
        scale = float(want.abs().max()) if len(x) else 1.0
        torch.testing.assert_close(panels(x, None).double(), want, rtol=rounding, atol=1e-5 * scale)
    with pytest.raises(ValueError, match="linear of"):
        panels(wide, None)
    with pytest.raises(ValueError, match="weight of"):
        FloatPanels(LIBRARY, weight.double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_is_kept_once(dtype: torch.dtype) -> None:
    assert LIBRARY is not None
    weight = torch.randn(192, 128).to(dtype)
    form = matrix(LIBRARY, weight, invariant=True)
    assert (form.nbytes, form.copied) == (weight.nbytes, True)


# ------------------------------------------------------------------------------------------ everything else


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 20, 64, 80])
def test_what_stands_between_products(width: int, dtype: torch.dtype, threads: int) -> None:
    operations = table(dtype)
    generator = torch.Generator().manual_seed(width)
    x = (4 * torch.randn(301, 2 * width, generator=generator)).to(dtype)
    weight = torch.rand(2 * width, generator=generator).to(dtype)
    positions = torch.arange(301)[:, None, None] * 7.3
    angles = positions * torch.rand(width, generator=generator)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def rotated(first: int, last: int) -> torch.Tensor:
        heads = x[first:last].view(-1, 2, width).clone()
        turn = (cos[first:last].contiguous(), sin[first:last].contiguous())
        return operations.rotate(heads, turn, weight.view(2, width), 1e-6)

    functions = {
        "rms_norm": lambda first, last: operations.rms_norm(x[first:last], weight, 1e-6),
        "layer_norm": lambda first, last: operations.layer_norm(x[first:last], weight, weight, 1e-6),
        "rotate": rotated,
        "angles": lambda first, last: (positions[first:last] * weight.float()).cos(),
    }
    for kind in ("silu", "gelu", "gelu_tanh", "relu"):
        functions[kind] = lambda first, last, kind=kind: operations.activation(kind)(x[first:last])
        functions[f"gated {kind}"] = lambda first, last, kind=kind: operations.gate(kind)(x[first:last])
    for name, function in functions.items():
        alone = torch.cat([function(i, i + 1) for i in range(301)])
        for first, last in ((0, 301), (1, 4), (3, 40), (299, 301)):
            assert torch.equal(function(first, last), alone[first:last]), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_draws_and_likelihoods(dtype: torch.dtype, threads: int) -> None:
    operations = table(dtype)
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(40, 5003, generator=generator)).to(dtype)
    logits[7] = torch.nan
    draws = [
        Draw(i / 40, 0.5 + i / 20, 0.01 * (i % 3), (0, 20, 3000)[i % 3], (1.0, 0.9)[i % 2]) for i in range(40)
    ]
    tokens, checks = operations.sample(logits, draws)
    counts = [5003 if i == 3 else i % 5 for i in range(40)]  # one wants all of them
    likely = operations.logprobs(logits, list(range(40)), counts)
    for i in range(40):
        token, check = operations.sample(logits[i : i + 1], draws[i : i + 1])
        if i != 7:
            assert (token, check) == (tokens[i : i + 1], checks[i : i + 1])
            assert operations.logprobs(logits[i : i + 1], [i], counts[i : i + 1]) == likely[i : i + 1]


# ---------------------------------------------------------------------------------------------- the promise


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_kept_when_asked_for_and_where_it_is_free(dtype: torch.dtype) -> None:
    assert LIBRARY is not None
    free = is_free(LIBRARY, dtype)
    assert create_operations(CPU, dtype, batch_invariant=True).batch_invariant
    assert create_operations(CPU, dtype).batch_invariant == free
    assert create_operations(CPU, dtype, batch_invariant=False).batch_invariant == free
    assert not create_operations(CPU, dtype, attention="torch").batch_invariant
    assert not create_operations(CPU, torch.float16).batch_invariant


@pytest.mark.parametrize(
    ("dtype", "attention", "words"),
    [
        (torch.float16, "auto", "float16 on cpu is not batch-invariant.*--dtype float32 or bfloat16"),
        (torch.float32, "torch", "'torch' is not batch-invariant.*--attention-backend auto"),
        (torch.bfloat16, "reference", "'reference' is not batch-invariant"),
    ],
)
def test_it_is_refused_where_it_cannot_be_kept(dtype: torch.dtype, attention: str, words: str) -> None:
    with pytest.raises(StartupError, match=words) as refused:
        create_operations(CPU, dtype, attention=attention, batch_invariant=True)
    assert refused.value.param == "--batch-invariant"


def test_it_is_refused_without_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.kernels.cpu.library.available", lambda *_: None)
    with pytest.raises(StartupError, match=r"not available.*The log says why"):
        create_operations(CPU, torch.float32, batch_invariant=True)


@pytest.mark.parametrize("scheme", [None, *SCHEMES])
@pytest.mark.parametrize("dtype", DTYPES)
def test_with_amx_ours_are_used_for_all_rows(
    scheme: str | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where oneDNN's tiles are faster, they are not taken, and by default the promise is not given."""
    assert LIBRARY is not None
    for module in ("matrix", "linear"):
        monkeypatch.setattr(f"penstock.kernels.cpu.{module}.has_amx", lambda: True)
    product = matrix(LIBRARY, torch.randn(128, 192).to(dtype), scheme, invariant=True)
    x = torch.randn(100, 192).to(dtype)
    assert torch.equal(product(x, None), torch.cat([product(row[None], None) for row in x]))
    if LIBRARY.multiplies_bf16 and dtype == torch.bfloat16:
        assert not is_free(LIBRARY, dtype)
