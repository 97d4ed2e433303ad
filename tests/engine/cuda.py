"""torch.cuda, played on a CPU: events, streams, pinned memory, and graphs that replay what was recorded.

While a graph records, every operator and every kernel of Triton is written down with its arguments; a replay
does them again on the same memory, and runs no line of the model's Python. So what a host would have to
decide anew for each step, and does not, comes out wrong; and what a GPU cannot record is refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

#: Operators whose result the host must see, or whose shape hangs on numbers: they wait for the device.
_WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal", "item")

_recording: list[Graph] = []


class Graph:
    """torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        self.work: list[Callable[[], None]] = []
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        for each in self.work:
            each()


class _Recorder(TorchDispatchMode):
    """Writes operators down as they are computed."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self._graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in _WAITS:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({name})")
        given = kwargs or {}
        made = func(*args, **given)
        memory = {each.untyped_storage().data_ptr() for each in _tensors((args, given))}
        fresh = [each for each in _tensors(made) if each.untyped_storage().data_ptr() not in memory]

        def again() -> None:
            now = func(*args, **given)
            if fresh:  # what was written into memory of its own is written there again
                tree_map(_refill, made, now)

        if fresh or func._schema.is_mutable:  # the others are views: contiguous() is one, or a copy
            self._graph.work.append(again)
        return made


def _tensors(values: Any) -> list[torch.Tensor]:
    return [each for each in tree_flatten(values)[0] if isinstance(each, torch.Tensor)]


def _refill(kept: Any, now: Any) -> None:
    if isinstance(kept, torch.Tensor) and kept.numel():
        kept.copy_(now)


class Stream:
    """torch.cuda.Stream: everything is done at once."""

    def __init__(self, device: object = None) -> None:
        self.waited = 0

    def wait_stream(self, other: Stream) -> None:
        self.waited += 1


class Event:
    """torch.cuda.Event: a millisecond lies between two of them."""

    _count = itertools.count()

    def __init__(self, enable_timing: bool = False) -> None:
        self._timed = enable_timing
        self._at: int | None = None

    def record(self, stream: Stream | None = None) -> None:
        self._at = next(self._count)

    def synchronize(self) -> None:
        assert self._at is not None, "waited for an event that was never recorded"

    def elapsed_time(self, end: Event) -> float:
        assert self._timed
        assert end._timed
        assert self._at is not None
        assert end._at is not None
        return float(end._at - self._at)


class Runtime:
    """torch.cuda.cudart()."""

    def __init__(self) -> None:
        self.registered: set[int] = set()
        self.refuses = False
        self.error: str | None = None
        """What a call that was refused leaves behind, for the next kernel."""

    def cudaHostRegister(self, pointer: int, size: int, flags: int) -> int:
        assert size > 0
        if self.refuses:
            self.error = "CUDA error: out of memory"
            return 2
        self.registered.add(pointer)
        return 0

    def cudaHostUnregister(self, pointer: int) -> int:
        self.registered.remove(pointer)
        return 0


@dataclass
class Played:
    """What was asked of it."""

    runtime: Runtime = field(default_factory=Runtime)
    graphs: list[Graph] = field(default_factory=list)
    pinned: int = 0
    current: Stream = field(default_factory=Stream)
    """The stream that work is queued on."""


def play_cuda(monkeypatch: pytest.MonkeyPatch) -> Played:
    """Until the test ends."""
    played = Played()

    @contextmanager
    def graph(into: Graph, pool: object = None, stream: Stream | None = None) -> Iterator[None]:
        assert pool is not None, "graphs that run one after the other share their memory"
        assert stream is not None
        played.graphs.append(into)
        _recording.append(into)
        before, played.current = played.current, stream
        try:
            with _Recorder(into):
                yield
        except RuntimeError as error:
            if "stream is capturing" in str(error):  # then the capture cannot be ended, nor the stream left
                ended = torch.AcceleratorError(
                    "CUDA error: operation failed due to a previous error during capture\nCUDA kernel …"
                )
                ended.error_code = 901  # type: ignore[attr-defined]
                raise ended  # noqa: B904
            played.current = before
            raise
        finally:
            _recording.pop()
        played.current = before

    @contextmanager
    def stream(chosen: Stream) -> Iterator[None]:
        before, played.current = played.current, chosen
        yield
        played.current = before

    def set_stream(chosen: Stream) -> None:
        played.current = chosen

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        assert not _recording, "memory is pinned while a graph records"
        played.pinned += 1
        return tensor.clone()

    empty, ones = torch.empty, torch.ones

    def launched(*size: Any, **more: Any) -> torch.Tensor:
        error, played.runtime.error = played.runtime.error, None
        if error is not None:
            raise torch.AcceleratorError(error)
        return ones(*size, **more)

    def empty_pinned(*size: Any, pin_memory: bool = False, **more: Any) -> torch.Tensor:
        played.pinned += pin_memory
        return empty(*size, **more)

    for name, value in {
        "Event": Event,
        "Stream": Stream,
        "CUDAGraph": Graph,
        "graph": graph,
        "stream": stream,
        "graph_pool_handle": lambda: (0, 1),
        "current_stream": lambda device=None: played.current,
        "set_stream": set_stream,
        "synchronize": lambda device=None: None,
        "cudart": lambda: played.runtime,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch, "empty", empty_pinned)
    monkeypatch.setattr(torch, "ones", launched)
    _record_kernels(monkeypatch)
    return played


def _record_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are interpreted; while a graph records, they are written down, and their insides are not."""
    from triton.runtime.interpreter import InterpretedFunction

    run = InterpretedFunction.run

    def recorded(self: Any, *args: Any, **more: Any) -> Any:
        if not _recording:
            return run(self, *args, **more)

        def work() -> None:
            with torch.utils._python_dispatch._disable_current_modes():
                run(self, *args, **more)

        _recording[-1].work.append(work)
        return work()

    monkeypatch.setattr(InterpretedFunction, "run", recorded)
