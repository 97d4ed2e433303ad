"""What a spec has decided already, beside the model and its pool: replicas, scaling, flags, slices, nodes.

A plan takes these as they are, and says so; what the load needs beyond them is said, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from penstock.core.errors import StartupError

if TYPE_CHECKING:
    from penstock.spec.model import Model, Pool, Spec

_READ = {
    "max-num-seqs", "max-num-batched-tokens", "gpu-memory-utilization", "max-model-len", "kv-cache-dtype",
    "kv-cache-memory-bytes", "tensor-parallel-size", "pipeline-parallel-size", "quantization", "dtype",
}  # fmt: skip
"""Flags of an engine that change what a plan reckons."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Burst:
    """Where replicas beyond the floor run, where that is another pool."""

    pool: str
    count: int
    """Its devices."""
    price_per_hour: int | None
    """Nanodollars of one."""
    purchase: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """Of one model; nothing, if it comes from flags alone."""

    pool: str = ""
    replicas: int | None = None
    """The floor, at least; None where the spec leaves it to its `load`."""
    most: int | None = None
    """scale.max."""
    fixed: bool = False
    """Whether there are always as many replicas: the spec names them, and no `scale`."""
    burst: Burst | None = None
    nodes: int = 1
    """Of each replica."""
    stages: int = 1
    """Parts that the layers of each replica are divided into (pipeline parallel)."""
    node_devices: int | None = None
    """Of each node; the catalogue's if not given."""
    mig: str | None = None
    """Slices that the pool is cut into; counts and prices are then of slices."""
    time_slicing: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    kv_cache: int | None = None
    """Bytes of each replica's cache."""
    utilization: float | None = None
    max_model_len: int | None = None
    kv_fp8: bool = False
    tp: int | None = None
    quantization: str | None = None
    float32: bool = False
    words: tuple[str, ...] = field(default=())
    """What of it is decided, and where."""


def decided(spec: Spec, name: str, model: Model) -> Decided:
    """What a spec says of a model. Raises StartupError for a flag whose value is none."""
    pool, where = spec.pools[model.pool], f"models.{name}"
    given = {flag.replace("_", "-"): value for flag, value in model.flags.items() if value is not None}
    number = _Numbers(where, given)
    named = "replicas" in model.model_fields_set or model.scale is not None
    cache = given.get("kv-cache-memory-bytes", model.memory)
    tp, stages = _ranks(where, model, number)
    found = Decided(
        pool=model.pool,
        replicas=model.replicas if named or model.load is None or model.load.rate is None else None,
        most=None if model.scale is None else model.scale.max,
        fixed=model.scale is None,
        burst=_burst(spec, model),
        nodes=model.nodes,
        stages=stages,
        node_devices=pool.nodes.devices,
        mig=pool.mig,
        time_slicing=pool.time_slicing,
        max_num_seqs=number.whole("max-num-seqs"),
        max_num_batched_tokens=number.whole("max-num-batched-tokens"),
        kv_cache=None if cache is None else number.bytes("kv-cache-memory-bytes", cache),
        utilization=number.share("gpu-memory-utilization"),
        max_model_len=number.whole("max-model-len") or model.max_model_len,
        kv_fp8=str(given.get("kv-cache-dtype", "auto")).startswith("fp8"),
        tp=tp,
        quantization=given.get("quantization") or model.quantization,
        float32=given.get("dtype") in ("float32", "float"),
    )
    return replace(found, words=tuple(_words(found, model, where, given, pool)))


