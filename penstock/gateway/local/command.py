"""How an engine is started: its command line and environment, from the spec. Pure, no process."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from penstock.spec.model import Model


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """What a replica gets of this machine."""

    devices: tuple[int, ...] = ()
    """Numbers of its accelerators; none on a CPU."""
    threads: int | None = None
    """CPU threads that compute; None leaves it to the engine."""
    kv_cache_bytes: int | None = None
    """Size of its KV cache; None leaves it to the engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """What is run."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    """Beside what `up` itself has. The key stands here: command lines can be read by everybody."""
    probe: str
    """Path that answers 200 once requests are taken."""
    alive: str
    """Path that answers 200 while it makes progress."""


def engine_command(
    name: str,
    model: Model,
    *,
    weights: str,
    port: int,
    key: str,
    placement: Placement,
    program: Sequence[str] = (),
) -> Command:
    """The command of one replica.

    Args:
        name: what requests call the model.
        weights: a folder or a Hugging Face id.
        key: the bearer token that the engine shall ask for.
        program: in place of `penstock serve` or `vllm serve`.
    """
    own = list(flags(model, placement))
    listen = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", name]
    environment = {}
    if placement.devices:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, placement.devices))
    if model.engine == "vllm":
        environment["VLLM_API_KEY"] = key
        start = program or ("vllm", "serve")
        return Command(
            arguments=(*start, weights, *listen, *own),
            environment=environment,
            probe="/health",
            alive="/health",
        )
    # no other key that `up` may have opens it
    environment |= {"PENSTOCK_GATEWAY_KEY": key, "PENSTOCK_API_KEY": "", "VLLM_API_KEY": ""}
    start = program or (sys.executable, "-m", "penstock", "serve")
    quiet = ["--disable-uvicorn-access-log"]  # the gateway has its own, and the ledger
    return Command(
        arguments=(*start, weights, *listen, *quiet, *own),
        environment=environment,
        probe="/readyz",
        alive="/livez",
    )


def with_flags(command: Command, more: Mapping[str, Any]) -> Command:
    """The same with these flags at its end, where they win over the same ones before."""
    return replace(
        command, arguments=(*command.arguments, *(part for each in more.items() for part in _flag(*each)))
    )


def flags(model: Model, placement: Placement) -> list[str]:
    """The flags that say what the spec says of a model, those of its `flags` at the end."""
    said: list[str] = []
    cpu = not placement.devices
    if model.max_model_len is not None:
        said += ["--max-model-len", str(model.max_model_len)]
    if model.quantization is not None:
        said += ["--quantization", model.quantization]
    if placement.kv_cache_bytes is not None:
        said += ["--kv-cache-memory-bytes", str(placement.kv_cache_bytes)]
    if model.devices > 1:
        said += ["--tensor-parallel-size", str(model.devices)]
    if model.engine == "penstock":
        said += ["--device", "cpu" if cpu else "cuda"]
        if "scheduling-policy" not in _names(model):  # the same as fcfs until the gateway tells a class
            said += ["--scheduling-policy", "priority"]
        if placement.threads is not None and "threads" not in _names(model):
            said += ["--threads", str(placement.threads)]
    for flag, value in model.flags.items():
        said += _flag(flag, value)
    return said


def _names(model: Model) -> set[str]:
    return {name.replace("_", "-") for name in model.flags}


def _flag(name: str, value: Any) -> list[str]:
    """`max-num-seqs: 64`, `enable-x: false`, lists, JSON for what is nested."""
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, list):
        return [f"--{name}", *map(_text, value)]
    return [f"--{name}={_text(value)}"]


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool | dict | list) else str(value)
