"""Steps of decode from graphs: which there are, when they are made, and that no token knows of them. The
graph is a fake that does the recorded work again; attention is torch's, behind the seam that graphs need."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.errors import DeviceLost
from penstock.core.plan import Plan
from penstock.engine.executor.cuda import CudaCapture
from penstock.engine.executor.graphs import DecodeGraphs
from penstock.engine.executor.torch_executor import TorchExecutor
from penstock.kernels.attention import AttentionBackend, AttentionStep, ReservingBackend, StepLayout
from penstock.model.graph_sizes import decode_sizes, graph_bytes, ready_sizes
from tests.engine.build import torch_executor
from tests.engine.streams import DelayedStream
from tests.engine.test_executor_contract import PROMPTS, admission, drive, item, new_executor, run, spec


class FakeGraph:
    """The function, called again; the output stays where it was."""

    def __init__(self, work: Callable[[], torch.Tensor]) -> None:
        self._work = work
        self.output = work().clone()
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        self.output.copy_(self._work())


class Reserved:
    """Torch's attention as a step whose rows are padded: what is written for padding is noticed."""

    def __init__(self, backend: AttentionBackend, rows: int, blocks: int) -> None:
        self._backend, self._rows, self._blocks = backend, rows, blocks
        self._step: AttentionStep | None = None
        self._real = 0

    def update(self, layout: StepLayout) -> None:
        blocks = sum(len(each.blocks) for each in layout.spans)
        if layout.num_tokens > self._rows or len(layout.spans) != layout.num_tokens or blocks > self._blocks:
            raise ValueError("more than was reserved")
        self._step, self._real = self._backend.prepare(layout), layout.num_tokens

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *caches: torch.Tensor, **more: object
    ) -> torch.Tensor:
        assert self._step is not None
        real = slice(0, self._real)
        out = torch.full(q.shape, 7.0)
        out[real] = self._step(q[real].contiguous(), k[real], v[real], *caches, **more)  # type: ignore[arg-type, misc]
        return out


class Reserving:
    """A backend that graphs can capture."""

    name = "reserving"

    def __init__(self, backend: AttentionBackend) -> None:
        self._backend = backend
        self.prepare = backend.prepare

    def reserve(self, rows: int, blocks: int) -> Reserved:
        return Reserved(self._backend, rows, blocks)


class Recorder:
    """Captures, and remembers in which order."""

    def __init__(self) -> None:
        self.made: list[FakeGraph] = []
        self.rows: list[int] = []
        self.error: Exception | None = None

    def __call__(self, work: Callable[[], torch.Tensor]) -> FakeGraph:
        if self.error is not None:
            raise self.error
        self.made.append(FakeGraph(work))
        self.rows.append(len(self.made[-1].output))
        return self.made[-1]

    @property
    def replays(self) -> int:
        return sum(graph.replays for graph in self.made)


def with_graphs(
    sizes: tuple[int, ...], num_blocks: int = 32, row_blocks: int = 8, ready: tuple[int, ...] | None = None
) -> tuple[TorchExecutor, DecodeGraphs, Recorder]:
    executor = torch_executor(num_blocks, 4, stream=DelayedStream())
    recorder = Recorder()
    graphs = DecodeGraphs(
        executor._model,
        executor._cache,
        Reserving(executor._attention),  # type: ignore[arg-type]
        recorder,
        sizes,
        sizes if ready is None else ready,
        row_blocks,
        num_blocks,
    )
    graphs.prepare()
    executor.record(graphs)
    return executor, graphs, recorder


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("sizes", [(1, 2, 3), (2,), (3,), (8,)])
def test_no_token_knows_of_graphs(depth: int, sizes: tuple[int, ...]) -> None:
    """Greedy and seeded, alone and in company, preempted and resumed; padded or in a step's own size."""
    specs = [spec(name, prompt, 6, temperature=0.0) for name, prompt in PROMPTS.items()]
    specs += [spec(f"{name}+", prompt, 6, seed=5, n=2, top_k=20) for name, prompt in PROMPTS.items()]
    expected = drive(new_executor("cpu"), specs, 1)[0]
    executor, _, recorder = with_graphs(sizes)
    tokens, _, scheduler = drive(executor, specs, depth)
    assert tokens == expected
    assert scheduler.totals.preemptions > 0
    assert recorder.replays > 5


def test_a_step_takes_the_next_larger_graph_or_none() -> None:
    _, graphs, recorder = with_graphs((2, 4, 8))
    assert [graphs.size_for(rows) for rows in (1, 2, 3, 4, 5, 8, 9)] == [2, 2, 4, 4, 8, 8, None]
    assert recorder.rows == [8, 4, 2]


def test_those_that_are_not_wanted_at_once_come_one_by_one_the_largest_first() -> None:
    executor, graphs, recorder = with_graphs((1, 2, 3, 8, 16), ready=(1, 2, 3))
    assert recorder.rows == [3, 2, 1]
    assert (graphs.sizes, graphs.missing) == ((1, 2, 3), 2)
    assert graphs.size_for(4) is None
    run(executor, Plan(0, (admission("a", (1, 2)),), (item("a", 0, 2, (0, 1), 1),)))  # between two captures
    sizes = [graphs.size_for(4) for _ in range(2) if graphs.capture_next()]
    assert sizes == [16, 8]
    assert not graphs.capture_next()
    assert recorder.rows == [3, 2, 1, 16, 8]


