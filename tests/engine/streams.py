"""A device that computes by itself, played on the host: nothing that it was given may be read too early."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch


@dataclass(frozen=True)
class Moment:
    """A mark: after so many calls, at such a time on the device."""

    number: int
    time: float


class Later:
    """Numbers that are there when a mark behind them has been waited for."""

    def __init__(self, stream: DelayedStream, tensor: torch.Tensor) -> None:
        self._stream = stream
        self._tensor = tensor.clone()
        self._behind = stream.marks
        stream.fetched += 1

    def numpy(self) -> npt.NDArray[Any]:
        assert self._stream.waited > self._behind, "read before the device had written it"
        return np.asarray(self._tensor.numpy())


class DelayedStream:
    """A queue with a clock of its own: what lies between two marks takes `cost` seconds, begins when the last
    is done and the host has put it in, and the host's time passes only while it waits."""

    asynchronous = True

    def __init__(self, cost: float = 1.0) -> None:
        self.cost = cost
        self.now = 0.0
        """The host's time."""
        self.marks = 0
        self.waited = 0
        """Number of the last mark that was waited for."""
        self.fetched = 0
        self.error: Exception | None = None
        """What the next wait raises."""
        self._end = 0.0
        self._work = False
        """Whether anything was put in since the last mark."""

    def send(self, array: npt.NDArray[Any]) -> torch.Tensor:
        self._work = True
        return torch.from_numpy(array.copy())

    def fetch(self, tensor: torch.Tensor) -> Later:
        return Later(self, tensor)

    def mark(self) -> Moment:
        self.marks += 1
        self._end = max(self._end, self.now) + (self.cost if self._work else 0.0)
        self._work = False
        return Moment(self.marks, self._end)

    def wait(self, mark: Moment) -> None:
        if self.error is not None:
            raise self.error
        self.waited = max(self.waited, mark.number)
        self.now = max(self.now, mark.time)

    def seconds(self, begin: Moment, end: Moment) -> float:
        assert self.waited >= end.number, "measured before it was done"
        return end.time - begin.time
