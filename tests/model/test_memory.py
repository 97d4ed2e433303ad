"""The memory plan: what is suggested fits, and one block more does not."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from penstock.core.errors import MemoryBudgetError
from penstock.model.graph_sizes import decode_sizes
from penstock.model.memory import (
    DEFAULT_UTILIZATION,
    activation_bytes,
    format_size,
    graphs_bytes,
    kv_bytes_per_token,
    plan_memory,
)
from penstock.model.model_config import ModelConfig, RopeConfig

GIB = 1 << 30
QWEN = ModelConfig(
    path=Path("config.json"),
    architecture="Qwen3ForCausalLM",
    vocab_size=151936,
    hidden_size=1024,
    num_layers=28,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=3072,
    max_position_embeddings=40960,
    rope=RopeConfig(),
    norm_eps=1e-6,
    activation="silu",
    windows=(None,) * 28,
    tie_word_embeddings=True,
    attention_bias=False,
    output_bias=False,
    mlp_bias=False,
    dtype="bfloat16",
    eos_ids=(),
    bos_id=None,
    raw={},
)
MACHINE: dict[str, Any] = {
    "weight_bytes": 3 * GIB // 2,
    "dtype_bytes": 2,
    "device": "cpu",
    "available_bytes": 22 * GIB,
    "total_bytes": 24 * GIB,
    "max_num_seqs": 64,
    "max_num_batched_tokens": 1024,
    "block_size": 16,
}
CUDA = MACHINE | {"device": "cuda", "available_bytes": 78 * GIB, "total_bytes": 80 * GIB}


def plan(**changes: Any) -> Any:
    return plan_memory(QWEN, **(MACHINE | changes))


def value(error: MemoryBudgetError, flag: str) -> float | None:
    """The value that the message suggests for a flag."""
    found = re.search(rf"{flag} ([\d.]*\d)", error.advice)
    return float(found[1]) if found else None


def test_sizes() -> None:
    budget = plan()
    assert kv_bytes_per_token(QWEN, 2) == budget.kv_bytes_per_token == 2 * 28 * 8 * 128 * 2
    assert budget.limit == 11 * GIB
    assert budget.kv_cache == budget.num_blocks * 16 * budget.kv_bytes_per_token
    assert budget.weights + budget.activations + budget.kv_cache <= budget.limit
    assert (
        budget.limit - (budget.weights + budget.activations + budget.kv_cache)
        < 16 * budget.kv_bytes_per_token
    )
    assert budget.tokens == budget.num_blocks * 16
    assert budget.concurrency == pytest.approx(budget.tokens / 40960)
    assert budget.max_model_len == 40960


def test_table() -> None:
    text = plan().render()
    lines = text.splitlines()
    assert lines[0] == "Memory (cpu)"
    assert [line.split()[0] for line in lines[1:4]] == ["weights", "activations", "KV"]
    assert "1.50 GiB" in lines[1]
    assert "80,832 tokens: 2.0 requests of 40,960 tokens" in text or "requests of 40,960 tokens" in text
    assert "--gpu-memory-utilization 0.5" in text
    ends = {line.index("GiB") for line in lines if " GiB " in line[:30]}
    assert len(ends) == 1, text


def test_cuda_takes_a_share_of_the_whole_device_but_not_what_others_hold() -> None:
    assert plan(**CUDA).limit == int(80 * GIB * DEFAULT_UTILIZATION["cuda"])
    assert plan(**CUDA | {"available_bytes": 40 * GIB}).limit == 40 * GIB


def test_a_small_model_does_not_take_everything() -> None:
    budget = plan(max_model_len=128, available_bytes=100 * GIB)
    assert budget.num_blocks == 4 * 64 * 8
    assert plan(max_model_len=128, kv_cache_memory_bytes=18 * GIB).kv_cache > 17 * GIB


def test_explicit_size() -> None:
    budget = plan(kv_cache_memory_bytes=5 * GIB)
    assert 5 * GIB - 16 * budget.kv_bytes_per_token < budget.kv_cache <= 5 * GIB
    assert budget.utilization is None
    assert "--kv-cache-memory-bytes" in budget.render()


def test_an_explicit_size_is_never_cut() -> None:
    with pytest.raises(MemoryBudgetError, match=r"966367641600 \(900.00 GiB\) is more than fits") as caught:
        plan(kv_cache_memory_bytes=900 * GIB)
    assert caught.value.param == "--kv-cache-memory-bytes"
    assert "1.10 GiB for the rest of the machine" in str(caught.value)
    largest = int(value(caught.value, "--kv-cache-memory-bytes") or 0)
    budget = plan(kv_cache_memory_bytes=largest)
    assert largest - 16 * budget.kv_bytes_per_token < budget.kv_cache <= largest
    assert 0.04 < budget.free / budget.available < 0.06
    with pytest.raises(MemoryBudgetError):
        plan(kv_cache_memory_bytes=largest + 1)
    with pytest.raises(MemoryBudgetError, match="is more than fits"):
        plan(kv_cache_memory_bytes=900 * GIB, max_model_len=-1)


def test_an_explicit_size_may_take_all_of_a_gpu_that_is_free() -> None:
    with pytest.raises(MemoryBudgetError, match="is more than fits") as caught:
        plan(**CUDA, kv_cache_memory_bytes=78 * GIB)
    largest = int(value(caught.value, "--kv-cache-memory-bytes") or 0)
    assert plan(**CUDA, kv_cache_memory_bytes=largest).free < 16 * 1024 * 1024


def test_over_the_models_context() -> None:
    with pytest.raises(
        MemoryBudgetError, match=r"50000 is longer than the model's context of 40960"
    ) as caught:
        plan(max_model_len=50000)
    assert caught.value.param == "--max-model-len"


def test_auto_fit_keeps_the_models_context_where_it_fits() -> None:
    assert plan(max_model_len=-1).max_model_len == 40960


def test_message() -> None:
    with pytest.raises(MemoryBudgetError) as caught:
        plan(available_bytes=8 * GIB)
    text = str(caught.value)
    assert "--max-model-len 40960 needs 4.38 GiB of KV cache for one request" in text
    assert re.search(r"Use --max-model-len \d+ or --gpu-memory-utilization 0\.\d+\.$", text)
    assert caught.value.param == "--max-model-len"


def test_weights_alone_are_too_much() -> None:
    with pytest.raises(MemoryBudgetError, match=r"nothing is left.*Use a smaller model or dtype"):
        plan(available_bytes=GIB)
    with pytest.raises(MemoryBudgetError, match=r"nothing is left") as caught:
        plan(available_bytes=int(4.2 * GIB), weight_bytes=int(2.5 * GIB))
    share, length = value(caught.value, "--gpu-memory-utilization"), value(caught.value, "--max-model-len")
    assert share is not None
    assert length is not None
    plan(
        available_bytes=int(4.2 * GIB),
        weight_bytes=int(2.5 * GIB),
        utilization=share,
        max_model_len=int(length),
    )


machines = st.fixed_dictionaries(
    {
        "device": st.sampled_from(["cpu", "cuda"]),
        "available_bytes": st.integers(1 * GIB, 40 * GIB),
        "total_bytes": st.just(40 * GIB),
        "weight_bytes": st.integers(GIB // 4, 30 * GIB),
        "block_size": st.sampled_from([1, 16, 64, 128]),
        "max_num_seqs": st.integers(1, 256),
        "max_num_batched_tokens": st.sampled_from([256, 1024, 8192]),
        "utilization": st.one_of(st.none(), st.floats(0.05, 1.0)),
        "kv_cache_memory_bytes": st.one_of(st.none(), st.integers(1, 8 * GIB), st.integers(GIB, 50 * GIB)),
        "max_model_len": st.one_of(st.none(), st.integers(1, 40960)),
    }
)


@settings(deadline=None)
@given(machine=machines)
def test_what_is_planned_fits(machine: dict[str, Any]) -> None:
    try:
        budget = plan(**machine)
    except MemoryBudgetError:
        assume(False)
    assert budget.weights + budget.activations + budget.kv_cache <= budget.limit <= budget.available
    assert budget.free >= 0
    assert budget.num_blocks >= math.ceil(budget.max_model_len / budget.block_size)
    assert budget.concurrency >= 1


@settings(deadline=None)
@given(machine=machines)
def test_what_is_suggested_fits_and_more_does_not(machine: dict[str, Any]) -> None:
    try:
        plan(**machine)
    except MemoryBudgetError as refused:
        error = refused
    else:
        assume(False)
    length = value(error, "--max-model-len")
    share = value(error, "--gpu-memory-utilization")
    size = value(error, "--kv-cache-memory-bytes")
    if length is not None and size is not None and " with " in error.advice:
        budget = plan(**machine | {"max_model_len": int(length), "kv_cache_memory_bytes": int(size)})
        assert budget.max_model_len == length
        return
    if length is not None and share is not None and " with " in error.advice:
        plan(**machine | {"max_model_len": int(length), "utilization": share})
        return
    if length is not None:
        budget = plan(**machine | {"max_model_len": int(length)})
        assert budget.max_model_len == length
        auto = plan(**machine | {"max_model_len": -1})
        wanted = machine["max_model_len"] or 40960
        if auto.max_model_len <= wanted:
            assert auto.max_model_len == length
        with pytest.raises(MemoryBudgetError):  # one block more
            plan(**machine | {"max_model_len": min(wanted, int(length) + machine["block_size"])})
    if share is not None:
        plan(**machine | {"utilization": share})
        with pytest.raises(MemoryBudgetError):
            plan(**machine | {"utilization": share - 0.01})
    if size is not None:
        plan(**machine | {"kv_cache_memory_bytes": int(size)})
        further = 1 if size < machine["kv_cache_memory_bytes"] else -1  # the largest, or the smallest
        with pytest.raises(MemoryBudgetError):
            plan(**machine | {"kv_cache_memory_bytes": int(size) + further})


def test_activations_grow_with_everything() -> None:
    base: dict[str, Any] = {
        "max_num_batched_tokens": 512,
        "max_num_seqs": 256,
        "max_model_len": 4096,
        "dtype_bytes": 2,
        "device": "cpu",
    }
    least = activation_bytes(QWEN, **base)
    for name in ("max_num_batched_tokens", "max_num_seqs", "max_model_len", "dtype_bytes"):
        assert activation_bytes(QWEN, **base | {name: 2 * base[name]}) > least
    assert activation_bytes(replace(QWEN, intermediate_size=20_000), **base) > least


def test_graphs_are_a_line_of_the_table_on_a_gpu() -> None:
    rows = decode_sizes(256)
    without = plan_memory(QWEN, **CUDA)
    budget = plan_memory(QWEN, **CUDA, graph_rows=rows, kv_cache_memory_bytes=5 * GIB)
    assert without.graphs == 0
    assert "graphs" not in without.render()
    graphs = graphs_bytes(QWEN, rows, 2, max_model_len=40960, block_size=16)
    # each keeps its logits and block tables, and they share the rest
    assert budget.graphs == graphs > 13 * (16 << 20) + sum(rows) * (2 * QWEN.vocab_size + 4 * 40960 // 16)
    assert budget.limit == budget.weights + budget.activations + budget.graphs + 5 * GIB
    assert (
        f"graphs      {format_size(budget.graphs):>12}  at most, 13 of 1 to 256 requests" in budget.render()
    )
    # what they take is not there for the cache
    tight = CUDA | {"available_bytes": 8 * GIB}
    difference = plan_memory(QWEN, **tight).kv_cache - plan_memory(QWEN, **tight, graph_rows=rows).kv_cache
    assert abs(difference - budget.graphs) <= 16 * budget.kv_bytes_per_token


def test_offload_is_whole_blocks_of_the_host() -> None:
    block = 16 * kv_bytes_per_token(QWEN, 2)
    budget = plan_memory(QWEN, **CUDA, offload_bytes=10 * block + 5, host_bytes=8 * GIB)
    assert (budget.host_blocks, budget.offload) == (10, 10 * block)
    assert "160 tokens of preempted requests, in the host's memory" in budget.render()
    # beside a GPU it takes nothing of the device; on a CPU it is the same memory
    assert budget.kv_cache == plan_memory(QWEN, **CUDA).kv_cache
    assert budget.free == plan_memory(QWEN, **CUDA).free
    size = 3000 * block
    here = plan(offload_bytes=2 * GIB, kv_cache_memory_bytes=size)
    assert here.limit == here.weights + here.activations + here.kv_cache + here.offload
    assert here.free == plan(kv_cache_memory_bytes=size).free - here.offload


def test_offload_that_is_not_there_is_refused_with_what_is() -> None:
    with pytest.raises(MemoryBudgetError, match=r"8\.00 GiB of the host's memory are wanted") as caught:
        plan_memory(QWEN, **CUDA, offload_bytes=8 * GIB, host_bytes=4 * GIB)
    assert caught.value.param == "--kv-offloading-size"
    most = value(caught.value, "--kv-offloading-size")
    assert most == 3.8
    plan_memory(QWEN, **CUDA, offload_bytes=int(most * GIB), host_bytes=4 * GIB)
    with pytest.raises(MemoryBudgetError, match="hold not one block, of"):
        plan_memory(QWEN, **CUDA, offload_bytes=1000)
    with pytest.raises(MemoryBudgetError, match=r"and --kv-offloading-size \(20\.00 GiB\)"):
        plan(offload_bytes=20 * GIB)


def test_what_does_not_fit_names_the_graphs() -> None:
    small = CUDA | {"available_bytes": 3 * GIB, "total_bytes": 3 * GIB}
    with pytest.raises(MemoryBudgetError, match=r"and CUDA graphs \(.*; --enforce-eager does without\)"):
        plan_memory(QWEN, **small, graph_rows=(1, 2, 4))