def test_a_device_that_cannot_record_computes_call_by_call(caplog: pytest.LogCaptureFixture) -> None:
    executor, graphs, recorder = with_graphs((1, 2, 4), ready=(1,))
    recorder.error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
    with caplog.at_level(logging.WARNING):
        assert not graphs.capture_next()
    assert "no graph of 4 decoding requests: OutOfMemoryError: CUDA out of memory" in caplog.text
    assert "\nmore" not in caplog.text
    assert (graphs.sizes, graphs.missing) == ((1,), 0)
    specs = [spec(name, prompt, 6, temperature=0.0) for name, prompt in PROMPTS.items()]
    assert drive(executor, specs, 2)[0] == drive(new_executor("cpu"), specs, 1)[0]
    recorder.error = torch.AcceleratorError("CUDA error: unspecified launch failure")
    _, graphs, recorder = with_graphs((1, 2), ready=(1,))
    recorder.error = torch.AcceleratorError("CUDA error: unspecified launch failure")
    with pytest.raises(DeviceLost, match="unspecified launch failure"):
        graphs.capture_next()


def test_attention_that_cannot_be_captured_has_no_graphs() -> None:
    executor = torch_executor(32, 4, stream=DelayedStream())
    made = (executor._model, executor._cache, executor._attention, Recorder(), (1, 2), (1, 2), 8, 32)
    graphs = DecodeGraphs(*made)
    graphs.prepare()
    assert (graphs.sizes, graphs.missing, graphs.capture_next()) == ((), 0, False)


def test_longer_tables_than_were_reserved_are_computed_call_by_call() -> None:
    executor, _, recorder = with_graphs((1,), row_blocks=2)
    prompt = tuple(range(1, 10))
    first = Plan(0, (admission("a", prompt),), (item("a", 0, 9, (0, 1, 2), 1),))
    token = run(executor, first)["a"]
    again = run(executor, Plan(1, items=(item("a", 9, 1, (), 1),)))["a"]
    plain = new_executor("cpu")
    assert run(plain, first)["a"] == token
    assert run(plain, Plan(1, items=(item("a", 9, 1, (), 1),)))["a"] == again
    assert recorder.replays == 0


def test_dropped_graphs_are_used_no_more() -> None:
    executor, graphs, recorder = with_graphs((1, 2, 4), ready=(1, 2))
    graphs.drop()
    specs = [spec(name, prompt, 6, temperature=0.0) for name, prompt in PROMPTS.items()]
    assert drive(executor, specs, 2)[0] == drive(new_executor("cpu"), specs, 1)[0]
    assert (recorder.replays, graphs.missing) == (0, 0)


@settings(max_examples=200, deadline=None)
@given(
    seqs=st.integers(1, 2000),
    given_=st.lists(st.integers(1, 3000), max_size=8),
    most=st.none() | st.integers(0, 1000),
)
def test_sizes_are_few_and_never_over_what_is_asked_for(
    seqs: int, given_: list[int], most: int | None
) -> None:
    sizes = decode_sizes(seqs, given_, most)
    largest = min(seqs, 512 if most is None else most)
    assert list(sizes) == sorted(set(sizes))
    assert all(1 <= size <= max(largest, 1) for size in sizes)
    assert set(ready_sizes(sizes)) <= set(sizes)
    if given_:
        assert set(sizes) == {size for size in given_ if size <= largest}
    elif largest:
        assert sizes[-1] == largest
        assert len(sizes) <= 20
        assert 0 < graph_bytes(sizes[:-1], 1000, 9) < graph_bytes(sizes, 1000, 9) or len(sizes) == 1
        # padding is at most as much as the step itself
        assert all(size <= 2 * (below + 1) for below, size in zip((0, *sizes), sizes, strict=False))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("depth", [1, 2])
def test_graphs_of_a_gpu_change_no_token(depth: int) -> None:
    """Real ones, of whatever attention this machine has that can be captured."""
    executor = torch_executor(32, 4, "cuda", host_blocks=16)
    if not isinstance(executor._attention, ReservingBackend):
        pytest.skip("attention here cannot be captured")
    capture = CudaCapture(torch.device("cuda"))
    model, cache, attention = executor._model, executor._cache, executor._attention
    graphs = DecodeGraphs(model, cache, attention, capture, (1, 2, 3), (1, 2), 8, 32)
    graphs.prepare()
    assert graphs.capture_next()
    assert graphs.sizes == (1, 2, 3)
    executor.record(graphs)
    specs = [spec(name, prompt, 6, temperature=0.0) for name, prompt in PROMPTS.items()]
    specs += [spec(f"{name}+", prompt, 6, seed=5, n=2) for name, prompt in PROMPTS.items()]
    plain = torch_executor(32, 4, "cuda")
    expected = drive(plain, specs, 1, num_blocks=30)[0]
    assert drive(executor, specs, depth, host_blocks=16)[0] == expected
    executor.close()
    plain.close()
