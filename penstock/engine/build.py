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
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TextIO

import torch

from penstock.core.blocks import BlockPool
from penstock.core.cost import StepCost
from penstock.core.errors import (
    DeviceOutOfMemory,
    MemoryBudgetError,
    ModelLoadError,
    RequestFailed,
)
from penstock.core.executor import Items
from penstock.core.plan import Plan
from penstock.core.scheduler import Scheduler, SchedulerConfig
from penstock.grammar.cache import Grammars
from penstock.grammar.compiler import Compiler
from penstock.kernels import start_build
from penstock.kernels.capability import Device, check_quantization, resolve_dtype
from penstock.kernels.create import create_operations, known_device
from penstock.kernels.operations import Operations
from penstock.model.bert import Encoder
from penstock.model.causal_lm import CausalLM
from penstock.model.config import load_config
from penstock.model.generation import generation_defaults
from penstock.model.hub import resolve_model
from penstock.model.memory import MemoryBudget, plan_memory
from penstock.model.model_config import ModelConfig
from penstock.model.pooler import Pooler
from penstock.model.pooling import pooling_plan
from penstock.model.reader import within_vocabulary
from penstock.observe import logs
from penstock.sampling.processors import Processors, load
from penstock.text.tokenizer import Tokenizer
from penstock.text.vocabulary import vocabulary

from .clock import MonotonicClock
from .config import EngineConfig, graph_sizes, resolve, step_limits, steps_ahead
from .encoder_budget import EncoderBudget, budget
from .encoders import make_executor
from .executor.create import (
    cache_of,
    check_memory,
    create_graphs,
    create_host,
    forget_measurements,
    stream_of,
    warm_head,
    warm_prompts,
    warm_sampler,
)
from .executor.torch_executor import TorchExecutor
from .hardware import Hardware, choose_device, inspect_hardware, prior, roofline
from .heartbeat import Heartbeat
from .held import Held
from .loading import load_any
from .loop import EngineLoop
from .machine import memory, usable_cores
from .messages import ModelInfo
from .trace import StepLog, open_log

logger = logging.getLogger("penstock.engine")


