"""One live engine: started, timed to its first token, put under loads, stopped; servers and workers alike.

    with start(engine, model) as session:    exec ──▶ first token, in session.startup
        session.run(load, seed)              one closed loop; the report of penstock.bench

A server is asked over HTTP. A worker (`workers/protocol.py`) gets one line of JSON per load and answers with
the times of every token; the same arithmetic as for a server turns them into a report.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from penstock.bench.client import (
    Outcome,
    RequestRecord,
    Target,
    find_model,
    get_json,
    open_session,
    send_request,
)
from penstock.bench.errors import BenchError
from penstock.bench.prompts import Prompt
from penstock.bench.report import build_report
from penstock.bench.serve import ServeBench, bench_serve
from penstock.bench.startup import free_port

from .engines import CHECKOUT, PEERS, Engine, Settings
from .loads import Load

FIRST = Prompt(list(range(100, 116)), max_tokens=2, input_tokens=16)
"""The request whose first token ends the start-up."""
LOAD_S = 900.0
"""Longest time that one load may take."""
STOP_S = 40.0
_POLL_S = 0.01


class EngineFailed(Exception):
    """The engine did not start, or ended, or refused: why, with the end of its log."""


class Session(ABC):
    """One running engine."""

    startup: dict[str, float]
    """Seconds from exec: healthy_s (a server's), first_token_s."""

    def __init__(self, engine: Engine, process: subprocess.Popen[bytes], log: Path, began: float) -> None:
        self.engine = engine
        self.process = process
        self.log = log
        self.began = began

    @abstractmethod
    def wait(self, deadline: float) -> None:
        """Until the first token; fills `startup`."""

    @abstractmethod
    def run(self, load: Load, seed: int) -> dict[str, Any]:
        """One load; the report as `penstock bench serve` gives it. Raises EngineFailed if requests failed."""

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """Names and versions of what runs."""

    def weight_bytes(self) -> int | None:
        """What the engine itself says that a step reads of the weights, if it says."""
        found = re.search(r"over ([\d.]+) GB of weights", self.log.read_text(errors="replace"))
        return round(1e9 * float(found[1])) if found else None

    def failure(self, what: str) -> EngineFailed:
        """What happened, with the last lines that the engine printed."""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        said = [line for line in lines if re.search(r"error|exception", line, re.IGNORECASE)] or lines
        tail = " | ".join(line.strip() for line in said[-3:])[-600:]
        return EngineFailed(f"{self.engine.id}: {what}; it printed {tail or 'nothing'}")

    def check_alive(self) -> None:
        """Raise EngineFailed if the process is gone."""
        if (code := self.process.poll()) is not None:
            raise self.failure(f"ended with status {code}")


@contextlib.contextmanager
def start(engine: Engine, model: Path, settings: Settings | None = None) -> Iterator[Session]:
    """Start the engine, wait for its first token, stop it at the end of the block. Raises EngineFailed."""
    port = free_port()
    command = engine.argv(model=model, port=port, python=sys.executable)
    if engine.kind == "worker":
        command.append(json.dumps(dict(settings or {})))
    environment = engine.environment()
    log = PEERS / "logs" / f"{engine.id}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    for directory in engine.cache_env:
        Path(environment[directory]).mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        began = time.perf_counter()
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE if engine.kind == "worker" else subprocess.DEVNULL,
                stdout=subprocess.PIPE if engine.kind == "worker" else output,
                stderr=output,
                cwd=CHECKOUT,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            raise EngineFailed(f"{engine.id}: cannot run {command[0]}: {error}") from error
    session: Session
    if engine.kind == "worker":
        session = _Worker(engine, process, log, began)
    else:
        session = _Server(engine, process, log, began, f"http://127.0.0.1:{port}")
    try:
        session.wait(began + engine.ready_s)
        yield session
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the process, then SIGKILL to what is left of its process group after it has ended."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
    if process.returncode is None:
        os.kill(process.pid, signal.SIGTERM)  # Popen's own would look first, and reap what has ended
        deadline = time.perf_counter() + STOP_S
        # WNOWAIT leaves it unreaped: until then its id is that of the group that was started here.
        ended = os.WEXITED | os.WNOWAIT | os.WNOHANG
        while os.waitid(os.P_PID, process.pid, ended) is None and time.perf_counter() < deadline:
            time.sleep(_POLL_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class _Server(Session):
    def __init__(
        self, engine: Engine, process: subprocess.Popen[bytes], log: Path, began: float, url: str
    ) -> None:
        super().__init__(engine, process, log, began)
        self.url = url
        self._model = ""
        self._version: str | None = None

    def wait(self, deadline: float) -> None:
        asyncio.run(self._wait(deadline))

    async def _wait(self, deadline: float) -> None:
        async with open_session() as session:
            while True:
                self.check_alive()
                if time.perf_counter() > deadline:
                    raise self.failure(f"not ready after {self.engine.ready_s:g} s")
                with contextlib.suppress(BenchError):
                    status, _ = await get_json(session, f"{self.url}/health", {})
                    if status == 200:
                        break
                await asyncio.sleep(_POLL_S)
            healthy = time.perf_counter() - self.began
            self._model = await find_model(session, self.url, {})
            body = {"temperature": 0, "ignore_eos": True}
            target = Target(self.url, "/v1/completions", self._model, {}, body, self.engine.ready_s)
            record = RequestRecord(0, time.perf_counter())
            await send_request(session, target, FIRST, record)
            if record.outcome is not Outcome.COMPLETED:
                raise self.failure(f"the first request failed: {record.cause}: {record.message}")
            self.startup = {
                "healthy_s": healthy,
                "first_token_s": record.chunk_times[0] - self.began,
            }
            _, answer = await get_json(session, f"{self.url}/version", {})
            self._version = answer.get("version") if isinstance(answer, dict) else None

    def run(self, load: Load, seed: int) -> dict[str, Any]:
        self.check_alive()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "prompts.jsonl"
            prompts = load.prompts(seed)
            path.write_text("".join(json.dumps(prompt.body(chat=False)) + "\n" for prompt in prompts))
            bench = ServeBench(
                base_url=self.url,
                model=self._model,
                dataset_path=path,
                num_prompts=load.requests,
                max_concurrency=load.concurrency,
                request_timeout=LOAD_S,
                body={"ignore_eos": True, "temperature": 0},
            )
            try:
                report = asyncio.run(bench_serve(bench))
            except BenchError as error:
                raise self.failure(str(error)) from error
        if report["completed"] != load.requests:
            raise self.failure(f"{load.id}: {report['errors'] or 'interrupted'}")
        return report

    def versions(self) -> dict[str, str]:
        return {self.engine.family: self._version} if self._version else {}


class _Worker(Session):
    def __init__(self, engine: Engine, process: subprocess.Popen[bytes], log: Path, began: float) -> None:
        super().__init__(engine, process, log, began)
        self._versions: dict[str, str] = {}
        self._rest = b""

    def wait(self, deadline: float) -> None:
        self._send([FIRST], 1)
        answer = self._receive(deadline)
        # CLOCK_MONOTONIC is one clock for all processes of a machine.
        self.startup = {"first_token_s": answer["records"][0]["chunk_times"][0] - self.began}
        self._versions = answer["versions"]

    def run(self, load: Load, seed: int) -> dict[str, Any]:
        self._send(load.prompts(seed), load.concurrency)
        answer = self._receive(time.perf_counter() + LOAD_S)
        records = []
        for index, row in enumerate(answer["records"]):
            record = RequestRecord(index, row["sent"], sent=row["sent"], chunk_times=row["chunk_times"])
            record.prompt_tokens, record.output_tokens = row["prompt_tokens"], len(row["chunk_times"])
            record.outcome, record.finished = Outcome.COMPLETED, row["chunk_times"][-1]
            records.append(record)
        return build_report(records, start=answer["start"], end=answer["end"], num_prompts=load.requests)

    def versions(self) -> dict[str, str]:
        return self._versions

    def _send(self, prompts: Sequence[Prompt], concurrency: int) -> None:
        requests = [{"prompt": prompt.content, "max_tokens": prompt.max_tokens} for prompt in prompts]
        job = json.dumps({"requests": requests, "concurrency": concurrency})
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(job.encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self.process.wait()
            self.check_alive()

    def _receive(self, deadline: float) -> dict[str, Any]:
        """The next line of the worker; raises EngineFailed if none comes in time or it is an error."""
        assert self.process.stdout is not None
        descriptor = self.process.stdout.fileno()
        while b"\n" not in self._rest:
            left = deadline - time.perf_counter()
            if left <= 0:
                raise self.failure("no answer in time")
            if not select.select([descriptor], [], [], min(left, 1.0))[0]:
                continue
            piece = os.read(descriptor, 1 << 20)
            if not piece:
                self.process.wait()
                self.check_alive()
            self._rest += piece
        line, self._rest = self._rest.split(b"\n", 1)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineFailed(f"{self.engine.id}: {answer['error']}")
        return answer
