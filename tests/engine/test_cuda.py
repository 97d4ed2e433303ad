"""CUDA's part of the engine, on a torch.cuda that is played (tests/engine/cuda.py), with Triton's kernels
interpreted: graphs, events, pinned memory, copies to the host."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.gpu import run as gpu_run
from benchmarks.gpu import timing
from penstock.core.cost import Coefficients
from penstock.core.executor import Ticket
from penstock.core.plan import Plan
from penstock.engine import build
from penstock.engine.executor.create import (
    check_memory,
    forget_measurements,
    stream_of,
    warm_head,
    warm_prompts,
    warm_sampler,
)
from penstock.engine.executor.cuda import CudaCapture, CudaStream
from penstock.engine.executor.graphs import DecodeGraphs
from penstock.engine.executor.offload import HostCache
from penstock.engine.executor.torch_executor import TorchExecutor
from penstock.kernels.attention import AttentionBackend, KVCache, KVCacheSpec, Span, StepLayout
from penstock.kernels.create import create_operations
from penstock.kernels.operations import Draw
from penstock.kernels.triton import quantized
from penstock.kernels.triton.schedule import Shape, Spans, task_map
from penstock.model.causal_lm import CausalLM
from penstock.model.config import load_config
from penstock.model.graph_sizes import graph_bytes
from penstock.model.loader import load_model
from penstock.model.staging import Staging
from tests.engine.build import checkpoint, torch_executor
from tests.engine.cuda import Event, Played, play_cuda
from tests.engine.test_executor_contract import drive, spec
from tests.engine.test_offload import plan
from tests.engine.test_wiring import built
from tests.kernels.triton import needs_triton, quiet

pytestmark = [
    needs_triton,
    quiet,
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the contract suite runs on it"),
]
CPU = torch.device("cpu")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Played:
    return play_cuda(monkeypatch)


def on_triton() -> tuple[CausalLM, KVCache, AttentionBackend]:
    """A tiny model whose kernels are all Triton's, and a cache of 33 blocks of 4."""
    path = checkpoint()
    operations = create_operations(CPU, torch.float32, attention="triton")
    model = load_model(path, load_config(path), operations)
    spec = model.cache_spec(4)
    return model, KVCache(spec, 33, CPU), operations.attention(spec)


def test_graphs_of_tritons_kernels_change_no_token(cuda: Played) -> None:
    """Two steps in flight: every step of decode is a replay of recorded operators and kernels, without a line
    of the model's Python; few numbers go to the device, and one answer comes back."""
    model, cache, attention = on_triton()
    executor = TorchExecutor(model, cache, attention, CPU, Coefficients(), stream=CudaStream(CPU))
    graphs = DecodeGraphs(model, cache, attention, CudaCapture(CPU), (2,), (2,), 8, 32)
    graphs.prepare()
    executor.record(graphs)
    copies: list[int] = []
    submit = executor.submit

    def counted(plan: Plan) -> Ticket:
        before = cuda.pinned
        ticket = submit(plan)
        if all(item.tokens == 1 for item in plan.items):
            copies.append(cuda.pinned - before)
        return ticket

    executor.submit = counted  # type: ignore[method-assign]
    specs = [
        spec("a", (3, 14, 15), 4, temperature=0.0),
        spec("b", (1, 2), 3, temperature=0.8, seed=7),
    ]
    expected = drive(torch_executor(32, 4), specs, 1)[0]
    tokens, ends, _ = drive(executor, specs, 2)
    assert tokens == expected
    assert sum(graph.replays for graph in cuda.graphs) >= 3
    assert 0 < max(copies) <= 7
    assert all(end.device_seconds > 0 for end in ends.values())
    executor.close()


def test_the_hosts_blocks_are_pinned_until_they_are_closed(cuda: Played) -> None:
    cache = KVCache(KVCacheSpec(2, 1, 8, 4, torch.float32), 6, CPU)
    stream = CudaStream(CPU)
    host = HostCache(cache, 8, stream, pinned=True)
    assert len(cuda.runtime.registered) == 4
    for layer in cache.layers:
        for part in layer:
            part.copy_(torch.randn(part.shape))
    before = [part.clone() for layer in cache.layers for part in layer]
    host.store([(0, 3), (5, 4)])
    for layer in cache.layers:
        for part in layer:
            part.zero_()
    host.load([(3, 0), (4, 5)])
    for part, old in zip((part for layer in cache.layers for part in layer), before, strict=True):
        assert torch.equal(part[[0, 5]], old[[0, 5]])
        assert not part[1:5].any()
    waited: list[object] = []
    stream.wait = waited.append  # type: ignore[method-assign]
    host.close()
    assert len(waited) == 1, "copies may be under way"
    assert not cuda.runtime.registered


