"""What a scheme of quantisation is for each engine: the one place that says so.

    scheme ─┬─ penstock: value of its --quantization, and the devices that it has kernels on
            └─ vllm:     value of its --quantization where it quantises at load, or nothing where the weights
                         must come quantised; it then reads the scheme from their config.json

Sizes are in facts.SCHEMES. fleet, deploy and check ask here; a test compares it with engine/build.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .facts import ALIASES, SCHEMES
from .hardware import Device


@dataclass(frozen=True, slots=True)
class Served:
    """A scheme on one engine."""

    flag: str | None
    """What --quantization is told; None: nothing."""
    checkpoint: str = ""
    """What weights it needs, in words, where they must come quantised; empty where it quantises at load."""
    vendors: frozenset[str] | None = None
    """Of devices that it runs on; None is any."""
    capability: float = 0.0
    """CUDA compute capability from which it is computed."""

    def lacks(self, device: Device) -> str | None:
        """Why it does not run on a device, as a sentence's end; None if it does."""
        if self.vendors is not None and device.vendor not in self.vendors:
            return "on NVIDIA's GPUs only"
        if device.vendor == "nvidia" and device.capability < self.capability:
            return f"from compute capability {self.capability} on; {device.name} has {device.capability}"
        return None


FP8_UNITS = 8.9
"""CUDA compute capability from which there are units for FP8 (Ada, Hopper)."""
PENSTOCK: Mapping[str, Served] = {
    "none": Served(None),
    "int8": Served("int8"),
    "awq": Served("int4"),
    "fp8": Served("fp8", vendors=frozenset({"nvidia"}), capability=FP8_UNITS),
}
"""Scheme → how our engine serves it. It quantises 16-bit weights at load, and reads no others
(model/config.py); on which device is kernels/capability.py's to say, and a test compares them."""
PENSTOCK_NAMES = frozenset({"none", "int8", "w8a8", "int4", "fp8"})
"""What our engine's --quantization knows."""
_CPU_NAMES = frozenset({"w8a8"})
"""Those of them that it knows on a CPU only."""
VLLM: Mapping[str, Served] = {
    "none": Served(None),
    "int8": Served(None, "a W8A8 checkpoint (compressed-tensors), as RedHatAI/…-quantized.w8a8"),
    "fp8": Served("fp8"),
    "fp8-block": Served(None, "a checkpoint in FP8 with blocks, as DeepSeek's"),
    "awq": Served(None, "an AWQ checkpoint, as Qwen/…-AWQ"),
    "gptq": Served(None, "a GPTQ checkpoint, as Qwen/…-GPTQ-Int4"),
    "mxfp4": Served(None, "an MXFP4 checkpoint, as openai/gpt-oss-20b"),
    "nvfp4": Served(None, "an NVFP4 checkpoint, as nvidia/…-FP4"),
}
"""Scheme → how vLLM serves it."""
VLLM_NAMES = frozenset(
    # of weights that come quantised
    "awq auto_awq awq_marlin gptq auto_gptq gptq_marlin fp8 fbgemm_fp8 fp_quant modelopt modelopt_fp4 "
    "modelopt_mxfp8 modelopt_mixed compressed-tensors experts_int8 quark moe_wna16 torchao inc humming mxfp4 "
    "gpt_oss_mxfp4 deepseek_v4_fp8 "
    # at load
    "online fp8_per_tensor fp8_per_block fp8_per_channel int8_per_channel_weight_only nvfp4_per_token "
    "mxfp8".split()
)
"""What vLLM's --quantization knows, in these letters: QuantizationMethods of 0.32.0
(model_executor/layers/quantization/__init__.py). Another name ends it, `none` among them."""
VLLM_DEPRECATED = frozenset({"fbgemm_fp8", "fp_quant"})
"""Those that it takes with --allow-deprecated-quantization only."""
VLLM_PLUGINS = {"bitsandbytes": "vllm-bnb-plugin", "gguf": "vllm-gguf-plugin"}
"""What it knows where somebody has put a plugin into its image → which."""
_VLLM_SCHEMES = {
    "awq_marlin": "awq", "auto_awq": "awq", "gptq_marlin": "gptq", "auto_gptq": "gptq",
    "fp8_per_tensor": "fp8", "fp8_per_channel": "fp8", "fp8_per_block": "fp8", "fbgemm_fp8": "fp8",
    "modelopt": "fp8", "modelopt_fp4": "nvfp4", "nvfp4_per_token": "nvfp4", "gpt_oss_mxfp4": "mxfp4",
    "experts_int8": "int8", "int8_per_channel_weight_only": "int8",
}  # fmt: skip
"""vLLM's name → scheme that takes as many bytes."""
_AT_LOAD = frozenset(
    "fp8 fp8_per_tensor fp8_per_channel fp8_per_block nvfp4_per_token mxfp4 mxfp8 online experts_int8 "
    "int8_per_channel_weight_only".split()
)
"""vLLM's names that take weights as they are published."""


