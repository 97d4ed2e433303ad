"""What masks cost a full batch: 32 requests that decode, all constrained, against the same unconstrained.

    python -m benchmarks.structured.throughput [--shape qwen3-0.6b] [--requests 32] [--tokens 64] [--rounds 5]

One engine with random weights in the real shape and a vocabulary of the real size (benchmarks.checkpoint).
Rounds alternate; both kinds generate as many tokens, for the schema is a list without a near end and the
others ignore theirs. A figure is the median over rounds of constrained over unconstrained decoding rate, by
the engine's own device seconds and by the wall clock. Target: at least 0.95.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.checkpoint import write_checkpoint
from penstock import LLM, SamplingParams
from penstock.bench.report import describe_machine
from penstock.core.structured import StructuredOutputsParams

from .libraries import PERSON

SCHEMA = {"type": "array", "items": PERSON, "minItems": 500}
TARGET = 0.95


def rates(llm: LLM, requests: int, params: SamplingParams) -> tuple[float, float]:
    """Tokens per second of the device, and of the wall clock."""
    prompts = [list(range(10 * row + 3, 10 * row + 19)) for row in range(requests)]
    began = time.perf_counter()
    outputs = llm.generate(prompts, [params.with_(seed=row) for row in range(requests)], use_tqdm=False)
    seconds = time.perf_counter() - began
    tokens = sum(len(each.outputs[0].token_ids) for each in outputs)
    if tokens != requests * (params.max_tokens or 0):
        raise RuntimeError(f"{tokens} tokens were generated, not {requests} times {params.max_tokens}.")
    return tokens / sum(each.device_seconds for each in outputs), tokens / seconds


def main() -> int:
    """Print the rounds and the ratios; 1 where the target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=None, help="a folder that is there already")
    parser.add_argument("--shape", default="qwen3-0.6b")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = args.model
        if model is None:
            model = folder
            write_checkpoint(Path(folder), args.shape)
        llm = LLM(model, max_num_seqs=args.requests, max_model_len=1024, kv_cache_memory_bytes=4 << 30)
        free = SamplingParams(temperature=1.0, max_tokens=args.tokens, ignore_eos=True)
        bound = free.with_(structured_outputs=StructuredOutputsParams(json=SCHEMA))
        for params in (free, bound):  # once for what is compiled or touched at first use
            rates(llm, args.requests, params.with_(max_tokens=4))
        rounds = [
            (rates(llm, args.requests, free), rates(llm, args.requests, bound)) for _ in range(args.rounds)
        ]
        llm.close()
    device = statistics.median(constrained[0] / plain[0] for plain, constrained in rounds)
    wall = statistics.median(constrained[1] / plain[1] for plain, constrained in rounds)
    for plain, constrained in rounds:
        print(f"unconstrained {plain[1]:8.1f} tok/s, constrained {constrained[1]:8.1f} tok/s")
    print(f"constrained / unconstrained: {device:.3f} of the device's rate, {wall:.3f} of the wall clock's")
    if args.json:
        result = {"machine": describe_machine(), "rounds": rounds, "device": device, "wall": wall}
        args.json.write_text(json.dumps(result, indent=1, default=str))
    return 0 if wall >= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
