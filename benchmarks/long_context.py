"""Decode of one request at growing contexts: what a token costs, and what its keys and values should cost.

    python -m benchmarks.long_context [--quantization int8]

Steps at all contexts alternate, and every round measures the bandwidth of reading memory anew: on virtual
machines it changes by a factor of two within seconds. The target: a token at 8,192 tokens of context takes at
most 1.3 times what it takes at 128, plus the bytes of its keys and values at the bandwidth of the same round.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from .steps import BLOCK, make_bench  # isort: skip (before torch is imported)

from penstock.core.plan import Admission, Plan, PlanItem
from penstock.core.request_spec import Prompt, RequestSpec
from penstock.core.sampling_params import Sampling
from penstock.engine.hardware import inspect_hardware
from penstock.engine.machine import usable_cores
from penstock.kernels.quantization import INTEGERS as SCHEMES

from .checkpoint import write_checkpoint
from .common import MODELS, save

CONTEXTS = (128, 1024, 4096, 8192)


def run(rounds: int = 40, quantization: str | None = None) -> dict[str, Any]:
    """Median seconds of a step at each context, and the target."""
    path = write_checkpoint(MODELS / "qwen3-0.6b", "qwen3-0.6b")
    blocks = [-(-context // BLOCK) for context in CONTEXTS]
    bench = make_bench(path, sum(blocks), threads=usable_cores(), quantization=quantization)
    model, spec, executor = bench.model, bench.spec, bench.executor
    bandwidths: list[float] = []
    for layer in bench.cache.layers:
        for half in layer:
            half.normal_()
    admitted = tuple(
        Admission(
            str(context),
            0,
            RequestSpec(
                id=str(context),
                prompts=(Prompt(tuple(i % 1000 for i in range(context)), 1),),
                sampling=Sampling(temperature=0.0),
            ),
            0,
        )
        for context in CONTEXTS
    )
    seconds: dict[int, list[float]] = {context: [] for context in CONTEXTS}
    for number in range(rounds + 1):
        # in both directions, so that none always follows the measurement of the bandwidth
        for at, context in sorted(enumerate(CONTEXTS), reverse=bool(number % 2)):
            first = sum(blocks[:at])
            step = number * len(CONTEXTS) + at
            own = tuple(range(first, first + blocks[at])) if number == 0 else ()
            item = PlanItem(str(context), 0, context - 1, 1, own, 1)
            # the same last token again and again: the context does not grow
            admissions = (admitted[at],) if number == 0 else ()
            result = executor.collect(executor.submit(Plan(step, admissions, (item,))))
            if number:
                seconds[context].append(result.seconds)
        if number:
            bandwidths.append(inspect_hardware(model.device, model.dtype).bandwidth)
    medians = {context: statistics.median(seconds[context]) for context in CONTEXTS}
    rows = []
    for context, median in medians.items():
        kv = spec.bytes_per_token * context
        allowed = [
            1.3 * base + kv / bandwidth
            for base, bandwidth in zip(seconds[CONTEXTS[0]], bandwidths, strict=True)
        ]
        ratios = [took / most for took, most in zip(seconds[context], allowed, strict=True)]
        shares = [
            (model.read_bytes + kv) / took / bandwidth
            for took, bandwidth in zip(seconds[context], bandwidths, strict=True)
        ]
        rows.append(
            {
                "context": context,
                "median_ms": 1e3 * median,
                "allowed_ms": 1e3 * statistics.median(allowed),
                "of_allowed": statistics.median(ratios),
                "rounds_within": sum(ratio <= 1.0 for ratio in ratios),
                "share_of_bandwidth": statistics.median(shares),
            }
        )
        print(
            f"{context:6} tokens  {1e3 * median:6.1f} ms, {statistics.median(ratios):4.0%} of what is "
            f"allowed (within it in {rows[-1]['rounds_within']} rounds of {rounds}); "
            f"{statistics.median(shares):.0%} of the measured bandwidth"
        )
    print(f"bandwidth {min(bandwidths) / 1e9:.1f} to {max(bandwidths) / 1e9:.1f} GB/s")
    return {
        "model": "qwen3-0.6b",
        "quantization": quantization or "none",
        "bandwidths": bandwidths,
        "contexts": rows,
        "seconds": {str(context): values for context, values in seconds.items()},
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quantization", choices=SCHEMES)
    args = parser.parse_args()
    name = "long_context" + (f"_{args.quantization}" if args.quantization else "")
    save(name, run(quantization=args.quantization))


if __name__ == "__main__":
    main()
