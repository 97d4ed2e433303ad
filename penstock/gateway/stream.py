"""A stream on its way through: whole events as they came, the usage taken out, and whether it ended well.

    pieces ──▶ whole events ──▶ the same bytes ──▶ client
                     └─ with "usage", "error" or an end: looked at, one by one

Only whole events go out, so that an error event can follow at any time. Nothing is decoded but events that
mention what is looked for. A client that did not ask for the usage does not see that the gateway did: the
chunk that only carries it is dropped, and `"usage":null` is taken out of the others.
"""

from __future__ import annotations

import re

from .endpoints import Endpoint, count_lines
from .usage import Tally, read_event

MOST = 4 << 20
"""Bytes of one event."""
_BLANK = re.compile(rb"\r?\n\r?\n")
_NULL_USAGE = re.compile(rb',\s?"usage":\s?null(?=[,}])')
_DATA = re.compile(rb"^data:[ ]?(.*?)\r?$", re.MULTILINE)


class TooLong(Exception):
    """An event has no end."""


class StreamFilter:
    """One stream."""

    def __init__(self, endpoint: Endpoint, tally: Tally, *, usage_wanted: bool) -> None:
        self.ended = False
        """Whether the last event has come that a whole stream has."""
        self.failed: bytes | None = None
        """Payload of the event with which the upstream said that it failed."""
        self._endpoint = endpoint
        self._tally = tally
        self._hide = not usage_wanted
        self._rest = b""

    @property
    def begun(self) -> bool:
        """Whether there was an event."""
        return self._tally.events > 0

    def feed(self, piece: bytes) -> bytes:
        """What goes to the client because of a piece; b"" while no event is whole. Raises TooLong."""
        if self._rest:
            piece = self._rest + piece
        end = piece.rfind(b"\n\n") + 2
        if end == 1 or b"\r\n\r\n" in piece[end:]:
            end = max((match.end() for match in _BLANK.finditer(piece)), default=0)
        if end == len(piece):
            self._rest = b""
        else:
            self._rest = piece[end:]
            if len(self._rest) > MOST:
                raise TooLong
            piece = piece[:end]
        if not piece:
            return b""
        self._tally.events += count_lines(piece, b"data:")
        if b'"usage"' in piece or b'"error"' in piece or self._endpoint.ended(piece):
            return self._look(piece)
        return piece

    def _look(self, events: bytes) -> bytes:
        if self._endpoint.ended(events):
            self.ended = True
            self._tally.events -= 1
        if self._hide and b"null" in events:
            events = events.replace(b',"usage":null', b"")  # as all engines write it, a tenth of the time
            if b'"usage"' in events:
                events = _NULL_USAGE.sub(b"", events)
            if not (b'"usage"' in events or b'"error"' in events):
                return events
        kept: list[bytes] = []
        start = 0
        for match in _BLANK.finditer(events):
            event = events[start : match.end()]
            start = match.end()
            if self._event(event):
                kept.append(event)
            if self.failed is not None:  # engines say [DONE] even then
                self._tally.events -= 1 + count_lines(events[start:], b"data:") - self.ended
                self.ended = False
                break
        return b"".join(kept)

    def _event(self, event: bytes) -> bool:
        """Look at one; false: it is not for the client."""
        if b'"usage"' not in event and b'"error"' not in event:
            return True
        data = b"\n".join(_DATA.findall(event))
        read = read_event(data, self._tally)
        if read is None:
            return True
        if read.error or read.type == "error":
            self.failed = data
            return False
        bare = read.usage is not None and read.choices == []
        if bare:
            self._tally.events -= 1
        return not (bare and self._hide)
