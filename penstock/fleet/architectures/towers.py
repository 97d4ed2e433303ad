"""Encoders that keep no cache, and decoders beside a tower that sees images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from penstock.fleet.facts import ModelFacts, Weight
from penstock.model.reader import Reader

from .dense import GEMMA3, QWEN3, decoder
from .tensors import Layer, Sizes, attention, facts_of, matrix, mlp


def encoder(reader: Reader) -> ModelFacts:
    """XLM-RoBERTa and BERT with their pooler: encoders, which keep no cache."""
    sizes = Sizes.of(reader)
    inner = reader.integer("intermediate_size")
    hidden, layers = sizes.hidden, sizes.layers
    layer = Layer(True, True, True, gated=False, norm_bias=True, final_norm=False)

    def weights() -> Iterator[Weight]:
        positions, types = reader.integer("max_position_embeddings"), reader.integer("type_vocab_size")
        rows = sizes.vocab + positions + types
        yield Weight("embedding", rows, hidden, 1, "ranks", multiplied=False)
        yield Weight("norm", hidden, 1, 2 * (2 * layers + 1))
        yield from attention(sizes, layer)
        yield from mlp(hidden, inner, layers, layer)
        yield from matrix("pooler", hidden, hidden, 1, bias=True, split="whole", quantized=False)

    facts = facts_of(reader, sizes, weights(), (), inner=inner, kind="embedding")
    # two positions are kept for padding
    return replace(facts, context_length=max(1, facts.context_length - 2))


def _vision(name: str, rows: int, columns: int, copies: int = 1, *, bias: bool = True) -> Iterator[Weight]:
    """A layer that sees images: never quantised, and no work for text."""
    yield from matrix(name, rows, columns, copies, bias=bias, quantized=False, multiplied=False)


def qwen3_vl(reader: Reader) -> ModelFacts:
    text, vision = _part(reader, "text_config"), _part(reader, "vision_config")
    facts = decoder(text, Sizes.of(text), QWEN3, kind="vision-language")
    width, inner, depth = (vision.integer(key) for key in ("hidden_size", "intermediate_size", "depth"))
    out, merge = vision.integer("out_hidden_size"), vision.integer("spatial_merge_size") ** 2
    patch = vision.integer("in_channels", default=3) * vision.integer("temporal_patch_size")
    patch *= vision.integer("patch_size") ** 2
    deep = vision.raw.get("deepstack_visual_indexes") or ()
    if not isinstance(deep, list | tuple) or len(deep) > depth:
        raise vision.refuse("deepstack_visual_indexes", "must list layers of the vision tower")

    def weights() -> Iterator[Weight]:
        yield from _vision("vision.patch", width, patch)
        positions = vision.integer("num_position_embeddings")
        yield from _vision("vision.positions", positions, width, bias=False)
        norms = 4 * depth * width + 2 * width + 2 * len(deep) * merge * width
        yield Weight("vision.norm", norms, multiplied=False)
        yield from _vision("vision.qkv", 3 * width, width, depth)
        yield from _vision("vision.o", width, width, depth)
        yield from _vision("vision.up", inner, width, depth)
        yield from _vision("vision.down", width, inner, depth)
        yield from _vision("vision.merge.up", merge * width, merge * width, 1 + len(deep))
        yield from _vision("vision.merge.down", out, merge * width, 1 + len(deep))

    return replace(facts, weights=facts.weights + tuple(weights()))


def gemma3(reader: Reader) -> ModelFacts:
    text, vision = _part(reader, "text_config"), _part(reader, "vision_config")
    facts = decoder(text, Sizes.of(text), GEMMA3, kind="vision-language")
    width, inner = vision.integer("hidden_size"), vision.integer("intermediate_size")
    depth, patch = vision.integer("num_hidden_layers"), vision.integer("patch_size")
    positions = (vision.integer("image_size") // patch) ** 2

    def weights() -> Iterator[Weight]:
        yield from _vision("vision.patch", width, 3 * patch**2)
        yield from _vision("vision.positions", positions, width, bias=False)
        yield Weight("vision.norm", 4 * depth * width + 2 * width + width, multiplied=False)
        yield from _vision("vision.qkvo", width, width, 4 * depth)
        yield from _vision("vision.up", inner, width, depth)
        yield from _vision("vision.down", width, inner, depth)
        yield from _vision("vision.project", facts.hidden_size, width, bias=False)

    return replace(facts, weights=facts.weights + tuple(weights()))


def _part(reader: Reader, key: str) -> Reader:
    """An object within config.json."""
    value = reader.raw.get(key)
    if not isinstance(value, dict):
        raise reader.refuse(key, "must be an object")
    return Reader(reader.path, value)
