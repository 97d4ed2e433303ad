"""What fits: the planner's answer for one model of a spec on one of its pools, as its files need it.

The reading of the spec is the planner's (fleet/asked.py); here is refused what cannot be on a cluster, and
reckoned what a pod asks for. Where the planner does not know a model, the spec must say what it would have
reckoned.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from penstock.core.errors import StartupError
from penstock.fleet.asked import check_quantization, facts_of, of_spec, pool_device, tp_sizes, whole
from penstock.fleet.candidates import TP_SIZES, Candidate, consider, context_of, schemes_of
from penstock.fleet.decided import decided
from penstock.fleet.facts import SCHEMES, ModelFacts
from penstock.fleet.hardware import GIB, Device
from penstock.fleet.options import profile_named
from penstock.fleet.plan import PlanError, beyond, longer, plan
from penstock.fleet.question import Question
from penstock.fleet.record import driver
from penstock.fleet.sizing import UTILIZATION
from penstock.spec.model import Model, Pool, Spec

_HOST = 13 * GIB
"""Of a pod with GPUs: CUDA's libraries and pinned buffers. With half of the weights beside it, this is what
the field gives 7B (20 GiB) and 70B (80 GiB) at 16 bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizing:
    """What one replica takes."""

    facts: ModelFacts | None
    """None where the planner does not know the model."""
    weights_bytes: int
    """As stored; 0 for the bundled model, which is in the image."""
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int | None
    utilization: float | None
    """Share of a device's memory; None on a CPU."""
    kv_cache_bytes: int | None
    """Size of the KV cache where it is given in bytes."""
    memory: int
    """Bytes of RAM of a pod."""
    ranks: tuple[int, int]
    """Tensor parallel, and parts of the layers (pipeline parallel)."""
    assumed: tuple[str, ...]
    """What nobody said, in words."""


def device_of(spec: Spec, pool_name: str) -> Device:
    """The device of a pool; a slice where it is cut. Raises StartupError for hardware or slices that there
    are not."""
    pool = spec.pools[pool_name]
    device = pool_device(pool_name, pool)
    if pool.mig is None:
        return device
    return device.sliced(profile_named(device, pool.mig, f"pools.{pool_name}.mig"))


