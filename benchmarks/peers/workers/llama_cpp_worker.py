"""llama.cpp through llama-cpp-python, one request at a time: prefill in one call, then token by token.

Runs under the Python of .peers/llama. Greedy choice over the raw logits; the KV cache is emptied between
requests. Settings: flash_attn, n_batch, n_ubatch.
"""

from __future__ import annotations

import os
import time
from typing import Any

from .protocol import Record, Request, Run, serve


def load(model_path: str, settings: dict[str, Any]) -> Run:
    """The model, and how a load runs on it."""
    import llama_cpp  # type: ignore[import-not-found, unused-ignore]
    import numpy as np

    threads = len(os.sched_getaffinity(0))
    llama = llama_cpp.Llama(
        model_path,
        n_ctx=4096,
        n_threads=threads,
        n_threads_batch=threads,
        n_gpu_layers=0,
        verbose=False,
        **settings,
    )
    vocabulary = llama.n_vocab()

    def choose() -> int:
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llama.ctx, -1), (vocabulary,))
        return int(logits.argmax())

    def run(requests: list[Request], concurrency: int) -> list[Record]:
        if concurrency != 1:
            raise ValueError(f"concurrency is {concurrency}; this worker runs one request at a time")
        records = []
        for request in requests:
            record = Record(time.perf_counter(), len(request.prompt))
            llama.reset()
            llama.eval(request.prompt)
            for _ in range(request.max_tokens - 1):
                token = choose()
                record.chunk_times.append(time.perf_counter())
                llama.eval([token])
            choose()
            record.chunk_times.append(time.perf_counter())
            records.append(record)
        return records

    return run


if __name__ == "__main__":
    serve(load, "llama_cpp_python")
