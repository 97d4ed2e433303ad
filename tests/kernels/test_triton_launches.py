"""What hosts start is what compilers ahead of time are given: kernels are replaced by something that only
writes down how they are called, for the shapes of published models, on each kind of device.

Triton compiles a kernel anew for other types of arguments, other constants, another number of warps or
stages; and for integers that are 1, or multiples of 16, unless the kernel says `do_not_specialize`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.gpu.compile import TARGETS, Target, reachable
from penstock.kernels.attention import KVCache, KVCacheSpec, Span, StepLayout
from penstock.kernels.capability import has_fp8, has_products
from penstock.kernels.operations import Draw
from penstock.kernels.triton import attention, gates, norms, quantized, rotation, sampling
from penstock.kernels.triton.launch import OPTIONS
from penstock.kernels.triton.registry import KERNELS, Configuration, Kernel, device_kind

from .triton import needs_triton

pytestmark = needs_triton
NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
}
Call = tuple[str, Configuration]

#: hidden, inner, query heads, heads of keys, head, rotated, whether heads have norms, vocabulary
MODELS = {
    "qwen3-0.6b": (1024, 3072, 16, 8, 128, 128, True, 151_936),
    "qwen3-32b": (5120, 25_600, 64, 8, 128, 128, True, 151_936),
    "qwen2.5-0.5b": (896, 4864, 14, 2, 64, 64, False, 151_936),
    "llama-3.1-405b": (16_384, 53_248, 128, 8, 128, 128, False, 128_256),
    "mistral-7b": (4096, 14_336, 32, 8, 128, 128, False, 32_768),
    "falcon-7b": (4544, 18_176, 71, 1, 64, 64, False, 65_024),
    "phi-2": (2560, 10_240, 32, 32, 80, 32, False, 51_200),
    "pythia-1b": (2048, 8192, 8, 8, 256, 64, False, 50_304),
    "gpt-neox-20b": (6144, 24_576, 64, 64, 96, 24, False, 50_432),
}


class Started:
    """Stands where a kernel was, and checks how it is started."""

    def __init__(self, kernel: Kernel, target: Target) -> None:
        self.calls = 0
        self._name = kernel.name
        function = kernel.function()
        self._parameters = function.arg_names
        self._free = set(function.kwargs["do_not_specialize"] or ())
        known = reachable(kernel, target)
        self._constants = {name for each in known for name in each.constants}
        self._known = [self._form(each) for each in known]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert all(0 < count < 1 << 31 for count in grid)
        return self._start

    @staticmethod
    def _form(each: Configuration) -> tuple[Any, ...]:
        types = {name: kind for name, kind in each.signature.items() if kind != "constexpr"}
        whole = {name for name in types if name in each.divisible}
        return types, dict(each.constants), whole, each.num_warps, each.num_stages

    def _start(self, *args: Any, num_warps: int = 4, num_stages: int = 3, **more: Any) -> None:
        assert {name: more.pop(name, None) for name in OPTIONS} == OPTIONS
        given = dict(zip(self._parameters, args, strict=False)) | more
        assert list(given) == self._parameters, "an argument is missing"
        self.calls += 1
        types: dict[str, str] = {}
        constants: dict[str, Any] = {}
        whole = set[str]()
        for name, value in given.items():
            if isinstance(value, Tensor):
                assert value.data_ptr() % 16 == 0, f"{name} is not aligned: another kernel"
                types[name] = f"*{NAMES[value.dtype]}"
            elif value is None or isinstance(value, (bool, str)) or name in self._constants:
                constants[name] = value
            elif isinstance(value, (int, np.integer)):
                assert -(1 << 31) <= value < 1 << 31, f"{name}={value} would be an i64"
                types[name] = "i32"
                if name not in self._free:
                    assert value != 1, f"{name}=1 would be a constant"
                    if value % 16 == 0:
                        whole.add(name)
            else:
                types[name] = "fp32"
        form = (types, constants, whole, num_warps, num_stages)
        close = [each for each in self._known if each[:2] == form[:2]]
        assert form in self._known, f"{self._name} is started as {form}, of which {close} are known"


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> Target:
    found: Target = TARGETS[request.param]
    return found


@pytest.fixture
def started(target: Target, monkeypatch: pytest.MonkeyPatch) -> dict[str, Started]:
    made = {kernel.name: Started(kernel, target) for kernel in KERNELS}
    for kernel in KERNELS:
        module = importlib.import_module(f"penstock.kernels.triton.{kernel.module}")
        monkeypatch.setattr(module, kernel.function_name, made[kernel.name])
    kind = device_kind(target.shared, target.known.capability)
    monkeypatch.setattr(attention, "device_kind", lambda *of: kind)
    where = quantized.architecture(target.known.capability)
    monkeypatch.setattr(quantized, "_device", lambda device: (where, 108))
    return made


def layer(target: Target, dtype: torch.dtype, model: tuple[int, ...], rows: int) -> None:
    """All that the layers, and the sampler, of this model start for so many rows."""
    hidden, inner, heads, kv_heads, dim, width, normed, vocabulary = model
    x, weight = torch.zeros(rows, hidden, dtype=dtype), torch.zeros(hidden, dtype=dtype)
    norms.rms_norm(x, weight, 1e-6)
    norms.add_rms_norm(x, x, weight, 1e-6)
    norms.layer_norm(x, weight, weight, 1e-6)
    gates.activation("gelu")(torch.zeros(rows, inner, dtype=dtype))
    gates.gate("silu")(torch.zeros(rows, 2 * inner, dtype=dtype))
    qkv = torch.zeros(rows, heads + 2 * kv_heads, dim, dtype=dtype)
    angles = torch.zeros(rows, 1, width, dtype=dtype), torch.zeros(rows, 1, width, dtype=dtype)
    own = torch.zeros(heads + kv_heads, dim, dtype=dtype) if normed else None
    rotation.rotate(qkv[:, : heads + kv_heads], angles, own, 1e-6)
    size = 16
    spec = KVCacheSpec(1, kv_heads, dim, size, dtype)
    cache = KVCache(spec, 2, torch.device("cpu")).layers[0]
    slots = torch.zeros(rows, dtype=torch.int32)
    if width == dim and has_products(target.known):
        rotation.rotate_and_write(qkv, angles, own, 1e-6, heads, cache, slots)
    if has_products(target.known):
        backend = attention.TritonAttention(spec, torch.device("cpu"))
        q, k, v = qkv.split([heads, kv_heads, kv_heads], 1)
        spans = [
            Span(20_000, 1, [0] * 1251),
            *([Span(0, rows - 1, [1] * (1 + rows // size))] if rows > 1 else []),
        ]
        reserved = backend.reserve(rows, 2000)
        reserved.update(StepLayout(spans[:1], size))
        for step in (backend.prepare(StepLayout(spans, size)), reserved):
            for window in (None, 4096):
                step(q, k, v, *cache, scale=1.0, window=window)
    draws = [Draw(0.5, 0.0), Draw(0.5, 1.0), Draw(0.5, 1.0, top_k=4), Draw(0.5, 1.0, top_p=0.5)]
    for kind in {dtype, torch.float32}:
        logits = torch.zeros(1, vocabulary, dtype=kind).expand(4, -1).contiguous()
        sampling.choose(logits, draws)
        sampling.logprobs(logits, [0] * 4, [2] * 4)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_started_is_known(name: str, target: Target, started: dict[str, Started]) -> None:
    dtypes = [torch.float16, torch.float32]
    if target.name != "sm_75":
        dtypes.append(torch.bfloat16)
    for dtype in dtypes:
        for rows in (1, 3, 48):
            layer(target, dtype, MODELS[name], rows)
    idle = {name for name, each in started.items() if not each.calls}
    alone = set() if has_products(target.known) else {"attend", "merge", "write_kv"}
    assert idle == {"quantized_product", "sum_of_parts", "round_to_fp8"} | alone


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantised_products_that_are_started_are_known(
    scheme: str, target: Target, started: dict[str, Started]
) -> None:
    if not has_products(target.known):
        pytest.skip("torch multiplies there")
    for outs, ins in ((1024, 1024), (64, 8192), (6144, 256)):
        matrix = quantized.QuantizedMatrix(torch.zeros(outs, ins, dtype=torch.bfloat16), scheme)
        for dtype in quantized.TYPES:
            bias = torch.zeros(outs, dtype=dtype)
            for rows in (1, 2, 16, 17, 32, 48, 64, 65, 256):
                x = torch.zeros(rows, ins, dtype=dtype)
                for each in (bias, None):
                    matrix(x, each)
    assert started["quantized_product"].calls
    assert started["sum_of_parts"].calls


def test_rows_in_fp8_that_are_started_are_known(target: Target, started: dict[str, Started]) -> None:
    if not has_fp8(target.known):
        pytest.skip("has no fp8")
    for width in (896, 1024, 4096, 14_336, 25_600):
        for rows in (1, 16):
            quantized.round_to_fp8(torch.zeros(rows, width, dtype=torch.bfloat16))
    assert started["round_to_fp8"].calls
