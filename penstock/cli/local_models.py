"""What `penstock up` will start on this machine, decided and checked before anything starts.

    Spec ─▶ flags of each engine (parsed as `penstock serve` does) ─▶ devices ─▶ memory of all together
         ─▶ a command for each replica, and the tables that say so

It knows engines' configurations, which the gateway must not; it starts nothing.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from penstock.core.errors import ModelLoadError, StartupError
from penstock.engine.config import EngineConfig
from penstock.engine.machine import memory, usable_cores
from penstock.engine.preview import preview
from penstock.gateway.local.command import Command, Placement, engine_command, flags
from penstock.gateway.local.devices import Device, accelerators, assign
from penstock.gateway.local.fleet import Part
from penstock.model.checkpoint import find_safetensors
from penstock.model.hub import is_local, resolve_model
from penstock.model.together import Need, share
from penstock.server.config import ServerConfig
from penstock.spec.model import Model, Pool, Spec

from .flags import Parser, make_config

_VLLM_PROCESS = 2 << 30
"""Bytes of vLLM's processes on a CPU, beside weights and cache; an estimate."""


@dataclass(frozen=True, slots=True)
class LocalPlan:
    """What will be started."""

    parts: Mapping[str, Part]
    tables: Sequence[str]
    """For people."""


def plan(spec: Spec, key: str, environment: Mapping[str, str] = os.environ) -> LocalPlan:
    """Decide everything. `key`: the bearer token of the engines. Downloads models that are not here.

    Raises StartupError, saying which model: a flag that is wrong, a file that is missing, an engine that is
    not installed, devices that are not there, memory that is not enough.
    """
    configs = {name: _checked(name, model, spec.pools[model.pool]) for name, model in spec.models.items()}
    programs = {"vllm": (_vllm(spec, environment), "serve")} if _uses(spec, "vllm") else {}
    devices = _devices(spec, environment)
    caches, tables = _memory(spec, configs, devices)
    threads = _threads(spec)
    parts = {}
    for name, model in spec.models.items():
        commands = []
        for index in range(model.replicas):
            numbers = tuple(device.number for device in devices.get((name, index), ()))
            commands.append(
                partial(
                    _command,
                    name,
                    model,
                    key,
                    Placement(
                        devices=numbers,
                        threads=None if numbers else threads,
                        kv_cache_bytes=caches.get(name) or None,  # encoders have none
                    ),
                    programs.get(model.engine, ()),
                )
            )
        parts[name] = Part(model=model, hardware=spec.pools[model.pool].hardware, commands=commands)
    return LocalPlan(parts, tables)


def _command(
    name: str, model: Model, key: str, placement: Placement, program: Sequence[str], port: int
) -> Command:
    weights = _weights(model)
    return engine_command(
        name, model, weights=weights, port=port, key=key, placement=placement, program=program
    )


def _weights(model: Model) -> str:
    """As an engine takes it: vLLM does not know the bundled model by its name."""
    if model.engine == "vllm" and is_local(model.weights):
        return str(resolve_model(model.weights))
    return model.weights


def _uses(spec: Spec, engine: str) -> bool:
    return any(model.engine == engine for model in spec.models.values())


def _vllm(spec: Spec, environment: Mapping[str, str]) -> str:
    if (found := shutil.which("vllm", path=environment.get("PATH"))) is not None:
        return found
    name = next(name for name, model in spec.models.items() if model.engine == "vllm")
    raise StartupError(
        f"models.{name}: engine: vllm needs the command vllm, which is not on PATH.",
        advice="Install vLLM, best in an environment of its own, and put its folder of commands on PATH; "
        "or use engine: penstock.",
    )


def _checked(name: str, model: Model, pool: Pool) -> EngineConfig | None:
    """The configuration of a Penstock engine, with all of its flags understood; None for another engine."""
    if model.engine != "penstock":
        return None
    from .serve import add_arguments, check_files, need_engine

    need_engine()
    cpu = pool.hardware == "cpu"
    placement = Placement(devices=() if cpu else (0,))
    parser = Parser(prog=f"penstock up: models.{name}")
    add_arguments(parser)
    args = parser.parse_args([model.weights, *flags(model, placement)])
    try:
        config: EngineConfig = make_config(EngineConfig, args)
        check_files(config, make_config(ServerConfig, args))
    except StartupError as error:
        raise _named(name, error) from None
    if cpu and config.gpu_memory_utilization is not None:
        raise StartupError(
            f"models.{name}.flags: gpu-memory-utilization: on a CPU, all models share what is free.",
            advice="Write memory: to give this one's KV cache a size of its own.",
        )
    return replace(config, kv_cache_memory_bytes=model.memory)


