"""Flags of the engine at the ends of their ranges, what they are resolved to, and how they travel."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.errors import StartupError
from penstock.core.scheduler import SchedulerConfig
from penstock.engine.config import EngineConfig, mixed_prefill_tokens, resolve, step_limits
from tests.http.test_borders_config import check_documented_defaults


@pytest.mark.parametrize(
    ("name", "least", "below"),
    [
        ("max_num_seqs", 1, 0),
        ("max_num_batched_tokens", 1, 0),
        ("block_size", 1, 0),
        ("max_num_queued_reqs", 0, -1),
        ("max_num_queued_tokens", 0, -1),
        ("long_prefill_token_threshold", 0, -1),
        ("max_num_mixed_prefill_tokens", 0, -1),
        ("kv_cache_memory_bytes", 1, 0),
        ("threads", 1, 0),
        ("liveness_grace", 0, -0.5),
    ],
)
def test_the_least_value_works_and_a_smaller_one_is_refused(name: str, least: float, below: float) -> None:
    assert getattr(EngineConfig(**{name: least}), name) == least  # type: ignore[arg-type]
    flag = "--" + name.replace("_", "-")
    with pytest.raises(StartupError) as caught:
        EngineConfig(**{name: below})  # type: ignore[arg-type]
    assert str(caught.value) == f"{flag} must be at least {least}, got {below}."
    assert caught.value.param == flag


@pytest.mark.parametrize("length", [1, -1, None, 10**6])
def test_lengths_that_can_be(length: int | None) -> None:
    assert EngineConfig(max_model_len=length).max_model_len == length


@pytest.mark.parametrize("share", [1e-9, 0.5, 1.0, None])
def test_shares_that_can_be(share: float | None) -> None:
    assert EngineConfig(gpu_memory_utilization=share).gpu_memory_utilization == share


@pytest.mark.parametrize(
    ("fields", "flag", "words"),
    [
        ({"max_model_len": 0}, "--max-model-len", "at least 1, or auto for what fits, got 0"),
        ({"max_model_len": -2}, "--max-model-len", "got -2"),
        ({"gpu_memory_utilization": 0.0}, "--gpu-memory-utilization", "in (0, 1], got 0.0"),
        ({"gpu_memory_utilization": -0.5}, "--gpu-memory-utilization", "got -0.5"),
        ({"gpu_memory_utilization": 1.01}, "--gpu-memory-utilization", "got 1.01"),
        ({"tensor_parallel_size": 2}, "--tensor-parallel-size", "one server per device behind a gateway"),
        ({"tensor_parallel_size": 0}, "--tensor-parallel-size", "0 is not implemented"),
        (
            {"enable_chunked_prefill": False},
            "--enable-chunked-prefill",
            "Raise --max-num-batched-tokens to compute long prompts in one piece.",
        ),
        ({"dtype": "float8"}, "--dtype", "Choose from: auto, bfloat16, float16, half, float32, float."),
        ({"quantization": "nf4"}, "--quantization", "Choose from: none, int8, w8a8, int4, fp8."),
        ({"device": "tpu"}, "--device", "Choose from: auto, cpu, cuda."),
        ({"load_format": "gguf"}, "--load-format", "Choose from: auto, safetensors, dummy."),
        ({"scheduling_policy": "lifo"}, "--scheduling-policy", "Choose from: fcfs, priority."),
    ],
)
def test_what_cannot_be_is_named_with_what_can(fields: dict[str, Any], flag: str, words: str) -> None:
    with pytest.raises(StartupError) as caught:
        EngineConfig(**fields)
    assert caught.value.param == flag
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("given", "kept"),
    [("half", "float16"), ("float", "float32"), ("bfloat16", "bfloat16"), ("auto", "auto")],
)
def test_vllms_other_names_of_types(given: str, kept: str) -> None:
    assert EngineConfig(dtype=given).dtype == kept


def test_defaults_are_those_of_the_documentation() -> None:
    check_documented_defaults(EngineConfig)


# ---- what is resolved ----


@pytest.mark.parametrize(
    ("device", "seqs", "tokens", "limits"),
    [
        ("cpu", None, None, (64, 256)),
        ("cuda", None, None, (256, 8192)),
        ("mps", None, None, (64, 256)),
        ("cpu", 7, None, (7, 256)),
        ("cpu", None, 512, (64, 512)),
        ("cpu", None, 10, (10, 10)),
        ("cpu", None, 64, (64, 64)),
        ("cpu", 256, None, (256, 256)),
        ("cuda", 8192, 8192, (8192, 8192)),
    ],
)
def test_limits_of_a_step(device: str, seqs: int | None, tokens: int | None, limits: tuple[int, int]) -> None:
    config = EngineConfig(max_num_seqs=seqs, max_num_batched_tokens=tokens)
    assert step_limits(config, device) == limits


def test_a_step_has_a_token_for_every_request() -> None:
    with pytest.raises(StartupError) as caught:
        step_limits(EngineConfig(max_num_seqs=257), "cpu")
    assert str(caught.value) == (
        "--max-num-seqs 257 is more than the 256 tokens of a step. "
        "Use --max-num-seqs 256, or --max-num-batched-tokens 257 or more."
    )
    assert caught.value.param == "--max-num-seqs"


@given(weight=st.floats(0.0, 1000.0))
def test_prompts_make_a_step_at_most_five_times_as_long(weight: float) -> None:
    most = mixed_prefill_tokens(EngineConfig(), "cpu", weight)
    assert most >= 48
    assert most == 48 or abs(most - 4 * weight) <= 0.5
    assert mixed_prefill_tokens(EngineConfig(), "cuda", weight) == 0
    for wanted in (0, 1, 700):
        for device in ("cpu", "cuda"):
            config = EngineConfig(max_num_mixed_prefill_tokens=wanted)
            assert mixed_prefill_tokens(config, device, weight) == wanted


def test_every_limit_reaches_the_scheduler() -> None:
    config = EngineConfig(
        max_num_seqs=5,
        max_num_batched_tokens=50,
        enable_prefix_caching=False,
        long_prefill_token_threshold=20,
        max_num_mixed_prefill_tokens=30,
        scheduling_policy="priority",
        max_num_queued_reqs=6,
        max_num_queued_tokens=70,
    )
    assert resolve(config, device="cpu", max_model_len=99, weight_tokens=1.0) == SchedulerConfig(
        max_num_seqs=5,
        max_num_batched_tokens=50,
        max_model_len=99,
        enable_prefix_caching=False,
        long_prefill_token_threshold=20,
        max_num_mixed_prefill_tokens=30,
        policy="priority",
        max_num_queued_reqs=6,
        max_num_queued_tokens=70,
    )
