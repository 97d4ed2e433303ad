"""Weights on their way to a GPU: through pinned memory, in pieces, so that reading and copying overlap.

    file (page cache) ── host copies ──▶ [ half 0 | half 1 ] ── the device copies ──▶ its memory
                                           while it copies one, the host fills the other

A GPU copies from ordinary memory through a small buffer of its driver's, while the host waits: one thread, at
a fraction of the link. Each thread that loads has a staging of its own. Types are converted on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

#: Bytes of one half: long enough that its copy outweighs its start.
HALF = 16 << 20


class Moment(Protocol):
    """What has been queued on the device so far."""

    def synchronize(self) -> None:
        """Return when it is done."""
        ...


def _event() -> Moment:
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    made: Moment = event
    return made


class Staging:
    """Two halves of pinned memory.

    Args:
        device: where to.
        half: bytes of each.
        pinned: the device copies by itself.
        moment: marks what has been queued.
    """

    def __init__(
        self,
        device: torch.device,
        half: int = HALF,
        *,
        pinned: bool = True,
        moment: Callable[[], Moment] = _event,
    ) -> None:
        self._device = device
        self._halves = [torch.empty(half, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
        self._busy: list[Moment | None] = [None, None]
        self._turn = 0
        self._moment = moment

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a host's tensor, of the same type, on the device: for whatever is queued from now on."""
        out = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
        if not tensor.numel():
            return out
        source = tensor.contiguous().view(-1).view(torch.uint8)
        target = out.view(-1).view(torch.uint8)
        half = len(self._halves[0])
        for begin in range(0, len(source), half):
            piece = source[begin : begin + half]
            turn = self._turn
            self._turn = 1 - turn
            if (busy := self._busy[turn]) is not None:
                busy.synchronize()
            buffer = self._halves[turn][: len(piece)]
            buffer.copy_(piece)
            target[begin : begin + len(piece)].copy_(buffer, non_blocking=True)
            self._busy[turn] = self._moment()
        return out
