"""Memory that kernels work in, kept from call to call: fresh pages would cost more than the arithmetic."""

from __future__ import annotations

import threading

import torch


class Scratch(threading.local):
    """A piece of memory of each calling thread; what an earlier call left in it is lost."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def address(self, nbytes: int) -> int:
        """Of at least so many bytes, until the next call from this thread."""
        if self._memory.numel() < nbytes:
            self._memory = torch.empty(nbytes, dtype=torch.uint8)
        return self._memory.data_ptr()
