"""The parts of the models against their formulas and against transformers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from penstock.kernels.create import create_operations
from penstock.model.layers import LayerNorm, Linear, RMSNorm, rotary_frequencies
from penstock.model.model_config import RopeConfig
from tests.kernels.tables import CPU, TABLES, table


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_linear_is_the_same_packed_or_not(dtype: torch.dtype, bias: bool, rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(128, 40, generator=generator).to(dtype)
    vector = torch.randn(128, generator=generator).to(dtype) if bias else None
    x = torch.randn(rows, 40, generator=generator).to(dtype)
    operations = create_operations(CPU, dtype)
    linear = Linear(operations, weight, vector)
    assert linear.copied == operations.copies_weights
    assert (linear.in_features, linear.out_features) == (40, 128)
    torch.testing.assert_close(linear(x), F.linear(x, weight, vector))
    assert linear.nbytes == (128 * 40 + (128 if bias else 0)) * dtype.itemsize


@pytest.mark.parametrize("name", TABLES)
def test_rms_norm_rounds_like_transformers(name: str) -> None:
    x = 3 * torch.randn(50, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = torch.randn(96, generator=torch.Generator().manual_seed(1)).bfloat16()
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    assert torch.equal(RMSNorm(table(name, torch.bfloat16), weight, 1e-6)(x), weight * normed.to(x.dtype))


@pytest.mark.parametrize("name", TABLES)
def test_norms_of_heads(name: str) -> None:
    operations = table(name, torch.float32)
    x = torch.randn(5, 3, 8)
    weight = torch.rand(3, 8)
    want = torch.stack([RMSNorm(operations, weight[head], 1e-6)(x[:, head]) for head in range(3)], dim=1)
    still = torch.ones(5, 1, 8), torch.zeros(5, 1, 8)
    torch.testing.assert_close(operations.rotate(x.clone(), still, weight, 1e-6), want)
    shared, bias = torch.rand(8), torch.rand(8)
    want = F.layer_norm(x, (8,), shared, bias, 1e-5)
    torch.testing.assert_close(LayerNorm(operations, shared, bias, 1e-5)(x), want)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("width", [8, 4])
def test_rotation_turns_pairs_as_complex_numbers(name: str, width: int) -> None:
    x, angles = torch.randn(6, 3, 8), torch.rand(6, 1, width // 2)
    cos = torch.cat((angles.cos(), angles.cos()), -1)
    sin = torch.cat((-angles.sin(), angles.sin()), -1)
    half = width // 2
    turned = torch.complex(x[..., :half], x[..., half:width]) * torch.polar(torch.ones_like(angles), angles)
    want = torch.cat((turned.real, turned.imag, x[..., width:]), -1)
    torch.testing.assert_close(table(name, torch.float32).rotate(x, (cos, sin), None, 0.0), want)


@dataclass
class Config:
    """What transformers' formulas look at."""

    rope_parameters: dict[str, Any]
    max_position_embeddings: int = 4096
    head_dim: int = 64
    hidden_size: int = 256
    num_attention_heads: int = 4
    extra: dict[str, Any] = field(default_factory=dict)

    def standardize_rope_params(self) -> None:
        """Nothing to do."""


@pytest.mark.parametrize(
    ("kind", "scaling"),
    [
        ("linear", {"factor": 3.0}),
        ("llama3", {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
        ("llama3", {"factor": 32.0, "low_freq_factor": 1.5, "high_freq_factor": 2.0}),
        ("yarn", {"factor": 4.0}),
        ("yarn", {"factor": 0.5}),
        ("yarn", {"factor": 16.0, "beta_fast": 24, "beta_slow": 2, "truncate": False}),
        ("yarn", {"factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.0}),
        ("yarn", {"factor": 4.0, "attention_factor": 1.25}),
    ],
)
@pytest.mark.parametrize("partial", [1.0, 0.5])
@pytest.mark.parametrize("original", [1024, 8192])
def test_frequencies(kind: str, scaling: dict[str, Any], partial: float, original: int) -> None:
    scaling = scaling | {"original_max_position_embeddings": original}
    config = Config({"rope_theta": 1e6, "rope_type": kind, "partial_rotary_factor": partial, **scaling})
    want, factor = ROPE_INIT_FUNCTIONS[kind](config, None)
    got, got_factor = rotary_frequencies(RopeConfig(1e6, kind, scaling, partial), int(64 * partial), 4096)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    assert got_factor == pytest.approx(factor)


def test_default_frequencies() -> None:
    got, factor = rotary_frequencies(RopeConfig(theta=100.0), 4, 10)
    torch.testing.assert_close(got, torch.tensor([1.0, 0.1]))
    assert factor == 1.0
