"""One answer's parser: its thought first, then text and calls.

deltas ─▶ ReasoningParser ─▶ Thought …
                └─ Text ─▶ ToolParser ─▶ Text, CallBegin, Arguments, CallEnd …

gpt-oss thinks between calls as well: its ToolParser reads all of it.
"""

from __future__ import annotations

from collections.abc import Iterable

from .pieces import Piece, Text
from .reasoning import ReasoningParser
from .tools import ToolParser


class MessageParser:
    """Feed it with `push`, then `finish` it once."""

    def __init__(self, reasoning: ReasoningParser | None = None, tools: ToolParser | None = None) -> None:
        """Put one together; either part may be missing."""
        self._reasoning = reasoning
        self._tools = tools

    @property
    def marks(self) -> tuple[str, ...]:
        """Texts that have to be seen, also where they are special tokens."""
        parts = (self._reasoning, self._tools)
        return tuple(mark for part in parts if part is not None for mark in part.all_marks())

    @property
    def thinking(self) -> bool:
        """Whether the answer is inside of a thought."""
        return any(part is not None and part.thinking for part in (self._reasoning, self._tools))

    @property
    def calls(self) -> int:
        """How many calls have begun."""
        return 0 if self._tools is None else self._tools.calls

    @property
    def cut(self) -> bool:
        """Whether the last call is not whole."""
        return self._tools is not None and self._tools.cut

    @property
    def satisfied(self) -> bool:
        """Nothing that follows will be given out: the rest need not be generated."""
        return self._tools is not None and self._tools.satisfied

    def push(self, text: str) -> list[Piece]:
        """The pieces that are certain with this text."""
        if self._reasoning is None:
            return self._called([Text(text)] if text else [])
        return self._called(self._reasoning.push(text))

    def finish(self) -> list[Piece]:
        """The pieces that were not certain before the end."""
        pieces = [] if self._reasoning is None else self._called(self._reasoning.finish())
        return pieces if self._tools is None else pieces + self._tools.finish()

    def _called(self, pieces: Iterable[Piece]) -> list[Piece]:
        """With the calls in the texts."""
        if self._tools is None:
            return list(pieces)
        found: list[Piece] = []
        for piece in pieces:
            if isinstance(piece, Text):
                found += self._tools.push(piece.text)
            else:
                found.append(piece)
        return found