def _named(name: str, error: StartupError) -> StartupError:
    return StartupError(f"models.{name}: {error.message}", param=error.param, advice=error.advice)


def _devices(spec: Spec, environment: Mapping[str, str]) -> dict[tuple[str, int], Sequence[Device]]:
    """(model, replica) → its accelerators; nothing for those on a CPU."""
    used = {model.pool for model in spec.models.values()}
    wanted = [
        (name, pool.count) for name, pool in spec.pools.items() if name in used and pool.hardware != "cpu"
    ]
    if not wanted:
        return {}
    rest = assign(wanted, accelerators(environment))
    given: dict[tuple[str, int], Sequence[Device]] = {}
    for name, model in spec.models.items():
        for index in range(model.replicas):
            if model.pool in rest:
                mine, rest[model.pool] = rest[model.pool][: model.devices], rest[model.pool][model.devices :]
                given[name, index] = mine
    return given


def warnings(spec: Spec) -> list[str]:
    """What works, and may not be what is meant."""
    said = []
    for name, pool in spec.pools.items():
        engines = sum(model.replicas for model in spec.models.values() if model.pool == name)
        if pool.hardware == "cpu" and engines > pool.count:
            said.append(
                f"pools.{name}: {engines} engines share {pool.count} device(s), and each counts its time as "
                f"a whole one: device-seconds may add up to more than the clock. With count: {engines}, and "
                "the price of one such share, they do not."
            )
    return said


def _threads(spec: Spec) -> int | None:
    """CPU threads of each engine: several would wait for one another on the same cores."""
    engines = sum(
        model.replicas for model in spec.models.values() if spec.pools[model.pool].hardware == "cpu"
    )
    return max(1, usable_cores() // engines) if engines > 1 else None


def _memory(
    spec: Spec,
    configs: Mapping[str, EngineConfig | None],
    devices: Mapping[tuple[str, int], Sequence[Device]],
) -> tuple[dict[str, int], list[str]]:
    """Sizes of KV caches, and the tables. An accelerator belongs to one replica, which shares it with nobody;
    the machine's memory belongs to all that run on its CPU."""
    caches = {name: model.memory for name, model in spec.models.items() if model.memory is not None}
    tables = []
    needs = []
    for name, model in spec.models.items():
        config = configs[name]
        given = devices.get((name, 0), ())
        try:
            if not given:
                needs.append(_need(name, model, config))
            elif config is not None:
                free = min(each.free for each in given)
                need = preview(config, device="cuda", name=name)
                alone = share(
                    [need], device="cuda", available=free, utilization=config.gpu_memory_utilization
                )
                tables.append(alone.render())
        except StartupError as error:
            raise _named(name, error) from None
    if needs:
        _, available = memory()
        shares = share(needs, device="cpu", available=available)
        tables.append(shares.render())
        caches |= {need.name: cache for need, cache in zip(needs, shares.kv_caches, strict=True)}
    return caches, tables


def _need(name: str, model: Model, config: EngineConfig | None) -> Need:
    """What a model on this machine's CPU takes."""
    if config is not None:
        return preview(config, device="cpu", name=name, replicas=model.replicas)
    like_ours = EngineConfig(
        model=model.weights, max_model_len=model.max_model_len, kv_cache_memory_bytes=model.memory
    )
    try:
        need = preview(like_ours, device="cpu", name=name, replicas=model.replicas)
        return replace(need, process=_VLLM_PROCESS)
    except ModelLoadError as error:
        # an architecture that only vLLM knows: its files say how large it is, and nothing how large its cache
        if model.memory is None or not is_local(model.weights):
            raise StartupError(
                f"how much memory it takes cannot be reckoned ({error.message})",
                advice="Write memory: (the size of its KV cache), and let weights be a folder.",
            ) from None
        weights = sum(Path(file).stat().st_size for file in find_safetensors(resolve_model(model.weights))[1])
        return Need(
            name=name,
            replicas=model.replicas,
            process=_VLLM_PROCESS,
            weights=weights,
            activations=0,
            least=model.memory,
            most=model.memory,
            block=1,
            given=model.memory,
        )
