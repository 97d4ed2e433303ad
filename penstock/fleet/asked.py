"""The one reading of a spec's models: what `penstock plan` answers, and `penstock compile` writes down.

    penstock.yaml ─▶ asked ─▶ Question ─┬─ plan     flags on top of it
                                        └─ compile  as it is, for each pool of a model

Two lengths are told apart. What comes as a rule is what time and capacity are reckoned with, and targets are
judged at; the longest request that may come is what --max-model-len holds.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import penstock.assets
from penstock.core.errors import StartupError

from . import catalogue, schemes
from .candidates import CPU_BATCHED, CPU_SEQS, context_of, machine_of, schemes_of
from .decided import Decided, decided
from .facts import ModelFacts
from .hardware import GIB, Device
from .load import Targets, Workload
from .options import profile_named
from .prices import Cloud
from .question import DEFAULT_OUTPUT, DEFAULT_PROMPT, DEFAULT_RATE, Names, Question, scheme_named
from .sizing import BLOCK, UTILIZATION, room

if TYPE_CHECKING:  # a model without a spec is planned without pydantic and YAML
    from penstock.spec.model import Model, Pool, Spec
    from penstock.spec.routes import Route

_CPU_CACHE = 4 * GIB
"""Most of a KV cache in a CPU's memory that is taken without being asked for."""
_CPU_PROCESSES = 1 * GIB
"""Python, torch and the API process; measured at 0.7 GiB, rounded up."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of a model's requests."""

    prompt: int
    """As a rule."""
    output: int
    """As a rule; 0 of an embedding."""
    longest: int
    """Prompt and answer of the longest that may come."""
    assumed: Mapping[str, str]
    """What of it nobody said, in words."""


def of_spec(spec: Spec, name: str, pool_name: str | None = None, *, what_if: bool = False) -> Question:
    """What a spec asks for one of its models, on its pool or the one of its burst.

    Args:
        what_if: another device, engine or scheme is asked about: what the spec's own cannot do is no error.

    Raises StartupError, naming the field, for hardware, slices, schemes and lengths that there are not.
    """
    model = spec.models[name]
    pool_name = pool_name or model.pool
    pool, names = spec.pools[pool_name], names_of(name, pool_name)
    facts = facts_of(model.weights)
    device = pool_device(pool_name, pool)
    if not what_if:
        check_quantization(name, model, facts, device)
    said = decided(spec, name, model)
    tokens = lengths(spec, name, model, facts, said)
    load = model.load
    rate = DEFAULT_RATE if load is None or load.rate is None else load.rate
    peak = 2 * rate if load is None or load.peak is None else load.peak
    assumed = dict(tokens.assumed)
    if load is None or load.rate is None:
        assumed["rate"] = f"assumed: {rate:g} requests a second ({names['rate']})"
    if load is None or load.peak is None:
        assumed["peak"] = f"assumed: {peak:g} requests a second at the peak ({names['peak']})"
    slo = {} if model.slo is None else {key: getattr(model.slo, key) for key in Targets.__slots__}
    if not any(value is not None for value in slo.values()):
        assumed["targets"] = f"no targets (models.{name}.slo): replicas are used to 85 % at most"
    scheme = scheme_named(said.quantization, names["quantization"]) if said.quantization else None
    question = Question(
        name=name,
        facts=facts,
        workload=Workload(rate=rate, prompt=tokens.prompt, output=tokens.output, peak=peak),
        targets=Targets(**slo),
        devices=(device,),
        tp=said.tp,
        scheme=scheme,
        kv_fp8=said.kv_fp8,
        mig=pool.mig,
        engine=model.engine,
        max_model_len=said.max_model_len,
        longest=tokens.longest,
        utilization=said.utilization or UTILIZATION,
        decided=said,
        price_per_hour=pool.price_per_hour,
        count=pool.count,
        cloud=_cloud(spec),
        assumed=assumed,
        names=names,
        float32=said.float32,
    )
    return question if device.vendor != "cpu" else _with_cache(question)


def check_quantization(name: str, model: Model, facts: ModelFacts | None, device: Device) -> None:
    """Raises StartupError if the engine cannot have these weights in the scheme that a spec names
    (fleet/schemes.py)."""
    said, where = model.quantization, f"models.{name}.quantization"
    if said is None or (model.image is not None and said.lower() in schemes.VLLM_PLUGINS):
        return  # somebody's own image may have the plugin
    native = None if facts is None else facts.native
    if (why := schemes.unserved(model.engine, said, native, device)) is not None:
        raise StartupError(
            f"{where}: {said} over {model.weights}: {why}.",
            param=where,
            advice="Name such weights, or leave quantization out and take a device with room for them as "
            "they are; fp8 is what vLLM makes of 16-bit weights at load.",
        )


