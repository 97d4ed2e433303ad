"""generation_config.json: when a model stops, and how its makers want it sampled. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from penstock.core.errors import InvalidRequest, ModelLoadError
from penstock.core.sampling_params import SamplingParams

from .config import read_json

#: Key of generation_config.json → field of SamplingParams; the keys that vLLM takes over, too.
_SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
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
    if not path.exists():
        return GenerationConfig()
    raw = read_json(path)
    ids = raw.get("eos_token_id")
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if any(isinstance(token, bool) or not isinstance(token, int) or token < 0 for token in ids):
        raise ModelLoadError(
            f"{path}: eos_token_id={raw['eos_token_id']!r} must be a token id or a list of them."
        )
    sampling = {name: raw[key] for key, name in _SAMPLING.items() if raw.get(key) is not None}
    for key, name in _SAMPLING.items():
        value = sampling.get(name)
        whole = name in ("top_k", "max_tokens")
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int if whole else int | float)
        ):
            raise ModelLoadError(f"{path}: {key}={value!r} must be {'an integer' if whole else 'a number'}.")
    try:
        SamplingParams(**sampling)
    except InvalidRequest as error:
        raise ModelLoadError(f"{path}: {error.message}", advice="Correct or remove the value.") from error
    return GenerationConfig(tuple(ids), sampling)


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
    other = Path(setting).expanduser()
    if not (other / "generation_config.json").exists():
        raise ModelLoadError(
            f"--generation-config {setting}: there is no generation_config.json in it.",
            param="--generation-config",
            advice="Use auto, vllm, or a directory that holds one.",
        )
    return load_generation_config(other)
