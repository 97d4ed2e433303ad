"""What an executor is put together from, by device: its queue, room on the host, graphs of decode.

memory plan ─▶ KV cache ─▶ host's cache ─▶ executor ─ probe ─▶ graphs wanted at once ─▶ ready
                                                                the others, in idle moments
"""

from __future__ import annotations

import logging
import time

import torch

from penstock.kernels.attention import AttentionBackend, KVCache, KVCacheSpec
from penstock.kernels.operations import Draw
from penstock.model.causal_lm import CausalLM
from penstock.model.graph_sizes import ready_sizes
from penstock.model.memory import MemoryBudget, format_size

from .cuda import CudaCapture, CudaStream
from .graphs import Capture, DecodeGraphs, blocks_of
from .offload import HostCache
from .stream import HostStream, Stream

logger = logging.getLogger("penstock.engine")


def stream_of(device: torch.device) -> Stream:
    """The device's queue."""
    return CudaStream(device) if device.type == "cuda" else HostStream()


def cache_of(spec: KVCacheSpec, plan: MemoryBudget, device: torch.device) -> KVCache:
    """The device's cache; its last block is the probe's, and for what graphs are captured with."""
    return KVCache(spec, plan.num_blocks + 1, device)


def create_host(cache: KVCache, plan: MemoryBudget, stream: Stream) -> tuple[HostCache | None, float]:
    """(the host's cache of a memory plan, None where it has none; seconds of a block's way there or back)"""
    if not plan.host_blocks:
        return None, 0.0
    host = HostCache(cache, plan.host_blocks, stream, pinned=stream.asynchronous)
    seconds = measure_copies(cache, host, stream)
    logger.info(
        "%s of the host's memory hold %s tokens of preempted requests; a block is copied in %.0f µs",
        format_size(host.nbytes),
        f"{plan.host_blocks * plan.block_size:,}",
        1e6 * seconds,
    )
    return host, seconds


def create_graphs(
    model: CausalLM,
    cache: KVCache,
    attention: AttentionBackend,
    plan: MemoryBudget,
    capture: Capture | None = None,
) -> DecodeGraphs | None:
    """The graphs of a memory plan; None where it has none."""
    if not plan.graph_rows:
        return None
    return DecodeGraphs(
        model,
        cache,
        attention,
        capture or CudaCapture(model.device),
        plan.graph_rows,
        ready_sizes(plan.graph_rows),
        blocks_of(plan.max_model_len, plan.block_size),
        plan.num_blocks,
    )


def warm_prompts(device: torch.device, most_tokens: int, max_model_len: int) -> tuple[int, ...]:
    """Tokens of prompts that start every kernel which a GPU may need, beside the usual probe: they are
    compiled, or brought to the device, when they are first started, and no request is to wait for that.

    Products with quantised weights have a tile for up to 16, 32 and 64 rows, and for more; a context of
    over two parts of attention's (256 positions) is merged.
    """
    if device.type != "cuda":
        return ()
    return tuple(sorted({min(size, most_tokens, max_model_len - 1) for size in (17, 33, 600)} - {0}))


def warm_head(model: CausalLM, most_rows: int) -> None:
    """The same for the output layer, which computes one row for each request."""
    if model.device.type == "cuda":
        for rows in (17, 33, 65):
            hidden = (min(rows, most_rows), model.config.hidden_size)
            model.logits(torch.zeros(hidden, dtype=model.dtype, device=model.device))


def warm_sampler(model: CausalLM) -> None:
    """Draw once in each way, where the device does it by itself: its kernels are compiled when they are first
    started, which is not to be in the first request with a top_p."""
    choose = model.operations.choose
    if choose is None:
        return
    draws = (Draw(0.5, 0.0), Draw(0.5, 1.0), Draw(0.5, 1.0, top_k=8, top_p=0.5))
    logits = torch.zeros((len(draws), model.config.vocab_size), dtype=model.dtype, device=model.device)
    for kind in (logits, logits.float()):  # requests with a bias, penalties or a grammar have float32
        choose(kind, draws)
    model.operations.logprobs(logits[:1], [0], [1])


def measure_copies(cache: KVCache, host: HostCache, stream: Stream) -> float:
    """Seconds that one block takes from the device to the host or back, where many are copied: it takes some
    milliseconds to find out. The blocks are the first ones, of a cache in which nothing is yet."""
    count = min(64, host.num_blocks, cache.num_blocks)
    best = float("inf")
    for _ in range(3):  # the first one warms up
        begin = stream.mark()
        host.store([(block, block) for block in range(count)])
        host.load([(block, block) for block in range(count)])
        end = stream.mark()
        stream.wait(end)
        best = min(best, stream.seconds(begin, end))
    return best / (2 * count)


def forget_measurements(device: torch.device) -> None:
    """Give back what the measurements of a GPU were made with: it is in nobody's plan."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def check_memory(device: torch.device, plan: MemoryBudget, since: float) -> None:
    """Compare what a GPU has given so far with the plan: it was computed, not tried. For the log; a step that
    does not fit is computed in parts."""
    if device.type != "cuda":
        return
    taken = torch.cuda.max_memory_reserved(device)
    planned = plan.weights + plan.activations + plan.graphs + plan.kv_cache
    tell = logger.warning if taken > planned else logger.info
    tell(
        "memory: %s taken, %s planned at most, after %.2f s",
        format_size(taken),
        format_size(planned),
        time.monotonic() - since,
    )