def names_of(name: str, pool_name: str) -> Names:
    """What is changed where, in a spec."""
    model, pool = f"models.{name}", f"pools.{pool_name}"
    fields = {
        "gpu": f"{pool}.hardware",
        "price": f"{pool}.price_per_hour",
        "mig": f"{pool}.mig",
        "memory": f"{model}.memory",
        "tp": f"{model}.devices",
        "nodes": f"{model}.nodes",
        "engine": f"{model}.engine",
        "weights": f"{model}.weights",
        "quantization": f"{model}.quantization",
        "max_model_len": f"{model}.max_model_len",
        **{key: f"{model}.load.{key}" for key in ("rate", "peak", "prompt", "output")},
        **{key: f"{model}.slo.{key}" for key in Targets.__slots__},
    }
    return Names(fields)


def whole(question: Question) -> Question:
    """With the slice that it is to run in as its device, at what the slice costs. Raises StartupError."""
    if question.mig is None:
        return question
    device = question.devices[0]
    profile = profile_named(device, question.mig, question.names["mig"])
    price = question.price_per_hour
    if price is None or question.decided.mig is None:  # else the spec's is of a slice already
        all_of_it = price if price is not None else device.price.per_hour if device.price else None
        price = None if all_of_it is None else all_of_it * profile.compute // 7
    return replace(question, devices=(device.sliced(profile),), tp=1, price_per_hour=price)


def facts_of(weights: str) -> ModelFacts:
    """Facts of a folder, of a model that the hub's cache has, or of the catalogue; `demo` is the bundled one.
    Nothing is downloaded. Raises StartupError, or ModelLoadError for a folder that cannot be read."""
    if weights == "demo":
        return catalogue.find_model(str(resources.files(penstock.assets).joinpath("demo")))
    current = Path(weights, "current")  # of a model in a store (`penstock models`)
    if (current / "config.json").is_file() and not Path(weights, "config.json").exists():
        return catalogue.find_model(str(current.resolve()))
    if not Path(weights).is_dir() and (cached := _cached(weights)) is not None:
        return catalogue.find_model(str(cached))
    if weights.startswith("/") and not Path(weights).is_dir():  # of a volume that is not here
        with contextlib.suppress(StartupError):
            return catalogue.find_model(weights.rstrip("/").rpartition("/")[2] or weights)
    return catalogue.find_model(weights)


def _cached(name: str) -> Path | None:
    """The newest snapshot of a model in the hub's cache."""
    if name.count("/") != 1 or ".." in name or name.startswith(("/", ".")):
        return None
    home = os.environ.get("HF_HUB_CACHE")
    folder = (
        Path(home) if home else Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "hub"
    )
    snapshots = folder / f"models--{name.replace('/', '--')}" / "snapshots"
    with contextlib.suppress(OSError):
        found = [each for each in snapshots.iterdir() if (each / "config.json").is_file()]
        return max(found, key=lambda each: each.stat().st_mtime, default=None)
    return None


