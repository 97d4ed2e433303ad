"""How a worker is driven: one JSON object per line on standard input, and one per line back.

    in   {"requests": [{"prompt": [ids], "max_tokens": n}, …], "concurrency": c}
    out  {"start": s, "end": s, "records": [{"sent": s, "chunk_times": [s, …], "prompt_tokens": n}, …],
          "versions": {…}}          times in seconds of CLOCK_MONOTONIC (time.perf_counter on Linux)
    out  {"error": text}            this load failed; the worker ends when its input does

One entry of `chunk_times` is one token. Whatever libraries print goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any


@dataclass
class Request:
    """One prompt, and how many tokens to make."""

    prompt: list[int]
    max_tokens: int


@dataclass
class Record:
    """When what happened to one request."""

    sent: float
    prompt_tokens: int
    chunk_times: list[float] = field(default_factory=list)


Run = Callable[[list[Request], int], list[Record]]
"""Sends the requests, a number of them at the same time; their records in the same order."""


def serve(load: Callable[[str, dict[str, Any]], Run], *packages: str) -> None:
    """Load the model (first argument) with settings (JSON, the second); answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    settings: dict[str, Any] = json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}
    versions = {package: metadata.version(package) for package in packages}
    try:
        run = load(sys.argv[1], settings)
        for line in sys.stdin:
            job = json.loads(line)
            requests = [Request(**request) for request in job["requests"]]
            start = time.perf_counter()
            records = run(requests, job["concurrency"])
            end = time.perf_counter()
            rows = [asdict(record) for record in records]
            answer({"start": start, "end": end, "records": rows, "versions": versions})
    except Exception as error:
        traceback.print_exc()
        answer({"error": f"{type(error).__name__}: {error}"})
