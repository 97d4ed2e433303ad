"""The engine on one GPU, in under ten minutes and without network: right, and how fast.

    python -m benchmarks.gpu.run                             both shapes, everything below
    python -m benchmarks.gpu.run --device cpu --shape tiny   the same on a CPU, small: to try the script

1. What the device can do: bytes/s of copying memory, FLOP/s of a matrix product.
2. Every entry of the table of operations against the specification.
3. The products with quantised weights at 1 to 256 rows, beside the plain one.
4. The engine with random weights: decode at batch 1, 8, 64 and 256, prefill, the host's share of a step (what
   it adds to the device's time, and what it does while that goes on), and the share of the device's own
   limits. Targets on an H100, for the 8B shape in bfloat16, stand beside them.
5. From exec to the first token of a server, whose weights are files in the page cache.
6. transformers' generate on the same shape, where it is installed.

What does not fit into --seconds is left out, and named. Writes benchmarks/results/gpu_run.json.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import logging
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.checkpoint import write_checkpoint, write_config
from penstock.core.plan import StepResult
from penstock.core.request_spec import Prompt, RequestSpec
from penstock.core.sampling_params import Sampling
from penstock.engine.build import Engine, build_engine
from penstock.engine.config import EngineConfig
from penstock.engine.executor.torch_executor import TorchExecutor
from penstock.engine.messages import Abort, Add
from penstock.kernels.create import create_operations, known_device

from .correctness import check_table
from .timing import Limits, copy_rate, on_gpu, product_rate, seconds_of

TARGETS = {"decode": 0.80, "prefill": 0.60, "host_ms": 0.3, "startup_s": 10.0}
"""On an H100: the 8B shape in bfloat16; and from exec to the first token, with weights in the page cache."""
SHAPES = {"0.6b": "qwen3-0.6b", "8b": "qwen3-8b", "32b": "qwen3-32b", "tiny": "qwen3-tiny"}
BATCHES = (1, 8, 64, 256)
ROWS = (1, 4, 16, 32, 64, 128, 256)


class Clock:
    """What is left of the time."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self.left_out: list[str] = []

    def allows(self, seconds: float, what: str) -> bool:
        """Whether there is time for something that takes about so long; else it is named."""
        if time.monotonic() + seconds <= self._end:
            return True
        self.left_out.append(what)
        return False


def describe(device: torch.device) -> dict[str, Any]:
    """Device and versions."""
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": str(known_device(device)),
    }
    for package in ("triton", "transformers", "penstock"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    if on_gpu(device):
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "cuda": torch.version.cuda or f"ROCm {torch.version.hip}",
            "memory_gib": f"{properties.total_memory / 2**30:.1f}",
            "multiprocessors": str(properties.multi_processor_count),
        }
    return found


# ---- products ----


def quantised_products(device: torch.device, dtype: torch.dtype, shape: tuple[int, int]) -> dict[str, Any]:
    """Scheme → rows → (seconds, seconds of the plain product over them), for a weight [out, in]."""
    operations = create_operations(device, dtype, quantized=True)
    schemes = [None, *(scheme for scheme in operations.schemes if scheme != "w8a8")]
    weight = torch.randn(shape, device=device).to(dtype)
    taken: dict[str, dict[int, float]] = {}
    for scheme in schemes:
        matrix = operations.linear(weight, scheme)
        for rows in ROWS if on_gpu(device) else ROWS[:3]:
            x = torch.randn((rows, shape[1]), device=device).to(dtype)
            # on a GPU the weight must not stay in the second-level cache from one call to the next
            seconds = seconds_of(lambda matrix=matrix, x=x: matrix(x, None), device, flush=True)
            taken.setdefault(scheme or "plain", {})[rows] = seconds
    return {
        "shape": list(shape),
        "microseconds": {
            name: {rows: value * 1e6 for rows, value in by.items()} for name, by in taken.items()
        },
        "speed-up": {
            name: {rows: taken["plain"][rows] / value for rows, value in by.items()}
            for name, by in taken.items()
            if name != "plain"
        },
    }


# ---- the engine ----


