"""Time to first token of a 1,000-token prompt that is shared: the first request computes it, the second hits.

python -m benchmarks.prefix [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from typing import Any

from .checkpoint import write_checkpoint
from .common import MODELS, post, save, serving


def run(rounds: int = 5, shared: int = 1000, own: int = 20) -> dict[str, Any]:
    """Each round has a prefix of its own, and two requests that differ after it."""
    model = write_checkpoint(MODELS / "qwen3-0.6b", "qwen3-0.6b")
    draw = random.Random(0)
    runs = []
    with serving(model, "--max-model-len", "4096") as url:

        def ask(prompt: list[int]) -> tuple[float, int]:
            usage = post(url, "/v1/completions", {"model": str(model), "prompt": prompt, "max_tokens": 1})[
                "usage"
            ]
            return usage["ttft_ms"], usage["prompt_tokens_details"]["cached_tokens"]

        ask([draw.randrange(100, 1000) for _ in range(shared + own)])  # warm up
        for _ in range(rounds):
            prefix = [draw.randrange(100, 1000) for _ in range(shared)]
            first, _ = ask(prefix + [draw.randrange(100, 1000) for _ in range(own)])
            second, cached = ask(prefix + [draw.randrange(100, 1000) for _ in range(own)])
            runs.append(
                {"first_ms": first, "second_ms": second, "cached": cached, "saved": 1 - second / first}
            )
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    return {"shared_tokens": shared, "own_tokens": own, "median": medians, "runs": runs}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    result = run(parser.parse_args().rounds)
    save("prefix", result)
    print(json.dumps(result["median"], indent=1))


if __name__ == "__main__":
    main()
