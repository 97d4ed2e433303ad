"""Time (and profile) single steps of the executor: no server, no scheduler, no noise but the machine's.

    python -m benchmarks.step_time models/qwen3-0.6b --batch 32 --prompt 128 [--profile]

Prints prefill tokens/s and the share of the measured matmul rate, decode ms per step and the share of the
measured read bandwidth.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from .steps import BLOCK, make_bench  # isort: skip (before torch is imported)
import torch

from penstock.core.plan import Admission, Plan, PlanItem
from penstock.core.request_spec import Prompt, RequestSpec
from penstock.core.sampling_params import Sampling
from penstock.engine.machine import usable_cores
from penstock.kernels.quantization import INTEGERS as SCHEMES


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--budget", type=int, default=1024, help="prefill tokens per step")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--quantization", choices=SCHEMES)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    each = -(-(args.prompt + args.steps + 8) // BLOCK)
    bench = make_bench(
        args.model,
        each * args.batch,
        threads=args.threads,
        dtype=getattr(torch, args.dtype),
        attention=args.attention,
        quantization=args.quantization,
    )
    model, spec, executor, hardware = bench.model, bench.spec, bench.executor, bench.hardware
    config = model.config
    print(hardware.describe())

    step = 0
    prefill: list[tuple[int, float]] = []
    waiting = list(range(args.batch))
    while waiting:
        group, waiting = (
            waiting[: max(1, args.budget // args.prompt)],
            waiting[max(1, args.budget // args.prompt) :],
        )
        admitted = tuple(
            _admission(str(i), [(i * 7 + j * 3) % config.vocab_size for j in range(args.prompt)])
            for i in group
        )
        items = tuple(
            PlanItem(str(i), 0, 0, args.prompt, tuple(range(i * each, (i + 1) * each)), 1) for i in group
        )
        result = executor.collect(executor.submit(Plan(step, admitted, items)))
        prefill.append((args.prompt * len(group), result.seconds))
        step += 1
    tokens, seconds = max(prefill, key=lambda pair: pair[0] / pair[1])
    flops = 2 * (model.num_parameters - config.vocab_size * config.hidden_size) * tokens / seconds
    print(
        f"prefill  {tokens / seconds:8.1f} tok/s   {flops / 1e9:6.0f} GFLOP/s "
        f"= {flops / hardware.flops:.0%} of measured"
    )

    times = []
    for turn in range(args.steps):
        items = tuple(PlanItem(str(i), 0, args.prompt + turn, 1, (), 1) for i in range(args.batch))
        if args.profile and turn == args.steps - 1:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                executor.collect(executor.submit(Plan(step, items=items)))
            print(
                profile.key_averages().table(
                    sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=40
                )
            )
        else:
            times.append(executor.collect(executor.submit(Plan(step, items=items))).seconds)
        step += 1
    median = statistics.median(times)
    weights = model.read_bytes
    kv = spec.bytes_per_token * args.batch * (args.prompt + args.steps // 2)
    rate = (weights + kv) / median
    print(
        f"decode   {1e3 * median:8.1f} ms/step   {args.batch / median:7.1f} tok/s   "
        f"{rate / 1e9:.1f} GB/s = {rate / hardware.bandwidth:.0%} of measured"
    )


def _admission(name: str, prompt: list[int]) -> Admission:
    spec = RequestSpec(id=name, prompts=(Prompt(tuple(prompt), 1),), sampling=Sampling(temperature=0.0))
    return Admission(name, 0, spec, 0)


if __name__ == "__main__":
    main()