class Watched:
    """An executor that remembers how long the device took, and how long the host has waited for it."""

    def __init__(self, executor: Any) -> None:
        self._executor = executor
        self.seconds: list[float] = []
        self.waited = 0.0
        self._stream, self._wait = executor._stream, executor._stream.wait
        self._stream.wait = self._timed

    def _timed(self, mark: Any) -> None:
        started = time.perf_counter()
        self._wait(mark)
        self.waited += time.perf_counter() - started

    def leave(self) -> Any:
        """The executor, as it was."""
        self._stream.wait = self._wait
        return self._executor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executor, name)

    def collect(self, ticket: Any) -> StepResult:
        result: StepResult = self._executor.collect(ticket)
        self.seconds.append(result.seconds)
        return result


def prompt_of(length: int, number: int, vocabulary: int) -> Prompt:
    """Token ids that no two requests share."""
    ids = tuple((number * 7919 + place * 104729 + 11) % (vocabulary - 16) + 16 for place in range(length))
    return Prompt(token_ids=ids, max_tokens=400)


def decode(engine: Engine, batch: int, context: int, steps: int) -> dict[str, float]:
    """Steps of `batch` requests that all decode: tokens/s, and where a step's time goes."""
    loop = engine.loop
    watched = Watched(loop.executor)
    loop.executor = watched
    ids = [f"decode-{batch}-{number}" for number in range(batch)]
    try:
        for number, id in enumerate(ids):
            prompt = prompt_of(context, number, engine.info.vocab_size)
            sampling = Sampling(temperature=0.0, ignore_eos=True)
            if refused := loop.handle(Add(RequestSpec(id=id, prompts=(prompt,), sampling=sampling))):
                raise RuntimeError(f"refused: {refused[0].failure}")
        for _ in range(20_000):
            loop.step()
            items = loop.last_plan.items
            if len(items) == batch and all(item.tokens == 1 for item in items):
                break
        else:
            raise RuntimeError("the requests never decoded together")
        for _ in range(8):
            loop.step()
        watched.seconds.clear()
        watched.waited = 0.0
        walls = []
        for _ in range(steps):
            started = time.perf_counter()
            loop.step()
            walls.append(time.perf_counter() - started)
        busy = (sum(walls) - watched.waited) / steps
        if len(loop.last_plan.items) != batch:
            raise RuntimeError(
                f"{len(loop.last_plan.items)} of {batch} requests are left: the cache is too small"
            )
    finally:
        loop.handle(Abort(tuple(ids)))
        while loop.has_work:
            loop.step()
        loop.executor = watched.leave()
    wall, device = statistics.median(walls), statistics.median(watched.seconds)
    total = sum(walls) / steps
    return {
        "batch": batch,
        "context": context,
        "tokens_per_second": batch / total,
        "step_ms": wall * 1e3,
        "device_ms": device * 1e3,
        "host_ms": max(0.0, total - sum(watched.seconds) / len(watched.seconds)) * 1e3,
        # a device that waits for the host in the middle of a step is not seen in host_ms, but here: then the
        # host is busy for as long as a step takes
        "host_busy_ms": busy * 1e3,
    }


def prefill(engine: Engine, length: int, repeats: int) -> dict[str, float]:
    """Prompts of `length` tokens, one at a time: tokens/s of the device."""
    loop = engine.loop
    watched = Watched(loop.executor)
    loop.executor = watched
    taken = []
    try:
        for number in range(repeats + 1):
            watched.seconds.clear()
            id = f"prefill-{length}-{number}"
            prompt = prompt_of(length, 1000 + number, engine.info.vocab_size)
            sampling = Sampling(temperature=0.0, ignore_eos=True)
            one = Prompt(token_ids=prompt.token_ids, max_tokens=1)
            loop.handle(Add(RequestSpec(id=id, prompts=(one,), sampling=sampling)))
            while loop.has_work:
                loop.step()
            taken.append(sum(watched.seconds))
    finally:
        loop.executor = watched.leave()
    seconds = statistics.median(taken[1:])
    return {"length": length, "seconds": seconds, "tokens_per_second": length / seconds}


