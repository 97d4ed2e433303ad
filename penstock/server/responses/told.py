"""Which of an answer's tokens are its texts': the dialect tells the logprobs of no others.

    tokens   I    look  .  </think>  It   's  <tool_call>  {…
    parts    Thought ────  ·         Text ──  ·            CallBegin …

A parser holds back what may be a mark. So a token waits until a part is given out: those that make up a text
are the last ones before it, as many as its characters need; all others are of marks, thoughts and calls. It
knows pending output; the shape of logprobs is somebody else's business.
"""

from __future__ import annotations

from collections.abc import Iterator

from penstock.server.generation import Choice
from penstock.server.pieces import Piece, piece_of
from penstock.text.output import DecodedLogprob
from penstock.text.parsers.pieces import Piece as Part


class Told:
    """The pieces of one choice with the logprobs of its texts. Feed it whatever is pending, in order."""

    def __init__(self) -> None:
        self._held: list[DecodedLogprob] = []
        """Of tokens of which nothing has been given out."""

    def pieces(self, choice: Choice) -> Iterator[tuple[Piece, list[DecodedLogprob]]]:
        """What is pending. Where nothing is told apart all of it is text, tokens without characters, too."""
        pending = choice.pending
        if pending.parsed is None:
            if pending.pieces or pending.logprobs:
                yield Piece("text", pending.text), list(pending.logprobs)
            return
        done = 0
        for before, entry in zip(pending.parsed_before, pending.logprobs, strict=True):
            yield from self._given(pending.parsed[done:before])
            self._held.append(entry)
            done = before
        yield from self._given(pending.parsed[done:])

    def _given(self, parts: list[Part]) -> Iterator[tuple[Piece, list[DecodedLogprob]]]:
        for part in parts:
            piece = piece_of(part)
            if piece is None:
                continue
            first, characters = len(self._held), len(piece.text) if piece.kind == "text" else 0
            while characters > 0 and first > 0:
                first -= 1
                characters -= self._held[first].width
            yield piece, self._held[first:]
            self._held.clear()
