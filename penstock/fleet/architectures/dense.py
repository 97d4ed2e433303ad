"""Decoders whose layers are attention and an MLP."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from penstock.fleet.facts import ModelFacts, Weight
from penstock.model.reader import Reader

from .tensors import Layer, Sizes, attention, facts_of, frame, groups, mlp


def dense(layer: Layer) -> Callable[[Reader], ModelFacts]:
    """A decoder whose layers are attention and an MLP."""

    return lambda reader: decoder(reader, Sizes.of(reader), layer)


def decoder(
    reader: Reader, sizes: Sizes, layer: Layer, beside: tuple[Weight, ...] = (), **more: Any
) -> ModelFacts:
    inner = reader.integer(layer.intermediate)
    windows = layer.windows(reader, sizes.layers)

    def weights() -> Iterator[Weight]:
        yield from frame(sizes, layer, reader.flag("tie_word_embeddings", layer.tied))
        yield from attention(sizes, layer)
        yield from mlp(sizes.hidden, inner, sizes.layers, layer)
        yield from beside

    kv = groups(windows, sizes.kv_heads, 2 * sizes.head_dim)
    return facts_of(reader, sizes, weights(), kv, inner=inner, **more)


def window(reader: Reader, layers: int) -> tuple[int | None, ...]:
    """The same window in every layer, or none."""
    given = reader.raw.get("sliding_window") is not None
    return (reader.integer("sliding_window") if given else None,) * layers


def qwen_window(reader: Reader, layers: int) -> tuple[int | None, ...]:
    return window(reader, layers) if reader.flag("use_sliding_window", False) else (None,) * layers


def listed_window(default_pattern: int) -> Callable[[Reader, int], tuple[int | None, ...]]:
    """layer_types, else every so manieth layer is full."""

    def windows(reader: Reader, layers: int) -> tuple[int | None, ...]:
        window = reader.integer("sliding_window", default=4096)
        pattern = reader.integer("sliding_window_pattern", default=default_pattern)
        types = reader.layer_types(layers)
        if types is None:
            types = [
                "full_attention" if (layer + 1) % pattern == 0 else "sliding_attention"
                for layer in range(layers)
            ]
        return tuple(window if each == "sliding_attention" else None for each in types)

    return windows


GEMMA2 = Layer(norms=4, tied=True, windows=listed_window(2))
GEMMA3 = Layer(norms=4, tied=True, qk_norm=True, windows=listed_window(6))
QWEN3 = Layer(qk_norm=True, windows=qwen_window)
PHI = Layer(qkv_bias=True, out_bias=True, mlp_bias=True, gated=False, norms=1, norm_bias=True, head_bias=True)
NEOX = Layer(qkv_bias=True, out_bias=True, mlp_bias=True, gated=False, norm_bias=True)


def llama(reader: Reader) -> ModelFacts:
    bias = reader.flag("attention_bias", False)
    layer = Layer(qkv_bias=bias, out_bias=bias, mlp_bias=reader.flag("mlp_bias", False))
    return decoder(reader, Sizes.of(reader), layer)


def opt(reader: Reader) -> ModelFacts:
    sizes = Sizes.of(reader)
    positions = reader.integer("max_position_embeddings", default=2048)
    layer = Layer(
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        gated=False,
        norm_bias=True,
        tied=True,
        intermediate="ffn_dim",
    )
    positional = Weight("positions", positions + 2, sizes.hidden, multiplied=False)
    return decoder(reader, sizes, layer, beside=(positional,))


def falcon(reader: Reader) -> ModelFacts:
    hidden, heads = reader.integer("hidden_size", "n_embed"), reader.integer("num_attention_heads", "n_head")
    layers = reader.integer("num_hidden_layers", "n_layer")
    if hidden % heads:
        raise reader.refuse("hidden_size", f"is not a multiple of its {heads} heads")
    new = reader.flag("new_decoder_architecture", False)
    if new:
        kv_heads = reader.integer("num_kv_heads", "n_head_kv", default=heads)
    else:
        kv_heads = 1 if reader.flag("multi_query", True) else heads
    sizes = Sizes(hidden, layers, heads, kv_heads, hidden // heads, reader.integer("vocab_size"))
    bias = reader.flag("bias", False)
    norms = 2 if new or not reader.flag("parallel_attn", True) else 1
    if new and reader.integer("num_ln_in_parallel_attn", default=2) == 1:
        norms = 1
    layer = Layer(bias, bias, bias, gated=False, norms=norms, norm_bias=True, tied=True)
    inner = reader.integer("ffn_hidden_size", default=4 * hidden)

    def weights() -> Iterator[Weight]:
        yield from frame(sizes, layer, reader.flag("tie_word_embeddings", True))
        yield from attention(sizes, layer)
        yield from mlp(hidden, inner, layers, layer)

    return facts_of(
        reader, sizes, weights(), groups((None,) * layers, kv_heads, 2 * sizes.head_dim), inner=inner
    )
