"""What a choice has said since it was last asked, for dialects that tell texts, thoughts and calls apart.

It knows what is pending in a choice; dialects make events or blocks of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from penstock.text.parsers.pieces import Arguments, CallBegin, Text, Thought
from penstock.text.parsers.pieces import Piece as Part

from .generation import Choice


@dataclass(frozen=True, slots=True)
class Piece:
    """Some more of one part of an answer."""

    kind: Literal["text", "thought", "call"]
    text: str
    """What it adds: of a call, to its arguments, which are JSON when they are whole."""
    call: int = 0
    """Number of the call."""
    call_id: str = ""
    """With a call's first piece, as its name."""
    name: str = ""


def pieces(choice: Choice) -> Iterator[Piece]:
    """What is pending, in order."""
    for part in choice.pending.parts:
        if (piece := piece_of(part)) is not None:
            yield piece


def piece_of(part: Part) -> Piece | None:
    """What a part of the parser's adds; None for the end of a call."""
    if isinstance(part, Text):
        return Piece("text", part.text)
    if isinstance(part, Thought):
        return Piece("thought", part.text)
    if isinstance(part, CallBegin):
        return Piece("call", "", part.index, part.id, part.name)
    if isinstance(part, Arguments):
        return Piece("call", part.text, part.index)
    return None
