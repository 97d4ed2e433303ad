"""Well-known rules of thumb against the exact figures: what the source documents say, and what is true.

Each claim has what was said, the value that the same assumptions give, the value without them, and a verdict:

    holds      within a tenth of what was said, or as the words say
    assumes    holds with an assumption that is named, and not without it
    wrong      does not hold
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from . import catalogue
from .facts import SCHEMES
from .hardware import GB, pack
from .roofline import Machine, fitted
from .sizing import room

_HOLDS, _ASSUMES, _WRONG = "holds", "assumes", "wrong"


@dataclass(frozen=True, slots=True)
class Claim:
    """One figure of a document."""

    number: str
    """Of the requirement that has it."""
    what: str
    said: str
    value: float
    """What is true, in the unit of what was said."""
    unit: str
    verdict: str
    why: str

    @property
    def shown(self) -> str:
        """`14.2 GB`."""
        text = f"{self.value:,.0f}" if abs(self.value) >= 100 else f"{self.value:,.3g}"
        return f"{text} {self.unit}".strip()


def weights_gb(model: str, scheme: str = "none", tp: int = 1, width: int = 2) -> float:
    """Decimal GB on one rank."""
    return catalogue.find_model(model).weight_bytes(SCHEMES[scheme], tp=tp, width=width) / GB


def claims() -> tuple[Claim, ...]:
    """All of them."""
    return (*_weights(), *_ranks(), *_slices(), *_contexts(), *_case_study())


def _weights() -> Iterator[Claim]:
    for number, model, said, scheme in (
        ("S8", "qwen2.5-7b", 14.0, "none"),
        ("S8", "llama-2-7b", 14.0, "none"),
        ("S8", "llama-2-70b", 140.0, "none"),
        ("S7", "qwen3-vl-8b", 16.0, "none"),
        ("S7", "qwen3-vl-8b", 8.0, "int8"),
        ("S7", "qwen3-32b", 64.0, "none"),
        ("S7", "qwen3-32b", 32.0, "int8"),
        ("S7", "bge-m3", 2.0, "none"),
        ("S7", "bge-m3", 1.0, "int8"),
    ):
        value = weights_gb(model, scheme)
        near = abs(value - said) <= 0.1 * said
        why = "weights alone; cache and activations come on top" if near else _off(model, scheme)
        yield Claim(
            number,
            f"weights of {catalogue.find_model(model).name.rpartition('/')[2]}, {_format(scheme)}",
            f"about {said:g} GB",
            value,
            "GB",
            _HOLDS if near else _WRONG,
            why,
        )
    yield Claim(
        "S8",
        "weights of Meta-Llama-3-70B, FP16",
        "more than 140 GB",
        weights_gb("llama-3-70b"),
        "GB",
        _HOLDS,
        "by its vocabulary of 128,256; Llama-2-70B has 138",
    )
    for scheme, said, note in (
        ("none", 80.0, "more than an A100-80GB has for an engine, as is said there"),
        ("int8", 40.0, "embeddings, heads and the vision tower stay at 16 bits"),
    ):
        both = weights_gb("qwen3-vl-8b", scheme) + weights_gb("qwen3-32b", scheme)
        yield Claim(
            "S7",
            f"Qwen3-VL-8B and Qwen3-32B together, {_format(scheme)}",
            f"about {said:g} GB" + (", tight" if scheme == "int8" else ""),
            both,
            "GB",
            _HOLDS if abs(both - said) <= 0.1 * said else _WRONG,
            note,
        )
    eight, thirteen = weights_gb("llama-3.1-8b"), weights_gb("llama-2-13b")
    yield Claim(
        "S9",
        "least memory for Llama-3.1-8B, FP16",
        "16 GB",
        eight,
        "GB of weights",
        _WRONG,
        f"the weights alone are {eight - 16:.2f} GB more than 16 GB, and a cache has to go somewhere: 24 "
        "GB, or quantisation",
    )
    yield Claim(
        "S9",
        "least memory for Llama-2-13B, FP16",
        "24-32 GB",
        thirteen,
        "GB of weights",
        _ASSUMES,
        f"32 GB leave {0.92 * 32 - thirteen:.1f} GB at 0.92; 24 GB do with 8 bits "
        f"({weights_gb('llama-2-13b', 'int8'):.1f} GB) or 4 ({weights_gb('llama-2-13b', 'awq'):.1f} GB)",
    )
    seventy = weights_gb("llama-3-70b")
    yield Claim(
        "S9",
        "least memory for a 70B, FP16",
        "2 x 40 GB and more, or 1 x 80 GB",
        seventy,
        "GB of weights",
        _WRONG,
        f"2 x 40 GB hold it at 4 bits ({weights_gb('llama-3-70b', 'awq'):.0f} GB); beside 8 "
        f"({weights_gb('llama-3-70b', 'int8'):.0f} GB) a cache has no room for one request of 2,048 tokens",
    )


def _off(model: str, scheme: str) -> str:
    if model == "bge-m3":
        full = weights_gb(model, "none", width=4)
        return (
            f"the file has 32 bits ({full:.2f} GB); FP16 is half of what was said, and its embedding of "
            "250,002 tokens, which INT8 leaves alone, is most of the rest"
        )
    return "embeddings, heads and vision towers stay at 16 bits" if scheme != "none" else ""


def _ranks() -> Iterator[Claim]:
    for tp, said, device in ((4, 35.0, "A100-40GB"), (8, 17.5, "V100-32GB")):
        value = weights_gb("llama-2-70b", tp=tp)
        yield Claim(
            "S10",
            f"Llama-2-70B FP16 on {tp} ranks",
            f"about {said:g} GB each (fits {device})",
            value,
            "GB",
            _HOLDS,
            "each rank keeps its heads, its part of the MLP and of the vocabulary, and all norms",
        )


def _slices() -> Iterator[Claim]:
    facts = catalogue.find_model("qwen3-32b")
    per_token = facts.kv_bytes_per_token()
    yield Claim(
        "T19",
        "KV cache of a token of Qwen3-32B",
        "262 kB",
        per_token / 1000,
        "kB",
        _HOLDS,
        "2 x 64 layers x 8 heads x 128 x 2 bytes",
    )
    told = (0.90 * 40 * GB - 32 * GB) / per_token
    yield Claim(
        "T19",
        "KV tokens of Qwen3-32B INT8 in a 40 GB slice, as reckoned there",
        "about 15k",
        told,
        "tokens",
        _ASSUMES,
        "40 decimal GB x 0.90 - 32 GB of weights, and nothing for a step or for CUDA",
    )
    device = catalogue.find_device("A100-80GB")
    profile = device.profile("3g.40gb")
    assert profile is not None
    machine = Machine(facts, device.sliced(profile), 1, SCHEMES["int8"], 2, 2, fitted().efficiency)
    truth = room(
        machine,
        utilization=0.92,
        max_num_batched_tokens=512,
        max_num_seqs=32,
        max_model_len=2048,
        engine="vllm",
    )
    yield Claim(
        "T19",
        "the same, with what really takes memory",
        "about 15k",
        truth.tokens,
        "tokens",
        _WRONG,
        f"the slice has {profile.memory / GB:.1f} GB, the weights {truth.weights / GB:.1f} (embedding and "
        f"head at 16 bits), a step up to {truth.step / GB:.1f}, CUDA about {truth.runtime / GB:.1f}; 32 "
        f"requests have {truth.tokens // 32} tokens each",
    )
    three, four = device.profile("3g.40gb"), device.profile("4g.40gb")
    assert three is not None
    assert four is not None
    yield Claim(
        "T18",
        "compute slices of 2 x 3g.40gb",
        "the A100 in two slices of 40 GB",
        2 * three.compute,
        "of 7",
        _WRONG,
        f"one is left over: 4g.40gb and 3g.40gb use {four.compute + three.compute}"
        f"{'' if pack((four, three)) else ' but do not fit'}; and pods ask for {three.resource}, not "
        "nvidia.com/gpu",
    )


def _contexts() -> Iterator[Claim]:
    facts = catalogue.find_model("llama-3-70b")
    device = catalogue.find_device("A100-80GB")
    yield Claim(
        "T20",
        "Llama-3-70B FP16 on one A100-80GB",
        "4 requests at 32k, 16 at 8k",
        facts.weight_bytes(SCHEMES["none"]) / device.memory,
        "times its memory, in weights",
        _WRONG,
        "its weights alone are more than the device has",
    )
    machine = Machine(facts, device, 1, SCHEMES["awq"], 2, 2, fitted().efficiency)
    space = room(machine, max_num_batched_tokens=2048, max_num_seqs=32, max_model_len=8192)
    long, short = space.tokens // 32768, space.tokens // 8192
    yield Claim(
        "S11",
        "Llama-3-70B at 4 bits on one A100-80GB: requests of 8k",
        "4 at 32k become 16 at 8k",
        short,
        "requests",
        _ASSUMES,
        f"{long} of 32k and {short} of 8k, at 4 bits (the model's own context is 8k); and blocks are taken "
        f"as tokens come, so that requests of 1,024 tokens are {space.tokens // 1024} with either setting",
    )
    yield Claim(
        "T20",
        "devices of a g5.48xlarge",
        "4 x A10G",
        8,
        "x A10G",
        _WRONG,
        "AWS lists 8; g5.12xlarge and g5.24xlarge have 4",
    )


def _case_study() -> Iterator[Claim]:
    day, price = 50_000, Fraction(4, 100)
    month = float(day * price * 30)
    yield Claim(
        "T21",
        "50,000 requests a day at $0.04, a month",
        "$180K",
        month,
        "dollars",
        _WRONG,
        "50,000 x 0.04 x 30",
    )
    after = float(day * Fraction(6, 1000) * 30)
    yield Claim(
        "T21",
        "the same at $0.006, and what is saved",
        "$155K saved",
        month - after,
        "dollars saved",
        _WRONG,
        f"${month:,.0f} - ${after:,.0f}; and both run on 8 devices, so that their bill does not change "
        "at all",
    )
    seconds = day / 86_400
    yield Claim(
        "T21",
        "50,000 requests a day",
        "8 users before, 256 after",
        seconds,
        "requests/s on average",
        _ASSUMES,
        f"at 8 s each that is {math.ceil(seconds * 8)} under way: the eight devices were enough for "
        "the average",
    )


def _format(scheme: str) -> str:
    return "FP16" if scheme == "none" else scheme.upper()