def served(engine: str, scheme: str) -> Served | None:
    """How an engine serves a scheme of facts.SCHEMES; None where it does not."""
    return (PENSTOCK if engine == "penstock" else VLLM).get(scheme)


def flag(engine: str, scheme: str) -> str | None:
    """What --quantization of an engine is told; None: nothing."""
    found = served(engine, scheme)
    return None if found is None else found.flag


def canonical(name: str) -> str:
    """The scheme of facts.SCHEMES that takes as many bytes, by any engine's name; else the name itself."""
    plain = name.lower()
    return _VLLM_SCHEMES.get(plain, ALIASES.get(plain, plain))


def told(engine: str, name: str, native: str | None = None) -> str | None:
    """What --quantization of an engine is told for a name of a spec; None: nothing.

    Args:
        native: scheme of the weights as published; None where nobody knows.
    """
    plain = name.lower()
    if engine == "vllm" and plain == "mxfp4" and native == "none":
        return plain  # it quantises to it at load, and reads it from weights that come so
    own = plain in PENSTOCK_NAMES
    if engine == "vllm":
        own = plain in VLLM_PLUGINS or (plain in VLLM_NAMES and plain not in VLLM)
    return plain if own and plain != "none" else flag(engine, canonical(plain))


def unserved(engine: str, name: str, native: str | None, device: Device) -> str | None:
    """Why a name of a spec cannot be given to an engine, as a sentence's end; None if it can.

    Args:
        native: scheme of the weights as published; None where nobody knows.
    """
    plain, scheme = name.lower(), canonical(name)
    found = served(engine, scheme)
    if found is None:
        if engine == "vllm" and plain in VLLM_PLUGINS:
            return f"vllm has it with the plugin {VLLM_PLUGINS[plain]} only, which its own image is without"
        known = engine == "vllm" and plain in VLLM_NAMES
        return None if known else f"{engine} does not have it; it has {', '.join(_offered(engine))}"
    if (lacks := found.lacks(device)) is not None:
        return f"{engine} computes so {lacks}"
    if engine == "penstock" and plain in _CPU_NAMES and device.vendor != "cpu":
        return f"{engine} computes so on a CPU only"
    if native is None:
        return None
    if engine == "penstock" and _restores(native):
        return None
    if engine == "penstock" and native != "none":
        return f"{engine} reads no weights that come quantised, but in fp8, and these do ({native})"
    if native != "none" and scheme.partition("-")[0] != native.partition("-")[0]:
        return f"these weights come in {native}"
    if plain not in _AT_LOAD and (needed := missing(engine, scheme, native)) is not None:
        return f"{engine} does not quantise so at load; it takes {needed}, and these weights are none"
    return None


def _restores(native: str) -> bool:
    """Whether our engine reads weights that come so: as 16 bits, which it may quantise at load."""
    return native.partition("-")[0] == "fp8"


def _offered(engine: str) -> list[str]:
    return sorted(PENSTOCK_NAMES if engine == "penstock" else {*VLLM, *VLLM_NAMES})


def missing(engine: str, scheme: str, native: str) -> str | None:
    """What weights an engine needs for a scheme, in words, where these are not such; None where they do.

    Args:
        native: scheme of the weights as published.
    """
    found = served(engine, scheme)
    if found is None or not found.checkpoint or scheme == native:
        return None
    return found.checkpoint


def why_not(engine: str, scheme: str, native: str, device: Device) -> str | None:
    """Why an engine cannot serve a scheme on a device; None if it can."""
    if engine == "penstock" and _restores(native):
        return f"it restores weights that come in {native} to 16 bits, which is not planned for"
    if engine == "penstock" and native != "none":
        return f"it reads no weights that come quantised ({native})"
    found = served(engine, scheme)
    if found is None:
        return f"it has no {scheme}"
    lacks = found.lacks(device)
    return None if lacks is None else f"it computes {found.flag or scheme} {lacks}"


def suited(device: Device) -> str:
    """The scheme that is tried first on a device: FP8 where it has units for it, else 4 bits, whose weights
    are read in a quarter of the time and multiplied at 16 (the documents' rule); on a CPU our engine's 8."""
    if device.vendor == "cpu":
        return "int8"
    units = "fp8" in device.flops and (device.vendor != "nvidia" or device.capability >= FP8_UNITS)
    return "fp8" if units else "awq"


def bits(name: str) -> float:
    """Bits of a weight by any engine's name of a scheme; 4, the fewest, for one that is not known."""
    found = SCHEMES.get(canonical(name))
    return 4.0 if found is None else found.bits
