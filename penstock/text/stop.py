"""Stop strings in a stream: found across any borders, and nothing held back that need not be.

It knows strings only. The match that *ends* first wins, and of those that end together the longest: so the
result does not depend on how the text is cut into deltas.

All that is kept of the past is the longest end of the text that begins a stop string: a match that is still
to come starts there or later.

    text    ……… the answer is 42 <|e             stop string  <|end|>
                                 └ tail: may become a match, all before it cannot

Memory is linear in the stop strings and the tail; so is a delta's work, unless the text was made to break off
long beginnings of a stop string again and again.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache


class StopChecker:
    """Searches one stream of text for its stop strings."""

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        """Look for `stops` (none of them empty); with `include` the match stays in the text."""
        self._stops = _stop_set(tuple(stops))
        self._include = include
        self._tail = ""
        """The longest end of the text so far that begins a stop string; held back unless `include`."""
        self._done = False

    def push(self, delta: str, search: bool = True) -> tuple[str, str | None]:
        """Take new text; return (text to give out, stop string found or None).

        After a match nothing more comes out. With `search` false (before `min_tokens`) no match may end in
        this delta; its characters can still begin one that ends later.
        """
        if self._done or not delta:
            return "", None
        old = len(self._tail)
        text = self._tail + delta
        shown = old if self._include else 0
        if search and (stop_end := self._stops.first_end(text, old)) is not None:
            stop, end = stop_end
            self._done = True
            self._tail = ""
            return text[shown : end if self._include else end - len(stop)], stop
        start = self._stops.beginning(text)
        self._tail = text[start:]
        return text[shown : None if self._include else start], None

    def flush(self) -> str:
        """What was held back, when the stream has ended without a match."""
        held = "" if self._include else self._tail
        self._tail = ""
        return held


class _StopSet:
    """The stop strings of one request, sorted for the two questions that a stream asks."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._sorted = sorted(set(stops))
        self._all = frozenset(stops)
        self._firsts = frozenset(stop[0] for stop in stops)
        self._lengths = sorted({len(stop) for stop in stops}, reverse=True)

    def first_end(self, text: str, old: int) -> tuple[str, int] | None:
        """(stop, where it ends) of the match that ends first, after the first `old` characters."""
        for end in range(old + 1, len(text) + 1):
            for length in self._lengths:
                if length <= end and (found := text[end - length : end]) in self._all:
                    return found, end
        return None

    def beginning(self, text: str) -> int:
        """Where the longest end of `text` starts that begins a stop string and is none itself."""
        for start, character in enumerate(text):
            if character not in self._firsts:
                continue
            end = text[start:]
            # strings that begin with `end` follow it in the order
            place = bisect_right(self._sorted, end)
            if place < len(self._sorted) and self._sorted[place].startswith(end):
                return start
        return len(text)


@lru_cache(maxsize=16)
def _stop_set(stops: tuple[str, ...]) -> _StopSet:
    """The choices of one request share one."""
    return _StopSet(stops)
