"""Small random encoders and rerankers, made by transformers, and what it computes of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.model.checkpoints import _spread, _transformers

SMALL = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 66,
}
_DECODER = {**SMALL, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512}

#: name → (class of the configuration, class of the model, options)
ENCODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertConfig", "BertModel", {}),
    "bert-masked": ("BertConfig", "BertForMaskedLM", {}),
    "bert-relu": ("BertConfig", "BertModel", {"hidden_act": "relu"}),
    "bert-classes": ("BertConfig", "BertForSequenceClassification", {"num_labels": 3}),
    "bert-cross": ("BertConfig", "BertForSequenceClassification", {"num_labels": 1}),
    "bert-tokens": ("BertConfig", "BertForTokenClassification", {"num_labels": 5}),
    "roberta": ("RobertaConfig", "RobertaModel", {"type_vocab_size": 1}),
    "xlm-roberta": ("XLMRobertaConfig", "XLMRobertaModel", {"type_vocab_size": 1}),
    "xlm-roberta-cross": (
        "XLMRobertaConfig",
        "XLMRobertaForSequenceClassification",
        {"num_labels": 1, "type_vocab_size": 1},
    ),
    "qwen3-model": ("Qwen3Config", "Qwen3Model", _DECODER),
    "qwen3-cross": ("Qwen3Config", "Qwen3ForSequenceClassification", {**_DECODER, "num_labels": 1}),
    "llama-classes": ("LlamaConfig", "LlamaForSequenceClassification", {**_DECODER, "num_labels": 4}),
    "qwen3-lm": ("Qwen3Config", "Qwen3ForCausalLM", {**_DECODER, "tie_word_embeddings": True}),
}


def make_encoder(directory: Path, name: str, *, files: dict[str, Any] | None = None, **options: Any) -> Path:
    """Write a checkpoint without a tokenizer.

    Args:
        files: sentence-transformers' files, as JSON.
        options: more of the configuration.
    """
    transformers = _transformers()
    config_class, model_class, own = ENCODERS[name]
    fields = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, **SMALL, **own, **options}
    config = getattr(transformers, config_class)(**fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(name))
        model = getattr(transformers, model_class)(config)
        _spread(model)
    model.save_pretrained(directory)
    for file, content in (files or {}).items():
        path = directory / file
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    return directory


def expected(directory: Path, name: str, ids: Sequence[int], second: int | None = None) -> torch.Tensor:
    """Of transformers: hidden states [n, H], or logits [labels] or [n, labels]."""
    transformers = _transformers()
    model = getattr(transformers, ENCODERS[name][1]).from_pretrained(directory).eval()
    given = {
        "input_ids": torch.tensor([list(ids)]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
    }
    if second is not None:
        types = torch.zeros(1, len(ids), dtype=torch.long)
        types[0, second:] = 1
        given["token_type_ids"] = types
    with torch.no_grad():
        out = model(**given, output_hidden_states=True)
    made: torch.Tensor = (
        out.logits[0]
        if "For" in ENCODERS[name][1] and "Classif" in ENCODERS[name][1]
        else (out.hidden_states[-1][0])
    )
    return made


POOLING = "sentence_transformers.models.Pooling"


def modules(mode: str | None = "mean", *, normalize: bool = False, old: bool = True) -> dict[str, Any]:
    """Files of sentence-transformers; old: as before version 5."""
    parts = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    files: dict[str, Any] = {}
    if mode is not None:
        parts.append({"idx": 1, "name": "1", "path": "1_Pooling", "type": POOLING})
        key = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens"}.get(mode, mode)
        files["1_Pooling/config.json"] = {f"pooling_mode_{key}": True} if old else {"pooling_mode": mode}
    if normalize:
        kind = "sentence_transformers.models.Normalize"
        parts.append({"idx": 2, "name": "2", "path": "2_Normalize", "type": kind})
    return {"modules.json": parts, **files}
