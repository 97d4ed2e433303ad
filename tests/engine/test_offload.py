"""The host's side of copied blocks: bytes come back as they went, however many at once."""

from __future__ import annotations

import random

import pytest
import torch

from penstock.engine.executor.create import (
    check_memory,
    create_graphs,
    create_host,
    forget_measurements,
    stream_of,
)
from penstock.engine.executor.offload import HostCache, _runs
from penstock.engine.executor.stream import HostStream
from penstock.kernels.attention import KVCache, KVCacheSpec
from penstock.model.memory import MemoryBudget
from tests.engine.streams import DelayedStream

CPU = torch.device("cpu")
SPEC = KVCacheSpec(num_layers=2, num_kv_heads=2, head_dim=4, block_size=4, dtype=torch.float32)


def filled(blocks: int) -> KVCache:
    cache = KVCache(SPEC, blocks, CPU)
    for number, part in enumerate(part for layer in cache.layers for part in layer):
        part.copy_(torch.randn(part.shape, generator=torch.Generator().manual_seed(number)))
    return cache


@pytest.mark.parametrize("seed", range(5))
def test_bytes_come_back_as_they_went(seed: int) -> None:
    draw = random.Random(seed)
    cache = filled(300)
    host = HostCache(cache, 200, HostStream())
    before = [[part.clone() for part in layer] for layer in cache.layers]
    blocks = draw.sample(range(300), 150)
    rooms = draw.sample(range(200), 150) if seed else list(range(150))
    targets = draw.sample(range(300), 150)
    host.store(list(zip(blocks, rooms, strict=True)))
    for layer in cache.layers:
        for part in layer:
            part.zero_()
    host.load(list(zip(rooms, targets, strict=True)))
    for layer, was in zip(cache.layers, before, strict=True):
        for part, old in zip(layer, was, strict=True):
            assert torch.equal(part[targets], old[blocks])
            rest = sorted(set(range(300)) - set(targets))
            assert not part[rest].any()
    assert host.nbytes == 200 * 4 * SPEC.bytes_per_token


def test_neighbours_are_copied_at_once_up_to_a_bound() -> None:
    assert list(_runs([(4, 9), (2, 7), (3, 1), (8, 0)])) == [(2, [7, 1, 9]), (8, [0])]
    runs = list(_runs([(block, block) for block in range(150)]))
    assert [len(blocks) for _, blocks in runs] == [64, 64, 22]
    assert list(_runs([])) == []


def test_without_memory_for_a_copy_blocks_go_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = filled(8)
    host = HostCache(cache, 8, HostStream())
    kept = [[part.clone() for part in layer] for layer in cache.layers]
    real = torch.Tensor.__getitem__

    def gather(tensor: torch.Tensor, index: object) -> torch.Tensor:
        if isinstance(index, torch.Tensor):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(tensor, index)

    def scatter(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "__getitem__", gather)
        patch.setattr(torch.Tensor, "index_copy_", scatter)
        host.store([(1, 0), (5, 1)])
        host.load([(0, 2), (1, 3)])
    for layer, was in zip(cache.layers, kept, strict=True):
        for part, old in zip(layer, was, strict=True):
            assert torch.equal(part[[2, 3]], old[[1, 5]])
    monkeypatch.setattr(torch.Tensor, "index_copy_", lambda *_: (_ for _ in ()).throw(RuntimeError("shapes")))
    with pytest.raises(RuntimeError, match="shapes"):
        host.load([(0, 2)])


def plan(host_blocks: int, graph_rows: tuple[int, ...] = ()) -> MemoryBudget:
    per_token = SPEC.bytes_per_token
    return MemoryBudget(
        device="cpu",
        available=1 << 30,
        utilization=0.5,
        limit=1 << 29,
        weights=0,
        activations=0,
        kv_cache=16 * 4 * per_token,
        kv_bytes_per_token=per_token,
        block_size=4,
        num_blocks=16,
        max_model_len=32,
        max_num_batched_tokens=8,
        graph_rows=graph_rows,
        offload=host_blocks * 4 * per_token,
    )


def test_a_plan_without_a_host_or_graphs_has_none() -> None:
    cache = filled(17)
    assert create_host(cache, plan(0), HostStream()) == (None, 0.0)
    assert create_graphs(None, cache, None, plan(0)) is None  # type: ignore[arg-type]
    assert isinstance(stream_of(CPU), HostStream)
    forget_measurements(CPU)
    check_memory(CPU, plan(0), 0.0)


def test_what_a_copy_takes_is_measured_on_the_device() -> None:
    """By its clock: two marks around copies there and back of as many blocks as fit on either side."""
    cache = filled(17)
    kept = [[part.clone() for part in layer] for layer in cache.layers]

    class Unpinned(DelayedStream):
        asynchronous = False  # there is no GPU to pin memory for

    stream = Unpinned(cost=0.64)
    host, seconds = create_host(cache, plan(10), stream)
    assert host is not None
    assert host.num_blocks == 10
    assert seconds == pytest.approx(0.64 / (2 * 10))
    for layer, was in zip(cache.layers, kept, strict=True):
        assert all(torch.equal(part, old) for part, old in zip(layer, was, strict=True))


@pytest.mark.parametrize("agrees", [True, False])
def test_pinned_memory_is_given_back_and_its_lack_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, agrees: bool
) -> None:
    """The driver is played: what it has pinned is what it is told to let go."""
    pinned: set[int] = set()

    class Driver:
        @staticmethod
        def cudaHostRegister(pointer: int, size: int, flags: int) -> int:
            pinned.add(pointer)
            return 0 if agrees else 2

        @staticmethod
        def cudaHostUnregister(pointer: int) -> int:
            pinned.remove(pointer)
            return 0

    monkeypatch.setattr(torch.cuda, "cudart", lambda: Driver)
    host = HostCache(filled(8), 4, HostStream(), pinned=True)
    assert len(pinned) == 4
    host.close()
    host.close()
    assert len(pinned) == (0 if agrees else 4)
    assert ("could not be pinned" in caplog.text) is not agrees
