"""Every healthy request gets the answer that it gets alone: to the last bit, whoever computes beside it.

    python -m tests.attack.stress --requests 10000 [--dtype bfloat16] [--quantization int8]

A tiny model has NaN in some rows of its embedding. Requests come in families with a common prefix; some are
ill (a token of such a row is in their prompt). All run through the real scheduler and executor, under
priorities, in a cache that is too small for them, in chunks of changing sizes; then each runs alone, in one
piece, without a prefix cache. Equal means equal tokens, equal bits of log-probabilities, equal failures: a
healthy request may draw a token whose embedding is NaN, and then fails alone as well.

Prints one line of JSON; exit status 1 if anything differs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from penstock.core.blocks import BlockPool
from penstock.core.cost import Coefficients
from penstock.core.plan import Event
from penstock.core.request_spec import RequestSpec
from penstock.core.scheduler import Scheduler, SchedulerConfig
from penstock.engine.executor.torch_executor import TorchExecutor
from penstock.kernels.attention import KVCache
from penstock.kernels.create import create_operations
from penstock.model.config import load_config
from penstock.model.loader import load_model
from tests.engine.fake import spec
from tests.model.checkpoints import make_checkpoint

VOCABULARY, ILL = 128, range(100, 128)
BLOCK, BLOCKS, LONGEST = 4, 60, 200
WAVE = 50


@dataclasses.dataclass
class Answer:
    """What a request got."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[Any] = dataclasses.field(default_factory=list)
    failure: str | None = None

    def take(self, event: Event) -> None:
        """Add what an event brings."""
        self.tokens += event.tokens
        self.logprobs += event.logprobs
        if event.failure is not None:
            self.failure = event.failure.cause


def make_executor(
    directory: Path, dtype: torch.dtype, quantization: str | None = None, architecture: str = "qwen3"
) -> TorchExecutor:
    """Of a tiny model with NaN in the embedding rows ILL."""
    make_checkpoint(directory, architecture, vocab_size=VOCABULARY, dtype=dtype, tie_word_embeddings=False)
    weights = load_file(directory / "model.safetensors")
    embedding = next(name for name in weights if "embed_tokens" in name or "embed_in" in name)
    weights[embedding][ILL.start :] = torch.nan
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    cpu = torch.device("cpu")
    operations = create_operations(cpu, dtype, quantized=quantization is not None, batch_invariant=True)
    model = load_model(directory, load_config(directory), operations, quantization=quantization)
    cache = model.cache_spec(BLOCK)
    return TorchExecutor(
        model, KVCache(cache, BLOCKS + 1, cpu), operations.attention(cache), cpu, Coefficients()
    )


def make_requests(rng: random.Random, count: int) -> Iterator[RequestSpec]:
    """Families of them; about a sixth is ill."""
    family: list[int] = []
    for number in range(count):
        if number % 8 == 0:
            family = [rng.randrange(3, ILL.start) for _ in range(rng.randrange(0, 60))]
        prompt = family[: rng.randrange(len(family) + 1)] if rng.random() < 0.3 else list(family)
        prompt += [rng.randrange(3, ILL.start) for _ in range(rng.randrange(1, 40))]
        if rng.random() < 1 / 6:
            prompt[rng.randrange(len(prompt) // 2, len(prompt))] = rng.choice(ILL)
        sampling: dict[str, object] = {"temperature": 0.0}
        if rng.random() < 0.7:
            sampling = {
                "temperature": rng.choice([0.7, 1.0, 1.5]),
                "seed": number,
                "top_p": rng.choice([1.0, 0.9]),
                "top_k": rng.choice([0, 20]),
                "repetition_penalty": rng.choice([1.0, 1.0, 1.2]),
            }
        if rng.random() < 0.7:  # else a draw of a bad token ends it
            sampling["logit_bias"] = dict.fromkeys(ILL, -100.0)
        yield spec(
            str(number),
            prompt,
            rng.randrange(1, 25),
            priority=rng.randrange(4),
            logprobs=rng.choice([None, 0, 3]),
            **sampling,
        )


def serve(
    executor: TorchExecutor, requests: list[RequestSpec], config: SchedulerConfig, rng: random.Random
) -> tuple[dict[str, Answer], Scheduler]:
    """All of them, a few more before every step."""
    scheduler = Scheduler(config, BlockPool(BLOCKS, BLOCK))
    answers = {request.id: Answer() for request in requests}
    coming = list(reversed(requests))
    while coming or scheduler.has_work:
        for _ in range(min(len(coming), rng.randrange(4))):
            scheduler.add(coming.pop(), 0.0)
        if not scheduler.has_work:
            continue
        plan = scheduler.schedule(0.0)
        events = scheduler.take_events()
        if plan.items:
            events += scheduler.commit(plan, executor.collect(executor.submit(plan)), 0.0)
        for event in events:
            answers[event.request].take(event)
    return answers, scheduler


def stress(executor: TorchExecutor, count: int, seed: int = 0) -> Counter[str]:
    """What happened, counted; `differ` and its kinds are zero where the promise is kept."""
    rng, found = random.Random(seed), Counter[str]()
    requests = list(make_requests(rng, count))
    alone = SchedulerConfig(
        max_num_seqs=1, max_num_batched_tokens=LONGEST, max_model_len=LONGEST, enable_prefix_caching=False
    )
    for first in range(0, count, WAVE):
        wave = requests[first : first + WAVE]
        config = SchedulerConfig(
            max_num_seqs=rng.choice([4, 8, 32]),
            max_num_batched_tokens=rng.choice([32, 48, 100, 256]),
            max_model_len=LONGEST,
            enable_prefix_caching=first // WAVE % 4 != 3,
            long_prefill_token_threshold=rng.choice([0, 5, 17, 30]),
            policy=rng.choice(["priority", "priority", "fcfs"]),
            watermark=0.0,
        )
        together, scheduler = serve(executor, wave, config, rng)
        found["preemptions"] += scheduler.totals.preemptions
        found["prefix_hit_tokens"] += scheduler.totals.prefix_hits
        for request in wave:
            found["requests"] += 1
            if any(token in ILL for token in request.prompts[0].token_ids):
                found["ill"] += 1
                found["ill_without_failure"] += together[request.id].failure is None
                continue
            found["healthy"] += 1
            # under a name of its own: the executor has not been told yet that the last ones are gone
            again = dataclasses.replace(request, id=f"{request.id} alone")
            want, _ = serve(executor, [again], alone, random.Random(0))
            found.update(compare(want[again.id], together[request.id]))
    return found


def compare(want: Answer, got: Answer) -> dict[str, int]:
    """What an answer in company has that the one alone has not, in ones and zeros."""
    return {
        "healthy_that_fail_alone": int(want.failure is not None),
        "differ": int(got != want),
        "differ_in_tokens": int(got.tokens != want.tokens),
        "differ_in_logprobs": int(got.logprobs != want.logprobs),
        "failures_in_company_only": int(want.failure is None and got.failure is not None),
    }


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--quantization", choices=("int8", "w8a8", "int4"))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as directory:
        executor = make_executor(
            Path(directory, "model"), getattr(torch, options.dtype), options.quantization
        )
        found = stress(executor, options.requests, options.seed)
    print(json.dumps({**vars(options), **found}))
    return int(found["differ"] > 0)


if __name__ == "__main__":
    sys.exit(main())
