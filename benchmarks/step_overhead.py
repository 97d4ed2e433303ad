"""Where the time of one turn of the engine's loop goes, and what of it is not the model's.

    python -m benchmarks.step_overhead [--model models/qwen3-0.6b] [--steps 60] [--prompt 110]

The engine process itself runs (penstock.engine.process, with its sockets), and its public methods are wrapped
from outside; nothing in the hot path knows of it. A turn goes from one poll of the inbox to the next:

    poll ── receive ── schedule ── execute ── commit ── log ── stats ── publish ── poll
                                     ├─ layout, attention.prepare, token ids      batch preparation
                                     ├─ CausalLM.forward, CausalLM.logits         the model
                                     └─ Sampler.sample

Model operations are the forward pass and the output layer. Everything else of a turn is overhead, also what
has no row of its own ("other"). Every row is a median over the turns in which all requests decoded; a row
does not contain the rows inside it.

The API process works while the engine does, on the same cores, so what it costs is processor time. It is
measured by itself: decoding the very messages that the engine sent, and, with tests.server.overhead,
streaming that many tokens through the real server (detokenising, JSON, SSE, sockets). Target: all overhead
together, the API process's included, at most 3 % of the turn of 32 requests, and at most 2 ms.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import zmq

from penstock.core.request_spec import Prompt, RequestSpec
from penstock.core.sampling_params import Sampling
from penstock.engine.config import EngineConfig
from penstock.engine.environment import prepare
from penstock.engine.heartbeat import Heartbeat
from penstock.engine.messages import (
    Add,
    Drain,
    Failed,
    Output,
    Ready,
    decode_from_engine,
    encode,
)
from penstock.engine.process import EngineProcess, Launch

from .checkpoint import write_checkpoint
from .common import MODELS, save

TARGET_SHARE, TARGET_MS = 0.03, 2.0
MODEL_ROWS = ("forward", "logits")
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "1 greedy": (1, {"temperature": 0.0}),
    "32 greedy": (32, {"temperature": 0.0}),
    "32 temperature 0.7, top_p 0.95": (32, {"temperature": 0.7, "top_p": 0.95}),
    "32 temperature 1": (32, {"temperature": 1.0}),
    "32 greedy, 5 logprobs": (32, {"temperature": 0.0, "logprobs": 5}),
}


# -------------------------------------------------------------------------------------- in the engine process


class Turns:
    """Self times of wrapped calls, turn by turn."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self._began = time.perf_counter()
        self._rows: dict[str, float] = {}
        self._inner: list[float] = []
        """Seconds spent in wrapped calls inside each open one."""
        self._requests = self._tokens = 0

    def wrap(self, owner: Any, name: str, row: str) -> None:
        """Let `owner.name` report to a row."""
        original = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            began = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                took = time.perf_counter() - began
                self._rows[row] = self._rows.get(row, 0.0) + took - self._inner.pop()
                if self._inner:
                    self._inner[-1] += took

        setattr(owner, name, timed)

    def watch_plans(self, scheduler: Any) -> None:
        """Note how many requests and tokens each turn's plan has."""
        original = scheduler.schedule

        def schedule(now: float) -> Any:
            plan = original(now)
            self._requests, self._tokens = len(plan.items), plan.tokens
            return plan

        scheduler.schedule = schedule

    def turn(self) -> None:
        """One ends here, the next begins."""
        now = time.perf_counter()
        if self._requests:
            record = {"turn": now - self._began, "requests": self._requests, "tokens": self._tokens}
            self.records.append({**record, "at": time.monotonic(), "rows": self._rows})
        self._began, self._rows, self._requests = now, {}, 0


def engine_main(launch: Launch, path: Path) -> None:
    """Run an engine process with everything wrapped; write its turns when it has drained."""
    from penstock.engine import build
    from penstock.engine.loop import EngineLoop
    from penstock.engine.trace import StepLog
    from penstock.kernels.attention import StepLayout
    from penstock.kernels.create import create_operations
    from penstock.kernels.operations import Operations
    from penstock.model.causal_lm import CausalLM
    from penstock.sampling.sampler import Sampler

    turns = Turns()
    poll = zmq.Poller.poll

    def marked_poll(self: zmq.Poller, timeout: int | None = None) -> Any:
        turns.turn()
        began = time.perf_counter()
        try:
            return poll(self, timeout)
        finally:
            turns._rows["receive"] = time.perf_counter() - began

    zmq.Poller.poll = marked_poll  # type: ignore[method-assign]
    for owner, name, row in (
        (StepLayout, "__init__", "layout"),
        (CausalLM, "forward", "forward"),
        (CausalLM, "logits", "logits"),
        (Sampler, "sample", "sample"),
        (StepLog, "stepped", "log"),
        (EngineLoop, "stats", "stats"),
        (EngineProcess, "send", "publish"),
    ):
        turns.wrap(owner, name, row)
    build_engine = build.build_engine

    def create_and_wrap(*args: Any, **options: Any) -> Operations:
        operations = create_operations(*args, **options)

        def attention(spec: Any) -> Any:
            backend = operations.attention(spec)
            turns.wrap(backend, "prepare", "prepare")
            return backend

        return replace(operations, attention=attention)

    def build_and_wrap(*args: Any) -> Any:
        engine = build_engine(*args)
        loop = engine.loop
        turns.watch_plans(loop.scheduler)
        turns.wrap(loop.scheduler, "schedule", "schedule")
        turns.wrap(loop.scheduler, "commit", "commit")
        turns.wrap(loop.executor, "submit", "batch")
        turns.wrap(loop.executor, "collect", "collect")
        return engine

    vars(build).update(build_engine=build_and_wrap, create_operations=create_and_wrap)
    process = EngineProcess(launch)
    try:
        process.run()
    finally:
        process.close()
        path.write_text(json.dumps(turns.records))


