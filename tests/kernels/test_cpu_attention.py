"""The backend "cpu" against the specification in reference.py, for the processor here and for lesser ones."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.errors import StartupError
from penstock.kernels.attention import KVCache, Span, StepLayout
from penstock.kernels.cpu import build
from penstock.kernels.cpu.attention import CpuAttention
from penstock.kernels.cpu.binding import Library
from penstock.kernels.cpu.library import available
from penstock.kernels.create import create_operations
from penstock.kernels.reference import ReferenceAttention

from .test_attention import CPU, Step, make_step

LIBRARY = available(wait_seconds=120)
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="no C++ compiler, or PENSTOCK_CPU_KERNELS=0")

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def kernels(step: Step, library: Library | None = LIBRARY) -> CpuAttention:
    assert library is not None
    return CpuAttention(library, step.spec)


def compute(step: Step, backend: CpuAttention | ReferenceAttention) -> tuple[torch.Tensor, ...]:
    """(output, keys, values), on copies."""
    keys, values = step.keys.clone(), step.values.clone()
    scale = step.spec.head_dim**-0.5
    out = backend.prepare(step.layout)(step.q, step.k, step.v, keys, values, scale=scale, window=step.window)
    return out, keys, values


def assert_agrees(step: Step, library: Library | None = LIBRARY) -> None:
    """The kernel gives the specification's output, and exactly its cache."""
    want = compute(step, ReferenceAttention(step.spec))
    got = compute(step, kernels(step, library))
    tolerance = TOLERANCE[step.spec.dtype]
    assert torch.isfinite(want[0]).all()
    torch.testing.assert_close(got[0], want[0], atol=tolerance, rtol=tolerance)
    for cache, expected in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(cache, expected, atol=0, rtol=0, equal_nan=True)


@st.composite
def steps(draw: st.DrawFn) -> Step:
    block_size = draw(st.sampled_from([1, 3, 16, 32, 128]))
    start = st.one_of(st.integers(0, 70), st.sampled_from([511, 512, 513, 700]))
    tokens = st.one_of(st.just(1), st.integers(1, 20), st.sampled_from([48, 65]))
    lengths = draw(st.lists(st.tuples(start, tokens), min_size=1, max_size=4))
    shared = draw(st.integers(0, 2))
    if shared:  # the first span writes the blocks in this very step; others read them
        lengths[0] = (0, shared * block_size + draw(st.integers(0, 5)))
        lengths += [(shared * block_size, draw(st.integers(1, 9))) for _ in range(draw(st.integers(1, 2)))]
    return make_step(
        lengths,
        block_size=block_size,
        kv_heads=draw(st.sampled_from([1, 2, 3])),
        group=draw(st.sampled_from([1, 2, 3, 4, 7, 8, 12])),
        dim=draw(st.sampled_from([8, 16, 32, 64, 80, 96, 128, 256])),
        window=draw(st.one_of(st.none(), st.integers(1, 80), st.sampled_from([511, 512, 600]))),
        shared=shared,
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        seed=draw(st.integers(0, 2**16)),
    )


@settings(max_examples=60, deadline=None)
@given(step=steps())
def test_any_mix_of_spans_agrees_with_the_reference(step: Step) -> None:
    assert_agrees(step)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("window", [None, 1, 64, 700])
def test_long_contexts(dtype: torch.dtype, window: int | None) -> None:
    lengths = [(1535, 1), (1536, 1), (1100, 3), (700, 130), (2, 1)]
    assert_agrees(make_step(lengths, block_size=16, dim=64, window=window, dtype=dtype))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_unevenly_strided_inputs(dtype: torch.dtype) -> None:
    step = make_step([(20, 1), (3, 7)], dim=16, dtype=dtype)
    want, _, _ = compute(step, kernels(step))
    step.q = step.q.transpose(0, 1).contiguous().transpose(0, 1)
    step.k = torch.stack([step.k, step.k], dim=-1)[..., 0]  # the last dimension is not dense
    assert torch.equal(compute(step, kernels(step))[0], want)


def one_span(step: Step, number: int) -> Step:
    """The same span, alone."""
    first, last = step.layout.query_starts[number : number + 2]
    layout = StepLayout([step.layout.spans[number]], step.layout.block_size)
    q, k, v = (tensor[first:last] for tensor in (step.q, step.k, step.v))
    return Step(step.spec, layout, q, k, v, step.keys, step.values, step.window)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("window", [None, 100])
