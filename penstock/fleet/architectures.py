"""config.json → ModelFacts, for each architecture: which tensors there are, and what a layer keeps of a
token.

The shapes are those of transformers' modules; tests/fleet/test_facts.py compares the sums with its own, on
the meta device. Reading is model/config.py's, with its bounds, so that a folder of somebody else's cannot
ask for more than a model can be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from penstock.core.errors import ModelLoadError
from penstock.files import read_json, shown
from penstock.model.config import Reader

from .facts import KvLayers, ModelFacts, Split, Weight


@dataclass(frozen=True, slots=True)
class _Layer:
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


def _matrix(
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


def _attention(sizes: _Sizes, layer: _Layer) -> Iterator[Weight]:
    hidden, layers = sizes.hidden, sizes.layers
    q, kv = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    yield from _matrix("q", q, hidden, layers, bias=layer.qkv_bias)
    yield from _matrix("k", kv, hidden, layers, bias=layer.qkv_bias, split="kv_heads")
    yield from _matrix("v", kv, hidden, layers, bias=layer.qkv_bias, split="kv_heads")
    yield from _matrix("o", hidden, q, layers, bias=layer.out_bias)
    if layer.qk_norm:
        yield Weight("qk_norm", sizes.head_dim, 1, 2 * layers)


def _mlp(hidden: int, inner: int, layers: int, layer: _Layer) -> Iterator[Weight]:
    if layer.gated:
        yield from _matrix("gate", inner, hidden, layers, bias=layer.mlp_bias)
    yield from _matrix("up", inner, hidden, layers, bias=layer.mlp_bias)
    yield from _matrix("down", hidden, inner, layers, bias=layer.mlp_bias)


def _frame(sizes: _Sizes, layer: _Layer, tied: bool) -> Iterator[Weight]:
    """Embedding, norms and head. A tied head is the embedding, which is then multiplied, too."""
    yield Weight("embedding", sizes.vocab, sizes.hidden, 1, "ranks", multiplied=tied)
    norms = layer.norms * sizes.layers + layer.final_norm
    yield Weight("norm", sizes.hidden, 1, norms * (2 if layer.norm_bias else 1))
    if not tied:
        yield from _matrix("head", sizes.vocab, sizes.hidden, 1, bias=layer.head_bias, quantized=False)


@dataclass(frozen=True, slots=True)
class _Sizes:
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @classmethod
    def of(cls, reader: Reader) -> _Sizes:
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


def _groups(windows: tuple[int | None, ...], heads: int, elements: int) -> tuple[KvLayers, ...]:
    """Layers of a kind together; full attention first."""
    kinds = sorted(set(windows), key=lambda window: (window is not None, window or 0))
    return tuple(KvLayers(windows.count(window), heads, elements, window) for window in kinds)


def _facts(
    reader: Reader,
    sizes: _Sizes,
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


def _dense(layer: _Layer) -> Callable[[Reader], ModelFacts]:
    """A decoder whose layers are attention and an MLP."""

    return lambda reader: _decoder(reader, _Sizes.of(reader), layer)


def _decoder(
    reader: Reader, sizes: _Sizes, layer: _Layer, beside: tuple[Weight, ...] = (), **more: Any
) -> ModelFacts:
    inner = reader.integer(layer.intermediate)
    windows = layer.windows(reader, sizes.layers)

    def weights() -> Iterator[Weight]:
        yield from _frame(sizes, layer, reader.flag("tie_word_embeddings", layer.tied))
        yield from _attention(sizes, layer)
        yield from _mlp(sizes.hidden, inner, sizes.layers, layer)
        yield from beside

    kv = _groups(windows, sizes.kv_heads, 2 * sizes.head_dim)
    return _facts(reader, sizes, weights(), kv, inner=inner, **more)


def _window(reader: Reader, layers: int) -> tuple[int | None, ...]:
    """The same window in every layer, or none."""
    given = reader.raw.get("sliding_window") is not None
    return (reader.integer("sliding_window") if given else None,) * layers


def _qwen_window(reader: Reader, layers: int) -> tuple[int | None, ...]:
    return _window(reader, layers) if reader.flag("use_sliding_window", False) else (None,) * layers


def _listed_window(default_pattern: int) -> Callable[[Reader, int], tuple[int | None, ...]]:
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


_GEMMA2 = _Layer(norms=4, tied=True, windows=_listed_window(2))
_GEMMA3 = _Layer(norms=4, tied=True, qk_norm=True, windows=_listed_window(6))
_QWEN3 = _Layer(qk_norm=True, windows=_qwen_window)
_PHI = _Layer(
    qkv_bias=True, out_bias=True, mlp_bias=True, gated=False, norms=1, norm_bias=True, head_bias=True
)
_NEOX = _Layer(qkv_bias=True, out_bias=True, mlp_bias=True, gated=False, norm_bias=True)


def _llama(reader: Reader) -> ModelFacts:
    bias = reader.flag("attention_bias", False)
    layer = _Layer(qkv_bias=bias, out_bias=bias, mlp_bias=reader.flag("mlp_bias", False))
    return _decoder(reader, _Sizes.of(reader), layer)


def _opt(reader: Reader) -> ModelFacts:
    sizes = _Sizes.of(reader)
    positions = reader.integer("max_position_embeddings", default=2048)
    layer = _Layer(
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        gated=False,
        norm_bias=True,
        tied=True,
        intermediate="ffn_dim",
    )
    positional = Weight("positions", positions + 2, sizes.hidden, multiplied=False)
    return _decoder(reader, sizes, layer, beside=(positional,))


def _falcon(reader: Reader) -> ModelFacts:
    hidden, heads = reader.integer("hidden_size", "n_embed"), reader.integer("num_attention_heads", "n_head")
    layers = reader.integer("num_hidden_layers", "n_layer")
    if hidden % heads:
        raise reader.refuse("hidden_size", f"is not a multiple of its {heads} heads")
    new = reader.flag("new_decoder_architecture", False)
    if new:
        kv_heads = reader.integer("num_kv_heads", "n_head_kv", default=heads)
    else:
        kv_heads = 1 if reader.flag("multi_query", True) else heads
    sizes = _Sizes(hidden, layers, heads, kv_heads, hidden // heads, reader.integer("vocab_size"))
    bias = reader.flag("bias", False)
    norms = 2 if new or not reader.flag("parallel_attn", True) else 1
    if new and reader.integer("num_ln_in_parallel_attn", default=2) == 1:
        norms = 1
    layer = _Layer(bias, bias, bias, gated=False, norms=norms, norm_bias=True, tied=True)
    inner = reader.integer("ffn_hidden_size", default=4 * hidden)

    def weights() -> Iterator[Weight]:
        yield from _frame(sizes, layer, reader.flag("tie_word_embeddings", True))
        yield from _attention(sizes, layer)
        yield from _mlp(hidden, inner, layers, layer)

    return _facts(
        reader, sizes, weights(), _groups((None,) * layers, kv_heads, 2 * sizes.head_dim), inner=inner
    )


def _experts(
    reader: Reader, *, count: str, inner: int, layer: _Layer, router_bias: bool = False, sinks: bool = False
) -> ModelFacts:
    """A decoder whose MLPs are experts, of which a router chooses some for each token."""
    sizes = _Sizes.of(reader)
    experts, used = reader.integer(count), reader.integer("num_experts_per_tok")
    if used > experts:
        raise reader.refuse("num_experts_per_tok", f"is more than the {experts} experts")
    share, copies = used / experts, sizes.layers * experts
    windows = layer.windows(reader, sizes.layers)

    def weights() -> Iterator[Weight]:
        yield from _frame(sizes, layer, reader.flag("tie_word_embeddings", layer.tied))
        yield from _attention(sizes, layer)
        if sinks:
            yield Weight("sinks", sizes.heads, 1, sizes.layers, "ranks")
        yield from _matrix(
            "router", experts, sizes.hidden, sizes.layers, bias=router_bias, split="whole", quantized=False
        )
        bias = layer.mlp_bias
        yield from _matrix("experts.gate", inner, sizes.hidden, copies, bias=bias, used=share)
        yield from _matrix("experts.up", inner, sizes.hidden, copies, bias=bias, used=share)
        yield from _matrix("experts.down", sizes.hidden, inner, copies, bias=bias, used=share)

    return _facts(
        reader,
        sizes,
        weights(),
        _groups(windows, sizes.kv_heads, 2 * sizes.head_dim),
        inner=inner,
        experts=experts,
        experts_used=used,
    )


def _mixtral(reader: Reader) -> ModelFacts:
    inner = reader.integer("intermediate_size")
    return _experts(reader, count="num_local_experts", inner=inner, layer=_Layer(windows=_window))


def _qwen3_moe(reader: Reader) -> ModelFacts:
    if reader.raw.get("mlp_only_layers") or reader.integer("decoder_sparse_step", default=1) != 1:
        raise reader.refuse("mlp_only_layers", "layers without experts are not counted yet")
    return _experts(reader, count="num_experts", inner=reader.integer("moe_intermediate_size"), layer=_QWEN3)


def _gpt_oss(reader: Reader) -> ModelFacts:
    layer = _Layer(qkv_bias=True, out_bias=True, mlp_bias=True, windows=_listed_window(2))
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


def _deepseek(reader: Reader) -> ModelFacts:
    """Multi-head latent attention: the cache has one latent for all heads, whole on every rank."""
    hidden, layers = reader.integer("hidden_size"), reader.integer("num_hidden_layers")
    heads, vocab = reader.integer("num_attention_heads"), reader.integer("vocab_size")
    nope, rope = reader.integer("qk_nope_head_dim"), reader.integer("qk_rope_head_dim")
    value, latent = reader.integer("v_head_dim"), reader.integer("kv_lora_rank")
    sizes = _Sizes(hidden, layers, heads, heads, nope + rope, vocab)
    experts, used = reader.integer("n_routed_experts"), reader.integer("num_experts_per_tok")
    shared = reader.integer("n_shared_experts", default=1)
    replaced = reader.raw.get("first_k_dense_replace")
    dense = min(layers, reader.integer("first_k_dense_replace")) if replaced else 0
    inner, moe = reader.integer("intermediate_size"), reader.integer("moe_intermediate_size")
    sparse, layer = layers - dense, _Layer()

    def weights() -> Iterator[Weight]:
        yield from _frame(sizes, layer, reader.flag("tie_word_embeddings", False))
        if reader.raw.get("q_lora_rank") is not None:
            q_latent = reader.integer("q_lora_rank")
            yield from _matrix("q_a", q_latent, hidden, layers, split="whole")
            yield Weight("q_a_norm", q_latent, 1, layers)
            yield from _matrix("q_b", heads * (nope + rope), q_latent, layers)
        else:
            yield from _matrix("q", heads * (nope + rope), hidden, layers)
        yield from _matrix("kv_a", latent + rope, hidden, layers, split="whole")
        yield Weight("kv_a_norm", latent, 1, layers)
        yield from _matrix("kv_b", heads * (nope + value), latent, layers)
        yield from _matrix("o", hidden, heads * value, layers)
        yield from _mlp(hidden, inner, dense, layer)
        yield from _matrix("router", experts, hidden, sparse, split="whole", quantized=False)
        yield from _mlp(hidden, moe * shared, sparse, layer)
        share, copies = used / experts, sparse * experts
        yield from _matrix("experts.gate", moe, hidden, copies, used=share)
        yield from _matrix("experts.up", moe, hidden, copies, used=share)
        yield from _matrix("experts.down", hidden, moe, copies, used=share)

    return _facts(
        reader,
        sizes,
        weights(),
        (KvLayers(layers, 1, latent + rope),),
        inner=inner,
        attention_width=heads * (nope + rope + value) // 2,
        experts=experts,
        experts_used=used,
    )


def _encoder(reader: Reader) -> ModelFacts:
    """XLM-RoBERTa and BERT with their pooler: encoders, which keep no cache."""
    sizes = _Sizes.of(reader)
    inner = reader.integer("intermediate_size")
    hidden, layers = sizes.hidden, sizes.layers
    layer = _Layer(True, True, True, gated=False, norm_bias=True, final_norm=False)

    def weights() -> Iterator[Weight]:
        positions, types = reader.integer("max_position_embeddings"), reader.integer("type_vocab_size")
        rows = sizes.vocab + positions + types
        yield Weight("embedding", rows, hidden, 1, "ranks", multiplied=False)
        yield Weight("norm", hidden, 1, 2 * (2 * layers + 1))
        yield from _attention(sizes, layer)
        yield from _mlp(hidden, inner, layers, layer)
        yield from _matrix("pooler", hidden, hidden, 1, bias=True, split="whole", quantized=False)

    facts = _facts(reader, sizes, weights(), (), inner=inner, kind="embedding")
    # two positions are kept for padding
    return replace(facts, context_length=max(1, facts.context_length - 2))


def _vision(name: str, rows: int, columns: int, copies: int = 1, *, bias: bool = True) -> Iterator[Weight]:
    """A layer that sees images: never quantised, and no work for text."""
    yield from _matrix(name, rows, columns, copies, bias=bias, quantized=False, multiplied=False)


def _qwen3_vl(reader: Reader) -> ModelFacts:
    text, vision = _part(reader, "text_config"), _part(reader, "vision_config")
    facts = _decoder(text, _Sizes.of(text), _QWEN3, kind="vision-language")
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


def _gemma3(reader: Reader) -> ModelFacts:
    text, vision = _part(reader, "text_config"), _part(reader, "vision_config")
    facts = _decoder(text, _Sizes.of(text), _GEMMA3, kind="vision-language")
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


_ARCHITECTURES: Mapping[str, Callable[[Reader], ModelFacts]] = {
    "BertModel": _encoder,
    "DeepseekV3ForCausalLM": _deepseek,
    "FalconForCausalLM": _falcon,
    "GPTNeoXForCausalLM": _dense(_NEOX),
    "Gemma2ForCausalLM": _dense(_GEMMA2),
    "Gemma3ForCausalLM": _dense(_GEMMA3),
    "Gemma3ForConditionalGeneration": _gemma3,
    "GptOssForCausalLM": _gpt_oss,
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _dense(_Layer(windows=_window)),
    "MixtralForCausalLM": _mixtral,
    "OPTForCausalLM": _opt,
    "Phi3ForCausalLM": _dense(_Layer(windows=_window)),
    "PhiForCausalLM": _dense(_PHI),
    "Qwen2ForCausalLM": _dense(_Layer(qkv_bias=True, windows=_qwen_window)),
    "Qwen3ForCausalLM": _dense(_QWEN3),
    "Qwen3MoeForCausalLM": _qwen3_moe,
    "Qwen3VLForConditionalGeneration": _qwen3_vl,
    "XLMRobertaModel": _encoder,
}


def known_architectures() -> tuple[str, ...]:
    """Values of config.json's `architectures` that can be planned."""
    return tuple(_ARCHITECTURES)


