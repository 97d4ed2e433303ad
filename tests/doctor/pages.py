"""Metrics pages as engines write them: vLLM 0.32's names and labels (v1/metrics/loggers.py), and 0.6's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

_LABELS = 'engine="0",model_name="Qwen/Qwen3-8B"'


def histogram(name: str, bounds: Sequence[float], values: Sequence[float], labels: str = _LABELS) -> str:
    """A histogram's samples."""
    lines = [f"# HELP {name} Histogram.", f"# TYPE {name} histogram"]
    for bound in (*bounds, math.inf):
        text = "+Inf" if math.isinf(bound) else f"{bound}"
        lines.append(f'{name}_bucket{{{labels},le="{text}"}} {sum(value <= bound for value in values)}.0')
    return "\n".join(
        [*lines, f"{name}_count{{{labels}}} {len(values)}.0", f"{name}_sum{{{labels}}} {sum(values)}"]
    )


def vllm(
    *,
    running: int = 4,
    waiting: int = 0,
    cache: float = 0.25,
    preemptions: int = 0,
    prompts: Sequence[float] = (900.0,) * 100,
    answers: Sequence[float] = (120.0,) * 100,
    ttft: Sequence[float] = (0.08,) * 100,
    queue: Sequence[float] = (0.001,) * 100,
    queries: int = 90_000,
    hits: int = 45_000,
    failed: int = 0,
    config: Mapping[str, str] | None = None,
) -> str:
    """A page of vLLM 0.32."""
    cache_config = {
        "block_size": "16",
        "cache_dtype": "auto",
        "calculate_kv_scales": "False",
        "enable_prefix_caching": "True",
        "gpu_memory_utilization": "0.92",
        "kv_cache_size_tokens": "200000",
        "num_gpu_blocks": "12500",
        "num_gpu_blocks_override": "None",
        "sliding_window": "None",
        **(config or {}),
    }
    info = ",".join(f'{name}="{value}"' for name, value in cache_config.items())
    tokens = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
    seconds = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0)
    first = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
    return "\n".join(
        [
            "# HELP python_gc_objects_collected_total Objects collected during gc",
            "# TYPE python_gc_objects_collected_total counter",
            'python_gc_objects_collected_total{generation="0"} 12341.0',
            "# TYPE process_resident_memory_bytes gauge",
            "process_resident_memory_bytes 3.2e+09",
            "# HELP vllm:num_requests_running Number of requests in model execution batches.",
            "# TYPE vllm:num_requests_running gauge",
            f"vllm:num_requests_running{{{_LABELS}}} {running}.0",
            "# TYPE vllm:num_requests_waiting gauge",
            f"vllm:num_requests_waiting{{{_LABELS}}} {waiting}.0",
            "# TYPE vllm:kv_cache_usage_perc gauge",
            f"vllm:kv_cache_usage_perc{{{_LABELS}}} {cache}",
            "# TYPE vllm:prefix_cache_queries_total counter",
            f"vllm:prefix_cache_queries_total{{{_LABELS}}} {queries}.0",
            "# TYPE vllm:prefix_cache_hits_total counter",
            f"vllm:prefix_cache_hits_total{{{_LABELS}}} {hits}.0",
            "# TYPE vllm:num_preemptions_total counter",
            f"vllm:num_preemptions_total{{{_LABELS}}} {preemptions}.0",
            "# TYPE vllm:request_success_total counter",
            f'vllm:request_success_total{{{_LABELS},finished_reason="stop"}} {len(prompts) - failed}.0',
            f'vllm:request_success_total{{{_LABELS},finished_reason="abort"}} 0.0',
            f'vllm:request_success_total{{{_LABELS},finished_reason="error"}} {failed}.0',
            histogram("vllm:request_prompt_tokens", tokens, prompts),
            histogram("vllm:request_generation_tokens", tokens, answers),
            histogram("vllm:time_to_first_token_seconds", first, ttft),
            histogram("vllm:request_queue_time_seconds", seconds, queue),
            "# HELP vllm:cache_config_info Information of the LLMEngine CacheConfig",
            "# TYPE vllm:cache_config_info gauge",
            f'vllm:cache_config_info{{{info},engine="0"}} 1.0',
            "",
        ]
    )


#: vLLM 0.6's page, as far as its names are others.
OLD = """\
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{model_name="m"} 3.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{model_name="m"} 30.0
# TYPE vllm:gpu_cache_usage_perc gauge
vllm:gpu_cache_usage_perc{model_name="m"} 0.97
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="16",cache_dtype="auto",enable_prefix_caching="False",\
gpu_memory_utilization="0.5",num_gpu_blocks="1000",num_cpu_blocks="9362",swap_space_bytes="4294967296"} 1.0
"""
