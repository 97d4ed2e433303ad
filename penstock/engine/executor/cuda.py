"""CUDA's part of an executor: its stream, how it records, and what is looked at before and after the start.

Nothing here runs without a GPU; what is decided is decided elsewhere (`ahead`, `graphs`), where it is tested
without one. tests/engine/test_executor_contract.py runs all of it where there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy.typing as npt
import torch

from penstock.kernels.transfer import on_device

from .stream import Fetched, Mark


class CudaStream:
    """The current stream of one GPU. Host memory that it copies from or to by itself is pinned; torch gives
    such memory to nobody else before the copy is done."""

    asynchronous = True

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def send(self, array: npt.NDArray[Any]) -> torch.Tensor:
        """See Stream."""
        return on_device(array, self._device)

    def fetch(self, tensor: torch.Tensor) -> Fetched:
        """See Stream."""
        there = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        fetched: Fetched = there.copy_(tensor, non_blocking=True)
        return fetched

    def mark(self) -> Mark:
        """An event, timed by the GPU when it comes to it."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def wait(self, mark: Mark) -> None:
        """See Stream. The host sleeps meanwhile as the driver has it do."""
        mark.synchronize()

    def seconds(self, begin: Mark, end: Mark) -> float:
        """See Stream; resolved to half a microsecond."""
        milliseconds: float = begin.elapsed_time(end)
        return milliseconds / 1000.0


class CudaGraph:
    """Recorded work."""

    def __init__(self, graph: torch.cuda.CUDAGraph, output: torch.Tensor) -> None:
        self.output = output
        self._graph = graph

    def replay(self) -> None:
        """See graphs.Recorded."""
        self._graph.replay()


class CudaCapture:
    """Records into graphs that share one pool of memory: they run one after the other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, work: Callable[[], torch.Tensor]) -> CudaGraph:
        """See graphs.Capture. The first call finds kernels and workspaces, which cannot be recorded.

        Raises what the work raises, or the end of the capture that it has broken.
        """
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
        current.wait_stream(self._stream)
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                output = work()
        finally:
            torch.cuda.set_stream(current)  # a capture that cannot be ended leaves its own
        return CudaGraph(graph, output)


def pin(tensor: torch.Tensor, device: torch.device) -> bool:
    """Let a GPU copy to and from a host's tensor by itself, until `unpin`; False if the driver refuses."""
    try:
        cuda = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        if int(cuda.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)) == 0:
            return True
        # CUDA remembers the refusal, and the next kernel, whoever's it is, would be said to have failed of it
        torch.ones(1, device=device)
    except RuntimeError:  # also AcceleratorError: no memory that may be pinned
        pass
    return False


def unpin(tensor: torch.Tensor) -> None:
    """Give it back to the system's care."""
    cuda = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    cuda.cudaHostUnregister(tensor.data_ptr())