def _ranks(where: str, model: Model, number: _Numbers) -> tuple[int, int]:
    """(tensor parallel, pipeline parallel) of a replica. Between nodes layers are divided, if no flag says
    otherwise."""
    tp, stages = number.whole("tensor-parallel-size"), number.whole("pipeline-parallel-size")
    if tp is None:
        tp = model.devices // (stages or model.nodes)
    if stages is None:
        stages = model.devices // tp
    if tp * stages != model.devices:
        raise StartupError(
            f"{where}.devices: {model.devices}, and the flags tensor-parallel-size {tp} and "
            f"pipeline-parallel-size {stages} take {tp * stages}.",
            param=f"{where}.devices",
            advice=f"Write devices: {tp * stages}, or leave the flags out: they follow devices and nodes.",
        )
    return tp, stages


def _burst(spec: Spec, model: Model) -> Burst | None:
    if model.scale is None or model.scale.burst in (None, model.pool):
        return None
    pool = spec.pools[str(model.scale.burst)]
    return Burst(
        pool=str(model.scale.burst),
        count=pool.count,
        price_per_hour=pool.price_per_hour,
        purchase=pool.purchase,
    )


def _words(found: Decided, model: Model, where: str, given: dict[str, Any], pool: Pool) -> Iterator[str]:
    if found.replicas is not None:
        text = f"{found.replicas} replicas" if found.replicas != 1 else "1 replica"
        if found.most is not None:
            burst = f" on {found.burst.pool}" if found.burst else ""
            text += f", up to {found.most}{burst} under load"
        yield f"decided: {text} ({where}.replicas{', .scale' if found.most is not None else ''})"
    if model.devices > 1:
        nodes = f" on {found.nodes} nodes" if found.nodes > 1 else ""
        fields = f"{where}.devices, .nodes" if found.nodes > 1 else f"{where}.devices"
        parts = f", the layers in {found.stages} parts" if found.stages > 1 else ""
        yield f"decided: {model.devices} devices to a replica{nodes}{parts} ({fields})"
    if found.mig is not None:
        yield f"decided: slices of {found.mig} (pools.{found.pool}.mig); counts and prices are of slices"
    if found.time_slicing is not None:
        yield (
            f"decided: {found.time_slicing} pods take turns on a device (pools.{found.pool}.time_slicing), "
            "for development only: these figures are of a pod that has the device to itself"
        )
    read = sorted(flag for flag in given if flag in _READ)
    if read:
        flags = ", ".join(f"{flag} {given[flag]}" for flag in read)
        yield f"decided: {flags} ({where}.flags)"
    others = sorted(flag for flag in given if flag not in _READ)
    if others:
        yield f"not in these figures: {', '.join(others)} ({where}.flags)"
    if found.kv_cache is not None and "kv-cache-memory-bytes" not in given:
        yield f"decided: a KV cache of {found.kv_cache / 1e9:.1f} GB ({where}.memory)"
    if pool.nodes.devices is not None:
        yield f"decided: {pool.nodes.devices} devices in a node (pools.{found.pool}.nodes.devices)"


class _Numbers:
    """Values of flags, which may be text."""

    def __init__(self, where: str, given: dict[str, Any]) -> None:
        self._where, self._given = where, given

    def whole(self, flag: str) -> int | None:
        """A positive integer."""
        value = self._given.get(flag)
        if value is None:
            return None
        try:
            number = int(value)
        except (TypeError, ValueError):
            number = 0
        if isinstance(value, bool) or number < 1:
            raise self._refuse(flag, value, "must be a positive integer")
        return number

    def share(self, flag: str) -> float | None:
        """Of 0.1 to 1."""
        value = self._given.get(flag)
        if value is None:
            return None
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = 0.0
        if not 0.1 <= number <= 1:
            raise self._refuse(flag, value, "must be from 0.1 to 1")
        return number

    def bytes(self, flag: str, value: Any) -> int:
        """A size."""
        from penstock.spec.units import size

        try:
            return size(str(value))
        except ValueError as error:
            raise self._refuse(flag, value, str(error)) from None

    def _refuse(self, flag: str, value: Any, what: str) -> StartupError:
        where = f"{self._where}.flags.{flag}"
        return StartupError(f"{where} is {value!r}: it {what}.", param=where)