def test_a_graph_is_what_was_recorded_and_runs_no_python(cuda: Played) -> None:
    given, calls = torch.ones(3), []

    def work() -> torch.Tensor:
        calls.append(1)
        halves = given.view(3, 1) * 2.0
        halves.add_(1.0)
        return halves.sum(1)

    capture = CudaCapture(CPU)
    graph = capture(work)
    own: Any = capture._stream
    assert (own.waited, cuda.current.waited) == (1, 1), "either stream may have work for the other"
    output = graph.output
    given.copy_(torch.tensor([5.0, 6.0, 7.0]))
    graph.replay()
    assert graph.output is output
    assert output.tolist() == [11.0, 13.0, 15.0]
    assert len(calls) == 2, "once to find workspaces, once to record"


def test_what_waits_for_the_device_cannot_be_recorded(cuda: Played) -> None:
    """It is the end of the capture that fails then, and leaves its own stream."""
    before = cuda.current
    with pytest.raises(RuntimeError, match="previous error during capture") as caught:
        CudaCapture(CPU)(lambda: torch.ones(3).nonzero())
    assert "not permitted when stream is capturing" in str(caught.value.__context__)
    assert cuda.current is before


def test_a_model_that_cannot_be_recorded_is_computed_call_by_call(
    cuda: Played, caplog: pytest.LogCaptureFixture
) -> None:
    """The device is as it was: the engine goes on without graphs, and says what has broken the capture."""
    model, cache, attention = on_triton()
    plain = model.logits
    model.logits = lambda hidden: plain(hidden).mul_(hidden.sum().item() * 0 + 1)  # type: ignore[method-assign]
    graphs = DecodeGraphs(model, cache, attention, CudaCapture(CPU), (1, 2), (1, 2), 8, 32)
    with caplog.at_level(logging.WARNING):
        graphs.prepare()
    assert (graphs.sizes, graphs.missing) == ((), 0)
    assert "no graph of 2 decoding requests" in caplog.text
    assert "not permitted when stream is capturing" in caplog.text


def test_the_plan_has_what_every_graph_keeps(cuda: Played) -> None:
    """Graphs share memory that one of them has left; what they give out, and are filled with, they keep."""
    model, cache, attention = on_triton()
    sizes = (1, 2, 4, 8)
    graphs = DecodeGraphs(model, cache, attention, CudaCapture(CPU), sizes, sizes, 8, 32)
    graphs.prepare()
    kept = {
        part.untyped_storage().data_ptr(): part.untyped_storage().nbytes()
        for graph in graphs._graphs.values()
        for part in (graph.recorded.output, graph.step._tables)  # type: ignore[attr-defined]
    }
    assert len(kept) == 2 * len(sizes)
    own = 4 * model.config.vocab_size + 4 * 8
    assert sum(kept.values()) <= graph_bytes(sizes, 0, own)
    assert sum(kept.values()) >= sum(sizes) * own


def test_memory_that_is_not_pinned_harms_nobody_later(cuda: Played) -> None:
    """CUDA remembers that it has refused, and would say so of the next kernel."""
    cuda.runtime.refuses = True
    cache = KVCache(KVCacheSpec(1, 1, 8, 4, torch.float32), 6, CPU)
    host = HostCache(cache, 8, CudaStream(CPU), pinned=True)
    assert torch.ones(1).item() == 1.0
    host.close()


@pytest.mark.parametrize("by_itself", [True, False])
def test_samplers_kernels_are_compiled_before_the_first_request(by_itself: bool) -> None:
    """Each of them: they are compiled when they are first started."""
    plain = torch_executor(4, 4).model
    drawn: list[tuple[torch.dtype, list[str]]] = []

    def choose(logits: torch.Tensor, draws: Sequence[Draw]) -> tuple[torch.Tensor, torch.Tensor]:
        assert len(logits) == len(draws)
        ways = ["greedy" if not each.temperature else "order" if each.top_p < 1 else "id" for each in draws]
        drawn.append((logits.dtype, ways))
        return torch.zeros(len(draws), dtype=torch.int64), torch.zeros(len(draws))

    model = copy(plain)
    model.operations = replace(plain.operations, choose=choose if by_itself else None)
    warm_sampler(model)
    assert drawn == [(torch.float32, ["greedy", "id", "order"])] * (2 if by_itself else 0)


