"""config.json, read once into one normalised, frozen ModelConfig.

Knows the spellings of transformers 4 and 5 and each architecture's defaults. Imports no torch: the API
process reads it too. Everything that Penstock cannot serve faithfully is refused here, by file and key.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from penstock.core.errors import ModelLoadError
from penstock.files import read_json, shown

logger = logging.getLogger("penstock.engine")

DTYPES = ("float32", "float16", "bfloat16")

#: rope_type → keys that it needs.
ROPE_TYPES: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
}


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding."""

    theta: float = 10000.0
    """Base of the wavelengths."""
    type: str = "default"
    """One of ROPE_TYPES."""
    scaling: Mapping[str, Any] = field(default_factory=dict)
    """Parameters of the type, as config.json has them."""
    partial_factor: float = 1.0
    """Share of each head that is rotated."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only language model, whatever its architecture calls things."""

    path: Path
    """The config.json it was read from."""
    architecture: str
    """One of supported_architectures()."""
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int
    """As config.json has it; see context_length."""
    rope: RopeConfig
    norm_eps: float
    activation: str
    windows: tuple[int | None, ...]
    """Sliding window of each layer; None where attention is full."""
    tie_word_embeddings: bool
    attention_bias: bool
    """Bias on the query, key and value projections."""
    output_bias: bool
    """Bias on attention's output projection."""
    mlp_bias: bool
    dtype: str
    """Of the checkpoint: one of DTYPES."""
    eos_ids: tuple[int, ...]
    bos_id: int | None
    raw: Mapping[str, Any] = field(repr=False)
    """config.json itself, for what only one architecture knows."""

    @property
    def context_length(self) -> int:
        """Longest sequence that the positions were made for: scaled types stretch the trained length."""
        scaling = self.rope.scaling
        if self.rope.type == "linear":
            return int(self.max_position_embeddings * scaling["factor"])
        if self.rope.type == "yarn":
            original = scaling.get("original_max_position_embeddings") or self.max_position_embeddings
            return max(self.max_position_embeddings, int(original * scaling["factor"]))
        return self.max_position_embeddings

    @property
    def rotary_dim(self) -> int:
        """Leading dimensions of each head that are rotated."""
        return int(self.head_dim * self.rope.partial_factor)


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
_MOST_POSITIONS = (1 << 31) - 1
#: Of a base of wavelengths.
_MOST_THETA = 1e15
#: key of rope_parameters → (least, most).
_ROPE_NUMBERS = {
    "factor": (1e-6, 1e6),
    "low_freq_factor": (1e-6, 1e6),
    "high_freq_factor": (1e-6, 1e6),
    "original_max_position_embeddings": (1, _MOST_POSITIONS),
    "beta_fast": (1e-6, 1e6),
    "beta_slow": (1e-6, 1e6),
    "mscale": (0.0, 1e6),
    "mscale_all_dim": (0.0, 1e6),
    "attention_factor": (1e-6, 1e6),
}


class Reader:
    """Typed access to config.json, with errors that name the file and the key."""

    def __init__(self, path: Path, raw: Mapping[str, Any]) -> None:
        self.path = path
        self.raw = raw

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
            most = _MOST.get(key, _MOST_POSITIONS)
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


