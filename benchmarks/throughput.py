"""Throughput against transformers, alternating in one run, on the same weights and the same prompts' lengths.

    python -m benchmarks.throughput [--rounds 3]

Ours: `penstock serve`, 32 requests kept in flight, 128 tokens in, 64 out, over HTTP. Peer: transformers'
`generate`, one request at a time, in process, bfloat16, SDPA attention, all cores: its best setting for that.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from penstock.bench.serve import ServeBench, bench_serve

from .checkpoint import write_checkpoint
from .common import MODELS, save, serving

INPUT, OUTPUT, CONCURRENCY = 128, 64, 32

_PEER = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
import torch
from transformers import AutoModelForCausalLM
path, prompt, output, count, threads = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(threads)
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
model.generation_config.eos_token_id = None
torch.manual_seed(0)
times = []
with torch.inference_mode():
    for number in range(count + 1):
        ids = torch.randint(100, 1000, (1, prompt))
        start = time.perf_counter()
        lengths = {"max_new_tokens": output, "min_new_tokens": output}
        model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **lengths)
        times.append(time.perf_counter() - start)
print(json.dumps(times[1:]))  # the first one warms up
"""


def transformers_sequential(model: Path, count: int, threads: int) -> float:
    """Generated tokens per second, one request after another."""
    command = [sys.executable, "-c", _PEER, str(model), str(INPUT), str(OUTPUT), str(count), str(threads)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    times = json.loads(out.strip().splitlines()[-1])
    return OUTPUT * len(times) / sum(times)


def ours(url: str, requests: int, seed: int) -> dict[str, Any]:
    """One closed-loop run."""
    bench = ServeBench(
        base_url=url,
        num_prompts=requests,
        random_input_len=INPUT,
        output_len=OUTPUT,
        max_concurrency=CONCURRENCY,
        seed=seed,
        body={"ignore_eos": True, "temperature": 0},
    )
    return asyncio.run(bench_serve(bench))


def run(rounds: int = 3, requests: int = 64, sequential: int = 3) -> dict[str, Any]:
    """Alternate; medians and all runs."""
    model = write_checkpoint(MODELS / "qwen3-0.6b", "qwen3-0.6b")
    import os

    threads = len(os.sched_getaffinity(0))
    runs: list[dict[str, float]] = []
    with serving(model, "--max-model-len", "4096") as url:
        ours(url, CONCURRENCY, seed=999)  # warm up
        for number in range(rounds):
            peer = transformers_sequential(model, sequential, threads)
            mine = ours(url, requests, seed=number)
            runs.append(
                {
                    "transformers_tok_s": peer,
                    "penstock_tok_s": mine["output_throughput"],
                    "penstock_median_ttft_ms": mine["median_ttft_ms"],
                    "penstock_median_itl_ms": mine["median_itl_ms"],
                    "ratio": mine["output_throughput"] / peer,
                }
            )
            print(json.dumps(runs[-1]), flush=True)
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    return {
        "load": {"input": INPUT, "output": OUTPUT, "concurrency": CONCURRENCY, "requests": requests},
        "median": medians,
        "runs": runs,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    result = run(parser.parse_args().rounds)
    save("throughput", result)
    print(json.dumps(result["median"], indent=1))


if __name__ == "__main__":
    main()
