"""What a model's answer is made of, in the order in which it wrote it.

    "Let me see.</think>I look it up.<tool_call>…"
      Thought ────────┘ Text ──────────┘ CallBegin · Arguments … · CallEnd

A parser makes pieces of text deltas; every dialect writes them in its own way, as they come or, added up by a
`Message`, when all are there. It is the same pieces either way, so a stream never says anything else than a
whole answer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Thought:
    """A part of the reasoning; never empty."""

    text: str


@dataclass(frozen=True, slots=True)
class Text:
    """A part of what is said to the user; never empty."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """A call of a tool begins; its name is known."""

    index: int
    """Of the call in its message, from 0."""
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """A part of a call's arguments, as JSON; never empty. The parts of a call that has ended are an
    object."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """The call is whole."""

    index: int


Piece: TypeAlias = Thought | Text | CallBegin | Arguments | CallEnd


@dataclass(slots=True)
class ToolCall:
    """One call."""

    id: str
    name: str
    arguments: str = ""
    """JSON of an object; cut off where the output was."""


@dataclass(slots=True)
class Message:
    """Pieces added up."""

    reasoning: str = ""
    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)

    @classmethod
    def of(cls, pieces: Iterable[Piece]) -> Message:
        """All of them."""
        thoughts: list[str] = []
        texts: list[str] = []
        message = cls()
        for piece in pieces:
            if isinstance(piece, Thought):
                thoughts.append(piece.text)
            elif isinstance(piece, Text):
                texts.append(piece.text)
            elif isinstance(piece, CallBegin):
                message.calls.append(ToolCall(piece.id, piece.name))
            elif isinstance(piece, Arguments):
                message.calls[piece.index].arguments += piece.text
        message.reasoning, message.content = "".join(thoughts), "".join(texts)
        return message
