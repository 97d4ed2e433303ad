"""transformers' continuous batching (`ContinuousBatchingManager`), on a CPU: a closed loop over its streams.

bfloat16, SDPA attention over its paged cache, all cores. The cache is bounded to the 4 GiB that other engines
get and a step to 1,024 tokens: with its default of 8,192 the attention masks that it plans for do not fit.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

from .protocol import Record, Request, Run, serve

CACHE_BYTES = 4 << 30
PAGE = 256
STEP_TOKENS = 1024


def load(model_path: str, settings: dict[str, Any]) -> Run:
    """The model, and how a load runs on it."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    options: dict[str, Any] = {"dtype": torch.bfloat16, "attn_implementation": "sdpa"}
    model: Any = AutoModelForCausalLM.from_pretrained(model_path, **options)
    model.eval()
    generation: Any = transformers.generation  # names that it does not list as exported
    shape = model.config
    bytes_per_token = shape.num_hidden_layers * 2 * shape.num_key_value_heads * shape.head_dim * 2
    manager = model.init_continuous_batching(
        generation_config=generation.GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=4096),
        continuous_batching_config=generation.ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=CACHE_BYTES // (bytes_per_token * PAGE),
            max_batch_tokens=STEP_TOKENS,
            auto_switch_to_flash=False,
            **settings,
        ),
    )
    manager.start()

    def run(requests: list[Request], concurrency: int) -> list[Record]:
        records = [Record(0.0, len(request.prompt)) for request in requests]
        waiting: Iterator[int] = iter(range(len(requests)))

        def send() -> None:
            for index in waiting:
                records[index].sent = time.perf_counter()
                manager.add_request(
                    requests[index].prompt,
                    request_id=str(index),
                    max_new_tokens=requests[index].max_tokens,
                    streaming=True,
                )
                return

        for _ in range(concurrency):
            send()
        finished = 0
        while finished < len(requests):
            output = manager.get_result(timeout=1.0)
            now = time.perf_counter()
            if output is None:
                if not manager.is_running():
                    raise RuntimeError("the generation thread of transformers ended; its log says why")
                continue
            if output.error is not None:
                raise RuntimeError(f"request {output.request_id}: {output.error}")
            record = records[int(output.request_id)]
            # A result carries all tokens so far: those that came with it are new.
            record.chunk_times += [now] * (len(output.generated_tokens) - len(record.chunk_times))
            if output.is_finished():
                finished += 1
                send()
        return records

    return run


if __name__ == "__main__":
    serve(load, "transformers", "torch")
