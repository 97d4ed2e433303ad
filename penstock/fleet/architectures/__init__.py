"""config.json → ModelFacts, for each architecture: which tensors there are, and what a layer keeps of a
token.

Reading is model/config.py's, with its bounds, so that a folder of somebody else's cannot ask for more than a
model can be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from penstock.core.errors import ModelLoadError
from penstock.files import read_json, shown
from penstock.fleet.facts import ModelFacts
from penstock.model.reader import Reader

from .dense import GEMMA2, GEMMA3, NEOX, PHI, QWEN3, dense, falcon, llama, opt, qwen_window, window
from .experts import deepseek, gpt_oss, mixtral, qwen3_moe
from .tensors import Layer
from .towers import encoder, gemma3, qwen3_vl

ARCHITECTURES: Mapping[str, Callable[[Reader], ModelFacts]] = {
    "BertModel": encoder,
    "DeepseekV3ForCausalLM": deepseek,
    "FalconForCausalLM": falcon,
    "GPTNeoXForCausalLM": dense(NEOX),
    "Gemma2ForCausalLM": dense(GEMMA2),
    "Gemma3ForCausalLM": dense(GEMMA3),
    "Gemma3ForConditionalGeneration": gemma3,
    "GptOssForCausalLM": gpt_oss,
    "LlamaForCausalLM": llama,
    "MistralForCausalLM": dense(Layer(windows=window)),
    "MixtralForCausalLM": mixtral,
    "OPTForCausalLM": opt,
    "Phi3ForCausalLM": dense(Layer(windows=window)),
    "PhiForCausalLM": dense(PHI),
    "Qwen2ForCausalLM": dense(Layer(qkv_bias=True, windows=qwen_window)),
    "Qwen3ForCausalLM": dense(QWEN3),
    "Qwen3MoeForCausalLM": qwen3_moe,
    "Qwen3VLForConditionalGeneration": qwen3_vl,
    "XLMRobertaModel": encoder,
}
"""Value of config.json's `architectures` → what reads the rest of it."""


def read_facts(path: Path, raw: Mapping[str, Any], name: str = "") -> ModelFacts:
    """Facts of one config.json.

    Args:
        path: for errors.
        raw: its contents.
        name: what the model is called; the folder if not given.

    Raises:
        ModelLoadError: names file and key; for an architecture that is not known, too.
    """
    names = raw.get("architectures")
    known = [each for each in names if each in ARCHITECTURES] if isinstance(names, list) else []
    if not known:
        given = ", ".join(map(shown, names[:3])) if isinstance(names, list) and names else "none"
        raise ModelLoadError(
            f"{shown(path)}: architecture {given} is not known to the planner.",
            advice=f"Known architectures: {', '.join(ARCHITECTURES)}.",
        )
    reader = Reader(path, raw)
    facts = ARCHITECTURES[known[0]](reader)
    fields: dict[str, Any] = {"architecture": known[0], "native": _native(reader)}
    if name:
        fields["name"] = name
    return replace(facts, **fields)


_NATIVE = {"fp8": "fp8", "mxfp4": "mxfp4", "awq": "awq", "gptq": "gptq"}


def _native(reader: Reader) -> str:
    """The scheme that a checkpoint is published in."""
    given = reader.raw.get("quantization_config")
    if given is None:
        return "none"
    method = given.get("quant_method") if isinstance(given, dict) else given
    if not isinstance(method, str) or method not in _NATIVE:
        raise reader.refuse(
            "quantization_config",
            f"method {shown(method)} is not known to the planner",
            f"Known: {', '.join(_NATIVE)}; plan the original checkpoint with --quantization.",
        )
    return "fp8-block" if isinstance(given, dict) and given.get("weight_block_size") else _NATIVE[method]


def read_directory(directory: Path) -> ModelFacts:
    """Facts of a model's folder. Raises ModelLoadError as read_facts does, and for a file that is not
    there."""
    return read_facts(directory / "config.json", read_json(directory / "config.json"))
