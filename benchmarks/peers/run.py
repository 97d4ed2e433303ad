"""Rounds: each starts every engine in turn, times its start, puts it under its loads, and stops it.

Alternating is what makes the ratios fair: a machine that is slow for ten minutes is slow for all of them, and
medians over rounds forget it. A failure of one engine is written down with its reason and ends nothing else.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import hardware
from .engines import CHECKOUT, PEERS, Engine, Settings
from .loads import TUNING, WARM_UP, WARM_UP_SINGLE, Load
from .results import Results
from .session import EngineFailed, Session, start


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure."""

    engines: Sequence[Engine]
    loads: Sequence[Load]
    rounds: int
    model: Path
    lock: Path | None = None
    """Held during every start-up and every load, so that other measurements can wait for it in between."""
    cold: bool = True
    """Whether to measure one start-up of each engine without its compiled code."""


def run(plan: Plan, results: Results) -> None:
    """Measure what the results do not have yet."""
    for number in range(plan.rounds):
        for engine in plan.engines:
            wanted = [load for load in plan.loads if _suits(engine, load)]
            missing = [load for load in wanted if not results.has(engine.id, load.id, number)]
            if not missing and results.has(engine.id, "startup", number):
                continue
            results.forget_failures(engine.id, number)
            try:
                _measure(plan, results, engine, missing, number)
            except EngineFailed as error:
                _say(f"{engine.id}: not measured: {error}")
                results.add(engine.id, number, "failed", reason=_without_paths(str(error)))


def _suits(engine: Engine, load: Load) -> bool:
    return engine.max_concurrency is None or load.concurrency <= engine.max_concurrency


def _measure(plan: Plan, results: Results, engine: Engine, loads: Sequence[Load], number: int) -> None:
    if engine.requires and not (PEERS / engine.requires).exists():
        raise EngineFailed(f"{engine.id}: .peers/{engine.requires} is missing; run `setup` first")
    model = model_file(engine, plan.model)
    if plan.cold and engine.cache_env and not results.has(engine.id, "cold-startup"):
        shutil.rmtree(engine.cache_dir, ignore_errors=True)
        with _holding(plan.lock), start(engine, model) as session:
            results.add(engine.id, number, "cold-startup", seconds=session.startup)
            _say(f"{engine.id}: cold start, first token after {session.startup['first_token_s']:.1f} s")
    settings = _tune(plan, results, engine, model)
    with _holding(plan.lock):
        _prepare(engine)
        _read(model)
        limits = hardware.measure()
    results.add(engine.id, number, "hardware", **limits)
    with contextlib.ExitStack() as stack:
        with _holding(plan.lock):
            session = stack.enter_context(start(engine, model, settings))
            if not results.has(engine.id, "startup", number):
                results.add(engine.id, number, "startup", seconds=session.startup)
            _say(f"{engine.id}: first token after {session.startup['first_token_s']:.1f} s")
            session.run(WARM_UP_SINGLE if engine.max_concurrency == 1 else WARM_UP, seed=number)
        results.data["engines"][engine.id] = {
            **engine.describe(),
            "versions": session.versions(),
            "settings": settings,
            "weight_bytes": session.weight_bytes() or weight_bytes(engine, model),
        }
        for load in loads:
            with _holding(plan.lock):
                report = session.run(load, seed=number)
            results.add(engine.id, number, load.id, report=report)
            _say(_line(engine, load, report))


def _prepare(engine: Engine) -> None:
    """Compile ahead; an engine that cannot is measured without, as it would run."""
    command = engine.prepare_argv(sys.executable)
    if command:
        done = subprocess.run(command, cwd=CHECKOUT, env=engine.environment(), capture_output=True, text=True)
        if done.returncode:
            _say(f"{engine.id}: {' '.join(engine.prepare)} failed: {(done.stdout + done.stderr)[-400:]}")


def _tune(plan: Plan, results: Results, engine: Engine, model: Path) -> Settings:
    """The fastest of the engine's candidates: the shortest time of one long request, best of two."""
    if len(engine.candidates) == 1:
        return engine.candidates[0]
    tried: list[dict[str, Any]] = results.data["tuning"].get(engine.id, [])
    for settings in engine.candidates[len(tried) :]:
        with _holding(plan.lock), start(engine, model, settings) as session:
            seconds = min(_latency(session, seed) for seed in range(2))
        tried.append({"settings": dict(settings), "seconds": seconds})
        results.data["tuning"][engine.id] = tried
        results.save()
        _say(f"{engine.id}: {settings}: {seconds:.2f} s for {TUNING.input_len} in / {TUNING.output_len} out")
    best: Mapping[str, Any] = min(tried, key=lambda entry: float(entry["seconds"]))
    return dict(best["settings"])


def _latency(session: Session, seed: int) -> float:
    report = session.run(TUNING, seed)
    return float(report["median_e2el_ms"]) / 1e3


def model_file(engine: Engine, checkpoint: Path) -> Path:
    """What this engine loads: the checkpoint, or the same weights as GGUF, written if they are not there."""
    if engine.gguf is None:
        return checkpoint
    path = PEERS / "llama" / "models" / f"{checkpoint.name}-{engine.gguf}.gguf"
    weights = checkpoint / "model.safetensors"
    if not path.exists() or path.stat().st_mtime < weights.stat().st_mtime:
        writer = "benchmarks.peers.workers.gguf_writer"
        python = PEERS / "llama/venv/bin/python"
        command = [str(python), "-m", writer, str(checkpoint), str(path), "--type", engine.gguf]
        done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
        if done.returncode:
            raise EngineFailed(f"{engine.id}: writing {path.name} failed: {done.stderr[-400:]}")
    return path


def weight_bytes(engine: Engine, model: Path) -> int | None:
    """Bytes of the weight files, which a decode step reads once (tied embeddings: once, for the output).

    None for an engine that quantises what it loads: only it knows.
    """
    if engine.weights != "bf16" and engine.gguf is None:
        return None
    return sum(file.stat().st_size for file in _weight_files(model))


def _weight_files(model: Path) -> list[Path]:
    return [model] if model.is_file() else sorted(model.glob("*.safetensors"))


def _read(model: Path) -> None:
    """Bring the weights into the page cache."""
    for file in _weight_files(model):
        with file.open("rb") as stream:
            while stream.read(1 << 24):
                pass


@contextlib.contextmanager
def _holding(lock: Path | None) -> Iterator[None]:
    if lock is None:
        yield
        return
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _line(engine: Engine, load: Load, report: Mapping[str, Any]) -> str:
    def number(name: str) -> str:
        value = report[name]
        return "–" if value is None else f"{value:,.1f}"

    return (
        f"{engine.id:20} {load.id:10} {report['output_throughput']:7.1f} tok/s"
        f"   TTFT {number('median_ttft_ms'):>8} / {number('p99_ttft_ms'):>8} ms"
        f"   TPOT {number('median_tpot_ms'):>6} ms   ITL {number('median_itl_ms'):>6} / "
        f"{number('p99_itl_ms'):>6} ms   {report['duration']:5.1f} s"
    )


def _without_paths(text: str) -> str:
    return text.replace(f"{CHECKOUT}/", "").replace(str(Path.home()), "~").replace(sys.prefix, "")


def _say(text: str) -> None:
    print(text, flush=True)