def read_facts(path: Path, raw: Mapping[str, Any], name: str = "") -> ModelFacts:
    """Facts of one config.json.

    Args:
        path: for errors.
        raw: its contents.
        name: what the model is called; the folder if not given.

    Raises:
        ModelLoadError: names file and key; for an architecture that is not known, too.
    """
    names = raw.get("architectures")
    known = [each for each in names if each in _ARCHITECTURES] if isinstance(names, list) else []
    if not known:
        given = ", ".join(map(shown, names[:3])) if isinstance(names, list) and names else "none"
        raise ModelLoadError(
            f"{shown(path)}: architecture {given} is not known to the planner.",
            advice=f"Known architectures: {', '.join(_ARCHITECTURES)}.",
        )
    reader = Reader(path, raw)
    facts = _ARCHITECTURES[known[0]](reader)
    fields: dict[str, Any] = {"architecture": known[0], "native": _native(reader)}
    if name:
        fields["name"] = name
    return replace(facts, **fields)


_NATIVE = {"fp8": "fp8", "mxfp4": "mxfp4", "awq": "awq", "gptq": "gptq"}


def _native(reader: Reader) -> str:
    """The scheme that a checkpoint is published in."""
    given = reader.raw.get("quantization_config")
    if given is None:
        return "none"
    method = given.get("quant_method") if isinstance(given, dict) else given
    if not isinstance(method, str) or method not in _NATIVE:
        raise reader.refuse(
            "quantization_config",
            f"method {shown(method)} is not known to the planner",
            f"Known: {', '.join(_NATIVE)}; plan the original checkpoint with --quantization.",
        )
    return "fp8-block" if isinstance(given, dict) and given.get("weight_block_size") else _NATIVE[method]


def read_directory(directory: Path) -> ModelFacts:
    """Facts of a model's folder. Raises ModelLoadError as read_facts does, and for a file that is not
    there."""
    return read_facts(directory / "config.json", read_json(directory / "config.json"))