def lengths(spec: Spec, name: str, model: Model, facts: ModelFacts, said: Decided) -> Lengths:
    """How long requests are: as `load` says; what it does not say follows from the routes to the model. What
    nobody said is no longer than what fits. Raises StartupError where what is said does not fit."""
    routes = list(_routes(spec, name))
    load, where, assumed = model.load, f"models.{name}", {}
    most = said.max_model_len or facts.context_length
    ceilings = [route.max_tokens.ceiling for route in routes]
    contexts = [route.context for route in routes]
    bound = min(most, max((each or most for each in contexts), default=most))
    prompt, output = (None, None) if load is None else (load.prompt, load.output)
    if facts.kind == "embedding":
        if output is not None:
            raise StartupError(
                f"{where}.load.output: {output}, and {facts.name} makes vectors, no answers.",
                param=f"{where}.load.output",
                advice="Leave it out.",
            )
        output = 0
    capped = [each for each in ceilings if each is not None]
    usual, why = DEFAULT_OUTPUT, f"{where}.load.output"
    defaults = {key: route.max_tokens.default for key, route in spec.routes.items() if route in routes}
    if given := {key: value for key, value in defaults.items() if value is not None}:
        which = max(given, key=lambda key: given[key])
        usual, why = given[which], f"routes.{which}.max_tokens.default; {why}"
    elif capped and len(capped) == len(routes):
        usual = min(usual, max(capped))
    if output is None:
        output = max(1, min(usual, bound // 2 if prompt is None else bound - prompt))
        assumed["output"] = f"assumed: {output} output tokens ({why})"
    if prompt is None:
        prompt = max(1, min(DEFAULT_PROMPT, bound - output))
        assumed["prompt"] = f"assumed: {prompt} prompt tokens ({where}.load.prompt)"
    if prompt + output > most:
        raise StartupError(
            f"{where}.load: a prompt of {prompt:,} and an answer of {output:,} tokens are "
            f"{prompt + output:,}, and "
            + (f"max_model_len is {most:,}." if said.max_model_len else f"{facts.name} takes {most:,}."),
            param=f"{where}.load",
            advice="Write fewer, or a longer max_model_len.",
        )
    answer = max([output or DEFAULT_OUTPUT, *capped])  # texts to embed vary by as much
    longest = max([prompt + answer, *(each or 0 for each in contexts)])
    return Lengths(prompt, output, min(longest, most), assumed)


def _routes(spec: Spec, name: str) -> Iterator[Route]:
    """Those that lead to a model of ours."""
    for route in spec.routes.values():
        if any(each.upstream is None and each.model == name for each in (*route.targets, *route.fallback)):
            yield route


def pool_device(pool_name: str, pool: Pool) -> Device:
    """A pool's, whole. Raises StartupError for hardware that the catalogue has not."""
    where = f"pools.{pool_name}.hardware"
    try:
        return catalogue.find_device(pool.hardware)
    except StartupError as error:
        raise StartupError(f"{where}: {error.message}", param=where, advice=error.advice) from None


def _with_cache(question: Question) -> Question:
    """On a CPU, memory is what a pod asks for: the size of its cache is decided, and the rest follows."""
    device, decided, names = question.devices[0], question.decided, question.names
    machine = machine_of(question, device, 1, next(schemes_of(question)))
    length, seqs = context_of(question), decided.max_num_seqs or CPU_SEQS
    each = question.facts.sequence_bytes(math.ceil(length / BLOCK) * BLOCK, machine.kv_width, 1)
    cache, assumed = decided.kv_cache, dict(question.assumed)
    if cache is None:
        cache = max(each, min(_CPU_CACHE, each * CPU_SEQS))
        assumed["memory"] = f"assumed: a KV cache of {cache / 1e9:.1f} GB ({names['memory']})"
    elif cache < each:
        raise StartupError(
            f"{names['memory']}: {cache:,} bytes of KV cache do not hold one request of {length:,} "
            f"tokens, which takes {each:,}.",
            param=names["memory"],
            advice=f"Write memory: {math.ceil(each / 2**20)}MiB or more, or a smaller max_model_len.",
        )
    space = room(
        machine,
        utilization=1.0,
        max_num_batched_tokens=decided.max_num_batched_tokens or CPU_BATCHED,
        max_num_seqs=seqs,
        max_model_len=length,
        engine=question.engine or "penstock",
    )
    quarter = GIB // 4
    memory = quarter * math.ceil((space.weights + space.step + cache + _CPU_PROCESSES) / quarter)
    return replace(
        question,
        devices=(replace(device, memory=memory),),
        utilization=1.0,
        decided=replace(decided, kv_cache=cache),
        assumed=assumed,
    )


def _cloud(spec: Spec) -> Cloud | None:
    """What a cloud takes: the first priced upstream that is not in the house."""
    for upstream in spec.upstreams.values():
        for name, model in upstream.models.items():
            if model.price is not None and not upstream.in_house:
                price = model.price
                return Cloud(
                    price.input * 1_000_000 // price.per,
                    price.output * 1_000_000 // price.per,
                    name=name,
                    as_of=price.as_of.isoformat(),
                    source=price.source,
                )
    return None


def tp_sizes(facts: ModelFacts, sizes: Sequence[int], parts: int = 1) -> str:
    """Numbers of devices that divide a model, for advice: `1 or 2 or 4`."""
    return " or ".join(str(size * parts) for size in sizes if facts.tp_problem(size) is None)
