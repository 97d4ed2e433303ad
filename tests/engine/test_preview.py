"""What is reckoned before a start is what the start finds."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from penstock.core.errors import ModelLoadError, StartupError
from penstock.engine.build import _dtype as as_built
from penstock.engine.config import EngineConfig
from penstock.engine.preview import _dtype, preview
from penstock.kernels.capability import Device
from penstock.kernels.create import create_operations
from penstock.model.config import load_config
from penstock.model.hub import resolve_model
from penstock.model.loader import load_model
from penstock.model.together import share
from tests.engine.build import checkpoint


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("quantization", ["none", "int8", "w8a8", "int4"])
@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_weights_are_reckoned_to_a_percent(dtype: str, quantization: str, load_format: str) -> None:
    config = EngineConfig(model="demo", dtype=dtype, quantization=quantization, load_format=load_format)
    path = resolve_model("demo")
    operations = create_operations(
        torch.device("cpu"), getattr(torch, dtype), quantized=quantization != "none"
    )
    if quantization != "none" and quantization not in operations.schemes:
        pytest.skip("no CPU kernels here")
    model = load_model(
        path,
        load_config(path),
        operations,
        load_format=load_format,  # type: ignore[arg-type]
        quantization=None if quantization == "none" else quantization,
    )
    reckoned = preview(config, device="cpu", name="demo").weights
    assert reckoned == pytest.approx(model.weight_bytes, rel=0.01)


@pytest.mark.parametrize(
    ("wanted", "checkpoint", "device", "chosen"),
    [
        ("auto", "float16", "cpu", "bfloat16"),
        ("auto", "float16", "cuda", "float16"),
        ("auto", "float32", "cpu", "float32"),
        ("float16", "float32", "cpu", "float16"),
        ("bfloat16", "float16", "cuda", "bfloat16"),
    ],
)
def test_the_type_is_the_one_that_the_engine_chooses(
    wanted: str, checkpoint: str, device: str, chosen: str
) -> None:
    model = cast(Any, SimpleNamespace(dtype=checkpoint))
    assert _dtype(wanted, model, device) == chosen
    there = {"float16": torch.float16, "float32": torch.float32, "bfloat16": torch.bfloat16}
    assert as_built(wanted, model, Device(device)) == there[chosen]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "phi", "falcon"])
@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_weights_of_tiny_models_are_not_reckoned_too_small(architecture: str, quantization: str) -> None:
    """Layers of some dozens of outputs are mostly padding; models that anybody serves have next to none."""
    directory = checkpoint(architecture)
    operations = create_operations(torch.device("cpu"), torch.float32, quantized=quantization != "none")
    if quantization != "none" and quantization not in operations.schemes:
        pytest.skip("no CPU kernels here")
    scheme = None if quantization == "none" else quantization
    loaded = load_model(directory, load_config(directory), operations, quantization=scheme)
    config = EngineConfig(model=str(directory), dtype="float32", quantization=quantization)
    reckoned = preview(config, device="cpu", name="tiny").weights
    assert loaded.weight_bytes * 0.99 <= reckoned <= loaded.weight_bytes * 1.6


def test_the_cache_is_that_of_one_request_up_to_what_is_of_use() -> None:
    need = preview(
        EngineConfig(model="demo", max_model_len=1000, max_num_seqs=4), device="cpu", name="demo", replicas=3
    )
    blocks = -(-1000 // 16)
    assert need.least == blocks * need.block
    assert need.most == 4 * 4 * blocks * need.block
    assert need.given is None
    assert need.replicas == 3


def test_the_longest_context_that_fits_needs_one_block() -> None:
    need = preview(EngineConfig(model="demo", max_model_len=-1), device="cpu", name="demo")
    assert need.least == need.block


def test_what_a_start_would_refuse_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="--max-model-len 9999 is longer than the model's context"):
        preview(EngineConfig(model="demo", max_model_len=9999), device="cpu", name="demo")
    with pytest.raises(ModelLoadError, match="does not exist"):
        preview(EngineConfig(model=str(tmp_path / "missing")), device="cpu", name="x")
    demo = resolve_model("demo")
    (tmp_path / "config.json").write_bytes((demo / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ModelLoadError, match="cannot be read"):
        preview(EngineConfig(model=str(tmp_path)), device="cpu", name="x")


def test_it_needs_no_torch() -> None:
    code = (
        "import sys; from penstock.engine.preview import preview;"
        "from penstock.engine.config import EngineConfig;"
        "preview(EngineConfig(model='demo'), device='cpu', name='x'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_graphs_and_offload_are_reckoned_too() -> None:
    plain = preview(EngineConfig(model="demo", enforce_eager=True), device="cuda", name="demo")
    graphs = preview(EngineConfig(model="demo"), device="cuda", name="demo")
    assert plain.beside == 0
    assert graphs.fixed - plain.fixed == graphs.beside > 13 * (16 << 20)
    offload = EngineConfig(model="demo", kv_offloading_size=0.25)
    assert (
        preview(offload, device="cuda", name="demo").beside == graphs.beside
    )  # the host's, not the device's
    here = preview(offload, device="cpu", name="demo")
    assert 0 <= (1 << 28) - here.beside < here.block
    shares = share([here, replace(here, name="other", beside=0)], device="cpu", available=1 << 33)
    assert "beside" in shares.render()
    assert "beside" not in share([plain], device="cuda", available=1 << 36).render()
