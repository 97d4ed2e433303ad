"""Typed access to config.json: what a value may be, and what is said, by file and key, of any other.

Knows types and limits; what the keys of an architecture mean, decoders.py and encoders.py know.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from penstock.core.errors import ModelLoadError
from penstock.files import shown

from .model_config import RopeConfig

logger = logging.getLogger("penstock.engine")

#: rope_type → keys that it needs.
ROPE_TYPES: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
}
#: key → the most that it may be: well above every model that is published, and low enough that nothing which
#: is made by these numbers alone takes more than some kilobytes. The weights have the last word on the rest.
_MOST = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 20,
    "n_embed": 1 << 20,
    "intermediate_size": 1 << 22,
    "ffn_hidden_size": 1 << 22,
    "num_hidden_layers": 4096,
    "n_layer": 4096,
    "num_attention_heads": 1 << 14,
    "n_head": 1 << 14,
    "num_key_value_heads": 1 << 14,
    "num_kv_heads": 1 << 14,
    "n_head_kv": 1 << 14,
    "head_dim": 1 << 14,
}
#: Of positions and windows: they are counted in 32 bits.
MOST_POSITIONS = (1 << 31) - 1
#: Of a base of wavelengths.
_MOST_THETA = 1e15
#: key of rope_parameters → (least, most).
_ROPE_NUMBERS = {
    "factor": (1e-6, 1e6),
    "low_freq_factor": (1e-6, 1e6),
    "high_freq_factor": (1e-6, 1e6),
    "original_max_position_embeddings": (1, MOST_POSITIONS),
    "beta_fast": (1e-6, 1e6),
    "beta_slow": (1e-6, 1e6),
    "mscale": (0.0, 1e6),
    "mscale_all_dim": (0.0, 1e6),
    "attention_factor": (1e-6, 1e6),
}


class Reader:
    """Typed access to config.json, with errors that name the file and the key."""

    def __init__(self, path: Path, raw: Mapping[str, Any], architecture: str = "") -> None:
        self.path = path
        self.raw = raw
        self.architecture = architecture
        """The one of `architectures` that is served."""

    def refuse(self, key: str, why: str, advice: str = "") -> ModelLoadError:
        return ModelLoadError(f"{shown(self.path)}: {key}={shown(self.raw.get(key))}: {why}.", advice=advice)

    def integer(self, *keys: str, default: int | None = None) -> int:
        """The first key that is there, a positive integer."""
        for key in keys:
            value = self.raw.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise self.refuse(key, "must be a positive integer")
            most = _MOST.get(key, MOST_POSITIONS)
            if value > most:
                raise self.refuse(key, f"is more than any model has; at most {most:,} can be served")
            return value
        if default is None:
            raise ModelLoadError(f"{shown(self.path)}: {keys[0]!r} is missing.")
        return default

    def number(self, *keys: str, default: float, most: float = math.inf) -> float:
        """The first key that is there, positive, finite and at most `most`."""
        for key in keys:
            value = self.raw.get(key)
            if value is None:
                continue
            if not _is_number(value) or value <= 0:
                raise self.refuse(key, "must be a positive number")
            if value > most:
                raise self.refuse(key, f"must be at most {most:g}")
            return float(value)
        return default

    def epsilon(self, key: str, default: float) -> float:
        """What a norm adds to a variance, in (0, 1]."""
        return self.number(key, default=default, most=1.0)

    def flag(self, key: str, default: bool) -> bool:
        value = self.raw.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.refuse(key, "must be true or false")
        return value

    def text(self, key: str, default: str) -> str:
        value = self.raw.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.refuse(key, "must be a string")
        return value

    def token_ids(self, key: str, vocab_size: int) -> tuple[int, ...]:
        """Ids under a key; those that the model cannot sample are left out, with a warning."""
        value = self.raw.get(key)
        if value is None:
            return ()
        ids = value if isinstance(value, list) else [value]
        if any(isinstance(token, bool) or not isinstance(token, int) for token in ids):
            raise self.refuse(key, "must be a token id or a list of them")
        return within_vocabulary(ids, vocab_size, f"{shown(self.path)}: {key}")

    def layer_types(self, layers: int | None = None) -> list[str] | None:
        """The kind of attention of each layer, where config.json says it; layers: how many there must be."""
        types = self.raw.get("layer_types")
        if types is not None and (
            not isinstance(types, list)
            or (layers is not None and len(types) != layers)
            or any(kind not in ("full_attention", "sliding_attention") for kind in types)
        ):
            raise self.refuse("layer_types", "must say full_attention or sliding_attention for each layer")
        return types

    def rope(self, theta_key: str, partial_key: str, partial_default: float, positions: int) -> RopeConfig:
        """transformers 4 has theta and rope_scaling apart, transformers 5 has rope_parameters."""
        key = "rope_parameters" if self.raw.get("rope_parameters") is not None else "rope_scaling"
        scaling = self.raw.get(key) or {}
        if not isinstance(scaling, dict):
            raise self.refuse(key, "must be an object")
        scaling = dict(scaling)
        kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
        scaling.pop("type", None)
        if not isinstance(kind, str) or kind not in ROPE_TYPES:
            raise self.refuse(
                key,
                f"rope type {shown(kind)} is not supported",
                f"Supported rope types: {', '.join(ROPE_TYPES)}.",
            )
        theta = scaling.pop("rope_theta", None)
        partial = scaling.pop("partial_rotary_factor", None)
        if kind in ("llama3", "yarn") and scaling.get("original_max_position_embeddings") is None:
            scaling["original_max_position_embeddings"] = positions
        for name, (least, most) in _ROPE_NUMBERS.items():
            value = scaling.get(name)
            if value is None and name not in ROPE_TYPES[kind]:
                continue
            if value is None or not _is_number(value) or not least <= value <= most:
                raise ModelLoadError(
                    f"{shown(self.path)}: {key}.{name}={shown(value)} must be a positive number for rope "
                    f"type {kind!r}, from {least:g} to {most:g}."
                )
        if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
            raise self.refuse(key, "low_freq_factor must be below high_freq_factor")
        if not isinstance(scaling.get("truncate", True), bool):
            raise self.refuse(key, "truncate must be true or false")
        theta = theta if theta is not None else self.number(theta_key, default=10000.0)
        partial = partial if partial is not None else self.number(partial_key, default=partial_default)
        if not _is_number(theta) or not 1 < theta <= _MOST_THETA:
            raise self.refuse(
                key if self.raw.get(theta_key) is None else theta_key,
                f"rope_theta must be a positive number over 1, at most {_MOST_THETA:g}",
            )
        if not _is_number(partial) or not 0 < partial <= 1:
            raise self.refuse(partial_key, "must be in (0, 1]")
        return RopeConfig(float(theta), kind, scaling if kind != "default" else {}, float(partial))


def _is_number(value: object) -> bool:
    """Whether it is a number that a float can hold: json reads NaN and Infinity, too, and any integer."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def within_vocabulary(ids: Iterable[int], vocab_size: int, where: str) -> tuple[int, ...]:
    """The ids that a model of this vocabulary can sample; a warning says that the others are ignored.

    Configurations with such ids are published, and harmless: it is a token that never comes.
    """
    kept = tuple(token for token in ids if 0 <= token < vocab_size)
    if left := [token for token in ids if not 0 <= token < vocab_size]:
        logger.warning(
            "%s: token id %s is outside of the vocabulary of %d, and ignored",
            where,
            shown(left[0]),
            vocab_size,
        )
    return kept
