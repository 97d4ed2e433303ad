"""Bodies of answers that somebody else sends: read whole, and never more of them than one wants to hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import aiohttp


async def read_at_most(response: aiohttp.ClientResponse, most: int) -> bytes:
    """The whole body, or its beginning of some more than `most` bytes. (aiohttp's `read(n)` is the first
    segment.)"""
    pieces, size = [], 0
    while size <= most and (piece := await response.content.readany()):
        pieces.append(piece)
        size += len(piece)
    return b"".join(pieces)
