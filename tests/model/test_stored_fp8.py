"""Checkpoints stored in fp8: every published form of scales gives the weights that a plain loop restores, and
what is not served is refused by name."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from penstock.core.errors import ModelLoadError
from penstock.engine.config import EngineConfig
from penstock.engine.preview import preview
from penstock.kernels.quantization import FP8, restore_fp8
from penstock.model.config import load_config
from penstock.model.stored_fp8 import stored_fp8
from tests.engine.test_wiring import built
from tests.model.checkpoints import make_checkpoint
from tests.model.test_loader import load, logits

BLOCK = (32, 20)
"""Divides neither 48 nor 80, the sizes of the small models, both ways."""


def compressed(strategy: str, **weights: Any) -> dict[str, Any]:
    """As llm-compressor writes it."""
    chosen = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, **weights}
    activations = {"num_bits": 8, "type": "float", "dynamic": True, "strategy": "token"}
    group = {"targets": ["Linear"], "weights": chosen, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "config_groups": {"group_0": group},
    }


QWEN = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": list(BLOCK),
    "modules_to_not_convert": ["lm_head"],
}
STATIC = {"quant_method": "fp8", "activation_scheme": "static"}
FORMS = {
    "blocks": ("block", "weight_scale_inv", torch.float32, QWEN),
    "tensors": ("tensor", "weight_scale", torch.float32, STATIC),
    "channels": ("channel", "weight_scale", torch.bfloat16, compressed("channel")),
    "compressed-tensors": ("tensor", "weight_scale", torch.bfloat16, compressed("tensor")),
    "compressed-blocks": (
        "block",
        "weight_scale",
        torch.float32,
        compressed("block", block_structure=list(BLOCK)),
    ),
}


def blocked(weight: torch.Tensor, strategy: str) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    rows, depth = weight.shape
    return {"block": BLOCK, "channel": (1, depth), "tensor": (rows, depth)}[strategy]


def stored(weight: torch.Tensor, strategy: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, scales [down, across]), block by block."""
    height, width = blocked(weight, strategy)
    down, across = (-(-size // step) for size, step in zip(weight.shape, (height, width), strict=True))
    values, scales = torch.empty(weight.shape, dtype=FP8), torch.empty(down, across, dtype=dtype)
    for i in range(down):
        for j in range(across):
            part = slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width)
            scales[i, j] = weight[part].abs().max() / 448.0
            values[part] = (weight[part] / scales[i, j].float()).clamp(-448, 448).to(FP8)
    return values, scales


def oracle(values: torch.Tensor, scales: torch.Tensor, strategy: str) -> torch.Tensor:
    """One number after the other, in float32."""
    height, width = blocked(values, strategy)
    out = torch.empty(values.shape)
    for i, row in enumerate(values.float()):
        for j, value in enumerate(row):
            out[i, j] = value * scales[i // height, j // width].float()
    return out


def make(directory: Path, form: str, architecture: str = "qwen3") -> tuple[Path, Path]:
    """(a checkpoint in this form, one with the numbers that it stands for)"""
    strategy, suffix, dtype, config = FORMS[form]
    here = make_checkpoint(directory / "fp8", architecture, tie_word_embeddings=False)
    plain = make_checkpoint(directory / "plain", architecture, tie_word_embeddings=False)
    numbers = load_file(here / "model.safetensors")
    restored = dict(numbers)
    for name, weight in list(numbers.items()):
        if weight.ndim < 2 or "embed" in name or "head" in name:
            continue
        numbers[name], scales = stored(weight, strategy, dtype)
        restored[name] = oracle(numbers[name], scales, strategy)
        base = name.removesuffix("weight")
        numbers[base + suffix] = scales.view(()) if form == "tensors" else scales
        if config is STATIC:
            numbers[base + "input_scale"] = torch.tensor(0.5)
    for path, tensors in ((here, numbers), (plain, restored)):
        (path / "model.safetensors").unlink()
        save_file(tensors, path / "model.safetensors")
    describe(here, config)
    return here, plain


def describe(directory: Path, quantization: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": quantization}))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_model_that_it_stands_for(form: str, tmp_path: Path) -> None:
    here, plain = make(tmp_path, form)
    assert torch.equal(logits(load(here)), logits(load(plain)))
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(logits(load(here, dtype)), logits(load(plain, dtype)))


def test_rows_that_are_fused_in_another_order_keep_their_scales(tmp_path: Path) -> None:
    here, plain = make(tmp_path, "blocks", "gpt-neox")
    assert torch.equal(logits(load(here)), logits(load(plain)))


def test_large_weights_are_restored_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.kernels.quantization._CHUNK", 300)
    weight = torch.randn(70, 45)
    for strategy in ("block", "channel", "tensor"):
        values, scales = stored(weight, strategy, torch.float32)
        again = restore_fp8(values, scales, BLOCK if strategy == "block" else None, torch.float32)
        assert torch.equal(again, oracle(values, scales, strategy))
        assert (again - weight).abs().max() < weight.abs().max() / 16  # half a step of three bits


def test_an_engine_serves_one_and_says_what_it_does(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    here, plain = make(tmp_path, "blocks")
    with caplog.at_level(logging.INFO, "penstock.engine"), built(model=str(here)) as engine:
        info = engine.info
    assert "the checkpoint's fp8 weights are restored to float32" in caplog.text
    config = EngineConfig(model=str(here), dtype="float32")
    need = preview(config, device="cpu", name="fp8")
    with built(model=str(plain)) as engine:
        assert engine.info.parameters == info.parameters
    assert need.weights == pytest.approx(4 * info.parameters, rel=0.5)  # packing pads such small layers


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            "without",
            r"'model.layers.0.mlp.up_proj.weight_scale', the scale of '.*up_proj.weight', is missing",
        ),
        ("shape", r"weight_scale_inv': scales of shape \[3\]; need \[\], \[80\] or \[80, 1\], or \[3, 3\]"),
        ("dtype", r"up_proj.weight_scale_inv' has dtype int8, which is not supported"),
        ("undescribed", r"proj.weight' has dtype float8_e4m3fn, which is not supported"),
        ("another", r"unexpected tensors 'model.layers.0.mlp.up_proj.zero_point'"),
    ],
)
def test_scales_that_do_not_fit(change: str, why: str, tmp_path: Path) -> None:
    here, _ = make(tmp_path, "blocks")
    numbers = load_file(here / "model.safetensors")
    scale = "model.layers.0.mlp.up_proj.weight_scale_inv"
    if change == "without":
        del numbers[scale]
    elif change == "shape":
        numbers[scale] = torch.ones(3)
    elif change == "dtype":
        numbers[scale] = numbers[scale].to(torch.int8)
    elif change == "undescribed":
        describe(here, None)
    else:
        numbers["model.layers.0.mlp.up_proj.zero_point"] = torch.ones(1)
    (here / "model.safetensors").unlink()
    save_file(numbers, here / "model.safetensors")
    with pytest.raises(ModelLoadError, match=why):
        load(here)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("awq", r"\(here 'awq'\) are not supported"),
        ({"quant_method": "gptq"}, r"\(here 'gptq'\) are not supported, but for fp8"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt='e5m2': of fp8, e4m3"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size=\[128\]: must be two"),
        ({"quant_method": "fp8", "weight_block_size": [128, True]}, "must be two positive integers"),
        ({"quant_method": "compressed-tensors"}, "config_groups is missing"),
        ({**compressed("tensor"), "config_groups": {"g": 1}}, "config_groups.'g'.weights is missing"),
        ({**compressed("tensor"), "format": "pack-quantized"}, "format 'pack-quantized'; supported are"),
        (compressed("tensor", num_bits=4), "type 'float' with 4 bits"),
        (compressed("tensor", type="int"), "type 'int' with 8 bits"),
        (compressed("tensor", symmetric=False), "supported are symmetric floats"),
        (compressed("group"), "strategy 'group'; supported: tensor, channel, block"),
        (compressed("block", block_structure=[0, 128]), r"block_structure=\[0, 128\]"),
        ({**compressed("tensor"), "sparsity_config": {"format": "sparse-24"}}, "'sparse-24' is not"),
        ({**compressed("tensor"), "transform_config": {"config_groups": {}}}, "rotated weights"),
    ],
)
def test_what_is_not_served_is_named(given: Any, why: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=why):
        stored_fp8(given)
    describe(make_checkpoint(tmp_path / "model", "llama"), given)
    with pytest.raises(ModelLoadError, match=rf"config\.json: quantization_config: .*{why}") as caught:
        load_config(tmp_path / "model")
    assert "Use the original checkpoint" in caught.value.advice