def run_engine(
    shape: str,
    device: torch.device,
    limits: Limits,
    clock: Clock,
    arguments: argparse.Namespace,
    scheme: str = "none",
) -> dict[str, Any]:
    """One shape with random weights, in one scheme."""
    small = not on_gpu(device)
    context, steps = (16, 4) if small else (512, 64)
    batches = [batch for batch in BATCHES if not small or batch <= 8]
    length = 32 if small else 4096
    with tempfile.TemporaryDirectory() as folder:
        config = write_config(Path(folder), SHAPES[shape])
        started = time.monotonic()
        engine = build_engine(
            EngineConfig(
                model=folder,
                load_format="dummy",
                device=device.type,
                dtype="bfloat16" if not small else "float32",
                quantization=scheme,
                max_model_len=8192 if not small else 1024,
                max_num_seqs=max(batches),
                max_num_batched_tokens=8192 if not small else 256,
                enable_prefix_caching=False,
                async_scheduling=not small,
            )
        )
        loaded = time.monotonic() - started
        try:
            finish_capture(engine)
            executor = engine.loop.executor
            assert isinstance(executor, TorchExecutor)
            model = executor.model
            kv_bytes = model.cache_spec(16).bytes_per_token
            result: dict[str, Any] = {
                "shape": shape,
                "scheme": scheme,
                "dtype": engine.info.dtype,
                "load_seconds": loaded,
                "weight_gb": model.weight_bytes / 1e9,
                "decode": [],
                "prefill": [],
            }
            for batch in batches:
                if not clock.allows(15, f"decode of {shape} {scheme} at batch {batch}"):
                    continue
                row = decode(engine, batch, context, steps)
                moved = model.read_bytes + batch * (context + steps / 2) * kv_bytes
                row["bandwidth_share"] = moved / (row["device_ms"] / 1e3) / limits.copy
                result["decode"].append(row)
            if clock.allows(20, f"prefill of {shape} {scheme}"):
                row = prefill(engine, length, 3)
                row["flop_share"] = prefill_flops(config, length) / row["seconds"] / limits.product
                result["prefill"].append(row)
        finally:
            engine.close()
            del engine
            gc.collect()
            if on_gpu(device):
                torch.cuda.empty_cache()
    return result


def finish_capture(engine: Engine) -> None:
    """Do what the engine does in idle moments: it records graphs."""
    while engine.chore is not None and engine.chore():
        pass


def prefill_flops(config: dict[str, Any], length: int) -> float:
    """Of the linear layers for every token, of causal attention, and of the last token's logits."""
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    layer = hidden * (q + 2 * kv) + q * hidden + 3 * hidden * inner
    linear = 2.0 * length * config["num_hidden_layers"] * layer
    attention = 2.0 * config["num_hidden_layers"] * q * length * length  # half of two products, causal
    return linear + attention + 2.0 * hidden * config["vocab_size"]


def start_up(device: torch.device, shape: str) -> dict[str, Any]:
    """Seconds from exec to the first token of `penstock serve`, weights as files in the page cache."""
    from penstock.bench.startup import StartupBench, bench_startup, free_port, serve_command

    with tempfile.TemporaryDirectory() as folder:
        path = write_checkpoint(Path(folder) / "model", SHAPES[shape])
        port = free_port()
        flags = ["--device", device.type, "--max-model-len", "1024"]
        command = serve_command(str(path), flags, port)
        found = bench_startup(
            StartupBench(command=command, base_url=f"http://127.0.0.1:{port}", model=str(path), repeats=2)
        )
    del found["command"]
    return found


