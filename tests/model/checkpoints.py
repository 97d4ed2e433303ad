"""Small random checkpoints of every supported architecture, made by transformers: the oracle's own models.

Their logits are well separated (see `_spread`), so that greedy tokens are the same under any order of
summation.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Arch:
    """An architecture, and what its small configuration sets."""

    config: str
    """Class name in transformers."""
    options: Mapping[str, Any] = field(default_factory=dict)


_SMALL = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_NO_GQA = {key: value for key, value in _SMALL.items() if key != "num_key_value_heads"}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}

#: name → architecture, variants behind a dash.
ARCHITECTURES: dict[str, Arch] = {
    "llama": Arch("LlamaConfig", _SMALL),
    "llama-tied": Arch("LlamaConfig", {**_SMALL, "tie_word_embeddings": True, "head_dim": 16}),
    "llama-bias": Arch("LlamaConfig", {**_SMALL, "attention_bias": True, "mlp_bias": True}),
    "llama-rope3": Arch("LlamaConfig", {**_SMALL, "rope_parameters": _LLAMA3_ROPE}),
    "llama-linear": Arch(
        "LlamaConfig",
        {**_SMALL, "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    "llama-yarn": Arch("LlamaConfig", {**_SMALL, "rope_parameters": _YARN_ROPE}),
    "mistral": Arch("MistralConfig", {**_SMALL, "sliding_window": 9}),
    "mistral-full": Arch("MistralConfig", {**_SMALL, "sliding_window": None, "head_dim": 16}),
    "qwen2": Arch("Qwen2Config", _SMALL),
    "qwen2-window": Arch(
        "Qwen2Config",
        {
            **_SMALL,
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 1,
        },
    ),
    "qwen3": Arch("Qwen3Config", {**_SMALL, "head_dim": 16}),
    "qwen3-tied": Arch("Qwen3Config", {**_SMALL, "head_dim": 32, "tie_word_embeddings": True}),
    "phi": Arch("PhiConfig", {**_NO_GQA, "rope_parameters": {"partial_rotary_factor": 0.5}}),
    "phi-qknorm": Arch("PhiConfig", {**_SMALL, "qk_layernorm": True}),
    "gpt-neox": Arch("GPTNeoXConfig", {**_NO_GQA, "num_attention_heads": 2}),
    "gpt-neox-serial": Arch(
        "GPTNeoXConfig", {**_NO_GQA, "use_parallel_residual": False, "attention_bias": False}
    ),
    "falcon": Arch("FalconConfig", _NO_GQA),
    "falcon-bias": Arch(
        "FalconConfig", {**_NO_GQA, "multi_query": False, "parallel_attn": False, "bias": True}
    ),
    "falcon-new": Arch("FalconConfig", {**_NO_GQA, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-new-1ln": Arch(
        "FalconConfig",
        {**_NO_GQA, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
}


def oracle(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The checkpoint as a transformers model in evaluation mode."""
    transformers = _transformers()
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


def make_checkpoint(
    directory: Path,
    arch: str = "llama",
    *,
    seed: int = 0,
    vocab_size: int = 128,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    **options: Any,
) -> Path:
    """Write a Hugging Face directory (no tokenizer) of ARCHITECTURES[arch] and return it.

    Args:
        options: override fields of the architecture's transformers configuration.
    """
    transformers = _transformers()
    entry = ARCHITECTURES[arch]
    fields = {"vocab_size": vocab_size, "bos_token_id": 1, "eos_token_id": 2} | dict(entry.options) | options
    config = getattr(transformers, entry.config)(**fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
        _spread(model)
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    return directory


@torch.no_grad()
def _spread(model: torch.nn.Module) -> None:
    """Weights that make every part matter: the initial ones leave biases 0, norms 1 and logits all alike."""
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.normal_(0.0, 0.2)
        elif parameter.ndim == 1:
            parameter.uniform_(0.5, 1.5)
        elif "embed" in name or "head" in name:
            parameter.normal_(0.0, 1.0)
        else:
            parameter.normal_(0.0, 1.2 * parameter.shape[1] ** -0.5)


@functools.cache
def _transformers() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return transformers
