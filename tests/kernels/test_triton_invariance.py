"""Triton's kernels: the bits of a row depend on it alone, wherever docs/architecture.md says so.

Norms, gates, rotations, draws, log-probabilities, and attention of decoding rows; not chunks of prompts,
which are cut by how much else there is to do, and not quantised products, whose tiles depend on the rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from penstock.kernels.attention import KVCache, KVCacheSpec, Span, StepLayout
from penstock.kernels.operations import Draw, Operations

from .test_operations import normal, turn
from .triton import DEVICE, DTYPES, needs_triton, quiet, table

pytestmark = [needs_triton, quiet]

companies = given(
    rows=st.integers(2, 5), place=st.integers(0, 4), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99)
)


def assert_alone(compute: Callable[[Tensor], Tensor], x: Tensor, place: int) -> None:
    """Row `place` of x among the others, and by itself."""
    place %= len(x)
    assert torch.equal(compute(x.clone())[place], compute(x[place : place + 1].clone())[0])


@settings(max_examples=6)
@companies
def test_norms_gates_and_functions(rows: int, place: int, dtype: torch.dtype, seed: int) -> None:
    operations = table(dtype)
    x = normal(rows, 90, dtype=dtype, seed=seed, scale=3).to(DEVICE)
    weight, bias = (normal(90, dtype=dtype, seed=seed + each).to(DEVICE) for each in (1, 2))
    assert_alone(lambda x: operations.rms_norm(x, weight, 1e-6), x, place)
    assert_alone(lambda x: operations.layer_norm(x, weight, bias, 1e-6), x, place)
    assert_alone(operations.gate("silu"), x, place)
    assert_alone(operations.activation("gelu"), x, place)


@settings(max_examples=6)
@companies
def test_rotation(rows: int, place: int, dtype: torch.dtype, seed: int) -> None:
    operations, place = table(dtype), place % rows
    x = normal(rows, 3, 48, dtype=dtype, seed=seed).to(DEVICE)
    weight = normal(3, 48, dtype=dtype, seed=seed + 1).to(DEVICE)
    cos, sin = (each.to(DEVICE) for each in turn(rows, 32, dtype))
    own = slice(place, place + 1)
    together = operations.rotate(x.clone(), (cos, sin), weight, 1e-6)
    assert torch.equal(together[own], operations.rotate(x[own].clone(), (cos[own], sin[own]), weight, 1e-6))


DRAWS = [
    Draw(0.3, 0.0),
    Draw(0.61, 1.0),
    Draw(0.2, 0.7, min_p=0.02),
    Draw(0.8, 1.2, top_k=7),
    Draw(0.4, 1.0, top_p=0.8),
]


@settings(max_examples=2)
@given(order=st.permutations(range(5)), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
def test_draws_and_logprobs(order: list[int], dtype: torch.dtype, seed: int) -> None:
    operations: Operations = table(dtype)
    logits = (normal(5, 1100, dtype=torch.float32, seed=seed) * 4).to(dtype).to(DEVICE)
    draws = [DRAWS[i] for i in order]
    tokens, checks = operations.sample(logits, draws)
    likelihoods = operations.logprobs(logits, tokens, [3, 0, 5, 1, 2])
    for i in (0, 3):
        alone = operations.sample(logits[i : i + 1], draws[i : i + 1])
        assert alone == ([tokens[i]], [checks[i]])
        count = [3, 0, 5, 1, 2][i]
        assert operations.logprobs(logits[i : i + 1], [tokens[i]], [count]) == [likelihoods[i]]


@settings(max_examples=4)
@given(
    lengths=st.lists(st.sampled_from([0, 40, 290]), min_size=2, max_size=3),
    chunk=st.booleans(),
    window=st.sampled_from([None, 37]),
    dtype=st.sampled_from(DTYPES),
)
def test_attention_of_decoding_rows(
    lengths: list[int], chunk: bool, window: int | None, dtype: torch.dtype
) -> None:
    """Contexts of one part and of several; beside others, and beside a chunk of a prompt."""
    size, dim, group = 16, 16, 2
    spec = KVCacheSpec(1, 1, dim, size, dtype)
    blocks = [-(-(length + 1) // size) for length in lengths]
    tables = [list(range(sum(blocks[:i]), sum(blocks[: i + 1]))) for i in range(len(blocks))]
    spans = [Span(length, 1, table) for length, table in zip(lengths, tables, strict=True)]
    if chunk:
        spans.append(Span(0, 5, [sum(blocks)]))
    backend = table(dtype).attention(spec)
    rows = sum(span.tokens for span in spans)
    q = normal(rows, group, dim, dtype=dtype).to(DEVICE)
    k, v = (normal(rows, 1, dim, dtype=dtype, seed=each).to(DEVICE) for each in (1, 2))
    cache = KVCache(spec, sum(blocks) + 1, DEVICE).layers[0]
    for part, seed in zip(cache, (3, 4), strict=True):
        part.copy_(normal(*part.shape, dtype=dtype, seed=seed))
    together = backend.prepare(StepLayout(spans, size))(q, k, v, *cache, scale=0.25, window=window)
    for i, span in enumerate(spans[: len(lengths)]):
        own = slice(i, i + 1)
        step = backend.prepare(StepLayout([span], size))
        assert torch.equal(together[own], step(q[own], k[own], v[own], *cache, scale=0.25, window=window))