def test_a_span_has_the_same_bits_alone_and_in_company(dtype: torch.dtype, window: int | None) -> None:
    lengths = [(900, 1), (0, 300), (40, 1), (600, 5), (700, 90), (3, 1)]
    step = make_step(lengths, block_size=16, dim=32, kv_heads=4, window=window, dtype=dtype)
    backend = kernels(step)
    together, _, _ = compute(step, backend)
    for number, (first, last) in enumerate(
        zip(step.layout.query_starts[:-1], step.layout.query_starts[1:], strict=True)
    ):
        assert torch.equal(compute(one_span(step, number), backend)[0], together[first:last])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype) -> None:
    step = make_step([(1500, 1), (0, 300), (40, 1), (600, 5)], block_size=16, dim=32, kv_heads=4, dtype=dtype)
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        results.append(compute(step, kernels(step))[0])
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("chunks", [[100], [1] * 100, [64, 36], [13, 1, 50, 36]])
def test_chunks_agree_with_the_whole_prompt(dtype: torch.dtype, chunks: list[int]) -> None:
    whole = make_step([(0, 100)], block_size=16, dim=32, dtype=dtype)
    want, keys, values = compute(whole, ReferenceAttention(whole.spec))
    cache = torch.full_like(keys, torch.nan), torch.full_like(values, torch.nan)
    backend, parts, start = kernels(whole), [], 0
    for tokens in chunks:
        rows = slice(start, start + tokens)
        layout = StepLayout([Span(start, tokens, whole.layout.spans[0].blocks)], 16)
        step = backend.prepare(layout)
        parts.append(step(whole.q[rows], whole.k[rows], whole.v[rows], *cache, scale=32**-0.5))
        start += tokens
    torch.testing.assert_close(torch.cat(parts), want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_nothing_beyond_a_context_is_read(dtype: torch.dtype) -> None:
    step = make_step([(37, 1), (5, 20), (530, 1), (0, 1)], block_size=16, dim=24, dtype=dtype)
    want, _, _ = compute(step, ReferenceAttention(step.spec))
    for span in step.layout.spans:  # make_step clears the tails of open blocks, as the backend "torch" needs
        for position in range(span.start, len(span.blocks) * 16):
            step.keys[span.blocks[position // 16], :, position % 16] = torch.nan
            step.values[span.blocks[position // 16], :, position % 16] = torch.nan
    got, _, _ = compute(step, kernels(step))
    torch.testing.assert_close(got, want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_poisoned_request_stays_alone_and_shows(dtype: torch.dtype, poison: float) -> None:
    step = make_step([(20, 1), (7, 12), (600, 1), (9, 3)], block_size=16, dim=32, dtype=dtype)
    backend = kernels(step)
    healthy, _, _ = compute(step, backend)
    for sick in range(4):
        first, last = step.layout.query_starts[sick : sick + 2]
        k = step.k.clone()
        k[first] = poison  # gives scores of NaN, or infinities of both signs
        ill = Step(step.spec, step.layout, step.q, k, step.v, step.keys, step.values, None)
        got, _, _ = compute(ill, backend)
        assert got[first:last].isnan().any(dim=-1).any(dim=-1).all()
        others = torch.ones(len(got), dtype=torch.bool)
        others[first:last] = False
        assert torch.equal(got[others], healthy[others])


def test_scores_of_minus_infinity_weigh_nothing() -> None:
    step = make_step([(70, 1), (66, 9)], block_size=16, dim=8, group=1, kv_heads=1)
    step.q.abs_()
    for span in step.layout.spans:  # the whole first tile of keys
        for block in span.blocks[:4]:
            step.keys[block] = -torch.inf
    assert_agrees(step)


def test_the_same_step_serves_layers_with_and_without_a_window() -> None:
    step = make_step([(30, 1), (8, 9)])
    prepared = kernels(step).prepare(step.layout)
    for window in (None, 3, None, 3):
        step.window = window
        keys, values = step.keys.clone(), step.values.clone()
        got = prepared(step.q, step.k, step.v, keys, values, scale=8**-0.5, window=window)
        torch.testing.assert_close(got, compute(step, ReferenceAttention(step.spec))[0])


def test_one_pool_of_threads() -> None:
    assert LIBRARY is not None
    torch.ones(1 << 22).exp_()  # torch has started its threads
    tasks = len(list(Path("/proc/self/task").iterdir()))
    step = make_step([(700, 1), (0, 200)], block_size=16)
    compute(step, kernels(step))
    assert len(list(Path("/proc/self/task").iterdir())) == tasks
    assert Path(LIBRARY.runtime).is_relative_to(Path(torch.__file__).parent.parent)
    assert LIBRARY.runtime in Path("/proc/self/maps").read_text()


def test_what_the_kernel_cannot_compute_is_refused() -> None:
    step = make_step([(5, 1)])
    spec, backend = step.spec, kernels(step)
    prepared = backend.prepare(step.layout)
    cache = KVCache(spec, 1, CPU).layers[0]
    outside = backend.prepare(StepLayout([Span(0, 1, [7])], spec.block_size))
    with pytest.raises(IndexError, match="of a cache of 1"):
        outside(step.q, step.k, step.v, *cache, scale=1.0)
    with pytest.raises(ValueError, match="bfloat16"):
        prepared(step.q.bfloat16(), step.k, step.v, step.keys, step.values, scale=1.0)
    with pytest.raises(ValueError, match="prepared for"):
        prepared(step.q, step.k, step.v, step.keys[:, :, :2], step.values, scale=1.0)
    with pytest.raises(ValueError, match="need"):
        prepared(step.q, step.k.repeat(2, 1, 1), step.v, step.keys, step.values, scale=1.0)
    with pytest.raises(StartupError, match=r"float32 and bfloat16.*not torch.float16"):
        create_operations(CPU, torch.float16, attention="cpu")


def _features() -> str:
    return Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="variants of x86")
@pytest.mark.parametrize(
    ("march", "isa", "needs"),
    [("x86-64", "generic", ""), ("x86-64-v3", "AVX2", "avx2"), ("x86-64-v4", "AVX512", "avx512bw")],
)
def test_lesser_processors(march: str, isa: str, needs: str) -> None:
    if needs not in _features():
        pytest.skip(f"this processor has no {needs}")
    swapped = {"-O3": "-O1", "-march=native": f"-march={march}"}  # -O1 compiles in a second
    library = Library(build.build(tuple(swapped.get(flag, flag) for flag in build.FLAGS)))
    assert library.isa == isa
    for dtype in TOLERANCE:
        for dim in (8, 80, 128):
            lengths = [(530, 1), (0, 70), (41, 1), (60, 5)]
            assert_agrees(
                make_step(lengths, block_size=16, dim=dim, group=3, window=600, dtype=dtype), library
            )
