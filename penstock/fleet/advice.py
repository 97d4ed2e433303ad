"""Which engine when: what each is for, and which of them a plan asks for.

Figures are the source documents' (utilisation, throughput and latency in words), not measurements of ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """One engine, as the field describes it."""

    name: str
    throughput: str
    first_token: str
    utilisation: str
    several_devices: str
    choose: str


ENGINES = (
    EngineFacts(
        "Penstock",
        "high on one device",
        "low",
        "-",
        "none",
        "one device or a CPU, exact bills for each request, plans and replays",
    ),
    EngineFacts(
        "vLLM",
        "high",
        "low",
        "95 % and more",
        "tensor, pipeline",
        "most models and devices, several devices to a model, ROCm and TPU",
    ),
    EngineFacts(
        "TensorRT-LLM",
        "highest",
        "lowest",
        "95 % and more",
        "tensor, pipeline",
        "the last of the latency on NVIDIA, where an engine build for each model is acceptable",
    ),
    EngineFacts(
        "TGI", "medium to high", "low", "80-90 %", "tensor", "a house that lives on the Hugging Face hub"
    ),
    EngineFacts("Ollama", "low", "medium", "60-70 %", "none", "one user who wants to chat in a minute"),
    EngineFacts(
        "llama.cpp", "low to medium", "medium", "50-70 %", "partial", "a laptop, Apple silicon, GGUF files"
    ),
    EngineFacts("LocalAI", "of its backends", "of its backends", "-", "of its backends", "one URL over many"),
)


@dataclass(frozen=True, slots=True)
class Advice:
    """The engine, and why."""

    engine: str
    reasons: tuple[str, ...]
    warnings: tuple[str, ...] = ()


def advise(
    *, engine: str | None, note: str, rate: float, tp: int, vendor: str, utilisation: float, parameters: int
) -> Advice:
    """For one plan.

    Args:
        engine: penstock or vllm, as the plan has it.
        note: why it is not ours, where it is not.
        rate: requests a second.
        utilisation: of the planned replicas.
    """
    reasons: list[str] = []
    warnings: list[str] = []
    if engine == "penstock":
        name = "Penstock"
        reasons.append("one device holds it, and its architecture and format are served by our engine")
    elif engine == "vllm":
        name = "vLLM"
        why = note.removeprefix("engine: vllm, since of ours ")
        reasons.append(f"not our engine: {why}" if why else "engine: vllm was asked for")
    else:
        name = "none"
        reasons.append(note)
    if rate * 86_400 <= 10_000 and vendor != "cpu":
        warnings.append(
            f"{rate * 86_400:,.0f} requests a day do not pay for a device: a cloud's tokens, or Ollama or "
            "llama.cpp on what is there, cost less"
        )
    if utilisation < 0.3 and vendor != "cpu":
        warnings.append(
            f"at {utilisation:.0%} of its capacity most of the bill is idle time; a smaller device, a slice, "
            "or batch work beside it would use it"
        )
    if parameters > 30e9:
        warnings.append(
            "check with `penstock eval` whether a smaller model passes: 70B for 8B is 5-10 times the hardware"
        )
    return Advice(name, tuple(reasons), tuple(warnings))


def table() -> Sequence[tuple[str, ...]]:
    """Rows, with a head."""
    head = ("engine", "throughput", "first token", "GPU used", "several devices", "choose it for")
    return (
        head,
        *(
            (
                each.name,
                each.throughput,
                each.first_token,
                each.utilisation,
                each.several_devices,
                each.choose,
            )
            for each in ENGINES
        ),
    )
