"""config.json, read once into one normalised, frozen ModelConfig.

Knows the spellings of transformers 4 and 5 and each architecture's defaults. Imports no torch: the API
process reads it too. Everything that Penstock cannot serve faithfully is refused here, by file and key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from penstock.core.errors import ModelLoadError
from penstock.files import read_json, shown

from . import encoders
from .decoders import DECODERS
from .model_config import DTYPES, Head, ModelConfig
from .reader import Reader
from .stored_fp8 import stored_fp8

#: Families of encoders → whether positions begin behind the padding token's id.
_ENCODERS: Mapping[str, bool] = {"Bert": False, "Roberta": True, "XLMRoberta": True}
#: Endings of names → what stands on the last layer.
_HEADS: Mapping[str, Head] = {
    "ForCausalLM": "generate",
    "ForMaskedLM": "embed",
    "Model": "embed",
    "ForSequenceClassification": "classify",
    "ForTokenClassification": "token_classify",
}


def _known(name: object) -> tuple[str, Head] | None:
    """(family, head) of an architecture that can be served."""
    if not isinstance(name, str):
        return None
    for ending, head in _HEADS.items():
        family = name.removesuffix(ending)
        if family == name:
            continue
        if family in _ENCODERS:
            return (family, head) if head != "generate" else None
        if f"{family}ForCausalLM" in DECODERS and ending not in ("ForMaskedLM", "ForTokenClassification"):
            return family, head
    return None


def supported_architectures() -> tuple[str, ...]:
    """Values of config.json's `architectures` that generate text here."""
    return tuple(DECODERS)


def pooling_architectures() -> tuple[str, ...]:
    """Those that embed or classify only; what generates embeds, too (`--convert embed`)."""
    families = [*_ENCODERS, *(name.removesuffix("ForCausalLM") for name in DECODERS)]
    names = [family + ending for family in families for ending in _HEADS if ending != "ForCausalLM"]
    return tuple(name for name in names if _known(name))


def model_class(architecture: str) -> tuple[str, str]:
    """Module and class name behind a supported architecture."""
    known = _known(architecture)
    if known is None:
        raise KeyError(architecture)
    family, _ = known
    if family in _ENCODERS:
        return "penstock.model.bert", "Encoder"
    module, cls, _ = DECODERS[f"{family}ForCausalLM"]
    return module, cls


def load_config(directory: Path, overrides: Mapping[str, Any] | None = None) -> ModelConfig:
    """The normalised config.json of a model directory.

    overrides: values in place of those in the file (--hf-overrides).

    Raises ModelLoadError, naming file and key, for a missing or malformed file, an architecture or rope type
    that is not supported, and checkpoints that are quantised otherwise than to fp8.
    """
    path = directory / "config.json"
    raw = {**read_json(path), **(overrides or {})}
    names = raw.get("architectures")
    advice = f"Supported architectures: {_summary()}."
    if not isinstance(names, list) or not names:
        raise ModelLoadError(f"{shown(path)}: 'architectures' is missing.", advice=advice)
    known = next((name for name in names if _known(name)), None)
    if known is None:
        text = ", ".join(map(shown, names[:3]))
        raise ModelLoadError(f"{shown(path)}: architecture {text} is not supported.", advice=advice)
    fp8 = None
    if (given := raw.get("quantization_config")) is not None:
        try:
            fp8 = stored_fp8(given)
        except ValueError as error:
            raise ModelLoadError(
                f"{shown(path)}: quantization_config: {error}.",
                advice=f"Use the original checkpoint, in one of {', '.join(DTYPES)}.",
            ) from None
    family, head = _known(known) or ("", "generate")
    reader = Reader(path, raw, known)
    if family in _ENCODERS:
        made = encoders.roberta(reader) if _ENCODERS[family] else encoders.bert(reader)
    else:
        made = DECODERS[f"{family}ForCausalLM"][2](reader)
    return replace(made, head=head, fp8=fp8)


def _summary() -> str:
    encoders = f"{', '.join(f'{family}Model' for family in _ENCODERS)} with their heads"
    return f"{', '.join(DECODERS)}, and of these families …Model and …ForSequenceClassification; {encoders}"
