"""The one table of metric names that an engine exports: name, kind, labels, buckets, meaning.

It knows vLLM 0.32's names, labels and bucket boundaries (`vllm/v1/metrics/loggers.py`, `buckets.py`), so that
dashboards, autoscalers and gateways written for vLLM work unchanged, and the `penstock:` names for what only
this engine can say. Whatever reads metrics (alerts, dashboards, autoscaler rules) is checked against this
table; it does not know where the values come from. Names without a counterpart here (LoRA, multi-modal
caches, tiers of the KV cache beyond the host, speculative decoding, sleep mode) are left out rather than
exported as zeros.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """Prometheus type of a metric."""

    GAUGE = "gauge"
    COUNTER = "counter"
    HISTOGRAM = "histogram"


class Buckets(StrEnum):
    """Families of bucket boundaries: each histogram draws its own from exactly one."""

    REQUEST_LATENCY = "request_latency"
    TIME_TO_FIRST_TOKEN = "time_to_first_token"
    INTER_TOKEN_LATENCY = "inter_token_latency"
    ITERATION_TOKENS = "iteration_tokens"
    REQUEST_PARAMS_N = "request_params_n"
    REQUEST_NUM_PREEMPTIONS = "request_num_preemptions"
    REQUEST_TOKENS = "request_tokens"
    """1-2-5 series up to the context length."""
    DEVICE_SECONDS = "device_seconds"
    """1-2-5 series from 100 µs to 1,000 s; not one of vLLM's."""


