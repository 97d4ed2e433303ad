"""Every entry of a device's table of operations against the specification, on that device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from penstock.kernels.attention import KVCache, KVCacheSpec, Span, StepLayout
from penstock.kernels.create import create_operations
from penstock.kernels.operations import Draw, LayerWeights, Operations
from penstock.kernels.reference import reference_operations

_HEADS, _KV_HEADS, _DIM = 32, 8, 128


def check_table(device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """One row for each entry and size: the largest error, over what is allowed: half a percent of the largest
    number and two units in the last place; of integers none."""
    fast = create_operations(device, dtype, quantized=True)
    slow = reference_operations(device, dtype)
    rows = []
    with torch.inference_mode():
        for entry, got, want in _pairs(fast, slow):
            error = float((got.float() - want.float()).abs().max())
            scale = float(want.float().abs().max())
            allowed = scale * max(0.005, 2 * torch.finfo(want.dtype).eps) if want.is_floating_point() else 0.0
            ok = bool(torch.isfinite(got.float()).all()) and error <= allowed
            rows.append({"entry": entry, "error": error, "allowed": allowed, "ok": ok})
    return rows


def _pairs(fast: Operations, slow: Operations) -> Iterator[tuple[str, Tensor, Tensor]]:
    device, dtype = fast.device, fast.dtype
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator).to(dtype)

    for width in (1024, 4096):
        x, weight = normal(33, width), normal(width).abs() + 0.5
        yield f"rms_norm of {width}", fast.rms_norm(x, weight, 1e-6), slow.rms_norm(x, weight, 1e-6)
        bias = normal(width)
        made = (table.layer_norm(x, weight, bias, 1e-5) for table in (fast, slow))
        yield f"layer_norm of {width}", *made
    angles = normal(33, 1, _DIM // 2).float()
    rotation = (
        torch.cat((angles.cos(), angles.cos()), -1).to(dtype),
        torch.cat((-angles.sin(), angles.sin()), -1).to(dtype),
    )
    x, weight = normal(33, _HEADS, _DIM), normal(_HEADS, _DIM).abs() + 0.5
    turned = [table.rotate(x.clone(), rotation, weight, 1e-6) for table in (fast, slow)]
    yield "norm and rotation", *turned
    x = normal(33, 2 * 3072)
    yield "silu gate", fast.gate("silu")(x), slow.gate("silu")(x)
    yield "gelu", fast.activation("gelu")(x), slow.activation("gelu")(x)
    yield from _attention(fast, slow, normal)
    yield from _stack(fast, slow, normal)
    weight = normal(1000, 1152)
    for scheme in (None, *fast.schemes):
        if scheme is not None and dtype == torch.float32 and device.type == "cuda":
            continue
        product, oracle = fast.linear(weight, scheme), slow.linear(weight, scheme)
        for rows in (1, 17, 64, 256):
            x = normal(rows, 1152)
            yield f"linear {scheme or ''} of {rows} rows", product(x, None), oracle(x, None)
    logits = normal(7, 151_936 if device.type == "cuda" else 4096) * 4
    draws = [
        Draw(0.1, 0.0), Draw(0.3, 1.0), Draw(0.9, 0.7, top_p=0.9), Draw(0.5, 1.3, top_k=40),
        Draw(0.2, 0.8, min_p=0.05), Draw(0.7, 1.0, top_k=5, top_p=0.5), Draw(0.99, 1.0),
    ]  # fmt: skip
    tokens = [torch.tensor(table.sample(logits, draws)[0]) for table in (fast, slow)]
    yield "sampled tokens", *tokens
    said = [table.logprobs(logits, tokens[1].tolist(), [5] * 7) for table in (fast, slow)]
    yield "logprobs", *(torch.tensor([[each.logprob, *each.logprobs] for each in rows]) for rows in said)
    yield "ranks", *(torch.tensor([[each.rank, *each.best] for each in rows]) for rows in said)


def _stack(fast: Operations, slow: Operations, normal: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Two layers in one call, beside the same in single calls of the same table, bit for bit; and beside the
    specification's attention and products, a norm and a sum later."""
    if fast.stack is None:
        return
    hidden, inner, size = 256, 512, 16
    heads, kv_heads = 4, 2
    shapes = {"qkv": ((heads + 2 * kv_heads) * _DIM, hidden), "out": (hidden, heads * _DIM)}
    shapes |= {"gate_up": (2 * inner, hidden), "down": (hidden, inner)}
    weights = [
        {name: normal(*shape) * shape[1] ** -0.5 for name, shape in shapes.items()}
        | {name: normal(hidden).abs() + 0.5 for name in ("attention_norm", "mlp_norm")}
        | {"head_norm": normal(heads + kv_heads, _DIM).abs() + 0.5}
        for _ in range(2)
    ]
    spec = KVCacheSpec(2, kv_heads, _DIM, size, fast.dtype)
    layout = StepLayout([Span(0, 20, [0, 1]), Span(0, 1, [2])], size)
    angles = normal(21, 1, _DIM // 2).float()
    turn = (angles.cos().repeat(1, 1, 2).to(fast.dtype), angles.sin().repeat(1, 1, 2).to(fast.dtype))
    turn[1][..., : _DIM // 2] *= -1
    x, eps, scale = normal(21, hidden), 1e-6, _DIM**-0.5

    def alone(table: Operations) -> Tensor:
        cache, step, y = KVCache(spec, 3, fast.device), table.attention(spec).prepare(layout), x.clone()
        for each, layer in zip(weights, cache.layers, strict=True):
            normed = table.rms_norm(y, each["attention_norm"], eps)
            parts = table.linear(each["qkv"], None)(normed, None).view(21, -1, _DIM)
            turned = table.rotate(parts[:, : heads + kv_heads], turn, each["head_norm"], eps)
            q, k, v = turned[:, :heads], turned[:, heads:], parts[:, heads + kv_heads :]
            attended = step(q, k, v, *layer, scale=scale).view(21, -1)
            y = y + table.linear(each["out"], None)(attended, None)
            gated = table.gate("silu")(
                table.linear(each["gate_up"], None)(table.rms_norm(y, each["mlp_norm"], eps), None)
            )
            y = y + table.linear(each["down"], None)(gated, None)
        return y

    layers = [
        LayerWeights(
            each["attention_norm"],
            (fast.linear(each["qkv"], None), None),
            each["head_norm"],
            (fast.linear(each["out"], None), None),
            each["mlp_norm"],
            (fast.linear(each["gate_up"], None), None),
            (fast.linear(each["down"], None), None),
            None,
        )
        for each in weights
    ]
    stack = fast.stack(layers, eps, scale)
    step = fast.attention(spec).prepare(layout)
    done = None if stack is None else stack.run(x.clone(), turn, step, KVCache(spec, 3, fast.device).layers)
    if done is None:
        return
    yield "layers in one call, beside single calls", done, alone(fast)
    yield "layers in one call", done, alone(slow)


def _attention(fast: Operations, slow: Operations, normal: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Prompts, decoding rows of ragged lengths, and both in one step; with a window and without."""
    size = 16
    spec = KVCacheSpec(1, _KV_HEADS, _DIM, size, fast.dtype)
    lengths = (1, 15, 16, 17, 130, 700 if fast.device.type == "cuda" else 140)
    firsts = [sum(-(-n // size) + 1 for n in lengths[:place]) for place in range(len(lengths))]
    tables = [
        list(range(first, first - (-length // size) + 1))
        for first, length in zip(firsts, lengths, strict=True)
    ]
    num_blocks = max(max(table) for table in tables) + 1
    prompts = [Span(0, n, table) for n, table in zip(lengths, tables, strict=True)]
    tokens = [Span(n, 1, table) for n, table in zip(lengths, tables, strict=True)]
    mixed = [tokens[0], tokens[5], Span(lengths[4] - 64, 64, tables[4])]
    for window in (None, 100):
        caches = [KVCache(spec, num_blocks, fast.device) for _ in range(2)]
        backends = [table.attention(spec) for table in (fast, slow)]
        for name, spans in (("prompts", prompts), ("decode", tokens), ("mixed", mixed)):
            layout = StepLayout(spans, size)
            q, k, v = normal(layout.num_tokens, _HEADS + 2 * _KV_HEADS, _DIM).split(
                [_HEADS, _KV_HEADS, _KV_HEADS], dim=1
            )
            made = [
                backend.prepare(layout)(q, k, v, *cache.layers[0], scale=_DIM**-0.5, window=window)
                for backend, cache in zip(backends, caches, strict=True)
            ]
            yield f"attention, {name}{'' if window is None else f', window {window}'}", *made
