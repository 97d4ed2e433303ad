"""The whole way of an engine on a GPU, from its flags to its tokens, on a torch.cuda that is played: tensors
that are asked for on the GPU are made on the CPU, and Triton's kernels are interpreted, with the tiles of an
H100. What only a GPU's branch does is done here: staging, graphs, steps queued ahead, blocks on the host.
While a step is queued, nothing may ask the device for an answer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from penstock.core.executor import Ticket
from penstock.core.plan import Plan
from penstock.engine import build, hardware
from penstock.engine.executor.torch_executor import TorchExecutor
from penstock.engine.loop import EngineLoop
from penstock.engine.messages import Add
from penstock.model import weights
from penstock.model.staging import Staging
from tests.engine.cuda import Played, play_cuda
from tests.engine.fake import spec
from tests.engine.test_wiring import built
from tests.kernels.triton import needs_triton, quiet
from tests.model.test_stored_fp8 import make

pytestmark = [
    needs_triton,
    quiet,
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the contract suite runs on it"),
]
H100 = SimpleNamespace(
    name="NVIDIA H100 (played)",
    major=9,
    minor=0,
    total_memory=80 << 30,
    multi_processor_count=2,
    shared_memory_per_block_optin=227 << 10,
)


#: Of tensors: what a host that asks for it waits for.
_ANSWERS = {"item", "tolist", "cpu", "__bool__", "__int__", "__float__", "__index__", "nonzero", "unique"}


class OnCpu(TorchFunctionMode):
    """What is asked for on a GPU is made on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.queueing = False
        """Whether nothing may wait for the device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        assert not (self.queueing and name in _ANSWERS), f"{name}() makes the host wait for the device"

        def here(device: torch.device) -> torch.device:
            return torch.device("cpu") if device.type == "cuda" else device

        args, kwargs = tree_map_only(torch.device, here, (args, kwargs or {}))
        return func(*args, **kwargs)


class Serial:
    """A pool of one thread, this one: the mode is a thread's own."""

    def __init__(self, workers: int) -> None:
        pass

    def __enter__(self) -> Serial:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def map(self, work: Callable[[int], Any], items: Iterable[int]) -> Iterator[Any]:
        return map(work, items)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Played]:
    played = play_cuda(monkeypatch)
    for name, value in {
        "is_available": lambda: True,
        "get_device_properties": lambda device: H100,
        "get_device_capability": lambda device: (9, 0),
        "get_arch_list": lambda: ["sm_90"],
        "mem_get_info": lambda device: (79 << 30, 80 << 30),
        "max_memory_reserved": lambda device: 1 << 20,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda device: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(hardware, "_bandwidth", lambda device: 3e12)
    monkeypatch.setattr(hardware, "_flops", lambda device, dtype: 8e14)
    monkeypatch.setattr(weights, "ThreadPoolExecutor", Serial)
    monkeypatch.setattr(build, "warm_prompts", lambda device, *most: (9,))  # the interpreter is slow
    monkeypatch.setattr(build, "warm_head", lambda model, most: None)
    with OnCpu() as mode:
        submit = TorchExecutor.submit

        def queued(self: TorchExecutor, plan: Plan) -> Ticket:
            mode.queueing = self._stream.asynchronous
            try:
                return submit(self, plan)
            finally:
                mode.queueing = False

        monkeypatch.setattr(TorchExecutor, "submit", queued)
        yield played


def answers(loop: EngineLoop) -> dict[str, list[int]]:
    loop.handle(Add(spec("greedy", prompt=(3, 14, 15, 9), max_tokens=3, temperature=0.0, ignore_eos=True)))
    loop.handle(Add(spec("drawn", prompt=(5, 6), max_tokens=3, temperature=0.9, seed=7, ignore_eos=True)))
    tokens: dict[str, list[int]] = {}
    while loop.has_work:
        for event in loop.step():
            assert event.failure is None, event.failure
            tokens.setdefault(event.request, []).extend(event.tokens)
    return tokens


def test_an_engine_on_a_gpu_from_its_flags_to_its_tokens(
    gpu: Played, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)
    flags = {"max_num_seqs": 2, "max_num_batched_tokens": 16, "max_model_len": 32, "block_size": 16}
    with built(device="cuda", kv_cache_memory_bytes=1 << 18, kv_offloading_size=0.001, **flags) as engine:
        assert (engine.info.device, engine.info.dtype) == ("cuda", "float32")
        executor: Any = engine.loop.executor
        assert executor.model.operations.name == "triton"
        assert len(gpu.runtime.registered) == 2 * executor.model.config.num_layers, "blocks on the host"
        assert engine.chore is not None
        assert len(gpu.graphs) == 2, "one request, and two"
        tokens = answers(engine.loop)
        assert sum(graph.replays for graph in gpu.graphs) >= 2
        assert not engine.chore(), "there is nothing left to record"
    assert not gpu.runtime.registered
    assert "Triton's kernels cannot be used" not in caplog.text
    assert "captured graphs of 1, 2 decoding requests" in caplog.text
    assert "Memory (cuda)" in caplog.text + capsys.readouterr().err
    with built(**flags) as engine:
        assert answers(engine.loop) == tokens


def test_weights_that_are_stored_in_fp8_are_restored_on_the_gpu(gpu: Played, tmp_path: Path) -> None:
    """They go there as they are stored."""
    stored, plain = make(tmp_path, "blocks")
    flags = {"max_num_seqs": 2, "max_num_batched_tokens": 16, "max_model_len": 32, "block_size": 16}
    sent: list[torch.dtype] = []
    send = Staging.send

    def noted(self: Staging, tensor: torch.Tensor) -> torch.Tensor:
        sent.append(tensor.dtype)
        return send(self, tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Staging, "send", noted)
        with built(model=str(stored), device="cuda", enforce_eager=True, **flags) as engine:
            assert engine.chore is None
            tokens = answers(engine.loop)
            layers = engine.loop.executor._model.config.num_layers  # type: ignore[attr-defined]
    assert sent.count(torch.float8_e4m3fn) == 7 * layers
    with built(model=str(plain), **flags) as engine:
        assert answers(engine.loop) == tokens


@pytest.mark.parametrize("scheme", ["int4", "fp8"])
def test_weights_are_quantised_on_the_gpu(gpu: Played, scheme: str, caplog: pytest.LogCaptureFixture) -> None:
    flags = {"max_num_seqs": 2, "max_num_batched_tokens": 16, "max_model_len": 32, "block_size": 16}
    with built(device="cuda", dtype="bfloat16", quantization=scheme, **flags) as engine:
        assert engine.info.quantization == scheme
        tokens = answers(engine.loop)
    assert {name: len(some) for name, some in tokens.items()} == {"greedy": 3, "drawn": 3}
    assert sum(graph.replays for graph in gpu.graphs) >= 2
    assert "cannot be used" not in caplog.text
