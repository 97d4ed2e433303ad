"""`penstock bench serve`: put load on a server and report what came back.

find the server and the model → draw prompts and arrivals → warm up → run → report
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import aiohttp

from penstock.bench.client import (
    Outcome,
    RequestRecord,
    Target,
    find_model,
    get_json,
    open_session,
    post_json,
    send_request,
)
from penstock.bench.errors import BenchError
from penstock.bench.load import Stop, arrival_times, closed_loop, open_loop, stop_after
from penstock.bench.prompts import WORDS, Prompt, PromptFormat, RandomPrompts, read_jsonl
from penstock.bench.report import build_report, describe_machine, timestamp

Progress = Callable[[RequestRecord], None]
"""Called with each record when its request has ended."""


@dataclass(frozen=True, slots=True)
class ServeBench:
    """What to measure. Lengths are in tokens, times in seconds, rates in requests per second."""

    base_url: str
    endpoint: str = "/v1/completions"
    model: str | None = None
    """None asks the server for its first model."""
    dataset_path: Path | None = None
    """JSON lines to send; None sends random prompts."""
    num_prompts: int = 1000
    num_warmups: int = 0
    """Requests sent, one after another, and left out of the report."""
    random_input_len: int = 1024
    output_len: int = 128
    random_range_ratio: float = 0.0
    random_prefix_len: int = 0
    prompt_format: PromptFormat | Literal["auto"] = "auto"
    """Random prompts as token ids or as words; auto takes token ids for completions, words for chat."""
    vocab_size: int = 1000
    request_rate: float = math.inf
    burstiness: float = 1.0
    max_concurrency: int | None = None
    max_duration: float | None = None
    request_timeout: float | None = 600.0
    seed: int = 0
    body: Mapping[str, Any] = field(default_factory=dict)
    """Fields for every request body."""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    percentiles: tuple[float, ...] = (50, 90, 99)
    goodput_ms: Mapping[str, float] = field(default_factory=dict)

    @property
    def closed(self) -> bool:
        """Whether a fixed number is kept in flight: bounded concurrency and nothing to wait for."""
        return math.isinf(self.request_rate) and self.max_concurrency is not None

    def describe(self) -> dict[str, Any]:
        """The configuration for the result file; header values may be secrets and are left out."""
        config = {**asdict(self), "headers": sorted(self.headers)}
        config["dataset_path"] = str(self.dataset_path) if self.dataset_path else None
        # JSON has no infinity; vLLM writes it as this text.
        return {key: "inf" if value == math.inf else value for key, value in config.items()}


async def bench_serve(bench: ServeBench, on_done: Progress = lambda _: None) -> dict[str, Any]:
    """Run the benchmark and return its report with configuration, date, versions and machine.

    Raises BenchError when nothing can be measured: no server, no model, bad prompts, failing warm-up.
    SIGINT ends the run early with what was measured so far.
    """
    if bench.max_concurrency is not None and bench.max_concurrency < 1:
        raise BenchError(f"--max-concurrency is {bench.max_concurrency}; it must be at least 1")
    arrivals = arrival_times(
        bench.num_prompts, bench.request_rate, burstiness=bench.burstiness, seed=bench.seed
    )
    async with open_session() as session:
        model = bench.model or await find_model(session, bench.base_url, bench.headers)
        target = Target(
            bench.base_url, bench.endpoint, model, bench.headers, bench.body, bench.request_timeout
        )
        server = await _server_version(session, target)
        prompts = await _prompts(session, target, bench)
        await _warm_up(session, target, prompts[bench.num_prompts :])
        records: list[RequestRecord] = []
        clock = time.perf_counter

        async def send(index: int, intended: float) -> None:
            record = RequestRecord(index, intended)
            records.append(record)
            await send_request(session, target, prompts[index], record, clock)
            on_done(record)

        stop = Stop()
        start = clock()
        if bench.closed:
            run = closed_loop(bench.num_prompts, bench.max_concurrency or 1, send, clock=clock)
        else:
            limit = bench.max_concurrency
            run = open_loop(arrivals, send, start=start, clock=clock, max_concurrency=limit)
        with _interruptible(stop):
            async with stop_after(stop, bench.max_duration):
                await stop.bound(run)
        end = clock()
    report = build_report(
        records,
        start=start,
        end=end,
        num_prompts=bench.num_prompts,
        percentiles=bench.percentiles,
        goodput_ms=bench.goodput_ms,
    )
    head = {
        "date": timestamp(),
        "backend": "openai-chat" if target.chat else "openai",
        "model_id": model,
        "num_prompts": bench.num_prompts,
        "request_rate": "inf" if math.isinf(bench.request_rate) else bench.request_rate,
        "burstiness": "inf" if math.isinf(bench.burstiness) else bench.burstiness,
        "max_concurrency": bench.max_concurrency,
        "load": "closed loop" if bench.closed else "open loop",
        "ended_by": stop.reason or "all requests done",
        "server_version": server,
    }
    return {**head, **report, "configuration": bench.describe(), "machine": describe_machine()}


@contextlib.contextmanager
def _interruptible(stop: Stop) -> Iterator[None]:
    """Let SIGINT set `stop` inside the block, where the platform and the thread allow it."""
    loop = asyncio.get_running_loop()
    try:
        loop.add_signal_handler(signal.SIGINT, stop.set, "interrupt")
    except (NotImplementedError, RuntimeError, ValueError):
        yield
        return
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)


async def _server_version(session: aiohttp.ClientSession, target: Target) -> str | None:
    """What the server says at `/version`; also the first contact, so that no server is found out here."""
    status, answer = await get_json(session, f"{target.base_url}/version", target.headers)
    return str(answer.get("version")) if status == 200 and isinstance(answer, dict) else None


async def _prompts(session: aiohttp.ClientSession, target: Target, bench: ServeBench) -> list[Prompt]:
    """The measured prompts, and behind them those of the warm-up."""
    count = bench.num_prompts + bench.num_warmups
    if bench.dataset_path is not None:
        return read_jsonl(bench.dataset_path, count, chat=target.chat, output_len=bench.output_len)
    form: PromptFormat = (
        bench.prompt_format if bench.prompt_format != "auto" else ("text" if target.chat else "token-ids")
    )
    if form == "token-ids" and target.chat:
        raise BenchError("--prompt-format token-ids needs --endpoint /v1/completions; chat takes text")
    prompts = RandomPrompts(
        input_len=bench.random_input_len,
        output_len=bench.output_len,
        range_ratio=bench.random_range_ratio,
        prefix_len=bench.random_prefix_len,
        format=form,
        vocab_size=bench.vocab_size,
        tokens_per_word=await tokens_per_word(session, target) if form == "text" else 1.0,
    )
    return prompts.draw(count, bench.seed)


async def tokens_per_word(session: aiohttp.ClientSession, target: Target) -> float:
    """How many tokens one of our words is to the server's tokenizer; 1 if it does not say."""
    body = {"model": target.model, "prompt": " ".join(WORDS), "add_special_tokens": False}
    status, answer = await post_json(session, f"{target.base_url}/tokenize", target.headers, body)
    count = answer.get("count") if status == 200 and isinstance(answer, dict) else None
    return count / len(WORDS) if isinstance(count, int) and count > 0 else 1.0


async def _warm_up(session: aiohttp.ClientSession, target: Target, prompts: list[Prompt]) -> None:
    for index, prompt in enumerate(prompts):
        record = RequestRecord(index, time.perf_counter())
        await send_request(session, target, prompt, record)
        if record.outcome is not Outcome.COMPLETED:
            raise BenchError(f"warm-up request {index + 1} failed: {record.cause}: {record.message}")
