"""What parsers of a stream are built on: a buffer, and a generator that is resumed with every delta.

A parser is written as if all of the text were there, and waits wherever it is not: so the borders of deltas
cannot matter. Nothing is taken from the buffer before it is certain what it is.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Generator, Sequence
from typing import TypeAlias

from .pieces import Piece, Text, Thought

Run: TypeAlias = Generator[None, None, None]
"""A part of a parser; yields where it needs more text."""


class Machine:
    """A parser of one answer. Feed it with `push`, then `finish` it once."""

    def __init__(self) -> None:
        self._buffer = ""
        """What has come and is not settled yet."""
        self._ended = False
        self._out: list[Piece] = []
        self._framing = ""
        """White space that was dropped before the last mark."""
        self._running = self._run()
        next(self._running, None)

    @classmethod
    def all_marks(cls) -> tuple[str, ...]:
        """Texts that have to be seen, also where they are special tokens."""
        raise NotImplementedError

    def push(self, text: str) -> list[Piece]:
        """The pieces that are certain with this text."""
        self._buffer += text
        return self._resume()

    def finish(self) -> list[Piece]:
        """The pieces that were not certain before the end."""
        self._ended = True
        return self._resume()

    def _run(self) -> Run:
        """The parser itself: from the first character to the end."""
        raise NotImplementedError

    def _resume(self) -> list[Piece]:
        next(self._running, None)
        out, self._out = self._out, []
        return out

    # ---- for the parsers ----
    def _take(self, count: int) -> str:
        """Remove characters from the buffer."""
        taken, self._buffer = self._buffer[:count], self._buffer[count:]
        return taken

    def _more(self) -> Generator[None, None, bool]:
        """Wait for more text; False where there is none any more."""
        if self._ended:
            return False
        yield
        return True

    def _until(
        self, marks: Sequence[str], kind: type[Text] | type[Thought] = Text, *, framed: bool = False
    ) -> Generator[None, None, str | None]:
        """Give out text up to the first of the marks, which stays in the buffer. None at the end of the
        output.

        framed: white space before a mark belongs to the mark, and is dropped.
        """
        found = _any(tuple(marks))
        while True:
            if match := found.search(self._buffer):
                text = self._take(match.start())
                said = text.rstrip() if framed else text
                self._framing = text[len(said) :]
                self._say(said, kind)
                return match[0]
            self._say(self._take(len(self._buffer) - held_back(self._buffer, marks, framed)), kind)
            if not (yield from self._more()):
                self._say(self._take(len(self._buffer)), kind)
                return None

    def _say(self, text: str, kind: type[Text] | type[Thought] = Text) -> None:
        if text:
            self._out.append(kind(text))


@functools.lru_cache
def _any(marks: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(marks, key=len, reverse=True))))


def held_back(text: str, marks: Sequence[str], framed: bool = False) -> int:
    """How many characters at the end of a text may belong to a mark that is still to come."""
    longest = 0
    for mark in marks:
        for size in range(min(len(mark) - 1, len(text)), longest, -1):
            if text.endswith(mark[:size]):
                longest = size
                break
    if framed:
        body = text[: len(text) - longest]
        longest += len(body) - len(body.rstrip())
    return longest
