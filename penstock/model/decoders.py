"""config.json of decoders: how each architecture spells what a ModelConfig has, and its defaults.

One function for each, and what most of them have in common.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from penstock.core.errors import ModelLoadError
from penstock.files import shown

from .model_config import DTYPES, ModelConfig
from .reader import MOST_POSITIONS, Reader


def common(reader: Reader, **special: Any) -> ModelConfig:
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
    if not 1 <= config.context_length <= MOST_POSITIONS:
        raise ModelLoadError(
            f"{reader.path}: max_position_embeddings={config.max_position_embeddings} times the rope factor "
            f"makes a context of {config.context_length} tokens; at most {MOST_POSITIONS} can be served."
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
    return common(
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
    return common(
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
    return common(
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
    return common(
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
    return common(
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
    return common(
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
    return common(
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
DECODERS: Mapping[str, tuple[str, str, Callable[[Reader], ModelConfig]]] = {
    "FalconForCausalLM": ("penstock.model.falcon", "FalconForCausalLM", _falcon),
    "GPTNeoXForCausalLM": ("penstock.model.gpt_neox", "GPTNeoXForCausalLM", _gpt_neox),
    "LlamaForCausalLM": ("penstock.model.llama", "LlamaForCausalLM", _llama),
    "MistralForCausalLM": ("penstock.model.llama", "LlamaForCausalLM", _mistral),
    "PhiForCausalLM": ("penstock.model.phi", "PhiForCausalLM", _phi),
    "Qwen2ForCausalLM": ("penstock.model.llama", "LlamaForCausalLM", _qwen2),
    "Qwen3ForCausalLM": ("penstock.model.qwen3", "Qwen3ForCausalLM", _qwen3),
}
