"""What a plan is asked for: one model, a workload, and what is decided already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from penstock.core.errors import StartupError

from . import schemes
from .decided import Decided
from .facts import ALIASES, SCHEMES, ModelFacts, Scheme
from .hardware import Device
from .load import Targets, Workload
from .prices import Cloud
from .roofline import Fit, fitted
from .sizing import UTILIZATION

if TYPE_CHECKING:
    from .measured import Measured

Engine = Literal["penstock", "vllm"]

DEFAULT_PROMPT, DEFAULT_OUTPUT = 1000, 200
"""Tokens of a request of which nobody said anything."""
DEFAULT_RATE, DEFAULT_TTFT = 1.0, 1.0
"""Of a bare `penstock plan MODEL`; the plan says that they are assumed."""

PENSTOCK_CAPABILITY = 7.5
"""CUDA compute capability that our engine's PyTorch has kernels for."""
VLLM_CAPABILITY = 7.0
"""vLLM's (its installation page, and the documents)."""


@dataclass(frozen=True, slots=True)
class Names:
    """What things are called where the user changes them: flags of `penstock plan`, or fields of a spec."""

    of: Mapping[str, str] = field(default_factory=dict)
    """What it is → its field; a flag if it is not here."""

    def __getitem__(self, what: str) -> str:
        return self.of.get(what, f"--{what.replace('_', '-')}")

    def flags(self, *given: str) -> Names:
        """Where these came from flags."""
        return Names({what: name for what, name in self.of.items() if what not in given})

    def setting(self, **values: object) -> str:
        """How it is written: `--gpu H100 --tp 2`, or `models.a.devices: 2, pools.gpu.hardware: H100`."""
        flags = [f"{self[what]} {value}" for what, value in values.items() if what not in self.of]
        fields = [f"{self[what]}: {value}" for what, value in values.items() if what in self.of]
        return ", ".join([*fields, *([" ".join(flags)] if flags else [])])


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
    auto: bool = False
    """Whether the scheme that suits a device is tried beside the published one."""
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
    assumed: Mapping[str, str] = field(default_factory=dict)
    """What nobody said → that it is assumed, in words."""
    longest: int | None = None
    """Tokens of the longest request that may come, for --max-model-len; the workload's if not given."""
    names: Names = field(default_factory=Names)
    """For messages."""
    count: int | None = None
    """Devices that there are."""
    decided: Decided = field(default_factory=Decided)
    """What a spec says beside."""
    float32: bool = False
    """Whether weights and cache have 32 bits, as with --dtype float32."""
    measured: Measured | None = None
    """What was measured on its device; published measurements if not given."""

    @property
    def fit(self) -> Fit:
        """The roofline that its speeds come from."""
        return fitted() if self.measured is None else self.measured.fit

    @property
    def stages(self) -> int:
        """Parts that the layers are divided into, one after the other (pipeline parallel)."""
        return self.decided.stages

    def without(self, *assumed: str) -> Question:
        """Where somebody did say these."""
        return replace(self, assumed={key: text for key, text in self.assumed.items() if key not in assumed})


def scheme_named(name: str, where: str = "--quantization") -> Scheme:
    """By name or alias; `where` it was said. Raises StartupError that lists them."""
    plain = schemes.canonical(name)
    if plain not in SCHEMES:
        raise StartupError(
            f"Quantization {name!r} is not known to the planner ({where}).",
            param=where,
            advice=f"It knows {', '.join([*SCHEMES, *ALIASES])}.",
        )
    return SCHEMES[plain]


PENSTOCK_ARCHITECTURES = frozenset(
    "FalconForCausalLM GPTNeoXForCausalLM LlamaForCausalLM MistralForCausalLM PhiForCausalLM "
    "Qwen2ForCausalLM Qwen3ForCausalLM".split()
)
"""Those that our engine serves; a test compares them with model/config.py."""
PENSTOCK_ENCODERS = frozenset(("BertModel", "XLMRobertaModel"))
"""Those whose tensors are known to the planner."""


def why_not_penstock(facts: ModelFacts, device: Device, tp: int, scheme: Scheme) -> str | None:
    """Why our engine cannot do it; None if it can. `tp`: devices of a replica."""
    if facts.architecture in PENSTOCK_ENCODERS:
        if device.vendor != "cpu":
            return f"its encoders ({facts.architecture}) have not run on GPUs"
    elif facts.architecture not in PENSTOCK_ARCHITECTURES:
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
    return schemes.why_not("penstock", scheme.name, facts.native, device)


def why_not_vllm(facts: ModelFacts, device: Device, tp: int, scheme: Scheme) -> str | None:
    """Why vLLM cannot do it; None if it can."""
    if device.vendor == "nvidia" and device.capability < VLLM_CAPABILITY:
        return f"its kernels need compute capability {VLLM_CAPABILITY}, {device.name} has {device.capability}"
    if device.vendor == "nvidia" and device.capability < scheme.minimum_capability:
        return (
            f"{scheme.name} needs compute capability {scheme.minimum_capability}, {device.name} has "
            f"{device.capability}"
        )
    return schemes.why_not("vllm", scheme.name, facts.native, device)


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
