"""The events of a response, kept for all who follow it, now or later.

    add ──▶ created · queued · in_progress · … ──follow(after)──▶ client, client, …

Event N of a response has the sequence_number N. It knows no event but by where it ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

_TOGETHER = 256
"""Events that are given at once to who comes late."""
_END = b"\n\n"


class EventLog:
    """The events of one response, for all who follow it."""

    def __init__(self) -> None:
        self._events: list[bytes] = []
        self._more = asyncio.Event()
        self._whole = False
        self.bytes = 0

    def add(self, data: bytes) -> None:
        """Some more events, each with its end."""
        self._events += [each + _END for each in data.split(_END)[:-1]]
        self.bytes += len(data)
        self._tell()

    def clear(self) -> None:
        """Keep none of those that there are; whoever follows goes on with the next one."""
        self._events = [b""] * len(self._events)
        self.bytes = 0

    def close(self) -> None:
        """No more will come."""
        self._whole = True
        self._tell()

    async def follow(self, after: int = -1) -> AsyncIterator[bytes]:
        """The events behind number `after`, as they come, until the last."""
        position = after + 1
        while True:
            more = self._more
            if found := self._events[position : position + _TOGETHER]:
                position += len(found)
                yield b"".join(found)
            elif self._whole:
                return
            else:
                await more.wait()

    def _tell(self) -> None:
        self._more.set()
        self._more = asyncio.Event()
