"""Settings of one engine, documented where they are defined; `penstock serve` makes its flags from them.

`EngineConfig` is what the user wrote; None means "choose for me". `resolve` decides the rest once the model
and the device are known: a pure function, whose result is printed at the start.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from penstock.core.errors import StartupError
from penstock.core.policy import POLICIES
from penstock.core.scheduler import SchedulerConfig
from penstock.model.graph_sizes import decode_sizes


def option(default: Any, help_: str, **metadata: Any) -> Any:
    """A dataclass field with the one line that `--help` prints for it.

    metadata: `choices` (tuple), `metavar`, `size` (accepts 8k, 8K, 4GiB), `auto` (what the word "auto" stands
    for), `positional`.
    """
    return field(default=default, metadata={"help": help_, **metadata})


_DTYPE_ALIASES = {"half": "float16", "float": "float32"}
"""vLLM's other names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What the user asked of the engine."""

    model: str = option("demo", "local directory, Hugging Face id, or 'demo' (bundled)", positional=True)
    revision: str | None = option(None, "branch, tag or commit of a Hugging Face id")
    download_dir: str | None = option(
        None, "folder for downloaded models; default is the Hugging Face cache", metavar="DIR"
    )
    dtype: str = option(
        "auto",
        "computation type; auto is the checkpoint's",
        choices=("auto", "bfloat16", "float16", "half", "float32", "float"),
    )
    quantization: str = option(
        "none",
        "quantise weights at load; w8a8 (CPU) and fp8 (GPU, 8.9 and later) activations, too",
        choices=("none", "int8", "w8a8", "int4", "fp8"),
        metavar="SCHEME",
    )
    runner: str = option(
        "auto",
        "generate text, or pool: embeddings, scores, classes; auto is as the model's files say",
        choices=("auto", "generate", "pooling"),
    )
    convert: str = option(
        "auto",
        "make a model that generates embed or classify",
        choices=("auto", "none", "embed", "classify"),
    )
    pooler_config: Mapping[str, Any] | None = option(
        None, "how it pools, as JSON: pooling_type (CLS, LAST, MEAN), use_activation, task", metavar="JSON"
    )
    hf_overrides: Mapping[str, Any] | None = option(
        None, "values in place of those in config.json, as JSON", metavar="JSON"
    )
    device: str = option("auto", "auto takes a GPU if there is one", choices=("auto", "cpu", "cuda"))
    load_format: str = option(
        "auto",
        "dummy makes seeded random weights without reading any",
        choices=("auto", "safetensors", "dummy"),
    )
    max_model_len: int | None = option(
        None,
        "longest prompt plus output in tokens; default is the model's, auto is what fits",
        size=True,
        auto=-1,
    )
    max_num_seqs: int | None = option(None, "most requests in one step; default 256 (64 on CPU)", size=True)
    max_num_batched_tokens: int | None = option(
        None, "token budget of one step; default 8192 (256 on CPU)", size=True
    )
    async_scheduling: bool | None = option(
        None, "plan a step while one runs; default on CUDA; on CPU, where nothing overlaps, tokens come later"
    )
    block_size: int = option(16, "tokens per block of the KV cache")
    enable_prefix_caching: bool = option(True, "share cached blocks between requests with equal prefixes")
    enable_chunked_prefill: bool = option(True, "always on: long prompts are computed in chunks")
    long_prefill_token_threshold: int = option(
        0, "most tokens of one prompt in one step, 0 is no limit of its own", size=True
    )
    max_num_mixed_prefill_tokens: int | None = option(
        None, "most prompt tokens beside decodes, plus 4 for each; 0 is no limit, as on CUDA", size=True
    )
    scheduling_policy: str = option(
        "fcfs", "priority serves lower numbers first, and background after all else", choices=tuple(POLICIES)
    )
    slo_ttft_ms: float | None = option(
        None, "milliseconds to a first token that background work is not to endanger"
    )
    slo_itl_ms: float | None = option(None, "the same between two tokens of a stream")
    max_num_queued_reqs: int | None = option(
        None, "most requests that may wait; more are refused with 503 and Retry-After", size=True
    )
    max_num_queued_tokens: int | None = option(
        None, "most prompt tokens that may wait: target TTFT x prefill rate", size=True
    )
    max_unread_tokens: int = option(
        32_768,
        "most tokens, with their alternatives, of a stream whose client does not read",
        size=True,
    )
    gpu_memory_utilization: float | None = option(
        None, "share of the device's memory to use; default 0.92 of a GPU, 0.5 of free RAM on CPU"
    )
    kv_cache_memory_bytes: int | None = option(
        None, "exact size of the KV cache, such as 4GiB; skips --gpu-memory-utilization", size=True
    )
    logits_processors: tuple[str, ...] = option(
        (), "classes of yours in the sampler, module:Class, with vLLM's interface; docs/structured.md"
    )
    generation_config: str = option(
        "auto",
        "where sampling defaults come from: auto is the model's generation_config.json, vllm is none",
        metavar="auto|vllm|DIR",
    )
    batch_invariant: bool | None = option(
        None,
        "an answer's bytes never depend on its company, on chunks or preemption; default where it is free",
    )
    attention_backend: str = option("auto", "attention kernels; reference is the slow specification")
    threads: int | None = option(None, "CPU threads of the engine; default is all cores")
    seed: int | None = option(None, "makes requests without a seed of their own repeatable, in order")
    tensor_parallel_size: int = option(1, "number of devices; only 1 is implemented")
    kv_offloading_size: float = option(
        0.0, "memory of the host for preempted requests, in GiB, where copies beat computing"
    )
    enforce_eager: bool = option(False, "no CUDA graphs: every step is computed call by call")
    cudagraph_capture_sizes: tuple[int, ...] = option(
        (),
        "decoding requests of a CUDA graph each; default is up to 16 sizes, up to --max-num-seqs",
        metavar="N",
    )
    max_cudagraph_capture_size: int | None = option(
        None, "largest of these sizes; default 512, 0 is none", size=True
    )
    trust_remote_code: bool = option(
        False, "accepted for compatibility: no code from checkpoints is ever run"
    )
    disable_log_stats: bool = option(False, "do not print a line of statistics every ten seconds")
    record_steps: str | None = option(
        None,
        "write every step's input, plan and result here, for replay; a full disk is logged",
        metavar="FILE",
    )
    liveness_grace: float = option(
        10.0, "seconds that a step may take beyond ten times its prediction before /livez fails"
    )

    def __post_init__(self) -> None:
        for name, least in (
            ("max_num_seqs", 1),
            ("max_num_batched_tokens", 1),
            ("block_size", 1),
            ("slo_ttft_ms", 0),
            ("slo_itl_ms", 0),
            ("max_num_queued_reqs", 0),
            ("max_num_queued_tokens", 0),
            ("max_unread_tokens", 1),
            ("long_prefill_token_threshold", 0),
            ("max_num_mixed_prefill_tokens", 0),
            ("kv_cache_memory_bytes", 1),
            ("threads", 1),
            ("kv_offloading_size", 0),
            ("max_cudagraph_capture_size", 0),
            ("liveness_grace", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise StartupError(f"{flag(name)} must be at least {least}, got {value}.", param=flag(name))
        if self.max_model_len is not None and self.max_model_len < 1 and self.max_model_len != -1:
            raise StartupError(
                f"--max-model-len must be at least 1, or auto for what fits, got {self.max_model_len}.",
                param="--max-model-len",
            )
        if self.gpu_memory_utilization is not None and not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise StartupError(
                f"--gpu-memory-utilization must be in (0, 1], got {self.gpu_memory_utilization}.",
                param="--gpu-memory-utilization",
            )
        if not math.isfinite(self.kv_offloading_size):
            raise StartupError(
                f"--kv-offloading-size must be a number of GiB, got {self.kv_offloading_size}.",
                param="--kv-offloading-size",
            )
        object.__setattr__(self, "cudagraph_capture_sizes", tuple(self.cudagraph_capture_sizes))
        if min(self.cudagraph_capture_sizes, default=1) < 1:
            raise StartupError(
                f"--cudagraph-capture-sizes must be at least 1, got {min(self.cudagraph_capture_sizes)}.",
                param="--cudagraph-capture-sizes",
            )
        if self.tensor_parallel_size != 1:
            raise StartupError(
                f"--tensor-parallel-size {self.tensor_parallel_size} is not implemented.",
                param="--tensor-parallel-size",
                advice="Serve on one device, or run one server per device behind a gateway.",
            )
        if not self.enable_chunked_prefill:
            raise StartupError(
                "--no-enable-chunked-prefill is not available: chunked prefill is always on.",
                param="--enable-chunked-prefill",
                advice="Raise --max-num-batched-tokens to compute long prompts in one piece.",
            )
        for entry in fields(self):
            choices = entry.metadata.get("choices")
            value = getattr(self, entry.name)
            if choices and value not in choices:
                raise StartupError(
                    f"{flag(entry.name)} {value!r} is not supported.",
                    param=flag(entry.name),
                    advice=f"Choose from: {', '.join(choices)}.",
                )
        object.__setattr__(self, "dtype", _DTYPE_ALIASES.get(self.dtype, self.dtype))


DEFAULT_LIMITS = {"cpu": (64, 256), "cuda": (256, 8192)}
"""device → (max_num_seqs, max_num_batched_tokens). Whoever decodes waits for a step: 512 tokens take two CPU
cores more than a second, and go no faster than 256 (docs/log.md)."""


def step_limits(config: EngineConfig, device: str) -> tuple[int, int]:
    """(max_num_seqs, max_num_batched_tokens) for this device; a step must have a token for every request."""
    seqs, tokens = DEFAULT_LIMITS.get(device, DEFAULT_LIMITS["cpu"])
    tokens = config.max_num_batched_tokens or tokens
    wanted = config.max_num_seqs or min(seqs, tokens)
    if wanted > tokens:
        raise StartupError(
            f"--max-num-seqs {wanted} is more than the {tokens} tokens of a step.",
            param="--max-num-seqs",
            advice=f"Use --max-num-seqs {tokens}, or --max-num-batched-tokens {wanted} or more.",
        )
    return wanted, tokens


def graph_sizes(config: EngineConfig, device: str, max_num_seqs: int) -> tuple[int, ...]:
    """Decoding requests of each graph that this engine captures."""
    if device != "cuda" or config.enforce_eager:
        return ()
    return decode_sizes(max_num_seqs, config.cudagraph_capture_sizes, config.max_cudagraph_capture_size)


def steps_ahead(config: EngineConfig, device: str) -> bool:
    """Whether a step is planned while one runs."""
    return device == "cuda" if config.async_scheduling is None else config.async_scheduling


def mixed_prefill_tokens(config: EngineConfig, device: str, weight_tokens: float) -> int:
    """Most prompt tokens in a step that also decodes, besides four for each request that does.

    Who decodes waits for all of a step. On a CPU, prompts are computed in small pieces at about the same rate
    as in large ones, once a piece takes longer than reading the weights, which is `weight_tokens`. Four times
    that: prompts make a step at most five times as long as its decodes alone would. And 48 at least: thinner,
    prompts wait too long (docs/log.md). On GPUs this has not been measured: no limit.
    """
    wanted = config.max_num_mixed_prefill_tokens
    if wanted is not None or device != "cpu":
        return wanted or 0
    return max(48, round(4 * weight_tokens))


def resolve(
    config: EngineConfig,
    *,
    device: str,
    max_model_len: int,
    weight_tokens: float,
    encoder: tuple[int, int] | None = None,
) -> SchedulerConfig:
    """Every limit of the scheduler, decided.

    encoder: (max_num_seqs, max_num_batched_tokens) of one, which computes prompts whole and shares nothing.

    max_model_len: from the memory plan. weight_tokens: how many prompt tokens are computed in the time that
    reading the weights takes.
    """
    seqs, tokens = encoder or step_limits(config, device)
    whole = encoder is not None
    return SchedulerConfig(
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        max_model_len=max_model_len,
        enable_prefix_caching=config.enable_prefix_caching and not whole,
        long_prefill_token_threshold=0 if whole else config.long_prefill_token_threshold,
        max_num_mixed_prefill_tokens=0 if whole else mixed_prefill_tokens(config, device, weight_tokens),
        whole_prompts=whole,
        policy=config.scheduling_policy,
        slo_ttft=None if config.slo_ttft_ms is None else config.slo_ttft_ms / 1e3,
        slo_itl=None if config.slo_itl_ms is None else config.slo_itl_ms / 1e3,
        max_num_queued_reqs=config.max_num_queued_reqs,
        max_num_queued_tokens=config.max_num_queued_tokens,
    )


def flag(name: str) -> str:
    """The command line spelling of a field."""
    return "--" + name.replace("_", "-")
