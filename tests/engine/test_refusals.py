"""What an engine cannot compute with is refused at the start, with what is supported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from penstock.core.errors import DeviceOutOfMemory, MemoryBudgetError, ModelLoadError, StartupError
from penstock.engine.build import build_engine
from penstock.engine.config import EngineConfig
from penstock.engine.executor.torch_executor import TorchExecutor
from tests.engine.build import checkpoint


@pytest.mark.parametrize(
    ("field", "value", "supported"),
    [
        ("dtype", "float64", "auto, bfloat16, float16, half, float32, float"),
        ("dtype", "int8", "auto, bfloat16, float16, half, float32, float"),
        ("device", "tpu", "auto, cpu, cuda"),
        ("device", "cuda:1", "auto, cpu, cuda"),
        ("quantization", "awq", "none, int8, w8a8, int4, fp8"),
    ],
)
def test_an_unsupported_dtype_or_device_lists_the_supported_ones(
    field: str, value: str, supported: str
) -> None:
    with pytest.raises(StartupError, match=f"--{field} '{value}' is not supported") as caught:
        EngineConfig(**{field: value})
    assert caught.value.param == f"--{field}"
    assert caught.value.advice == f"Choose from: {supported}."


def test_quantisation_wants_a_dtype_that_it_computes_in() -> None:
    with pytest.raises(StartupError, match=r"int8 computes in bfloat16 or float32 on a CPU") as caught:
        build_engine(EngineConfig(model="demo", device="cpu", dtype="float16", quantization="int8"))
    assert caught.value.param == "--dtype"


def test_a_device_that_is_not_there_names_one_that_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(StartupError, match=r"torch sees no CUDA device.*--device cpu") as caught:
        build_engine(EngineConfig(model=str(checkpoint()), device="cuda"))
    assert caught.value.param == "--device"


@pytest.mark.parametrize("dtype", ["float64", "float8_e4m3fn", "int8"])
def test_a_checkpoint_of_an_unsupported_dtype_is_named(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "model"
    shutil.copytree(checkpoint(), path)
    config = json.loads((path / "config.json").read_text())
    config.pop("torch_dtype", None)
    (path / "config.json").write_text(json.dumps({**config, "dtype": dtype}))
    with pytest.raises(ModelLoadError, match=f"{dtype!r}: is not supported.*float32"):
        build_engine(EngineConfig(model=str(path), device="cpu"))


def test_a_first_step_without_memory_is_refused_with_the_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    compute: Callable[..., object] = TorchExecutor._compute

    def crowded(self: TorchExecutor, items: object) -> object:
        compute(self, items)
        raise DeviceOutOfMemory("CUDA out of memory")

    monkeypatch.setattr(TorchExecutor, "_compute", crowded)
    small = EngineConfig(
        model=str(checkpoint()), device="cpu", kv_cache_memory_bytes=1 << 20, max_model_len=64
    )
    with pytest.raises(MemoryBudgetError, match=r"first step: CUDA out of memory.*--kv-cache-memory-bytes"):
        build_engine(small)
