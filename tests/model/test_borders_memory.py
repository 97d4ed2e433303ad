"""The memory plan at its borders: sizes as words, what is counted, and what is advised."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.errors import MemoryBudgetError
from penstock.kernels.limits import workspace_bytes
from penstock.model.memory import _most, activation_bytes, format_size, kv_bytes_per_token

from .test_memory import CUDA, GIB, MACHINE, QWEN, plan


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (-1023, "-1023 B"),
        (1024, "1.00 KiB"),
        (-1536, "-1.50 KiB"),
        ((1 << 20) - 1, "1024.00 KiB"),
        (1 << 20, "1.00 MiB"),
        ((1 << 30) - 1, "1024.00 MiB"),
        (1 << 30, "1.00 GiB"),
        (3 << 29, "1.50 GiB"),
        (5 << 40, "5120.00 GiB"),
    ],
)
def test_sizes_in_words(count: int, words: str) -> None:
    assert format_size(count) == words


@given(limit=st.integers(0, 70), border=st.integers(0, 80))
def test_the_largest_that_fits_is_found_in_few_steps(limit: int, border: int) -> None:
    asked: list[int] = []

    def fits(number: int) -> bool:
        asked.append(number)
        return number <= border

    assert _most(fits, limit) == min(limit, border)
    assert all(1 <= number <= limit for number in asked)
    assert len(asked) <= 7


# ---- what is counted ----

TINY = replace(
    QWEN, vocab_size=1000, hidden_size=10, num_heads=6, num_kv_heads=2, head_dim=5, intermediate_size=100
)
STEP: dict[str, Any] = {"max_num_batched_tokens": 7, "max_num_seqs": 3, "max_model_len": 64, "dtype_bytes": 2}


def test_keys_and_values_of_all_layers() -> None:
    assert kv_bytes_per_token(TINY, 2) == 2 * 28 * (2 * 5) * 2
    assert kv_bytes_per_token(replace(TINY, num_layers=1), 4) == 2 * (2 * 5) * 4


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_activations_are_what_the_docstring_lists(device: str) -> None:
    hidden, q, kv, middle = 10, 30, 10, 100
    per_token = 2 * sum(
        [
            3 * hidden,  # residual, normed input, output
            q + 2 * kv,  # the projections
            3 * (q + kv),  # their rotation
            2 * q,  # attention's output
            3 * hidden,  # the MLP's, likewise
            3 * middle,  # gate, up and their product
        ]
    )
    norms = 2 * 4 * (q + kv)  # in float32, of what is wider
    workspace = workspace_bytes(max_model_len=64, kv_heads=2, head_dim=5, dtype_bytes=2, device=device)
    fixed = activation_bytes(TINY, **STEP | {"max_num_batched_tokens": 0}, device=device)
    assert fixed == 128 * 1000 * (2 + 32) + workspace
    assert activation_bytes(TINY, **STEP, device=device) - fixed == 7 * (per_token + norms)
    # where the residual is wider than queries and keys
    wide = replace(TINY, hidden_size=50)
    more = activation_bytes(wide, **STEP, device=device) - fixed
    assert more == 7 * (per_token + 2 * 6 * (50 - 10) + 2 * 4 * 50)


@pytest.mark.parametrize(("seqs", "rows"), [(1, 128), (128, 128), (129, 129), (500, 500)])
def test_logits_are_those_of_all_requests_or_of_a_piece_of_a_prompt(seqs: int, rows: int) -> None:
    one = activation_bytes(TINY, **STEP | {"max_num_seqs": seqs}, device="cpu")
    none = activation_bytes(replace(TINY, vocab_size=0), **STEP | {"max_num_seqs": seqs}, device="cpu")
    assert one - none == rows * 1000 * 34


# ---- what is planned ----


def test_the_table_word_by_word() -> None:
    budget = plan(max_model_len=1000, max_num_seqs=2)
    activations = format_size(budget.activations)
    assert budget.num_blocks == 4 * 2 * 63
    assert budget.free == budget.available - budget.weights - budget.activations - budget.kv_cache
    assert budget.concurrency == 8
    assert [line.rstrip() for line in budget.render().splitlines()] == [
        "Memory (cpu)",
        "  weights         1.50 GiB",
        f"  activations {activations:>12}  at most, 1,024 tokens per step",
        f"  KV cache    {format_size(budget.kv_cache):>12}  8,064 tokens: 8.0 requests of 1,000 tokens",
        f"{'':28}504 blocks of 16, 112.00 KiB/token",
        "  limit          11.00 GiB  --gpu-memory-utilization 0.5",
        f"  free        {format_size(budget.free):>12}  of 22.00 GiB available",
    ]
    exact = plan(kv_cache_memory_bytes=5 * GIB)
    assert "GiB  --kv-cache-memory-bytes\n" in exact.render()
    assert exact.limit == exact.weights + exact.activations + 5 * GIB


@pytest.mark.parametrize("length", [None, -1])
def test_the_models_context_is_the_longest(length: int | None) -> None:
    assert plan(max_model_len=length).max_model_len == 40960
    assert plan(max_model_len=40960).max_model_len == 40960
    with pytest.raises(MemoryBudgetError, match=r"Use --max-model-len 40960 or less\.") as caught:
        plan(max_model_len=40961)
    assert caught.value.param == "--max-model-len"


def test_what_fits_exactly_fits() -> None:
    """One byte less does not."""
    base = plan(max_model_len=1600, kv_cache_memory_bytes=GIB)
    one_request = 100 * 16 * base.kv_bytes_per_token
    assert plan(max_model_len=1600, kv_cache_memory_bytes=one_request).num_blocks == 100
    with pytest.raises(MemoryBudgetError) as caught:
        plan(max_model_len=1600, kv_cache_memory_bytes=one_request - 1)
    assert caught.value.advice == f"Use --max-model-len 1584 or --kv-cache-memory-bytes {one_request}."
    auto = plan(max_model_len=-1, kv_cache_memory_bytes=one_request)
    assert (auto.max_model_len, auto.num_blocks) == (1600, 100)


def test_on_cuda_others_are_spared_nothing_and_on_a_cpu_a_twentieth() -> None:
    for machine, spared in ((MACHINE, int(22 * GIB * 0.05)), (CUDA, 0)):
        with pytest.raises(MemoryBudgetError) as caught:
            plan(**machine | {"kv_cache_memory_bytes": 900 * GIB, "max_model_len": 1000})
        said = str(caught.value)
        assert ("for the rest of the machine" in said) == bool(spared)
        largest = int(said.split("--kv-cache-memory-bytes ")[-1].rstrip("."))
        budget = plan(**machine | {"kv_cache_memory_bytes": largest, "max_model_len": 1000})
        assert budget.limit == machine["available_bytes"] - spared


def test_a_size_that_leaves_no_room_for_the_context_is_advised_with_a_shorter_one() -> None:
    machine = {"available_bytes": 5 * GIB, "kv_cache_memory_bytes": 100 * GIB}
    with pytest.raises(MemoryBudgetError) as caught:
        plan(**machine)
    words = caught.value.advice.removesuffix(".").split()
    assert words[:2] == ["Use", "--kv-cache-memory-bytes"]
    assert words[3:5] == ["with", "--max-model-len"]
    size, length = int(words[2]), int(words[5])
    found = plan(available_bytes=5 * GIB, kv_cache_memory_bytes=size, max_model_len=length)
    assert (found.max_model_len, length % 16) == (length, 0)
    for more in ({"kv_cache_memory_bytes": size + 1}, {"max_model_len": length + 16}):
        with pytest.raises(MemoryBudgetError):
            plan(
                **{"available_bytes": 5 * GIB, "kv_cache_memory_bytes": size, "max_model_len": length} | more
            )


def test_without_room_for_anything_a_smaller_model_is_advised() -> None:
    for fields in ({}, {"kv_cache_memory_bytes": GIB}):
        with pytest.raises(MemoryBudgetError) as caught:
            plan(available_bytes=GIB, **fields)
        assert caught.value.advice == "Use a smaller model or dtype, or more memory."


@given(share=st.floats(0.05, 1.0))
def test_an_advised_share_is_the_smallest_whole_percentage(share: float) -> None:
    try:
        plan(available_bytes=9 * GIB, utilization=share)
    except MemoryBudgetError as error:
        advised = [part for part in error.advice.split() if part.startswith("0.")]
        if not advised:
            return
        value = float(advised[0].rstrip("."))
        assert value > share
        assert round(value * 100) == pytest.approx(value * 100)
        plan(available_bytes=9 * GIB, utilization=value)
        if value - 0.01 > share:
            with pytest.raises(MemoryBudgetError):
                plan(available_bytes=9 * GIB, utilization=value - 0.01)