@dataclass(frozen=True, slots=True)
class Engine:
    """A loop with what it stands on."""

    loop: EngineLoop
    log: StepLog
    info: ModelInfo
    chore: Callable[[], bool] | None = None
    """A piece of work that nobody waits for, for when there is nothing else to do; False: none is left."""

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
    model_config = load_config(path, config.hf_overrides)
    pooling = pooling_plan(
        path, model_config, runner=config.runner, convert=config.convert, pooler=config.pooler_config
    )
    known = known_device(device)
    dtype = _dtype(config.dtype, model_config, known)
    operations = create_operations(
        device,
        dtype,
        attention=config.attention_backend,
        quantized=config.quantization != "none",
        batch_invariant=config.batch_invariant,
    )
    scheme = _quantization(config, operations, known)
    if model_config.fp8 is not None:
        logger.info("%s", _restored(operations, scheme))
    hardware = inspect_hardware(device, dtype)
    forget_measurements(device)
    logger.info("%s", hardware.describe())
    logger.info("batch invariance: %s", _kept(config, operations))
    timer.lap("inspect")
    size = model_config.vocab_size
    generation = generation_defaults(config.generation_config, path)
    stops = within_vocabulary(generation.eos_ids, size, "generation_config.json: eos_token_id")
    eos_ids = tuple(sorted({*model_config.eos_ids, *stops}))
    grammars = Grammars(lambda: Compiler(vocabulary(Tokenizer.from_directory(path), size, eos_ids)))
    if pooling is None:
        grammars.warm()  # beside the weights
    model, pooler = load_any(config, path, model_config, pooling, operations, scheme, _progress_bar())
    timer.lap("load")
    if isinstance(model, Encoder):
        assert pooler is not None  # encoders do nothing else
        return _build_encoder(config, path, model, pooler, hardware, heartbeat, timer, record)
    seqs, tokens = step_limits(config, device.type)
    plan = plan_memory(
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
        graph_rows=graph_sizes(config, device.type, seqs),
        offload_bytes=int(config.kv_offloading_size * 2**30),
        host_bytes=memory()[1],
    )
    _tell(plan)
    spec = model.cache_spec(config.block_size)
    cache = cache_of(spec, plan, device)
    attention = operations.attention(spec)
    read = model.read_bytes
    logger.info("%s", roofline(hardware, read, model.num_parameters))
    clock = MonotonicClock()
    stream = stream_of(device)
    host, copying = create_host(cache, plan, stream)
    coefficients = replace(
        prior(hardware, read, model.num_parameters, spec.bytes_per_token), per_copy=copying
    )
    cost = StepCost(coefficients)
    kinds = load(config.logits_processors)
    processors = Processors(kinds, device, max_num_seqs=seqs, vocab_size=size) if kinds else None
    executor = TorchExecutor(
        model,
        cache,
        attention,
        device,
        coefficients,
        clock,
        _progress(heartbeat, clock, cost),
        stream=stream,
        host=host,
        grammars=grammars,
        processors=processors,
        pooler=pooler,
    )
    timer.lap("cache")
    advice = "Lower --kv-cache-memory-bytes or --gpu-memory-utilization."
    _warm_up(executor.probe, path, advice)
    for count in warm_prompts(device, tokens, plan.max_model_len):
        _warm_up(partial(executor.probe, count), path, advice)
    if pooling is None:
        warm_head(model, seqs)
        warm_sampler(model)
    timer.lap("warm up")
    graphs = create_graphs(model, cache, attention, plan)
    if graphs is not None:
        graphs.prepare()
        executor.record(graphs)
        timer.lap("graphs")
    check_memory(device, plan, timer.started)
    limits = resolve(
        config,
        device=device.type,
        max_model_len=plan.max_model_len,
        weight_tokens=coefficients.fixed / coefficients.per_token,
    )
    logger.info("%s", ", ".join(f"{entry.name} {getattr(limits, entry.name)}" for entry in fields(limits)))
    capacity = executor.capacity()
    pool = BlockPool(capacity.num_blocks, capacity.block_size)
    scheduler = Scheduler(limits, pool, cost, features=capacity.features, host_blocks=capacity.host_blocks)
    log = StepLog(limits, capacity, record)
    loop = EngineLoop(
        scheduler,
        executor,
        clock,
        log,
        heartbeat,
        frozenset(eos_ids),
        seed=config.seed,
        depth=2 if steps_ahead(config, device.type) else 1,
        held=Held(grammars),
    )
    info = _info(path, model, device, limits, config, plan, eos_ids, timer.laps, pooler)
    logger.info("engine ready: %s, %s on %s; %s", info.architecture, info.dtype, device, timer)
    return Engine(loop, log, info, graphs.capture_next if graphs is not None else None)


def _build_encoder(
    config: EngineConfig,
    path: Path,
    model: Encoder,
    pooler: Pooler,
    hardware: Hardware,
    heartbeat: Heartbeat | None,
    timer: _Timer,
    record: TextIO | None,
) -> Engine:
    """The rest of the way for an encoder, which has no KV cache."""
    device, info = model.device, pooler.plan.info
    plan = budget(
        config,
        model.config,
        info,
        weights=model.weight_bytes,
        width=model.dtype.itemsize,
        device=device.type,
        available=hardware.available_bytes,
    )
    _tell(plan)
    if config.kv_cache_memory_bytes is not None:
        logger.warning("--kv-cache-memory-bytes changes nothing: an encoder keeps no keys and values")
    multiplied = model.read_bytes // model.dtype.itemsize
    logger.info("at best %s tok/s", f"{hardware.flops / (2 * multiplied):,.0f}")
    coefficients = prior(hardware, model.read_bytes, multiplied, 0)
    clock, cost = MonotonicClock(), StepCost(coefficients)
    executor = make_executor(model, pooler, plan, coefficients, clock, _progress(heartbeat, clock, cost))
    timer.lap("cache")
    _warm_up(executor.probe, path, "Lower --max-num-batched-tokens.")
    timer.lap("warm up")
    limits = resolve(
        config,
        device=device.type,
        max_model_len=plan.max_model_len,
        weight_tokens=0.0,
        encoder=(plan.max_num_seqs, plan.max_num_batched_tokens),
    )
    capacity = executor.capacity()
    pool = BlockPool(capacity.num_blocks, capacity.block_size)
    scheduler = Scheduler(limits, pool, cost, features=capacity.features)
    log = StepLog(limits, capacity, record)
    loop = EngineLoop(scheduler, executor, clock, log, heartbeat, frozenset(), seed=config.seed)
    told = _info(path, model, device, limits, config, plan, (), timer.laps, pooler)
    logger.info("engine ready: %s, %s on %s; %s", told.architecture, told.dtype, device, timer)
    return Engine(loop, log, told)


