"""config.json of encoders: BERT and RoBERTa (XLM-RoBERTa has its wiring), whatever head stands on them.

What is published with learnt absolute positions and GELU is served; other variants are refused by key.
"""

from __future__ import annotations

from .decoders import common
from .model_config import ModelConfig, RopeConfig
from .reader import Reader


def bert(reader: Reader) -> ModelConfig:
    """BertModel and its heads."""
    return _encoder(reader, offset=0)


def roberta(reader: Reader) -> ModelConfig:
    """RobertaModel, XLMRobertaModel and their heads: positions are counted from behind the padding token's
    id."""
    padding = reader.raw.get("pad_token_id", 1)
    if isinstance(padding, bool) or not isinstance(padding, int) or not 0 <= padding < 1 << 16:
        raise reader.refuse("pad_token_id", "must be a small integer: positions are counted from it")
    return _encoder(reader, offset=padding + 1)


def _encoder(reader: Reader, offset: int) -> ModelConfig:
    if reader.text("position_embedding_type", "absolute") != "absolute":
        raise reader.refuse("position_embedding_type", "only absolute positions are supported")
    for key in ("is_decoder", "add_cross_attention"):
        if reader.flag(key, False):
            raise reader.refuse(key, "the model is served as an encoder")
    reader.integer("type_vocab_size", default=2)
    positions = reader.integer("max_position_embeddings", default=512)
    if positions <= offset:
        raise reader.refuse("max_position_embeddings", f"has no room behind the first {offset} positions")
    heads = reader.integer("num_attention_heads")
    return common(
        reader,
        architecture=reader.architecture,
        causal=False,
        position_offset=offset,
        max_position_embeddings=positions,
        num_kv_heads=heads,
        rope=RopeConfig(),
        norm_eps=reader.epsilon("layer_norm_eps", 1e-12),
        activation=reader.text("hidden_act", "gelu"),
        tie_word_embeddings=False,
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        eos_ids=(),
        bos_id=None,
    )
