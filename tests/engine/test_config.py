"""What the engine decides where the user said nothing."""

from __future__ import annotations

import pytest

from penstock.core.errors import StartupError
from penstock.engine.config import EngineConfig, graph_sizes, resolve, steps_ahead


@pytest.mark.parametrize(
    ("device", "weight_tokens", "wanted", "decided"),
    [
        ("cpu", 5.4, None, 48),  # two Zen 4 cores, fast memory
        ("cpu", 12.1, None, 48),  # slow memory
        ("cpu", 70.2, None, 281),  # with AMX: more than the whole budget, so no limit
        ("cpu", 12.0, 24, 24),
        ("cpu", 12.0, 0, 0),
        ("cuda", 260.0, None, 0),
        ("cuda", 260.0, 512, 512),
    ],
)
def test_prompts_beside_decodes_are_limited_by_what_the_device_computes_while_it_reads(
    device: str, weight_tokens: float, wanted: int | None, decided: int
) -> None:
    config = EngineConfig(max_num_mixed_prefill_tokens=wanted)
    limits = resolve(config, device=device, max_model_len=4096, weight_tokens=weight_tokens)
    assert limits.max_num_mixed_prefill_tokens == decided


def test_limits_that_make_no_sense_are_refused() -> None:
    with pytest.raises(StartupError, match="--max-num-mixed-prefill-tokens must be at least 0, got -1"):
        EngineConfig(max_num_mixed_prefill_tokens=-1)
    config = EngineConfig(max_num_seqs=9, max_num_batched_tokens=8)
    with pytest.raises(StartupError, match="--max-num-seqs 9 is more than the 8 tokens of a step"):
        resolve(config, device="cpu", max_model_len=64, weight_tokens=12.0)


def test_graphs_are_for_gpus_and_may_be_left_out() -> None:
    assert graph_sizes(EngineConfig(), "cuda", 8) == (1, 2, 4, 8)
    assert graph_sizes(EngineConfig(), "cpu", 8) == ()
    assert graph_sizes(EngineConfig(enforce_eager=True), "cuda", 8) == ()
    assert graph_sizes(EngineConfig(max_cudagraph_capture_size=4), "cuda", 8) == (1, 2, 4)
    assert graph_sizes(EngineConfig(max_cudagraph_capture_size=0), "cuda", 8) == ()
    given = EngineConfig(cudagraph_capture_sizes=[16, 3, 3])  # type: ignore[arg-type]
    assert given.cudagraph_capture_sizes == (16, 3, 3)
    assert graph_sizes(given, "cuda", 8) == (3,)


def test_steps_are_planned_ahead_where_a_device_computes_by_itself() -> None:
    assert [steps_ahead(EngineConfig(), device) for device in ("cpu", "cuda")] == [False, True]
    assert steps_ahead(EngineConfig(async_scheduling=True), "cpu")
    assert not steps_ahead(EngineConfig(async_scheduling=False), "cuda")


@pytest.mark.parametrize(
    ("fields", "flag"),
    [
        ({"kv_offloading_size": -1.0}, "--kv-offloading-size"),
        ({"kv_offloading_size": float("nan")}, "--kv-offloading-size"),
        ({"kv_offloading_size": float("inf")}, "--kv-offloading-size"),
        ({"cudagraph_capture_sizes": (4, 0)}, "--cudagraph-capture-sizes"),
        ({"max_cudagraph_capture_size": -1}, "--max-cudagraph-capture-size"),
    ],
)
def test_sizes_that_are_none_are_refused(fields: dict[str, object], flag: str) -> None:
    with pytest.raises(StartupError) as caught:
        EngineConfig(**fields)  # type: ignore[arg-type]
    assert caught.value.param == flag