_BOUNDARIES: dict[Buckets, tuple[float, ...]] = {
    Buckets.REQUEST_LATENCY: (
        *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
        *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
    ),
    Buckets.TIME_TO_FIRST_TOKEN: (
        *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
        *(10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
    ),
    Buckets.INTER_TOKEN_LATENCY: (
        *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
        *(10.0, 20.0, 40.0, 80.0),
    ),
    Buckets.ITERATION_TOKENS: (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
    Buckets.REQUEST_PARAMS_N: (1, 2, 5, 10, 20),
    Buckets.REQUEST_NUM_PREEMPTIONS: (1, 2, 3, 4, 5, 10, 20),
    Buckets.DEVICE_SECONDS: (
        *(0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
        *(1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0),
    ),
}


def boundaries(family: Buckets, max_model_len: int) -> tuple[float, ...]:
    """Upper bounds of a family's buckets. `max_model_len` (tokens) caps the token-count series."""
    if family is not Buckets.REQUEST_TOKENS:
        return _BOUNDARIES[family]
    series: list[float] = []
    decade = 1
    while decade <= max_model_len:
        series += [step * decade for step in (1, 2, 5) if step * decade <= max_model_len]
        decade *= 10
    return tuple(series)


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the table."""

    name: str
    """As it is declared; counters appear with `_total`."""
    kind: Kind
    help: str
    labels: tuple[str, ...] = ("model_name", "engine")
    buckets: Buckets | None = None
    """Of a histogram; None for the other kinds."""

    def series(self) -> tuple[str, ...]:
        """Names of the samples on the page, as queries spell them."""
        if self.kind is Kind.COUNTER:
            return (f"{self.name.removesuffix('_total')}_total",)
        if self.kind is Kind.HISTOGRAM:
            return tuple(f"{self.name}{suffix}" for suffix in ("_bucket", "_count", "_sum"))
        return (self.name,)


_BASE = ("model_name", "engine")


def _gauge(name: str, help: str, *labels: str) -> Metric:
    return Metric(name, Kind.GAUGE, help, (*_BASE, *labels))


def _counter(name: str, help: str, *labels: str) -> Metric:
    return Metric(name, Kind.COUNTER, help, (*_BASE, *labels))


def _histogram(name: str, buckets: Buckets, help: str) -> Metric:
    return Metric(name, Kind.HISTOGRAM, help, _BASE, buckets)


# ---- state, after each step ----
NUM_REQUESTS_RUNNING = _gauge("vllm:num_requests_running", "Requests that hold KV blocks.")
NUM_REQUESTS_WAITING = _gauge("vllm:num_requests_waiting", "Requests in the queue.")
NUM_REQUESTS_WAITING_BY_REASON = _gauge(
    "vllm:num_requests_waiting_by_reason",
    "Requests in the queue by why they wait: for capacity, or deferred until something else is done.",
    "reason",
)
KV_CACHE_USAGE_PERC = _gauge("vllm:kv_cache_usage_perc", "Share of KV blocks in use; 1 is 100 %.")
KV_OFFLOAD_CPU_CACHE_USAGE_PERC = _gauge(
    "vllm:kv_offload_cpu_cache_usage_perc",
    "Share of the host's KV blocks that hold something of preempted requests; 1 is 100 %.",
)
CACHE_CONFIG_INFO = Metric(
    "vllm:cache_config_info",
    Kind.GAUGE,
    "Configuration of the KV cache, in labels; always 1.",
    # vLLM gives this one no model_name
    (
        *("engine", "block_size", "num_gpu_blocks", "cache_dtype", "enable_prefix_caching"),
        *("kv_cache_size_tokens", "kv_cache_max_concurrency"),
    ),
)
ENGINE_CONFIG_INFO = Metric(
    "penstock:engine_config_info",
    Kind.GAUGE,
    "The engine's limits and kind, in labels; always 1.",
    (
        *("model_name", "engine", "device", "dtype", "quantization"),
        *("max_num_seqs", "max_num_batched_tokens", "max_model_len"),
    ),
)
INFO = (CACHE_CONFIG_INFO, ENGINE_CONFIG_INFO)
"""Of these, the labels are what is told."""

# ---- counters, of each step ----
PROMPT_TOKENS = _counter("vllm:prompt_tokens", "Prompt tokens processed, computed or found in the cache.")
PROMPT_TOKENS_BY_SOURCE = _counter(
    "vllm:prompt_tokens_by_source",
    "Prompt tokens by where their keys and values came from; the sources add up to prompt_tokens.",
    "source",
)
PROMPT_TOKENS_CACHED = _counter("vllm:prompt_tokens_cached", "Prompt tokens served from the prefix cache.")
PROMPT_TOKENS_CACHED_BY_SOURCE = _counter(
    "vllm:prompt_tokens_cached_by_source", "Cached prompt tokens by the tier that held them.", "source"
)
GENERATION_TOKENS = _counter("vllm:generation_tokens", "Tokens generated.")
NUM_PREEMPTIONS = _counter("vllm:num_preemptions", "Preemptions: requests put back into the queue.")
PREFIX_CACHE_QUERIES = _counter("vllm:prefix_cache_queries", "Tokens looked up in the prefix cache.")
PREFIX_CACHE_HITS = _counter("vllm:prefix_cache_hits", "Tokens found in the prefix cache.")
ITERATION_TOKENS = _histogram(
    "vllm:iteration_tokens_total", Buckets.ITERATION_TOKENS, "Tokens processed in one step of the engine."
)
RECOMPUTED_TOKENS = _counter("penstock:recomputed_tokens", "Tokens computed again after a preemption.")
KV_OFFLOAD_STORE_BYTES = _counter(
    "vllm:kv_offload_store_bytes", "Bytes of preempted requests' KV blocks copied to the host."
)
KV_OFFLOAD_LOAD_BYTES = _counter(
    "vllm:kv_offload_load_bytes", "Bytes of preempted requests' KV blocks copied back."
)
DEVICE_SECONDS = _counter(
    "penstock:device_seconds",
    "Device seconds by state; busy and idle add up to the wall clock.",
    "state",
)
STEP_SECONDS = _histogram("penstock:step_seconds", Buckets.DEVICE_SECONDS, "Device time of one step.")
PREDICTED_STEP_SECONDS = _histogram(
    "penstock:predicted_step_seconds",
    Buckets.DEVICE_SECONDS,
    "What the cost model had predicted for the step; compare its sum with that of step_seconds.",
)

# ---- of each request ----
REQUEST_SUCCESS = _counter(
    "vllm:request_success", "Requests that ended, by how they ended.", "finished_reason"
)
ADMISSION_REJECTIONS = _counter(
    "vllm:admission_rejections", "Requests refused with 503, by the limit that refused them.", "reason"
)
TIME_TO_FIRST_TOKEN = _histogram(
    "vllm:time_to_first_token_seconds", Buckets.TIME_TO_FIRST_TOKEN, "Arrival to first token."
)
INTER_TOKEN_LATENCY = _histogram(
    "vllm:inter_token_latency_seconds", Buckets.INTER_TOKEN_LATENCY, "Gap between two outputs of a request."
)
TIME_PER_OUTPUT_TOKEN = _histogram(
    "vllm:request_time_per_output_token_seconds",
    Buckets.INTER_TOKEN_LATENCY,
    "Mean gap between the tokens of a request with at least two.",
)
E2E_LATENCY = _histogram(
    "vllm:e2e_request_latency_seconds", Buckets.REQUEST_LATENCY, "Arrival to last token."
)
QUEUE_TIME = _histogram(
    "vllm:request_queue_time_seconds", Buckets.REQUEST_LATENCY, "Arrival to first time in a step."
)
INFERENCE_TIME = _histogram(
    "vllm:request_inference_time_seconds", Buckets.REQUEST_LATENCY, "First time in a step to last token."
)
PREFILL_TIME = _histogram(
    "vllm:request_prefill_time_seconds", Buckets.REQUEST_LATENCY, "First time in a step to first token."
)
DECODE_TIME = _histogram(
    "vllm:request_decode_time_seconds", Buckets.REQUEST_LATENCY, "First token to last token."
)
REQUEST_PROMPT_TOKENS = _histogram(
    "vllm:request_prompt_tokens", Buckets.REQUEST_TOKENS, "Prompt tokens of a request."
)
REQUEST_GENERATION_TOKENS = _histogram(
    "vllm:request_generation_tokens", Buckets.REQUEST_TOKENS, "Generated tokens of a request."
)
MAX_NUM_GENERATION_TOKENS = _histogram(
    "vllm:request_max_num_generation_tokens",
    Buckets.REQUEST_TOKENS,
    "Generated tokens of the longest of a request's n sequences.",
)
REQUEST_PARAMS_N = _histogram("vllm:request_params_n", Buckets.REQUEST_PARAMS_N, "The n asked for.")
REQUEST_PARAMS_MAX_TOKENS = _histogram(
    "vllm:request_params_max_tokens",
    Buckets.REQUEST_TOKENS,
    "The max_tokens asked for, or what applied instead.",
)
PREFILL_KV_COMPUTED_TOKENS = _histogram(
    "vllm:request_prefill_kv_computed_tokens",
    Buckets.REQUEST_TOKENS,
    "Prompt tokens of a request that had to be computed, that is, were not in the prefix cache.",
)
REQUEST_NUM_PREEMPTIONS = _histogram(
    "vllm:request_num_preemptions", Buckets.REQUEST_NUM_PREEMPTIONS, "Preemptions of a request."
)
REQUEST_DEVICE_SECONDS = _histogram(
    "penstock:request_device_seconds", Buckets.DEVICE_SECONDS, "Device seconds that a request used."
)

METRICS: tuple[Metric, ...] = tuple(value for value in list(vars().values()) if isinstance(value, Metric))
"""Every row, in the order of this file."""

#: Values of closed label sets, exported from the start so that rates and ratios have no gaps.
LABEL_VALUES: dict[str, tuple[str, ...]] = {
    NUM_REQUESTS_WAITING_BY_REASON.name: ("capacity", "deferred"),
    PROMPT_TOKENS_BY_SOURCE.name: ("local_compute", "local_cache_hit"),
    PROMPT_TOKENS_CACHED_BY_SOURCE.name: ("device",),
    REQUEST_SUCCESS.name: ("stop", "length", "abort", "error"),
    ADMISSION_REJECTIONS.name: ("max_num_queued_reqs", "max_num_queued_tokens"),
    DEVICE_SECONDS.name: ("busy", "idle"),
}


def series() -> Iterator[str]:
    """Names of all samples that an engine exports, as queries spell them."""
    for metric in METRICS:
        yield from metric.series()


@dataclass(frozen=True, slots=True)
class OldName:
    """A name, whose it is now, and the last version of vLLM that showed it by itself."""

    old: str
    now: str
    last: tuple[int, int]


#: vLLM has dropped others without a successor: swapped requests, the CPU's cache, hit rates, forward passes.
OLD_NAMES = (
    OldName("vllm:time_in_queue_requests", QUEUE_TIME.name, (0, 8)),
    OldName("vllm:gpu_cache_usage_perc", KV_CACHE_USAGE_PERC.name, (0, 10)),
    OldName("vllm:gpu_prefix_cache_queries", PREFIX_CACHE_QUERIES.name, (0, 10)),
    OldName("vllm:gpu_prefix_cache_hits", PREFIX_CACHE_HITS.name, (0, 10)),
    OldName("vllm:time_per_output_token_seconds", INTER_TOKEN_LATENCY.name, (0, 11)),
)

_VERSION = re.compile(r"v?([0-9]{1,4})\.([0-9]{1,4})(?:[.\-+a-z]\S*)?")


def parse_version(text: str) -> tuple[int, int]:
    """(major, minor) of "0.10", "v0.10.2". Raises ValueError for what is no version."""
    match = _VERSION.fullmatch(text.strip().lower())
    if match is None:
        raise ValueError(f"must be a version such as 0.10, got {text!r}")
    return int(match[1]), int(match[2])
