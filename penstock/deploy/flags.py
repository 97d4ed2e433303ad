"""The flags of engines, from a spec and what has been reckoned: flags, never environment variables (T17)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from penstock.fleet import schemes
from penstock.spec.model import Model

from .sizing import Sizing


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag."""

    name: str
    """Without its dashes."""
    values: tuple[str, ...] = ()
    """None for a switch."""

    @property
    def words(self) -> tuple[str, ...]:
        """Of the command line: `--name=value`, `--name a b`, `--name`."""
        if len(self.values) == 1:
            return (f"--{self.name}={self.values[0]}",)
        return (f"--{self.name}", *self.values)


def engine_flags(model: Model, sizing: Sizing, *, threads: int | None, drain: float) -> tuple[Flag, ...]:
    """What the engine is told beside its model, address and name; a spec's own flags win.

    Args:
        threads: that compute, on a CPU; None on GPUs.
        drain: seconds that requests get when it is told to end.
    """
    cpu = threads is not None
    said: dict[str, Flag] = {}

    def say(name: str, value: object) -> None:
        said[name] = Flag(name, (f"{value:g}" if isinstance(value, float) else str(value),))

    say("max-model-len", sizing.max_model_len)
    say("max-num-seqs", sizing.max_num_seqs)
    if sizing.max_num_batched_tokens is not None:
        say("max-num-batched-tokens", sizing.max_num_batched_tokens)
    if sizing.kv_cache_bytes is not None:
        say("kv-cache-memory-bytes", sizing.kv_cache_bytes)
    elif sizing.utilization is not None:
        say("gpu-memory-utilization", sizing.utilization)
    if model.quantization is not None:
        value = schemes.told(model.engine, model.quantization, sizing.facts.native if sizing.facts else None)
        if value is not None:  # else vLLM reads it from the weights
            say("quantization", value)
    if not cpu:
        tensor, pipeline = sizing.ranks
        say("tensor-parallel-size", tensor)
        if pipeline > 1:
            say("pipeline-parallel-size", pipeline)
    if model.engine == "penstock":
        say("device", "cpu" if cpu else "cuda")
        if threads is not None:
            say("threads", threads)  # else all of the node's cores, whatever the pod has of them
        say("log-format", "json")
    said["enable-prefix-caching"] = Flag("enable-prefix-caching")
    say("scheduling-policy", "priority")  # the same as fcfs until the gateway tells a class
    say("shutdown-timeout", f"{drain:g}")
    for name, value in model.flags.items():
        plain = name.replace("_", "-")
        said.pop(plain.removeprefix("no-"), None)
        said[plain] = _flag(plain, value)
    return tuple(said.values())


def _flag(name: str, value: Any) -> Flag:
    """`max-num-seqs: 64`, `enable-x: false`, lists, JSON for what is nested."""
    if isinstance(value, bool):
        return Flag(name if value else f"no-{name}")
    if isinstance(value, list):
        return Flag(name, tuple(map(_text, value)))
    return Flag(name, (_text(value),))


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool | dict | list) else str(value)
