"""Processes that accept on one listening socket: how many connections each has, for equal shares.

    float64[n]   connections of each process; infinite while it does not accept

All of them hear of a connection that waits, and the first would take it: of many that come together, mostly
the same one. So who has more than another leaves it to the others for some milliseconds, as in vLLM. One
page of memory, no locks: a count is written by one process, and read by the others as it is or was.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from pathlib import Path

_COUNT = struct.Struct("d")
CHECKS = 5
"""How often a process leaves a connection to others, before it takes it: they may be busy, or stuck."""
PAUSE = 0.001
"""Seconds between two of them."""


class Peers:
    """One process's view of the page.

    Args:
        path: the page's file; see `create`.
        index: this process's place.
        count: processes.
    """

    def __init__(self, path: Path, index: int, count: int) -> None:
        self._layout = struct.Struct(f"{count}d")
        self._at = index * _COUNT.size
        with path.open("r+b") as file:
            self._page = mmap.mmap(file.fileno(), self._layout.size)

    @staticmethod
    def create(path: Path, count: int) -> None:
        """The page of so many processes, none of which accepts yet."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(_COUNT.pack(math.inf) * count)

    def tell(self, connections: float) -> None:
        """This process has so many."""
        _COUNT.pack_into(self._page, self._at, connections)

    def leave(self) -> None:
        """It does not accept any more."""
        self.tell(math.inf)

    @property
    def fewest(self) -> bool:
        """Whether no other process has fewer."""
        counts = self._layout.unpack_from(self._page)
        return bool(_COUNT.unpack_from(self._page, self._at)[0] <= min(counts))