def size(spec: Spec, name: str, model: Model, pool_name: str) -> Sizing:
    """One replica of a model on a pool. Raises StartupError, naming the field, for what cannot be."""
    device = device_of(spec, pool_name)
    pool = spec.pools[pool_name]
    _devices(name, model, pool_name, pool, device)
    facts = _known(model.weights)
    if facts is None:
        check_quantization(name, model, None, device)
        return _unknown(spec, name, model, device)
    _fits_the_model(name, model, facts, device)
    question = whole(of_spec(spec, name, pool_name))
    found = consider(question, question.devices[0], question.tp or 1, next(schemes_of(question)))
    if not found.ok:
        raise _refused(name, pool_name, question, found)
    space, cpu = found.room, device.vendor == "cpu"
    weights = facts.weight_bytes(SCHEMES[facts.native])
    return Sizing(
        facts=facts,
        weights_bytes=0 if model.weights == "demo" else weights,
        max_model_len=space.max_model_len,
        max_num_seqs=found.max_num_seqs,
        max_num_batched_tokens=None if cpu else space.max_num_batched_tokens,
        utilization=None if cpu else space.utilization,
        kv_cache_bytes=question.decided.kv_cache,
        memory=space.limit if cpu else _round(_HOST + weights // 2 // model.nodes, 4 * GIB),
        ranks=(found.tp, found.stages),
        assumed=(*_assumed(name, model, question, device), *_long(name, question, found)),
    )


def replicas(spec: Spec, name: str) -> tuple[int, tuple[str, ...]]:
    """(Replicas of a model's floor, what is to be told of them): as many as its `load` takes, at least those
    that are named. Raises StartupError where `scale.max` or the pool has fewer."""
    model = spec.models[name]
    if model.load is None or model.load.rate is None or _known(model.weights) is None:
        return model.replicas, ()
    question = whole(of_spec(spec, name))
    device, scheme = question.devices[0], next(schemes_of(question))
    found = consider(question, device, question.tp or 1, scheme)
    if not found.ok:  # why is told where it is sized
        return model.replicas, ()
    where, wanted = f"models.{name}", found.replicas
    driven = {"least": "which carries them", "spec": "as it says"}
    because = driver(question, found)
    words = driven.get(because) or f"driven by {because.replace('_', '-')}"
    many = "1 replica" if wanted == 1 else f"{wanted} replicas"
    takes = f"{model.load.rate:g} requests/s take {many} on {device.name}, {words}"
    if model.scale is not None and model.scale.max < wanted:
        raise StartupError(
            f"{where}.scale.max: {model.scale.max}, and {takes}.",
            param=f"{where}.scale.max",
            advice=f"Write max: {wanted} or more, other targets, or a smaller {where}.load.rate.",
        )
    return wanted, (f"{where}: {takes}", *beyond(question, found))


def _known(weights: str) -> ModelFacts | None:
    """What the planner knows of weights; None where it does not."""
    try:
        return facts_of(weights)
    except StartupError:
        return None


def _assumed(name: str, model: Model, question: Question, device: Device) -> Iterator[str]:
    load = question.workload
    if question.max_model_len is None and device.vendor != "cpu":
        yield (
            f"models.{name}: --max-model-len {context_of(question)} holds {question.longest} tokens, the "
            "longest that its routes and load let through; max_model_len: says otherwise"
        )
    if model.slo is not None and {"prompt", "output"} & set(question.assumed):
        yield (
            f"models.{name}: slo is judged at {load.prompt} + {load.output} tokens; models.{name}.load says "
            "otherwise"
        )


def _long(name: str, question: Question, found: Candidate) -> Iterator[str]:
    return (f"models.{name}: {each}" for each in longer(question, found))


def _devices(name: str, model: Model, pool_name: str, pool: Pool, device: Device) -> None:
    """Whether so many devices can be one replica."""
    if pool.mig is not None and model.devices > 1:
        raise StartupError(
            f"models.{name}.devices: {model.devices} slices (mig: {pool.mig}) cannot hold one replica: "
            "slices do not talk to one another.",
            advice="Write devices: 1, with a larger slice or whole devices.",
        )
    if device.vendor == "cpu":
        if model.devices > 1:
            raise StartupError(
                f"models.{name}.devices: {model.devices}, and pools.{pool_name} is a CPU.",
                advice="Write devices: 1.",
            )
        return
    each, most = model.devices // model.nodes, pool.nodes.devices or device.node
    if pool.mig is None and each > most:
        raise StartupError(
            f"models.{name}.devices: {each} devices on each node, and a node with {device.name} has {most}.",
            advice=f"Write nodes: {math.ceil(model.devices / most)}, or pools.{pool_name}.nodes.devices.",
        )
    if model.nodes > 1 and model.engine != "vllm":
        raise StartupError(
            f"models.{name}.nodes: {model.nodes}, and our engine runs on one device.",
            advice="Write engine: vllm.",
        )


def _fits_the_model(name: str, model: Model, facts: ModelFacts, device: Device) -> None:
    """Whether it can be divided so, and has such a context."""
    tp = model.devices // model.nodes
    if (unfit := facts.tp_problem(tp)) is not None:
        sizes = [size for size in TP_SIZES if size <= device.node]
        raise StartupError(
            f"models.{name}.devices: {model.devices}"
            + (f" on {model.nodes} nodes" if model.nodes > 1 else "")
            + f" do not divide {facts.name}: {unfit}.",
            param=f"models.{name}.devices",
            advice=f"Write {tp_sizes(facts, sizes, model.nodes)}.",
        )
    if model.max_model_len is not None and model.max_model_len > facts.context_length:
        raise StartupError(
            f"models.{name}.max_model_len: {model.max_model_len:,} is longer than the context of "
            f"{facts.name}, {facts.context_length:,} tokens.",
            param=f"models.{name}.max_model_len",
            advice=f"Write {facts.context_length} or less.",
        )


def _refused(name: str, pool_name: str, question: Question, found: Candidate) -> StartupError:
    """Why it does not fit, and the nearest that would, in the planner's words."""
    where = f"models.{name} on pools.{pool_name}"
    try:
        plan([question])
    except PlanError as error:
        return StartupError(f"{where}: {error.message}", param=error.param, advice=error.advice)
    return StartupError(f"{where}: {found.problem}.")


def _unknown(spec: Spec, name: str, model: Model, device: Device) -> Sizing:
    """A model that the planner does not know: the spec must say what it would have reckoned."""
    missing = [
        field
        for field, value in (
            (f"models.{name}.max_model_len", model.max_model_len),
            (f"models.{name}.flags: {{max-num-seqs: …}}", model.flags.get("max-num-seqs")),
            ("cluster.storage.size", spec.cluster.storage.size),
            ("cluster.load_time", spec.cluster.load_time),
        )
        if value is None
    ]
    if missing:
        raise StartupError(
            f"models.{name}.weights: {model.weights} is neither in the catalogue nor a folder with its "
            "config.json here, so nothing can be reckoned.",
            advice=f"`penstock plan --models` lists the catalogue; or add {', '.join(missing)}.",
        )
    assert model.max_model_len is not None
    said = decided(spec, name, model)
    return Sizing(
        facts=None,
        weights_bytes=(spec.cluster.storage.size or 0) // 2,  # of two versions
        max_model_len=model.max_model_len,
        max_num_seqs=said.max_num_seqs or 1,
        max_num_batched_tokens=None,
        utilization=None if device.vendor == "cpu" else UTILIZATION,
        kv_cache_bytes=model.memory,
        memory=_round(_HOST + (spec.cluster.storage.size or 0) // 2, 4 * GIB),
        ranks=(said.tp or 1, said.stages),
        assumed=(f"models.{name}: whether it fits its devices is not known; the planner has no facts of it",),
    )


def _round(size: int, step: int) -> int:
    return math.ceil(size / step) * step
