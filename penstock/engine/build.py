"""From an EngineConfig to an engine that is ready to step; prints what it decides on the way.

    config ─▶ model directory ─▶ ModelConfig ─▶ weights ─▶ memory plan ─▶ KV cache ─▶ executor ─▶ loop

The memory table is printed before the KV cache is allocated; what does not fit is refused with the flag and
the value that would.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from penstock.core.blocks import BlockPool
from penstock.core.cost import StepCost
from penstock.core.errors import (
    DeviceOutOfMemory,
    MemoryBudgetError,
    ModelLoadError,
    RequestFailed,
    StartupError,
)
from penstock.core.executor import Items
from penstock.core.plan import Plan
from penstock.core.scheduler import Scheduler, SchedulerConfig
from penstock.kernels import start_build
from penstock.kernels.attention import KVCache
from penstock.kernels.create import create_operations
from penstock.kernels.operations import Operations
from penstock.model.causal_lm import CausalLM
from penstock.model.config import ModelConfig, load_config, within_vocabulary
from penstock.model.generation import generation_defaults
from penstock.model.hub import resolve_model
from penstock.model.loader import load_model
from penstock.model.memory import MemoryBudget, plan_memory
from penstock.observe import logs

from .clock import MonotonicClock
from .config import EngineConfig, resolve, step_limits
from .executor.torch_executor import TorchExecutor
from .hardware import choose_device, inspect_hardware, prior, roofline
from .heartbeat import Heartbeat
from .loop import EngineLoop
from .machine import usable_cores
from .messages import ModelInfo
from .trace import StepLog, open_log

logger = logging.getLogger("penstock.engine")


@dataclass(frozen=True, slots=True)
class Engine:
    """A loop with what it stands on."""

    loop: EngineLoop
    log: StepLog
    info: ModelInfo

    def close(self) -> None:
        """Free the device and flush the log."""
        self.log.close()
        self.loop.executor.close()


def build_engine(config: EngineConfig, heartbeat: Heartbeat | None = None) -> Engine:
    """Load a model and make it ready. Raises StartupError subclasses for what cannot be served."""
    timer = _Timer()
    record = open_log(config.record_steps)
    device = choose_device(config.device)
    if device.type == "cpu":
        start_build()  # on a machine's first start, the kernels are compiled while the model is looked for
        torch.set_num_threads(config.threads or usable_cores())
    path = resolve_model(config.model, config.revision, config.download_dir)
    model_config = load_config(path)
    dtype = _dtype(config.dtype, model_config, device)
    operations = create_operations(
        device,
        dtype,
        attention=config.attention_backend,
        quantized=config.quantization != "none",
        batch_invariant=config.batch_invariant,
    )
    scheme = _quantization(config, operations)
    hardware = inspect_hardware(device, dtype)
    logger.info("%s", hardware.describe())
    logger.info("batch invariance: %s", _kept(config, operations))
    timer.lap("inspect")
    model = load_model(
        path,
        model_config,
        operations,
        load_format=config.load_format,  # type: ignore[arg-type]
        quantization=scheme,
        progress=_progress_bar(),
    )
    timer.lap("load")
    seqs, tokens = step_limits(config, device.type)
    budget = plan_memory(
        model_config,
        weight_bytes=model.weight_bytes,
        dtype_bytes=dtype.itemsize,
        device=device.type,
        available_bytes=hardware.available_bytes,
        total_bytes=hardware.memory_bytes,
        utilization=config.gpu_memory_utilization,
        kv_cache_memory_bytes=config.kv_cache_memory_bytes,
        max_model_len=config.max_model_len,
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        block_size=config.block_size,
    )
    if logs.configured():
        logger.info("%s", budget.render())
    else:  # offline: nobody else says it
        print(budget.render(), file=sys.stderr, flush=True)
    spec = model.cache_spec(config.block_size)
    cache = KVCache(spec, budget.num_blocks + 1, device)  # the last one is the probe's
    attention = operations.attention(spec)
    read = model.read_bytes
    logger.info("%s", roofline(hardware, read, model.num_parameters))
    coefficients = prior(hardware, read, model.num_parameters, spec.bytes_per_token)
    clock, cost = MonotonicClock(), StepCost(coefficients)

    def progress(part: Items) -> None:
        if heartbeat:
            heartbeat.begin(clock.now(), cost.predict(Plan(0, items=part)))

    executor = TorchExecutor(model, cache, attention, device, coefficients, clock, progress)
    timer.lap("cache")
    try:
        executor.probe()  # the first use of every kernel is slower than the rest
    except RequestFailed as error:
        raise ModelLoadError(f"{path}: {error}") from error
    except DeviceOutOfMemory as error:
        raise MemoryBudgetError(
            f"out of memory in the first step: {error.message}.",
            advice="Lower --kv-cache-memory-bytes or --gpu-memory-utilization.",
        ) from error
    timer.lap("warm up")
    limits = resolve(
        config,
        device=device.type,
        max_model_len=budget.max_model_len,
        weight_tokens=coefficients.fixed / coefficients.per_token,
    )
    logger.info("%s", ", ".join(f"{entry.name} {getattr(limits, entry.name)}" for entry in fields(limits)))
    capacity = executor.capacity()
    pool = BlockPool(capacity.num_blocks, capacity.block_size)
    scheduler = Scheduler(limits, pool, cost, features=capacity.features)
    generation = generation_defaults(config.generation_config, path)
    stops = within_vocabulary(
        generation.eos_ids, model_config.vocab_size, "generation_config.json: eos_token_id"
    )
    eos_ids = tuple(sorted({*model_config.eos_ids, *stops}))
    log = StepLog(limits, capacity, record)
    loop = EngineLoop(
        scheduler,
        executor,
        clock,
        log,
        heartbeat,
        frozenset(eos_ids),
        seed=config.seed,
        depth=2 if config.async_scheduling else 1,
    )
    info = _info(path, model, device, limits, config.quantization, budget, eos_ids, timer.laps)
    logger.info("engine ready: %s, %s on %s; %s", info.architecture, info.dtype, device, timer)
    return Engine(loop, log, info)


def _kept(config: EngineConfig, operations: Operations) -> str:
    """Whether equal requests get equal bytes in any company, in words for the log."""
    if operations.batch_invariant:
        return "kept; equal requests with equal seeds get equal bytes, whatever runs beside them"
    if config.attention_backend in ("torch", "reference"):
        return f"not kept by --attention-backend {config.attention_backend}"
    if operations.name != "cpu":
        return f"not kept by the {operations.name} operators on {operations.device}"
    return "off, it may cost speed here; --batch-invariant keeps it"


def _dtype(wanted: str, config: ModelConfig, device: torch.device) -> torch.dtype:
    name = wanted
    if name == "auto":
        name = config.dtype
        if name == "float16" and device.type == "cpu":
            name = "bfloat16"  # CPUs have no fast float16
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _quantization(config: EngineConfig, operations: Operations) -> str | None:
    scheme, device = config.quantization, operations.device
    if scheme == "none":
        return None
    if operations.dtype == torch.float16:
        raise StartupError(
            f"--quantization {scheme} computes in bfloat16 or float32, not in float16.",
            param="--dtype",
            advice="Use --dtype bfloat16.",
        )
    if device.type != "cpu":
        raise StartupError(
            f"--quantization {scheme} is implemented for CPU, not for {device.type}.",
            param="--quantization",
            advice="Drop the flag, or use --device cpu.",
        )
    if scheme not in operations.schemes:
        raise StartupError(
            f"--quantization {scheme} needs the CPU kernels, which are not there.",
            param="--quantization",
            advice="The log says why; most often a C++ compiler is missing (apt-get install g++).",
        )
    if not operations.multiplies_integers:
        logger.warning(
            "This processor has no instructions for products of 8-bit integers: "
            "--quantization %s saves memory here, and costs speed.",
            scheme,
        )
    return scheme


def _info(
    path: Path,
    model: CausalLM,
    device: torch.device,
    limits: SchedulerConfig,
    quantization: str,
    budget: MemoryBudget,
    eos_ids: tuple[int, ...],
    laps: dict[str, float],
) -> ModelInfo:
    return ModelInfo(
        path=str(path),
        architecture=model.config.architecture,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(device),
        vocab_size=model.config.vocab_size,
        max_model_len=budget.max_model_len,
        eos_ids=eos_ids,
        block_size=budget.block_size,
        num_blocks=budget.num_blocks,
        max_num_seqs=limits.max_num_seqs,
        parameters=model.num_parameters,
        startup_seconds=laps,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        quantization=quantization,
    )


def _progress_bar() -> Callable[[int, int], None] | None:
    """Draws a bar on a terminal; a log gets one line at the end."""
    if sys.stderr.isatty() and not logs.in_json():

        def draw(done: int, total: int) -> None:
            width = 30
            filled = width * done // total if total else width
            end = "\n" if done >= total else ""
            bar = "█" * filled + "░" * (width - filled)
            sys.stderr.write(f"\rloading weights {bar} {done / 2**20:,.0f}/{total / 2**20:,.0f} MiB{end}")
            sys.stderr.flush()

        return draw

    def report(done: int, total: int) -> None:
        if done >= total:
            logger.info("loaded %.0f MiB of weights", total / 2**20)

    return report


class _Timer:
    """Seconds of each part of the start."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name] = round(now - self._last, 3)
        self._last = now

    def __str__(self) -> str:
        return ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.laps.items())