def _common(reader: Reader, **special: Any) -> ModelConfig:
    """What most architectures spell alike; `special` overrides it."""
    raw = reader.raw
    vocab = reader.integer("vocab_size")
    fields: dict[str, Any] = {
        "path": reader.path,
        "vocab_size": vocab,
        "max_position_embeddings": reader.integer("max_position_embeddings", default=2048),
        "attention_bias": False,
        "output_bias": False,
        "mlp_bias": False,
        "dtype": _dtype(reader),
        "eos_ids": reader.token_ids("eos_token_id", vocab),
        "bos_id": next(iter(reader.token_ids("bos_token_id", vocab)), None),
        "raw": raw,
    } | special
    sizes = (("hidden_size", "hidden_size"), ("num_layers", "num_hidden_layers"))
    for name, key in (*sizes, ("num_heads", "num_attention_heads")):
        if name not in fields:  # Falcon has other keys for them
            fields[name] = reader.integer(key)
    heads, hidden = fields["num_heads"], fields["hidden_size"]
    if "num_kv_heads" not in fields:
        fields["num_kv_heads"] = reader.integer("num_key_value_heads", default=heads)
    if "head_dim" not in fields:
        if raw.get("head_dim") is None and hidden % heads:
            raise reader.refuse("hidden_size", f"is not a multiple of num_attention_heads={heads}")
        fields["head_dim"] = reader.integer("head_dim", default=hidden // heads)
    if heads % fields["num_kv_heads"]:
        raise ModelLoadError(
            f"{reader.path}: {heads} attention heads cannot share {fields['num_kv_heads']} KV heads evenly."
        )
    if "intermediate_size" not in fields:
        fields["intermediate_size"] = reader.integer("intermediate_size")
    if "rope" not in fields:
        fields["rope"] = reader.rope(
            "rope_theta", "partial_rotary_factor", 1.0, fields["max_position_embeddings"]
        )
    if "windows" not in fields:
        fields["windows"] = (None,) * fields["num_layers"]
    config = ModelConfig(**fields)
    rotated = config.rotary_dim + config.rotary_dim % 2  # dimensions are rotated in pairs
    if not 2 <= rotated <= config.head_dim:
        raise ModelLoadError(
            f"{shown(reader.path)}: head_dim={config.head_dim}, of which {config.rope.partial_factor:g} is "
            "rotated, has no room for a pair of dimensions."
        )
    if not 1 <= config.context_length <= _MOST_POSITIONS:
        raise ModelLoadError(
            f"{reader.path}: max_position_embeddings={config.max_position_embeddings} times the rope factor "
            f"makes a context of {config.context_length} tokens; at most {_MOST_POSITIONS} can be served."
        )
    return config


def _dtype(reader: Reader) -> str:
    key = "dtype" if reader.raw.get("dtype") is not None else "torch_dtype"
    name = reader.text(key, "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise reader.refuse(key, "is not supported", f"Supported: {', '.join(DTYPES)}.")
    return name


def _llama(reader: Reader) -> ModelConfig:
    bias = reader.flag("attention_bias", False)
    return _common(
        reader,
        architecture="LlamaForCausalLM",
        norm_eps=reader.epsilon("rms_norm_eps", 1e-6),
        activation=reader.text("hidden_act", "silu"),
        tie_word_embeddings=reader.flag("tie_word_embeddings", False),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=reader.flag("mlp_bias", False),
    )


def _mistral(reader: Reader) -> ModelConfig:
    layers = reader.integer("num_hidden_layers")
    if len(set(reader.layer_types() or ())) > 1:
        raise reader.refuse("layer_types", "alternating attention is not part of MistralForCausalLM")
    window = reader.integer("sliding_window") if reader.raw.get("sliding_window") is not None else None
    return _common(
        reader,
        architecture="MistralForCausalLM",
        num_kv_heads=reader.integer("num_key_value_heads", default=8),
        norm_eps=reader.epsilon("rms_norm_eps", 1e-6),
        activation=reader.text("hidden_act", "silu"),
        windows=(window,) * layers,
        tie_word_embeddings=reader.flag("tie_word_embeddings", False),
    )


def _qwen_windows(reader: Reader) -> tuple[int | None, ...]:
    """Full attention, unless use_sliding_window: then in layer_types, else from max_window_layers on."""
    layers = reader.integer("num_hidden_layers")
    if not reader.flag("use_sliding_window", False):
        return (None,) * layers
    window = reader.integer("sliding_window", default=4096)
    types = reader.layer_types(layers)
    if types is not None:
        return tuple(window if kind == "sliding_attention" else None for kind in types)
    full = reader.raw.get("max_window_layers", 28)
    if isinstance(full, bool) or not isinstance(full, int) or full < 0:
        raise reader.refuse("max_window_layers", "must be an integer of at least 0")
    return tuple(window if layer >= full else None for layer in range(layers))


def _qwen2(reader: Reader) -> ModelConfig:
    return _common(
        reader,
        architecture="Qwen2ForCausalLM",
        norm_eps=reader.epsilon("rms_norm_eps", 1e-6),
        activation=reader.text("hidden_act", "silu"),
        windows=_qwen_windows(reader),
        tie_word_embeddings=reader.flag("tie_word_embeddings", False),
        attention_bias=True,
    )


def _qwen3(reader: Reader) -> ModelConfig:
    bias = reader.flag("attention_bias", False)
    return _common(
        reader,
        architecture="Qwen3ForCausalLM",
        head_dim=reader.integer("head_dim", default=128),
        norm_eps=reader.epsilon("rms_norm_eps", 1e-6),
        activation=reader.text("hidden_act", "silu"),
        windows=_qwen_windows(reader),
        tie_word_embeddings=reader.flag("tie_word_embeddings", False),
        attention_bias=bias,
        output_bias=bias,
    )


def _phi(reader: Reader) -> ModelConfig:
    reader.flag("qk_layernorm", False)  # here and below: read by the architecture itself, checked here
    positions = reader.integer("max_position_embeddings", default=2048)
    return _common(
        reader,
        architecture="PhiForCausalLM",
        rope=reader.rope("rope_theta", "partial_rotary_factor", 0.5, positions),
        norm_eps=reader.epsilon("layer_norm_eps", 1e-5),
        activation=reader.text("hidden_act", "gelu_new"),
        tie_word_embeddings=reader.flag("tie_word_embeddings", False),
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
    )


def _gpt_neox(reader: Reader) -> ModelConfig:
    positions = reader.integer("max_position_embeddings", default=2048)
    heads = reader.integer("num_attention_heads")
    bias = reader.flag("attention_bias", True)
    reader.flag("use_parallel_residual", True)
    return _common(
        reader,
        architecture="GPTNeoXForCausalLM",
        num_kv_heads=heads,
        rope=reader.rope("rotary_emb_base", "rotary_pct", 0.25, positions),
        norm_eps=reader.epsilon("layer_norm_eps", 1e-5),
        activation=reader.text("hidden_act", "gelu"),
        tie_word_embeddings=reader.flag("tie_word_embeddings", False),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=True,
    )


def _falcon(reader: Reader) -> ModelConfig:
    if reader.flag("alibi", False):
        raise reader.refuse(
            "alibi", "ALiBi position biases are not supported", "Falcon models with rotary embeddings are."
        )
    hidden = reader.integer("n_embed", "hidden_size")
    heads = reader.integer("num_attention_heads", "n_head")
    if reader.flag("new_decoder_architecture", False):
        kv_heads = reader.integer("num_kv_heads", "n_head_kv", default=heads)
    else:
        kv_heads = 1 if reader.flag("multi_query", True) else heads
    bias = reader.flag("bias", False)
    reader.flag("parallel_attn", True)
    reader.integer("num_ln_in_parallel_attn", default=1)
    return _common(
        reader,
        architecture="FalconForCausalLM",
        hidden_size=hidden,
        num_heads=heads,
        num_layers=reader.integer("num_hidden_layers", "n_layer"),
        num_kv_heads=kv_heads,
        intermediate_size=reader.integer("ffn_hidden_size", default=4 * hidden),
        norm_eps=reader.epsilon("layer_norm_epsilon", 1e-5),
        activation=reader.text("activation", "gelu"),
        tie_word_embeddings=reader.flag("tie_word_embeddings", True),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
    )


#: architecture → (module and class that serve it, how to read its config). Llama's wiring serves what differs
#: from it in the configuration only.
_ARCHITECTURES: Mapping[str, tuple[str, str, Callable[[Reader], ModelConfig]]] = {
    "FalconForCausalLM": ("penstock.model.falcon", "FalconForCausalLM", _falcon),
    "GPTNeoXForCausalLM": ("penstock.model.gpt_neox", "GPTNeoXForCausalLM", _gpt_neox),
    "LlamaForCausalLM": ("penstock.model.llama", "LlamaForCausalLM", _llama),
    "MistralForCausalLM": ("penstock.model.llama", "LlamaForCausalLM", _mistral),
    "PhiForCausalLM": ("penstock.model.phi", "PhiForCausalLM", _phi),
    "Qwen2ForCausalLM": ("penstock.model.llama", "LlamaForCausalLM", _qwen2),
    "Qwen3ForCausalLM": ("penstock.model.qwen3", "Qwen3ForCausalLM", _qwen3),
}


def supported_architectures() -> tuple[str, ...]:
    """Values of config.json's `architectures` that can be served."""
    return tuple(_ARCHITECTURES)


def model_class(architecture: str) -> tuple[str, str]:
    """Module and class name behind a supported architecture."""
    module, cls, _ = _ARCHITECTURES[architecture]
    return module, cls


def load_config(directory: Path) -> ModelConfig:
    """The normalised config.json of a model directory.

    Raises ModelLoadError, naming file and key, for a missing or malformed file, an architecture or rope type
    that is not supported, and quantised checkpoints.
    """
    path = directory / "config.json"
    raw = read_json(path)
    names = raw.get("architectures")
    advice = f"Supported architectures: {', '.join(_ARCHITECTURES)}."
    if not isinstance(names, list) or not names:
        raise ModelLoadError(f"{shown(path)}: 'architectures' is missing.", advice=advice)
    known = [name for name in names if isinstance(name, str) and name in _ARCHITECTURES]
    if not known:
        text = ", ".join(map(shown, names[:3]))
        raise ModelLoadError(f"{shown(path)}: architecture {text} is not supported.", advice=advice)
    if raw.get("quantization_config") is not None:
        quantization = raw["quantization_config"]
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ModelLoadError(
            f"{shown(path)}: quantization_config: quantised checkpoints (here {shown(method)}) are not "
            "supported.",
            advice=f"Use the original checkpoint, in one of {', '.join(DTYPES)}.",
        )
    return _ARCHITECTURES[known[0]][2](Reader(path, raw))
