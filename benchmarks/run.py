"""Every comparison in one go, and the table for the README.

make bench            (python -m benchmarks.run; about twenty minutes on two cores)
python -m benchmarks.run --table     only the table, from the results that are there
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from . import api_overhead, kv_memory, prefix, startup, throughput
from .common import RESULTS, save

BENCHMARKS = {
    "throughput": throughput.run,
    "prefix": prefix.run,
    "startup": startup.run,
    "kv_memory": kv_memory.run,
    "api_overhead": api_overhead.run,
}


def table(results: Path = RESULTS) -> str:
    """Markdown: what, measured, target."""

    def load(name: str) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads((results / f"{name}.json").read_text())
        return loaded

    speed, prefixes, starts = load("throughput")["median"], load("prefix")["median"], load("startup")
    memory, overhead = load("kv_memory"), load("api_overhead")
    demo, large = (starts[name]["median_first_token_s"] for name in ("demo", "qwen3-0.6b"))
    machine = load("throughput")["machine"]
    rows = [
        (
            "Throughput, 32 concurrent requests, 128 in / 64 out, over HTTP",
            f"{speed['penstock_tok_s']:.0f} tok/s; `transformers` one at a time "
            f"{speed['transformers_tok_s']:.1f}: **{speed['ratio']:.1f}×**",
            "≥ 8×",
        ),
        (
            "TTFT of a 1,000-token shared prompt, second request",
            f"{prefixes['second_ms']:.0f} ms instead of {prefixes['first_ms']:.0f}: "
            f"**−{prefixes['saved']:.0%}**",
            "−80 %",
        ),
        ("From exec to first token, demo model", f"**{demo:.1f} s**", "≤ 4 s"),
        ("From exec to first token, 0.6B, warm page cache", f"**{large:.1f} s**", "≤ 8 s"),
        (
            "KV slots that hold live tokens, at saturation, mixed lengths",
            f"**{memory['live_share']['mean']:.1%}** (5th percentile {memory['live_share']['p5']:.1%})",
            "≥ 96 %",
        ),
        (
            "Concurrency against reserving max-model-len",
            f"{memory['concurrency']['paged']:.0f} against "
            f"{memory['concurrency']['reserving_max_model_len']}: **{memory['concurrency_ratio']:.1f}×**",
            "≥ 4×",
        ),
        (
            "What the API process adds to a token at 32 streams, mean (p99)",
            f"**{overhead['qwen3-0.6b']['median']['added_mean_ms']:.1f} ms** "
            f"({overhead['qwen3-0.6b']['median']['added_p99_ms']:.1f}) with the engine on all cores",
            "≤ 3 ms",
        ),
    ]
    lines = ["| | measured | target |", "|---|---|---|"]
    lines += [f"| {what} | {measured} | {target} |" for what, measured, target in rows]
    lines += [
        "",
        f"{machine['cpu']}, {machine['cores']} cores; 0.6B means random weights in the shape of Qwen3-0.6B, "
        "bfloat16.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS))
    args = parser.parse_args()
    if not args.table:
        for name in args.only:
            print(f"== {name}", flush=True)
            save(name, BENCHMARKS[name]())  # type: ignore[operator]
    print(table())


if __name__ == "__main__":
    main()
