"""transformers' `generate`, batched: the requests in flight are one batch that starts and ends together.

Prompts are padded on the left, the batch runs until its longest answer is made, and what the shorter ones
generate meanwhile is not counted. bfloat16, SDPA attention, all cores.
"""

from __future__ import annotations

import os
import time
from typing import Any

from .protocol import Record, Request, Run, serve

PAD = 0


def load(model_path: str, settings: dict[str, Any]) -> Run:
    """The model, and how a load runs on it."""
    import torch
    from transformers import AutoModelForCausalLM, StoppingCriteria

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    options: dict[str, Any] = {"dtype": torch.bfloat16, "attn_implementation": "sdpa"}
    model: Any = AutoModelForCausalLM.from_pretrained(model_path, **options)
    model.eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD

    class Stamp(StoppingCriteria):  # type: ignore[misc, unused-ignore]
        """Never stops; is called after every step, and looks at the clock."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            self.times.append(time.perf_counter())
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    def batch(requests: list[Request]) -> list[Record]:
        longest = max(len(request.prompt) for request in requests)
        ids = torch.full((len(requests), longest), PAD)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(requests):
            ids[row, longest - len(request.prompt) :] = torch.tensor(request.prompt)
            mask[row, longest - len(request.prompt) :] = 1
        stamp, sent = Stamp(), time.perf_counter()
        steps = max(request.max_tokens for request in requests)
        model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=steps, stopping_criteria=[stamp]
        )
        return [Record(sent, len(request.prompt), stamp.times[: request.max_tokens]) for request in requests]

    def run(requests: list[Request], concurrency: int) -> list[Record]:
        records: list[Record] = []
        with torch.inference_mode():
            for first in range(0, len(requests), concurrency):
                records += batch(requests[first : first + concurrency])
        return records

    return run


if __name__ == "__main__":
    serve(load, "transformers", "torch")