def _progress(heartbeat: Heartbeat | None, clock: MonotonicClock, cost: StepCost) -> Callable[[Items], None]:
    """Tells who watches the engine of a part of a step."""

    def progress(part: Items) -> None:
        if heartbeat:
            heartbeat.begin(clock.now(), cost.predict(Plan(0, items=part)))

    return progress


def _warm_up(probe: Callable[[], None], path: Path, advice: str) -> None:
    """The first use of every kernel is slower than the rest."""
    try:
        probe()
    except RequestFailed as error:
        raise ModelLoadError(f"{path}: {error}") from error
    except DeviceOutOfMemory as error:
        raise MemoryBudgetError(
            f"out of memory in the first step: {error.message}.", advice=advice
        ) from error


def _tell(budget: MemoryBudget | EncoderBudget) -> None:
    if logs.configured():
        logger.info("%s", budget.render())
    else:  # offline: nobody else says it
        print(budget.render(), file=sys.stderr, flush=True)


def _kept(config: EngineConfig, operations: Operations) -> str:
    """Whether equal requests get equal bytes in any company, in words for the log."""
    if operations.batch_invariant:
        return "kept; equal requests with equal seeds get equal bytes, whatever runs beside them"
    if config.attention_backend in ("torch", "reference"):
        return f"not kept by --attention-backend {config.attention_backend}"
    if operations.name != "cpu":
        return f"not kept by the {operations.name} operators on {operations.device}"
    return "off, it may cost speed here; --batch-invariant keeps it"


def _dtype(wanted: str, config: ModelConfig, known: Device) -> torch.dtype:
    choice = resolve_dtype(wanted, config.dtype, known)
    for note in choice.notes:
        logger.warning("%s", note)
    dtype: torch.dtype = getattr(torch, choice.dtype)
    return dtype


def _quantization(config: EngineConfig, operations: Operations, known: Device) -> str | None:
    scheme = config.quantization
    check_quantization(scheme, str(operations.dtype).removeprefix("torch."), known, operations.schemes)
    if scheme == "none":
        return None
    if known.type == "cpu" and not operations.multiplies_integers:
        logger.warning(
            "This processor has no instructions for products of 8-bit integers: "
            "--quantization %s saves memory here, and makes prompts no faster.",
            scheme,
        )
    return scheme


def _restored(operations: Operations, scheme: str | None) -> str:
    """What becomes of weights that are stored in fp8, in words for the log."""
    dtype = str(operations.dtype).removeprefix("torch.")
    if scheme is not None:
        return f"the checkpoint's fp8 weights are restored to {dtype}, and rounded to {scheme} anew"
    advice = ""
    if operations.schemes:
        smaller = "fp8" if "fp8" in operations.schemes else "int8"
        advice = f", twice as large as they are stored; --quantization {smaller} keeps them small"
    return f"the checkpoint's fp8 weights are restored to {dtype}{advice}"


def _info(
    path: Path,
    model: CausalLM | Encoder,
    device: torch.device,
    limits: SchedulerConfig,
    config: EngineConfig,
    budget: MemoryBudget | EncoderBudget,
    eos_ids: tuple[int, ...],
    laps: dict[str, float],
    pooler: Pooler | None,
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
        quantization=config.quantization,
        logits_processors=config.logits_processors,
        block_bytes=budget.block_size * budget.kv_bytes_per_token if isinstance(budget, MemoryBudget) else 0,
        pooling=None if pooler is None else pooler.plan.info,
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
        self.started = self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name] = round(now - self._last, 3)
        self._last = now

    def __str__(self) -> str:
        return ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.laps.items())
