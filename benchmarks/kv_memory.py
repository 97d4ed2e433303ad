"""How much of the KV cache holds live tokens at saturation, and how many requests that makes room for.

    python -m benchmarks.kv_memory [--blocks 2048]

The scheduler and a simulated device (no model: the figures depend on lengths only). Prompt and output lengths
are log-normal; requests arrive faster than they leave, so the cache is full. Each step, after the plan: live
tokens (computed positions of running requests, shared blocks counted once) over all slots of the cache. The
alternative is to reserve max-model-len slots for each request, as engines without paging do.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from typing import Any

from penstock.core.blocks import BlockPool
from penstock.core.cost import Coefficients, StepCost
from penstock.core.executor import Capacity
from penstock.core.request_spec import Prompt, RequestSpec
from penstock.core.sampling_params import Sampling
from penstock.core.scheduler import Scheduler, SchedulerConfig
from penstock.core.simulated import SimulatedExecutor


def run(
    blocks: int = 2048, block_size: int = 16, max_model_len: int = 2048, requests: int = 1500
) -> dict[str, Any]:
    """Saturate, measure in the middle of the run."""
    draw = random.Random(0)
    config = SchedulerConfig(max_num_seqs=1024, max_num_batched_tokens=2048, max_model_len=max_model_len)
    scheduler = Scheduler(config, BlockPool(blocks, block_size), StepCost())
    capacity = Capacity(blocks, block_size, 50_000, Coefficients())
    executor = SimulatedExecutor(capacity, lambda request, known, generated: draw.randrange(50_000))
    lengths = []
    for number in range(requests):
        prompt = min(1200, max(4, int(draw.lognormvariate(5.3, 0.8))))
        output = min(800, max(4, int(draw.lognormvariate(5.0, 0.7))))
        lengths.append(prompt + output)
        tokens = tuple(draw.randrange(50_000) for _ in range(prompt))
        sampling = Sampling(temperature=0.0)
        scheduler.add(RequestSpec(id=str(number), prompts=(Prompt(tokens, output),), sampling=sampling), 0.0)
    live, running = [], []
    while scheduler.has_work:
        plan = scheduler.schedule(0.0)
        if scheduler.waiting > 50 and plan.step > 200:  # saturated, and warmed up
            live.append(_live(scheduler) / (blocks * block_size))
            running.append(len(scheduler.running))
        scheduler.commit(plan, executor.collect(executor.submit(plan)), 0.0)
    reserved = blocks * block_size // max_model_len
    return {
        "blocks": blocks,
        "block_size": block_size,
        "max_model_len": max_model_len,
        "mean_length": statistics.mean(lengths),
        "steps_measured": len(live),
        "live_share": {
            "mean": statistics.mean(live),
            "p5": statistics.quantiles(live, n=20)[0],
            "max": max(live),
        },
        "concurrency": {"paged": statistics.mean(running), "reserving_max_model_len": reserved},
        "concurrency_ratio": statistics.mean(running) / reserved,
        "preemptions": scheduler.totals.preemptions,
        "recomputed_share": scheduler.totals.recomputed_tokens / max(1, sum(lengths)),
    }


def _live(scheduler: Scheduler) -> int:
    """Slots that hold keys and values of a running request, each block counted once."""
    size, filled = scheduler.pool.block_size, dict[int, int]()
    for request in scheduler.running:
        for index, block in enumerate(request.blocks):
            tokens = min(size, max(0, request.computed - index * size))
            filled[block] = max(filled.get(block, 0), tokens)
    return sum(filled.values())


def main() -> None:
    """Command line."""
    from .common import save

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=2048)
    parser.add_argument("--block-size", type=int, default=16)
    args = parser.parse_args()
    result = run(args.blocks, args.block_size)
    save("kv_memory", result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
