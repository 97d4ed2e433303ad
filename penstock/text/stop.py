"""Stop strings in a stream: found across any borders, and nothing held back that need not be.

It knows strings only. The match that *ends* first wins, and of those that end together the longest: so the
result does not depend on how the text is cut into deltas.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopChecker:
    """Searches one stream of text for its stop strings."""

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        """Look for `stops` (none of them empty); with `include` the match stays in the text."""
        self._stops = tuple(stops)
        self._include = include
        self._longest = max(map(len, self._stops), default=0)
        self._prefixes = frozenset(stop[:n] for stop in self._stops for n in range(1, len(stop)))
        self._tail = ""
        """The last characters of the text, enough to hold the beginning of any stop string."""
        self._held = 0
        """How many of them have not been given out."""
        self._done = False

    def push(self, delta: str, search: bool = True) -> tuple[str, str | None]:
        """Take new text; return (text to give out, stop string found or None).

        After a match nothing more comes out. With `search` false (before `min_tokens`) no match may end in
        this delta; its characters can still begin one that ends later.
        """
        if self._done or not delta:
            return "", None
        text = self._tail + delta
        shown = len(self._tail) - self._held
        match = self._find(text, len(self._tail)) if search else None
        if match is not None:
            start, stop = match
            self._done = True
            return text[shown : start + len(stop) if self._include else start], stop
        held = 0 if self._include else self._beginning(text)
        emit = text[shown : len(text) - held]
        self._tail = text[-(self._longest - 1) :] if self._longest > 1 else ""
        self._held = held
        return emit, None

    def flush(self) -> str:
        """What was held back, when the stream has ended without a match."""
        held = self._tail[len(self._tail) - self._held :] if self._held else ""
        self._held = 0
        return "" if self._done else held

    def _find(self, text: str, old: int) -> tuple[int, str] | None:
        """(start, stop) of the match that ends first, and after the first `old` characters."""
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            start = text.find(stop, max(0, old + 1 - len(stop)))
            if start >= 0 and (best is None or (start + len(stop), start) < best[:2]):
                best = (start + len(stop), start, stop)
        return None if best is None else best[1:]

    def _beginning(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        for n in range(min(self._longest - 1, len(text)), 0, -1):
            if text[-n:] in self._prefixes:
                return n
        return 0
