"""generation_config.json: when a model stops, and how its makers want it sampled. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from penstock.core.errors import InvalidRequest, ModelLoadError
from penstock.core.sampling_params import SamplingParams
from penstock.files import exists, read_json, shown

#: Key of generation_config.json → field of SamplingParams; the keys that vLLM takes over, too.
_SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "max_new_tokens": "max_tokens",
}


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """A model's generation defaults."""

    eos_ids: tuple[int, ...] = ()
    """Tokens that end the output."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Defaults under the names of SamplingParams; only what the file sets."""


def load_generation_config(directory: Path) -> GenerationConfig:
    """Read it; without the file there are no defaults.

    Raises ModelLoadError, naming file and key, for values that could never be served.
    """
    path = directory / "generation_config.json"
    if not exists(path):
        return GenerationConfig()
    raw = read_json(path)
    ids = raw.get("eos_token_id")
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(_is_integer(token) and token >= 0 for token in ids):
        raise ModelLoadError(
            f"{shown(path)}: eos_token_id={shown(raw['eos_token_id'])} must be a token id or a list of them."
        )
    sampling = {name: raw[key] for key, name in _SAMPLING.items() if raw.get(key) is not None}
    for key, name in _SAMPLING.items():
        value = sampling.get(name)
        whole = name in ("top_k", "max_tokens")
        if value is not None and not (_is_integer(value) or (isinstance(value, float) and not whole)):
            kind = "an integer of 32 bits" if whole else "a number"
            raise ModelLoadError(f"{shown(path)}: {key}={shown(value)} must be {kind}.")
    try:
        SamplingParams(**sampling)
    except InvalidRequest as error:
        raise ModelLoadError(
            f"{shown(path)}: {error.message}", advice="Correct or remove the value."
        ) from error
    return GenerationConfig(tuple(ids), sampling)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 31


def generation_defaults(setting: str, directory: Path) -> GenerationConfig:
    """What --generation-config asks for.

    Args:
        setting: "auto" reads the model's own file; "vllm" (as in vLLM) takes only its end-of-sequence ids;
            anything else is a directory with another generation_config.json.
        directory: the model's.

    Raises ModelLoadError: the other directory has no such file; or as load_generation_config.
    """
    if setting == "auto":
        return load_generation_config(directory)
    if setting == "vllm":
        return GenerationConfig(load_generation_config(directory).eos_ids)
    other = Path(os.path.expanduser(setting))
    if not exists(other / "generation_config.json"):
        raise ModelLoadError(
            f"--generation-config {shown(other)}: there is no generation_config.json in it.",
            param="--generation-config",
            advice="Use auto, vllm, or a directory that holds one.",
        )
    return load_generation_config(other)
