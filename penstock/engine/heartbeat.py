"""Progress of the engine, in a page of memory that all processes map: no messages, no threads, no polling.

    float64[4]   progress at   |   step began at (0: none)   |   its predicted seconds   |   steps ended
    float64[…]   of each API process:  requests that it waits for   |   since when there are any

The first line is written by the engine around every step (less than a microsecond), and read by an API
process when somebody asks whether the engine lives. Doubles are written whole on every machine that Python
runs on.
"""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path

_LAYOUT = struct.Struct("4d")
_OWED = struct.Struct("2d")
SLOTS = 129
"""API processes that can have a count, and the one that starts them."""


class Heartbeat:
    """One engine's page. The API process creates the file, the engine opens it."""

    def __init__(self, path: Path, *, create: bool = False) -> None:
        flags = os.O_RDWR | (os.O_CREAT | os.O_EXCL if create else 0)
        descriptor = os.open(path, flags, 0o600)
        try:
            if create:
                os.ftruncate(descriptor, mmap.PAGESIZE)
            self._page = mmap.mmap(descriptor, mmap.PAGESIZE)
        finally:
            os.close(descriptor)

    def begin(self, now: float, predicted: float) -> None:
        """A step begins; it should take `predicted` seconds."""
        _, _, _, steps = self.read()
        _LAYOUT.pack_into(self._page, 0, now, now, predicted, steps)

    def end(self, now: float) -> None:
        """The step ended."""
        _, _, _, steps = self.read()
        _LAYOUT.pack_into(self._page, 0, now, 0.0, 0.0, steps + 1)

    def read(self) -> tuple[float, float, float, float]:
        """(progress at, step began at, predicted seconds, steps ended); all 0 before the first step."""
        values: tuple[float, float, float, float] = _LAYOUT.unpack_from(self._page, 0)
        return values

    def set_owed(self, slot: int, requests: int, since: float) -> None:
        """An API process waits for so many, and for some of them since then."""
        _OWED.pack_into(self._page, _LAYOUT.size + slot * _OWED.size, requests, since)

    def owed(self) -> tuple[int, float]:
        """(requests that all of them wait for, since when somebody does)"""
        start = _LAYOUT.size
        waits = list(_OWED.iter_unpack(self._page[start : start + SLOTS * _OWED.size]))
        return int(sum(count for count, _ in waits)), min(
            (since for count, since in waits if count), default=0
        )

    def close(self) -> None:
        """Unmap."""
        self._page.close()
