"""Bytes and FLOP of each kernel of a step, and what they take at a device's measured limits: arithmetic.

A kernel takes the longer of its bytes over the bandwidth and its FLOP over the rate of products; in a perfect
world they overlap. Weights and caches are read once, activations written by one kernel and read by the next.
16 bits for everything; weights of linear layers alone have fewer where they are quantised.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.checkpoint import SHAPES

WIDTH = 2
"""Bytes of an activation, a key, a value and a plain weight."""


@dataclass(frozen=True, slots=True)
class Limit:
    """What somebody has measured on a device. Bytes/s of copying, FLOP/s of products in bfloat16."""

    name: str
    bandwidth: float
    flops: float


LIMITS = (
    Limit("A100", 0.90 * 2.039e12, 267.9e12),
    Limit("H100", 0.90 * 3.35e12, 794.5e12),
    Limit("MI300X", 4.177e12, 781.9e12),
)
SOURCES = (
    "Products in bfloat16: 267.9, 794.5 and 781.9 TFLOP/s, the largest that were measured in "
    '"Maximum Achievable Matmul FLOPS" of stas00/ml-engineering (compute/accelerator): A100 SXM, H100 '
    "SXM, MI300X.",
    "Copies: MI300X 4.18 TB/s, AMD's threshold for BabelStream's copy in its acceptance tests. A100 "
    "SXM (80 GB) and H100 SXM: 90 % of the data sheets' 2.04 and 3.35 TB/s. That share is assumed: "
    "`python -m benchmarks.gpu.run` measures both limits of its device, and its shares are of them.",
)
MODELS = {"Qwen3 0.6B": "qwen3-0.6b", "Qwen3 8B": "qwen3-8b", "Qwen3 32B": "qwen3-32b"}
CONTEXT = 1024
LOADS = (
    ("decode, 1 request", 1, False),
    ("decode, 64 requests", 64, False),
    ("prompt of 2,048 tokens", 2048, True),
)
"""Words, tokens of the step, whether they are one prompt. Decoding requests have a context of CONTEXT."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a kernel does in a step, in all layers."""

    kernel: str
    bytes: float
    flops: float

    def seconds(self, limit: Limit) -> float:
        """At best."""
        return max(self.bytes / limit.bandwidth, self.flops / limit.flops)


def step(shape: str, tokens: int, prompt: bool, weight_bits: float = 16) -> Iterator[Work]:
    """The kernels of a step in order, each summed over the layers."""
    config: dict[str, Any] = SHAPES[shape]
    layers, hidden, inner = config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"]
    dim = config["head_dim"]
    q, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    sampled = 1 if prompt else tokens

    def moved(*elements: int) -> float:
        return float(layers * tokens * sum(elements) * WIDTH)

    def product(name: str, ins: int, outs: int) -> Work:
        weight = layers * ins * outs * weight_bits / 8
        return Work(name, weight + moved(ins, outs), 2.0 * layers * tokens * ins * outs)

    yield Work("norms and sums (2 per layer)", moved(6 * hidden), 0.0)
    yield product("query, key, value product", hidden, q + 2 * kv)
    yield Work("head norm, rotation, write of keys and values", moved(2 * q + 4 * kv), 0.0)
    # each token reads the keys and values before it; a prompt's tokens share what one tile reads
    cached = tokens if prompt else tokens * CONTEXT
    pairs = tokens * (tokens + 1) / 2 if prompt else tokens * (CONTEXT + 1)
    yield Work("attention", layers * cached * 2.0 * kv * WIDTH + moved(2 * q), 4.0 * layers * pairs * q)
    yield product("attention's output product", q, hidden)
    yield product("gate and up product", hidden, 2 * inner)
    yield Work("silu gate", moved(3 * inner), 0.0)
    yield product("down product", inner, hidden)
    vocab = config["vocab_size"]
    head = vocab * hidden * WIDTH + sampled * (hidden + vocab) * WIDTH
    yield Work("output layer", float(head), 2.0 * sampled * vocab * hidden)
    yield Work("sampler", float(sampled * vocab * WIDTH), 0.0)
