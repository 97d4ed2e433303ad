"""What a plan is asked for: one model, a workload, and what is decided already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from penstock.core.errors import StartupError

from .facts import ALIASES, SCHEMES, ModelFacts, Scheme
from .hardware import Device
from .load import Targets, Workload
from .prices import Cloud
from .sizing import UTILIZATION

Engine = Literal["penstock", "vllm"]

DEFAULT_PROMPT, DEFAULT_OUTPUT, DEFAULT_RATE, DEFAULT_TTFT = 1000, 200, 1.0, 1.0
"""Of a bare `penstock plan MODEL`; the plan says that they are assumed."""

PENSTOCK_CAPABILITY = 7.5
"""CUDA compute capability that our engine's PyTorch has kernels for."""
VLLM_CAPABILITY = 7.0
"""vLLM's (its installation page, and the documents)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One model's."""

    name: str
    facts: ModelFacts
    workload: Workload
    targets: Targets
    devices: Sequence[Device]
    """To choose from; one where it is decided."""
    tp: int | None = None
    scheme: Scheme | None = None
    """None is as published, and what is smaller where that does not fit is only told of."""
    kv_fp8: bool = False
    mig: str | None = None
    """A profile, where the model is to run in one."""
    engine: Engine | None = None
    """None is ours where it can, else vLLM."""
    max_model_len: int | None = None
    utilization: float = UTILIZATION
    price_per_hour: int | None = None
    """Nanodollars of a device; the catalogue's if not given."""
    cloud: Cloud | None = None
    assumed: tuple[str, ...] = ()
    """What nobody said, in words."""
    count: int | None = None
    """Devices that there are."""
    float32: bool = False
    """Whether weights and cache have 32 bits, as with --dtype float32."""


def scheme_named(name: str) -> Scheme:
    """By name or alias. Raises StartupError that lists them."""
    plain = ALIASES.get(name.lower(), name.lower())
    if plain not in SCHEMES:
        raise StartupError(
            f"Quantization {name!r} is not known to the planner.",
            param="--quantization",
            advice=f"It knows {', '.join([*SCHEMES, *ALIASES])}.",
        )
    return SCHEMES[plain]


PENSTOCK_ARCHITECTURES = frozenset(
    "FalconForCausalLM GPTNeoXForCausalLM LlamaForCausalLM MistralForCausalLM PhiForCausalLM "
    "Qwen2ForCausalLM "
    "Qwen3ForCausalLM".split()
)
"""Those that our engine serves; a test compares them with model/config.py."""


def why_not_penstock(facts: ModelFacts, device: Device, tp: int, scheme: Scheme) -> str | None:
    """Why our engine cannot do it; None if it can."""
    if facts.architecture not in PENSTOCK_ARCHITECTURES:
        return f"it does not serve {facts.architecture}"
    if device.vendor not in ("nvidia", "cpu"):
        return f"it has no kernels for {device.name}"
    if device.vendor == "nvidia" and device.capability < PENSTOCK_CAPABILITY:
        return (
            f"its kernels need compute capability {PENSTOCK_CAPABILITY}, {device.name} has "
            f"{device.capability}"
        )
    if tp > 1:
        return "it runs on one device"
    if scheme.name not in ("none", "int8", "awq"):
        return f"it has no {scheme.name}"
    if scheme.name == "awq" and device.vendor != "cpu":
        return "it quantises to 4 bits on a CPU only"
    return None


def why_not_vllm(facts: ModelFacts, device: Device, tp: int, scheme: Scheme) -> str | None:
    """Why vLLM cannot do it; None if it can."""
    if device.vendor == "nvidia" and device.capability < VLLM_CAPABILITY:
        return f"its kernels need compute capability {VLLM_CAPABILITY}, {device.name} has {device.capability}"
    if device.vendor == "nvidia" and device.capability < scheme.minimum_capability:
        return (
            f"{scheme.name} needs compute capability {scheme.minimum_capability}, {device.name} has "
            f"{device.capability}"
        )
    return None


def engine_for(question: Question, device: Device, tp: int, scheme: Scheme) -> tuple[Engine | None, str]:
    """Which engine serves it, and why it is not the other; None with the reason where neither does."""
    facts = question.facts
    ours, theirs = (
        why_not_penstock(facts, device, tp, scheme),
        why_not_vllm(facts, device, tp, scheme),
    )
    if question.engine == "penstock" or (question.engine is None and ours is None):
        return ("penstock", "") if ours is None else (None, f"engine: penstock cannot: {ours}")
    if theirs is None:
        note = f"engine: vllm, since of ours {ours}" if ours and question.engine is None else ""
        return "vllm", note
    return None, f"engine: vllm cannot: {theirs}" + (f"; ours neither: {ours}" if ours else "")