# ------------------------------------------------------------------------------------------ in this process


class Driver:
    """The other end of the engine's sockets: sends requests, and keeps what comes back as it is."""

    def __init__(self, model: Path, threads: int | None) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="penstock-")
        root = self._directory.name
        self._records = Path(root, "turns.json")
        Heartbeat(Path(root, "heartbeat"), create=True).close()
        self._context = zmq.Context()
        self._inbox, self._outbox = self._context.socket(zmq.PULL), self._context.socket(zmq.PUSH)
        self._inbox.bind(f"ipc://{root}/events")
        self._outbox.bind(f"ipc://{root}/requests")
        reader, self._pipe = os.pipe()
        launch = Launch(
            config=EngineConfig(
                model=str(model), max_model_len=2048, threads=threads, enable_prefix_caching=False
            ),
            inbox=f"ipc://{root}/requests",
            outbox=f"ipc://{root}/events",
            heartbeat=f"{root}/heartbeat",
            parent=reader,
            log_level="warning",
        )
        environment = dict(os.environ)
        prepare(environment, threads)  # as RemoteEngine.launch does
        command = [sys.executable, "-m", "benchmarks.step_overhead", "--engine", str(self._records)]
        self._process = subprocess.Popen(
            [*command, msgspec.json.encode(launch).decode()],
            pass_fds=(reader,),
            env=environment,
            stderr=subprocess.DEVNULL,
        )
        os.close(reader)
        while not isinstance(message := decode_from_engine(self._receive()), Ready):
            if isinstance(message, Failed):
                raise RuntimeError(message.message)
        self.vocab_size = message.info.vocab_size

    def run(self, name: str, requests: int, prompt: int, steps: int, params: dict[str, Any]) -> list[bytes]:
        """Run requests to their ends; the messages with an event of every request."""
        for number in range(requests):
            tokens = tuple((number * 7919 + place * 31) % self.vocab_size for place in range(prompt))
            spec = RequestSpec(
                id=f"{name} {number}",
                prompts=(Prompt(tokens, steps),),
                sampling=Sampling(**params, ignore_eos=True, seed=number),
                arrived_at=time.monotonic(),
            )
            self._outbox.send(encode(Add(spec)))
        messages, unfinished = [], requests
        while unfinished:
            data = self._receive()
            message = decode_from_engine(data)
            if isinstance(message, Failed):
                raise RuntimeError(message.message)
            if isinstance(message, Output):
                unfinished -= sum(event.finish is not None for event in message.events)
                if len(message.events) == requests and not any(event.finish for event in message.events):
                    messages.append(data)
        return messages

    def finish(self) -> list[dict[str, Any]]:
        """End the engine; its turns."""
        self._outbox.send(encode(Drain(10.0)))
        self._process.wait(60)
        records: list[dict[str, Any]] = json.loads(self._records.read_text())
        return records

    def close(self) -> None:
        """End what still runs."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        os.close(self._pipe)
        self._context.destroy(linger=0)
        self._directory.cleanup()

    def _receive(self) -> bytes:
        while not self._inbox.poll(1000):
            if self._process.poll() is not None:
                raise RuntimeError(f"the engine ended with status {self._process.returncode}")
        data: bytes = self._inbox.recv()
        return data


@contextlib.contextmanager
def driving(model: Path, threads: int | None) -> Iterator[Driver]:
    """A driver for the length of a with block."""
    driver = Driver(model, threads)
    try:
        yield driver
    finally:
        driver.close()


def summarise(records: list[dict[str, Any]], requests: int) -> dict[str, Any]:
    """Medians in milliseconds over the turns in which all requests decoded, but for the first few."""
    full = [r for r in records if r["requests"] == r["tokens"] == requests][3:]
    names = {name for record in full for name in record["rows"]}
    rows = {name: 1e3 * statistics.median(r["rows"].get(name, 0.0) for r in full) for name in sorted(names)}
    rows["other"] = 1e3 * statistics.median(r["turn"] - sum(r["rows"].values()) for r in full)
    turn = 1e3 * statistics.median(r["turn"] for r in full)
    overhead = 1e3 * statistics.median(
        r["turn"] - sum(r["rows"].get(name, 0.0) for name in MODEL_ROWS) for r in full
    )
    return {"turns": len(full), "turn_ms": turn, "rows_ms": rows, "engine_overhead_ms": overhead}


def decode_ms(messages: list[bytes]) -> float:
    """Decoding one message in the API process."""

    def all_of_them() -> None:
        for message in messages:
            decode_from_engine(message)

    return 1e3 * median_seconds(all_of_them) / len(messages)


def median_seconds(work: Callable[[], None], rounds: int = 7) -> float:
    """Of a few calls."""
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def stream_ms(model: Path, streams: int, extra: dict[str, Any], tokens: int = 256) -> float:
    """Processor time that the real server spends on one token for each of so many chat streams."""
    import uvloop

    from penstock.text.tokenizer import Tokenizer
    from tests.server.overhead import measure

    tokenizer = Tokenizer.from_directory(model)
    return 1e3 * streams * float(uvloop.run(measure(tokenizer, streams, tokens, extra)))


def run(
    model: Path | None = None,
    *,
    prompt: int = 110,
    steps: int = 60,
    threads: int | None = None,
    cases: tuple[str, ...] = tuple(CASES),
    api: bool = True,
) -> dict[str, Any]:
    """All cases on one engine; see the module."""
    model = model or write_checkpoint(MODELS / "qwen3-0.6b", "qwen3-0.6b")
    windows: dict[str, tuple[float, float]] = {}
    messages: dict[str, list[bytes]] = {}
    with driving(model, threads) as driver:
        for name in cases:
            requests, params = CASES[name]
            began = time.monotonic()
            messages[name] = driver.run(name, requests, prompt, steps, params)
            windows[name] = (began, time.monotonic())
        records = driver.finish()
    result: dict[str, Any] = {"model": model.name, "prompt": prompt, "steps": steps, "cases": {}}
    streamed: dict[tuple[int, int | None], float] = {}
    for name, (begin, end) in windows.items():
        requests, params = CASES[name]
        entry = summarise([r for r in records if begin <= r["at"] <= end], requests)
        entry["requests"] = requests
        entry["message_bytes"] = round(statistics.mean(map(len, messages[name])))
        if api:
            entry["api_decode_ms"] = decode_ms(messages[name])
            top = params.get("logprobs")
            if (requests, top) not in streamed:  # temperature is nothing to the API process
                extra = {} if top is None else {"logprobs": True, "top_logprobs": top}
                streamed[requests, top] = stream_ms(model, requests, extra)
            entry["api_stream_ms"] = streamed[requests, top]
        overhead = (
            entry["engine_overhead_ms"] + entry.get("api_decode_ms", 0.0) + entry.get("api_stream_ms", 0.0)
        )
        entry["overhead_ms"] = overhead
        entry["overhead_share"] = overhead / entry["turn_ms"]
        entry["engine_overhead_share"] = entry["engine_overhead_ms"] / entry["turn_ms"]
        result["cases"][name] = entry
    return result


def table(result: dict[str, Any]) -> str:
    """For people."""
    cases = result["cases"]
    rows = list(dict.fromkeys(row for case in cases.values() for row in case["rows_ms"]))
    rows.sort(key=lambda row: (row in MODEL_ROWS, row))
    lines = [f"{'ms':24}" + "".join(f"{name.replace(', ', ' ')[:17]:>18}" for name in cases)]

    def line(title: str, values: list[str]) -> None:
        lines.append(f"{title:24}" + "".join(f"{value:>18}" for value in values))

    for row in rows:
        line(row, [f"{case['rows_ms'].get(row, 0.0):.3f}" for case in cases.values()])
    line("turn", [f"{case['turn_ms']:.2f}" for case in cases.values()])
    line(
        "engine overhead",
        [f"{c['engine_overhead_ms']:.2f} = {c['engine_overhead_share']:.1%}" for c in cases.values()],
    )
    for row in ("api_decode_ms", "api_stream_ms"):
        line(row.removesuffix("_ms"), [f"{c[row]:.3f}" if row in c else "-" for c in cases.values()])
    line(
        f"all (≤ {TARGET_SHARE:.0%}, ≤ {TARGET_MS:g} ms)",
        [f"{c['overhead_ms']:.2f} = {c['overhead_share']:.1%}" for c in cases.values()],
    )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    if sys.argv[1:2] == ["--engine"]:
        engine_main(msgspec.json.decode(sys.argv[3], type=Launch), Path(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="directory; default is the 0.6B shape, random weights")
    parser.add_argument("--prompt", type=int, default=110, help="tokens")
    parser.add_argument("--steps", type=int, default=60, help="tokens generated by each request")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--case", action="append", choices=tuple(CASES), help="default: all")
    parser.add_argument("--no-api", action="store_true", help="leave out the API process")
    parser.add_argument("--name", default="step_overhead", help="of the result file")
    args = parser.parse_args()
    result = run(
        args.model,
        prompt=args.prompt,
        steps=args.steps,
        threads=args.threads,
        cases=tuple(args.case or CASES),
        api=not args.no_api,
    )
    save(args.name, result)
    print(table(result))


if __name__ == "__main__":
    main()
