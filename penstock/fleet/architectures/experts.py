"""Decoders whose MLPs are experts, of which a router chooses some for each token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from penstock.fleet.facts import KvLayers, ModelFacts, Weight
from penstock.model.reader import Reader

from .dense import QWEN3, listed_window, window
from .tensors import Layer, Sizes, attention, facts_of, frame, groups, matrix, mlp


def _experts(
    reader: Reader, *, count: str, inner: int, layer: Layer, router_bias: bool = False, sinks: bool = False
) -> ModelFacts:
    """A decoder whose MLPs are experts, of which a router chooses some for each token."""
    sizes = Sizes.of(reader)
    experts, used = reader.integer(count), reader.integer("num_experts_per_tok")
    if used > experts:
        raise reader.refuse("num_experts_per_tok", f"is more than the {experts} experts")
    share, copies = used / experts, sizes.layers * experts
    windows = layer.windows(reader, sizes.layers)

    def weights() -> Iterator[Weight]:
        yield from frame(sizes, layer, reader.flag("tie_word_embeddings", layer.tied))
        yield from attention(sizes, layer)
        if sinks:
            yield Weight("sinks", sizes.heads, 1, sizes.layers, "ranks")
        yield from matrix(
            "router", experts, sizes.hidden, sizes.layers, bias=router_bias, split="whole", quantized=False
        )
        bias = layer.mlp_bias
        yield from matrix("experts.gate", inner, sizes.hidden, copies, bias=bias, used=share)
        yield from matrix("experts.up", inner, sizes.hidden, copies, bias=bias, used=share)
        yield from matrix("experts.down", sizes.hidden, inner, copies, bias=bias, used=share)

    return facts_of(
        reader,
        sizes,
        weights(),
        groups(windows, sizes.kv_heads, 2 * sizes.head_dim),
        inner=inner,
        experts=experts,
        experts_used=used,
    )


def mixtral(reader: Reader) -> ModelFacts:
    inner = reader.integer("intermediate_size")
    return _experts(reader, count="num_local_experts", inner=inner, layer=Layer(windows=window))


def qwen3_moe(reader: Reader) -> ModelFacts:
    if reader.raw.get("mlp_only_layers") or reader.integer("decoder_sparse_step", default=1) != 1:
        raise reader.refuse("mlp_only_layers", "layers without experts are not counted yet")
    return _experts(reader, count="num_experts", inner=reader.integer("moe_intermediate_size"), layer=QWEN3)


def gpt_oss(reader: Reader) -> ModelFacts:
    layer = Layer(qkv_bias=True, out_bias=True, mlp_bias=True, windows=listed_window(2))
    facts = _experts(
        reader,
        count="num_local_experts",
        inner=reader.integer("intermediate_size"),
        layer=layer,
        router_bias=True,
        sinks=True,
    )
    # quantised as published: the experts alone
    weights = tuple(
        Weight(w.name, w.rows, w.columns, w.copies, w.split, w.used, "experts" in w.name and w.columns > 1)
        if w.multiplied
        else w
        for w in facts.weights
    )
    return replace(facts, weights=weights)


def deepseek(reader: Reader) -> ModelFacts:
    """Multi-head latent attention: the cache has one latent for all heads, whole on every rank."""
    hidden, layers = reader.integer("hidden_size"), reader.integer("num_hidden_layers")
    heads, vocab = reader.integer("num_attention_heads"), reader.integer("vocab_size")
    nope, rope = reader.integer("qk_nope_head_dim"), reader.integer("qk_rope_head_dim")
    value, latent = reader.integer("v_head_dim"), reader.integer("kv_lora_rank")
    sizes = Sizes(hidden, layers, heads, heads, nope + rope, vocab)
    experts, used = reader.integer("n_routed_experts"), reader.integer("num_experts_per_tok")
    shared = reader.integer("n_shared_experts", default=1)
    replaced = reader.raw.get("first_k_dense_replace")
    dense = min(layers, reader.integer("first_k_dense_replace")) if replaced else 0
    inner, moe = reader.integer("intermediate_size"), reader.integer("moe_intermediate_size")
    sparse, layer = layers - dense, Layer()

    def weights() -> Iterator[Weight]:
        yield from frame(sizes, layer, reader.flag("tie_word_embeddings", False))
        if reader.raw.get("q_lora_rank") is not None:
            q_latent = reader.integer("q_lora_rank")
            yield from matrix("q_a", q_latent, hidden, layers, split="whole")
            yield Weight("q_a_norm", q_latent, 1, layers)
            yield from matrix("q_b", heads * (nope + rope), q_latent, layers)
        else:
            yield from matrix("q", heads * (nope + rope), hidden, layers)
        yield from matrix("kv_a", latent + rope, hidden, layers, split="whole")
        yield Weight("kv_a_norm", latent, 1, layers)
        yield from matrix("kv_b", heads * (nope + value), latent, layers)
        yield from matrix("o", hidden, heads * value, layers)
        yield from mlp(hidden, inner, dense, layer)
        yield from matrix("router", experts, hidden, sparse, split="whole", quantized=False)
        yield from mlp(hidden, moe * shared, sparse, layer)
        share, copies = used / experts, sparse * experts
        yield from matrix("experts.gate", moe, hidden, copies, used=share)
        yield from matrix("experts.up", moe, hidden, copies, used=share)
        yield from matrix("experts.down", hidden, moe, copies, used=share)

    return facts_of(
        reader,
        sizes,
        weights(),
        (KvLayers(layers, 1, latent + rope),),
        inner=inner,
        attention_width=heads * (nope + rope + value) // 2,
        experts=experts,
        experts_used=used,
    )