@pytest.mark.parametrize("where", list(quantized.SHARED_MEMORY))
@pytest.mark.parametrize("bits", [8, 4])
def test_no_product_is_compiled_for_a_request(where: str, bits: int) -> None:
    """Whatever a step's rows, the probe and the prompts after it have started the kernel: layers of Qwen3 8B
    and their head."""
    prompts = warm_prompts(torch.device("cuda"), 8192, 40_960)

    def started(rows: int, outs: int, groups: int) -> tuple[object, ...]:
        tile = quantized.choose(rows, outs, groups, bits, where, 132)
        return tile.outs, tile.rows, tile.warps, tile.stages, tile.parts > 1

    for outs, groups in ((6144, 32), (4096, 32), (24_576, 32), (4096, 96)):
        met = {started(rows, outs, groups) for rows in (1, 8, *prompts)}
        assert {started(rows, outs, groups) for rows in range(1, 8193)} <= met
    model = copy(torch_executor(4, 4).model)
    heads: list[int] = []
    model.device = torch.device("cuda")
    model.logits = lambda hidden: heads.append(len(hidden)) or hidden  # type: ignore[method-assign]
    zeros = torch.zeros
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "zeros", lambda size, dtype, device: zeros(size, dtype=dtype))
        warm_head(model, 256)
    met = {started(rows, 151_936, 32) for rows in (1, *heads)}
    assert {started(rows, 151_936, 32) for rows in range(1, 257)} <= met


def test_warming_stays_within_what_a_step_may_have() -> None:
    gpu = torch.device("cuda")
    assert warm_prompts(CPU, 8192, 4096) == ()
    assert warm_prompts(gpu, 20, 4096) == (17, 20)
    assert warm_prompts(gpu, 8192, 10) == (9,)
    assert warm_prompts(gpu, 8192, 1) == ()
    longest = warm_prompts(gpu, 8192, 4096)[-1]
    shape = Shape(kv_heads=8, group=4, dim=128, decode_queries=16, chunk_queries=128, keys=64, programs=264)
    spans = Spans.of(StepLayout([Span(longest, 1, range(64))], 16))
    assert len(task_map(spans, None, shape).merges), "the context of the token after it is merged"
    executor = torch_executor(4, 4)
    for layer in executor._cache.layers:
        for part in layer:
            part.fill_(3.0)
    executor.probe(longest)
    for layer in executor._cache.layers:
        assert all(bool((part[:4] == 3.0).all()) for part in layer), "a plan's block was written to"


def test_an_engine_starts_every_kernel_before_it_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    probe = TorchExecutor.probe

    def noted(self: TorchExecutor, tokens: int = 8) -> None:
        computed.append(tokens)
        probe(self, tokens)

    monkeypatch.setattr(TorchExecutor, "probe", noted)
    monkeypatch.setattr(build, "warm_prompts", lambda device, *most: most)
    with built(max_num_seqs=2, max_num_batched_tokens=24, max_model_len=40):
        assert computed == [8, 24, 40]


def test_weights_go_through_pinned_memory(cuda: Played) -> None:
    given = torch.arange(100, dtype=torch.float32)
    assert torch.equal(Staging(CPU, half=64).send(given), given)
    assert cuda.pinned == 2


def test_memory_is_compared_with_the_plan(
    cuda: Played, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    device = torch.device("cuda")
    assert isinstance(stream_of(device), CudaStream)
    given_back: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given_back.append("cache"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: given_back.append("peak"))
    forget_measurements(device)
    assert given_back == ["cache", "peak"]
    budget = plan(4, (1, 2))
    planned = budget.weights + budget.activations + budget.graphs + budget.kv_cache
    for taken, level in ((planned, logging.INFO), (planned + 1, logging.WARNING)):
        caplog.clear()
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device, taken=taken: taken)
        with caplog.at_level(logging.INFO, "penstock.engine"):
            check_memory(device, budget, 0.0)
        assert [record.levelno for record in caplog.records] == [level]


def test_the_benchmark_measures_by_events(cuda: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name, major, minor, total_memory, multi_processor_count = "Played", 9, 0, 80 << 30, 132

    monkeypatch.setattr(timing, "on_gpu", lambda device: True)
    monkeypatch.setattr(gpu_run, "on_gpu", lambda device: True)
    monkeypatch.setattr(timing, "SPOIL", 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    done: list[int] = []
    assert timing.seconds_of(lambda: done.append(1), CPU, flush=True) == 0.001
    assert len(done) >= 6
    assert gpu_run.describe(CPU)["multiprocessors"] == "132"
    assert Event().record() is None
