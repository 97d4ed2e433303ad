"""What architectures have in common: the tensors of a decoder by shape, and facts from them.

The shapes are those of transformers' modules; tests/fleet/test_facts.py compares the sums with its own, on
the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from penstock.fleet.facts import KvLayers, ModelFacts, Split, Weight
from penstock.model.reader import Reader


@dataclass(frozen=True, slots=True)
class Layer:
    """What the decoder layers of one architecture differ in."""

    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    gated: bool = True
    norms: int = 2
    norm_bias: bool = False
    final_norm: bool = True
    qk_norm: bool = False
    head_bias: bool = False
    tied: bool = False
    """Default of tie_word_embeddings."""
    intermediate: str = "intermediate_size"
    windows: Callable[[Reader, int], tuple[int | None, ...]] = lambda reader, layers: (None,) * layers


def matrix(
    name: str,
    rows: int,
    columns: int,
    copies: int,
    *,
    bias: bool = False,
    split: Split = "ranks",
    used: float = 1.0,
    quantized: bool = True,
    multiplied: bool = True,
) -> Iterator[Weight]:
    """A linear layer, and its bias."""
    yield Weight(name, rows, columns, copies, split, used, quantized, multiplied)
    if bias:
        yield Weight(f"{name}.bias", rows, 1, copies, split, used, False, multiplied)


def attention(sizes: Sizes, layer: Layer) -> Iterator[Weight]:
    hidden, layers = sizes.hidden, sizes.layers
    q, kv = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    yield from matrix("q", q, hidden, layers, bias=layer.qkv_bias)
    yield from matrix("k", kv, hidden, layers, bias=layer.qkv_bias, split="kv_heads")
    yield from matrix("v", kv, hidden, layers, bias=layer.qkv_bias, split="kv_heads")
    yield from matrix("o", hidden, q, layers, bias=layer.out_bias)
    if layer.qk_norm:
        yield Weight("qk_norm", sizes.head_dim, 1, 2 * layers)


def mlp(hidden: int, inner: int, layers: int, layer: Layer) -> Iterator[Weight]:
    if layer.gated:
        yield from matrix("gate", inner, hidden, layers, bias=layer.mlp_bias)
    yield from matrix("up", inner, hidden, layers, bias=layer.mlp_bias)
    yield from matrix("down", hidden, inner, layers, bias=layer.mlp_bias)


def frame(sizes: Sizes, layer: Layer, tied: bool) -> Iterator[Weight]:
    """Embedding, norms and head. A tied head is the embedding, which is then multiplied, too."""
    yield Weight("embedding", sizes.vocab, sizes.hidden, 1, "ranks", multiplied=tied)
    norms = layer.norms * sizes.layers + layer.final_norm
    yield Weight("norm", sizes.hidden, 1, norms * (2 if layer.norm_bias else 1))
    if not tied:
        yield from matrix("head", sizes.vocab, sizes.hidden, 1, bias=layer.head_bias, quantized=False)


@dataclass(frozen=True, slots=True)
class Sizes:
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @classmethod
    def of(cls, reader: Reader) -> Sizes:
        hidden, heads = reader.integer("hidden_size"), reader.integer("num_attention_heads", "n_head")
        if reader.raw.get("head_dim") is None and hidden % heads:
            raise reader.refuse("hidden_size", f"is not a multiple of num_attention_heads={heads}")
        kv_heads = reader.integer("num_key_value_heads", default=heads)
        if heads % kv_heads:
            raise reader.refuse("num_key_value_heads", f"does not divide num_attention_heads={heads}")
        return cls(
            hidden=hidden,
            layers=reader.integer("num_hidden_layers"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=reader.integer("head_dim", default=max(1, hidden // heads)),
            vocab=reader.integer("vocab_size"),
        )


def groups(windows: tuple[int | None, ...], heads: int, elements: int) -> tuple[KvLayers, ...]:
    """Layers of a kind together; full attention first."""
    kinds = sorted(set(windows), key=lambda window: (window is not None, window or 0))
    return tuple(KvLayers(windows.count(window), heads, elements, window) for window in kinds)


def facts_of(
    reader: Reader,
    sizes: Sizes,
    weights: Iterator[Weight],
    kv: tuple[KvLayers, ...],
    *,
    inner: int,
    kind: Literal["text", "vision-language", "embedding"] = "text",
    attention_width: int | None = None,
    **more: Any,
) -> ModelFacts:
    return ModelFacts(
        name=reader.path.parent.name,
        architecture="",
        kind=kind,
        hidden_size=sizes.hidden,
        num_layers=sizes.layers,
        num_heads=sizes.heads,
        num_kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        intermediate_size=inner,
        vocab_size=sizes.vocab,
        context_length=_context(reader),
        weights=tuple(weights),
        kv=kv,
        attention_width=attention_width or sizes.heads * sizes.head_dim,
        **more,
    )


def _context(reader: Reader) -> int:
    """Longest sequence, as ModelConfig.context_length has it. Other types of scaling name the longest
    themselves."""
    positions = reader.integer("max_position_embeddings", default=2048)
    scaling = reader.raw.get("rope_scaling") or reader.raw.get("rope_parameters") or {}
    if not isinstance(scaling, dict):
        raise reader.refuse("rope_scaling", "must be an object")
    kind, factor = scaling.get("rope_type") or scaling.get("type"), scaling.get("factor")
    if kind not in ("linear", "yarn"):
        return positions
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < 1e6:
        raise reader.refuse("rope_scaling", "its factor must be a positive number")
    original = scaling.get("original_max_position_embeddings") or positions
    if not isinstance(original, int) or isinstance(original, bool) or not 0 < original < 1 << 31:
        raise reader.refuse("rope_scaling", "its original_max_position_embeddings must be a positive integer")
    return max(positions, int(original * factor)) if kind == "yarn" else int(positions * factor)
