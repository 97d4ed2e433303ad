"""Background work beside real-time traffic, in a simulator: what it gets done, and what others notice of it.

    python benchmarks/background.py [--seconds 1800] [--seed 0] [--out benchmarks/results/background.json]

The scheduler is the one that serves; the executor takes the time of a cost model with the coefficients of a
GPU (about those of an 8B model in bfloat16 on an H100). Real-time requests arrive at random times, at
a given share of what the device can do; background requests are always there in number. Told are the P99 of
TTFT and ITL without background and with it, and background's tokens per second against the idle share of the
offline throughput. `--device cpu` takes coefficients of a small CPU instead.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from penstock.core.blocks import BlockPool
from penstock.core.cost import Coefficients, StepCost
from penstock.core.executor import Capacity
from penstock.core.request_spec import Prompt, RequestSpec, ServiceClass
from penstock.core.sampling_params import Sampling
from penstock.core.scheduler import Scheduler, SchedulerConfig
from penstock.core.simulated import SimulatedExecutor

DEVICES = {
    "gpu": (
        Coefficients(fixed=7e-3, per_token=2.2e-5, per_context=1.5e-9, per_sample=4e-6),
        {"max_num_seqs": 256, "max_num_batched_tokens": 8192, "max_num_mixed_prefill_tokens": 1024},
        25_000,
    ),
    "cpu": (
        Coefficients(fixed=15e-3, per_token=1.2e-3, per_context=4e-8, per_sample=3e-4),
        {"max_num_seqs": 64, "max_num_batched_tokens": 2048, "max_num_mixed_prefill_tokens": 32},
        2_000,
    ),
}
_BLOCK = 16
_AHEAD = 400
"""Background requests that wait at any time."""


@dataclass
class Seen:
    """What those who wait have seen, and what was generated."""

    ttft: list[float] = field(default_factory=list)
    itl: list[float] = field(default_factory=list)
    tokens: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    prompts: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    seconds: float = 0.0
    preemptions: int = 0

    def work(self, kind: str) -> int:
        """Tokens computed for, of prompts and generated."""
        return self.tokens[kind] + self.prompts[kind]


class Load:
    """Requests with lengths as drawn by a seed."""

    def __init__(self, seed: int, kind: str, device: str) -> None:
        self._rng = random.Random(f"{seed} {kind}")
        self._kind, self._number = kind, 0
        self._scale = 1.0 if device == "gpu" else 0.25

    def next(self, now: float) -> RequestSpec:
        self._number += 1
        prompt = max(8, int(self._scale * self._rng.lognormvariate(6.0, 0.8)))
        output = max(4, int(self._scale * self._rng.lognormvariate(5.0, 0.6)))
        start = self._rng.randrange(1 << 20)
        return RequestSpec(
            id=f"{self._kind}{self._number}",
            prompts=(Prompt(tuple(range(start, start + min(prompt, 6000))), min(output, 1000)),),
            sampling=Sampling(temperature=0.0, ignore_eos=True),
            arrived_at=now,
            service_class=ServiceClass.BACKGROUND if self._kind == "b" else ServiceClass.REALTIME,
        )

    def gap(self, rate: float) -> float:
        return self._rng.expovariate(rate)


def simulate(
    device: str, seconds: float, seed: int, *, rate: float, background: bool, slo: dict[str, float]
) -> Seen:
    """Run a trace of so many seconds."""
    costs, limits, blocks = DEVICES[device]
    config = SchedulerConfig(max_model_len=8192, **limits, **slo)  # type: ignore[arg-type]
    scheduler = Scheduler(config, BlockPool(blocks, _BLOCK), StepCost(costs))
    capacity = Capacity(
        num_blocks=blocks,
        block_size=_BLOCK,
        vocab_size=1 << 21,
        prior=costs,
    )
    executor = SimulatedExecutor(capacity, lambda request, known, generated: generated % 997, StepCost(costs))
    realtime, waiting = Load(seed, "r", device), Load(seed, "b", device)
    seen, now = Seen(), 0.0
    arrives = realtime.gap(rate) if rate else float("inf")
    last: dict[str, float] = {}
    arrived: dict[str, float] = {}
    while now < seconds:
        while arrives <= now:
            spec = realtime.next(arrives)
            arrived[spec.id] = arrives
            seen.prompts["r"] += len(spec.prompts[0].token_ids)
            scheduler.add(spec, now)
            arrives += realtime.gap(rate)
        while background and scheduler.waiting < _AHEAD:
            spec = waiting.next(now)
            seen.prompts["b"] += len(spec.prompts[0].token_ids)
            scheduler.add(spec, now)
        plan = scheduler.schedule(now)
        if not plan.items:
            now = arrives
            continue
        result = executor.collect(executor.submit(plan))
        now += result.seconds
        for event in scheduler.commit(plan, result, now):
            kind = event.request[0]
            if event.tokens:
                seen.tokens[kind] += len(event.tokens)
                if kind == "r":
                    if event.request in last:
                        seen.itl.append(now - last[event.request])
                    else:
                        seen.ttft.append(now - arrived[event.request])
                    last[event.request] = now
            if event.finish is not None:
                last.pop(event.request, None)
                arrived.pop(event.request, None)
    seen.seconds, seen.preemptions = now, scheduler.totals.preemptions
    for request in scheduler._roll.requests.values():  # what was not computed of those that are still here
        seen.prompts[request.id[0]] -= max(0, request.prompt_len - request.computed)
    return seen


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def measure(device: str, seconds: float, seed: int, utilisation: float) -> dict[str, Any]:
    """The three runs: offline, real-time alone, both."""
    offline = simulate(device, min(seconds, 300.0), seed, rate=0.0, background=True, slo={})
    per_second = offline.work("b") / offline.seconds
    probe = Load(seed, "r", device)
    drawn = [probe.next(0.0).prompts[0] for _ in range(4000)]
    mean = sum(len(prompt.token_ids) + prompt.max_tokens for prompt in drawn) / len(drawn)
    rate = utilisation * per_second / mean
    alone = simulate(device, seconds, seed, rate=rate, background=False, slo={})
    ttft, itl = percentile(alone.ttft, 0.99), percentile(alone.itl, 0.99)
    slo = {"slo_ttft": ttft, "slo_itl": itl}
    both = simulate(device, seconds, seed, rate=rate, background=True, slo=slo)
    idle = 1 - alone.work("r") / alone.seconds / per_second
    got = both.work("b") / both.seconds
    return {
        "device": device,
        "seconds": seconds,
        "seed": seed,
        "realtime_requests": len(alone.ttft),
        "offline_tokens_per_s": per_second,
        "idle_share": idle,
        "background_tokens_per_s": got,
        "background_of_idle": got / (idle * per_second),
        "background_preemptions": both.preemptions,
        "p99_ttft_ms": {"alone": 1e3 * ttft, "both": 1e3 * percentile(both.ttft, 0.99)},
        "p99_itl_ms": {"alone": 1e3 * itl, "both": 1e3 * percentile(both.itl, 0.99)},
        "p50_ttft_ms": {
            "alone": 1e3 * percentile(alone.ttft, 0.5),
            "both": 1e3 * percentile(both.ttft, 0.5),
        },
        "p50_itl_ms": {"alone": 1e3 * percentile(alone.itl, 0.5), "both": 1e3 * percentile(both.itl, 0.5)},
    }


def main() -> None:
    """Measure, print and write."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--device", choices=tuple(DEVICES), default="gpu")
    parser.add_argument("--seconds", type=float, default=1800.0)
    parser.add_argument("--utilisation", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = measure(args.device, args.seconds, args.seed, args.utilisation)
    found |= {"simulated": True, "python": platform.python_version()}
    text = json.dumps(found, indent=2)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
