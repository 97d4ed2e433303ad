"""Who is measured: every engine's command, environment and settings; nothing is started here.

Commands have placeholders: {python} is this Python, {peers} the folder of the peers' environments, {model}
the checkpoint, {port} a free port, {cores} the cores of this process as vLLM writes them ("0-1"). They are
written to the result file before they are filled in, so that no path of a machine gets there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

CHECKOUT = Path(__file__).resolve().parents[2]
PEERS = CHECKOUT / ".peers"
MAX_MODEL_LEN = 4096

UNWANTED = frozenset(
    "OMP_NUM_THREADS OMP_WAIT_POLICY OMP_PROC_BIND KMP_AFFINITY KMP_BLOCKTIME LD_PRELOAD PYTHONPATH".split()
)
"""Variables of this shell that engines do not get."""

Settings = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Engine:
    """One column of the comparison."""

    id: str
    title: str
    kind: Literal["server", "worker"]
    """A server speaks HTTP; a worker is a library driven over its standard input and output."""
    command: tuple[str, ...]
    family: str
    """penstock, vllm, transformers or llama.cpp: what shares a colour and a version."""
    weights: str = "bf16"
    """bf16, int8, int4 or q8_0."""
    env: Mapping[str, str] = field(default_factory=dict)
    cache_env: tuple[str, ...] = ()
    """Variables that name the directory of compiled code; emptied once to measure a cold start."""
    prepare: tuple[str, ...] = ()
    """A command to run before a warm start: compiles what a first start would leave for later."""
    ready_s: float = 120.0
    """Longest start-up that is waited for."""
    max_concurrency: int | None = None
    """Loads above this are not for this engine."""
    candidates: tuple[Settings, ...] = ({},)
    """Settings of a worker, of which the fastest is measured."""
    gguf: str | None = None
    """The GGUF type that this engine wants instead of safetensors."""
    requires: str | None = None
    """A file under .peers/ without which there is no such engine; `setup` makes it."""

    def argv(self, *, model: Path, port: int, python: str) -> list[str]:
        """The command line, filled in."""
        places = {"python": python, "peers": str(PEERS), "model": str(model), "port": port, "cores": cores()}
        return [part.format(**places) for part in self.command]

    def prepare_argv(self, python: str) -> list[str]:
        """The command before a warm start, filled in; empty if there is none."""
        return [part.format(python=python) for part in self.prepare]

    def environment(self) -> dict[str, str]:
        """This shell's, without what would change how engines run, and the engine's own."""
        shell = {name: value for name, value in os.environ.items() if name not in UNWANTED}
        own = {name: value.format(cores=cores(), peers=PEERS) for name, value in self.env.items()}
        caches = {name: str(self.cache_dir / name.lower()) for name in self.cache_env}
        return {**shell, **own, **caches}

    @property
    def cache_dir(self) -> Path:
        """Where its compiled code is kept."""
        return PEERS / "cache" / self.id

    def describe(self) -> dict[str, Any]:
        """For the result file."""
        return {
            "title": self.title,
            "kind": self.kind,
            "family": self.family,
            "weights": self.weights,
            "command": " ".join(self.command),
            "environment": dict(self.env),
        }


def cores() -> str:
    """The cores of this process, as vLLM writes them: 0-1, or 0,2,4 where they are not in a row."""
    usable = sorted(os.sched_getaffinity(0))
    in_a_row = usable == list(range(usable[0], usable[-1] + 1))
    return f"{usable[0]}-{usable[-1]}" if in_a_row else ",".join(map(str, usable))


def _penstock(id: str, title: str, *flags: str, weights: str = "bf16", cold: bool = False) -> Engine:
    command = (
        *("{python}", "-m", "penstock", "serve", "{model}", "--host", "127.0.0.1", "--port", "{port}"),
        *("--max-model-len", str(MAX_MODEL_LEN), "--disable-uvicorn-access-log", *flags),
    )
    caches = ("PENSTOCK_CACHE",) if cold else ()
    # A first start waits for its compiler: that is the start without compiled code.
    build = ("{python}", "-m", "penstock.kernels.cpu.build")
    return Engine(id, title, "server", command, "penstock", weights=weights, cache_env=caches, prepare=build)


def _vllm(id: str, title: str, **env: str) -> Engine:
    return Engine(
        id,
        title,
        "server",
        (
            *("{peers}/vllm/venv/bin/vllm", "serve", "{model}", "--host", "127.0.0.1", "--port", "{port}"),
            *("--dtype", "bfloat16", "--max-model-len", str(MAX_MODEL_LEN)),
        ),
        "vllm",
        env={
            "VLLM_CPU_KVCACHE_SPACE": "4",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            **env,
        },
        cache_env=("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR"),
        ready_s=600.0,
        requires="vllm/venv/bin/vllm",
    )


def _transformers(id: str, title: str, worker: str) -> Engine:
    command = ("{python}", "-m", f"benchmarks.peers.workers.{worker}", "{model}")
    env = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return Engine(id, title, "worker", command, "transformers", env=env)


def _llama(id: str, title: str, weights: str) -> Engine:
    return Engine(
        id,
        title,
        "worker",
        ("{peers}/llama/venv/bin/python", "-m", "benchmarks.peers.workers.llama_cpp_worker", "{model}"),
        "llama.cpp",
        weights=weights,
        max_concurrency=1,
        candidates=tuple(
            {"flash_attn": flash, "n_batch": 2048, "n_ubatch": ubatch}
            for flash in (False, True)
            for ubatch in (128, 512, 1024)
        ),
        gguf=weights,
        requires="llama/venv/bin/python",
    )


VLLM_BEST = {
    "VLLM_CPU_OMP_THREADS_BIND": "{cores}",
    # It warns that it wants this OpenMP, which one of its dependencies brings: measured 2 to 4 % faster.
    "LD_PRELOAD": "{peers}/vllm/venv/lib/libiomp5.so",
    # Graphs compiled ahead fail to load in 0.32.0 on CPUs and are made at every start: 86 s instead of 50.
    "VLLM_USE_AOT_COMPILE": "0",
}
"""What makes vLLM's CPU build fast, found by measuring."""

ENGINES = {
    engine.id: engine
    for engine in (
        _llama("llama-bf16", "llama.cpp, bf16", "bf16"),
        _llama("llama-q8", "llama.cpp, Q8_0", "q8_0"),
        _penstock("penstock-int8", "Penstock, int8", "--quantization", "int8", weights="int8"),
        _penstock("penstock-w8a8", "Penstock, w8a8", "--quantization", "w8a8", weights="int8"),
        _penstock("penstock-int4", "Penstock, int4", "--quantization", "int4", weights="int4"),
        _penstock("penstock", "Penstock", cold=True),
        _vllm("vllm-bound", "vLLM, all cores bound", **VLLM_BEST),
        _vllm("vllm", "vLLM, default"),
        _transformers("transformers-static", "transformers, generate", "transformers_static"),
        _transformers("transformers-cb", "transformers, continuous", "transformers_continuous"),
    )
}
"""In the order of a round: who is compared with each other runs one after the other."""
FAMILIES = ("penstock", "vllm", "transformers", "llama.cpp")
"""In the order of tables and pictures."""