def peer_transformers(device: torch.device, shape: str) -> dict[str, float]:
    """Tokens/s of transformers' generate at batch 1 and 8, greedy."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    with tempfile.TemporaryDirectory() as folder:
        config = Qwen3Config(**write_config(Path(folder), SHAPES[shape]))
    small = not on_gpu(device)
    dtype = torch.float32 if small else torch.bfloat16
    context, steps = (16, 8) if small else (512, 64)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    found = {}
    for batch in (1, 8):
        ids = torch.randint(16, config.vocab_size, (batch, context), device=device)

        def generate(tokens: int, ids: Tensor = ids) -> None:
            ask = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 1}
            with torch.inference_mode():
                model.generate(ids, attention_mask=torch.ones_like(ids), **ask)

        generate(2)
        one = seconds_of(lambda: generate(1), device, least=1)
        many = seconds_of(lambda: generate(steps + 1), device, least=1)
        found[f"decode tokens/s at batch {batch}"] = batch * steps / max(many - one, 1e-9)
    return found


# ---- all of it ----


def measure(arguments: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Everything, as one record."""
    device = torch.device(arguments.device)
    small = not on_gpu(device)
    dtype = torch.float32 if small else torch.bfloat16
    if not small and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        dtype = torch.float16
    clock = Clock(arguments.seconds)
    result: dict[str, Any] = {"machine": describe(device), "targets": TARGETS}
    say("  ".join(f"{key} {value}" for key, value in result["machine"].items()))
    limits = Limits(
        copy_rate(device, 64 << 20 if small else 2 << 30), product_rate(device, dtype, 512 if small else 8192)
    )
    result["limits"] = {"copy_bytes_per_second": limits.copy, "product_flop_per_second": limits.product}
    say(
        f"measured: copy {limits.copy / 1e9:,.0f} GB/s, "
        f"products {limits.product / 1e12:,.2f} TFLOP/s in {dtype}"
    )

    result["correctness"] = check_table(device, dtype)
    for row in result["correctness"]:
        say(
            f"  {'ok ' if row['ok'] else 'BAD'} {row['entry']}: "
            f"largest error {row['error']:.2g} of {row['allowed']:.2g}"
        )

    if clock.allows(30, "products with quantised weights"):
        products = result["products"] = quantised_products(
            device, dtype, (256, 256) if small else (6144, 4096)
        )
        for name, by in products["speed-up"].items():
            say(
                f"  {name} over plain: "
                + ", ".join(f"{rows} rows {value:.2f}x" for rows, value in by.items())
            )

    result["engine"] = []
    for shape in arguments.shape:
        known = create_operations(device, dtype, quantized=True).schemes if not small else ()
        for scheme in ("none", *(s for s in ("fp8", "int4") if s in known and shape == arguments.shape[-1])):
            if clock.allows(60 if not small else 1, f"{shape} {scheme}"):
                made = run_engine(shape, device, limits, clock, arguments, scheme)
                result["engine"].append(made)
                tell_engine(made, say)
    if not arguments.no_startup and clock.allows(90, "start-up"):
        result["startup"] = start_up(device, arguments.shape[0])
        say(f"from exec to the first token: {result['startup']['min_first_token_s']:.2f} s")
    wanted = result["machine"]["transformers"] != "not installed" and not arguments.no_peers
    if wanted and clock.allows(60, "transformers"):
        try:
            result["peers"] = {"transformers": peer_transformers(device, arguments.shape[0])}
            for name, value in result["peers"]["transformers"].items():
                say(f"transformers, {arguments.shape[0]}: {name} {value:,.1f}")
        except Exception as error:  # another's
            result["peers"] = {"transformers": f"failed: {error}"}
            say(f"transformers failed: {error}")
    result["left_out"] = clock.left_out
    if clock.left_out:
        say(f"no time for: {', '.join(clock.left_out)}")
    return result


def tell_engine(made: dict[str, Any], say: Callable[[str], None]) -> None:
    """A table of one shape, targets beside the figures."""
    aimed = made["shape"] == "8b" and made["scheme"] == "none"
    say(
        f"{made['shape']} {made['scheme']}, {made['dtype']}, {made['weight_gb']:.2f} GB, "
        f"loaded in {made['load_seconds']:.1f} s"
    )
    say("  batch   tokens/s   step ms   device ms   host ms   (busy)   share of the copy rate")
    for row in made["decode"]:
        goal = (
            f"   target {TARGETS['decode']:.0%}, host {TARGETS['host_ms']} ms"
            if aimed and row["batch"] == 1
            else ""
        )
        say(
            f"  {row['batch']:5d} {row['tokens_per_second']:10,.1f} {row['step_ms']:9.2f} "
            f"{row['device_ms']:11.2f} {row['host_ms']:9.3f} {row['host_busy_ms']:8.3f} "
            f"{row['bandwidth_share']:12.0%}{goal}"
        )
    for row in made["prefill"]:
        goal = f"   target {TARGETS['prefill']:.0%}" if aimed else ""
        say(
            f"  prefill of {row['length']:,}: {row['tokens_per_second']:,.0f} tokens/s, "
            f"{row['flop_share']:.0%} of the product rate{goal}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", nargs="+", choices=tuple(SHAPES), default=["0.6b", "8b"])
    parser.add_argument("--seconds", type=float, default=540.0, help="what does not fit is left out")
    parser.add_argument("--no-startup", action="store_true", help="start no server")
    parser.add_argument("--no-peers", action="store_true", help="run no other program")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "gpu_run.json")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("No GPU here: torch sees no CUDA device. --device cpu --shape tiny tries the script itself.")
        raise SystemExit(2)
    logging.disable(logging.INFO)
    result = {"date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())}
    result |= measure(arguments, lambda line: print(line, flush=True))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {arguments.out}")
    if not all(row["ok"] for row in result["correctness"]):
        sys.exit("kernels disagree with the specification")


if __name__ == "__main__":
    main()
