"""The queue of a device, as an executor sees it: what is put in is done in order, and the host need not wait.

    send ─▶ compute … ─▶ fetch ─▶ mark        the host goes on; `wait(mark)` is where it may read

A mark is a moment on the device. What a step takes is the time between two marks: so steps that are queued
behind each other are measured one by one, whatever the host does meanwhile, and no second is counted twice.

`HostStream` is a processor that computes when it is called; `cuda.CudaStream` a GPU's.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

Mark = Any
"""A moment; what it is is the stream's own business."""


class Fetched(Protocol):
    """Numbers on their way to the host."""

    def numpy(self) -> npt.NDArray[Any]:
        """They. Only after a mark that was set behind them has been waited for."""
        ...


class Stream(Protocol):
    """One device's."""

    asynchronous: bool
    """Whether work is queued: then a call returns before its work is done."""

    def send(self, array: npt.NDArray[Any]) -> torch.Tensor:
        """The array on the device, for whatever is queued from now on."""
        ...

    def fetch(self, tensor: torch.Tensor) -> Fetched:
        """Bring a tensor to the host, as it is when everything queued so far is done."""
        ...

    def mark(self) -> Mark:
        """The moment when everything queued so far is done."""
        ...

    def wait(self, mark: Mark) -> None:
        """Return when that moment has come. Raises what went wrong on the device until then."""
        ...

    def seconds(self, begin: Mark, end: Mark) -> float:
        """Device time between two marks that have come."""
        ...


class HostStream:
    """The host's own processor: everything is done when its call returns, and its clock is the host's."""

    asynchronous = False

    def send(self, array: npt.NDArray[Any]) -> torch.Tensor:
        """The array itself."""
        return torch.from_numpy(array)

    def fetch(self, tensor: torch.Tensor) -> Fetched:
        """The tensor itself: it is there."""
        fetched: Fetched = tensor
        return fetched

    def mark(self) -> Mark:
        """Now."""
        return time.perf_counter()

    def wait(self, mark: Mark) -> None:
        """It has come."""

    def seconds(self, begin: Mark, end: Mark) -> float:
        """Between two calls."""
        difference: float = end - begin
        return difference


def column(values: list[int]) -> npt.NDArray[np.int64]:
    """A list of ids or rows as an array to send."""
    return np.array(values, np.int64)
