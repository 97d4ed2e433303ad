"""Units of systemd: what they start, and with which variables."""

from __future__ import annotations

import re
from collections.abc import Iterator

from . import commands, shell
from .engines import key_in
from .finding import Finding, Word
from .words import Place

_SETTING = re.compile(r"^(ExecStart|ExecStartPre|Environment)=[-@:+!]*(.*)$")


def examine(text: str, path: str) -> Iterator[Finding]:
    """What is wrong with a unit."""
    lines = text.split("\n")
    environment: list[Word] = []
    starts: list[list[Word]] = []
    number = 0
    while number < len(lines):
        found = _SETTING.match(lines[number])
        first = number
        pieces = [found[2]] if found else []
        while found and pieces[-1].endswith("\\") and number + 1 < len(lines):
            number += 1
            pieces.append(lines[number])
        number += 1
        if found is None:
            continue
        offsets = [found.start(2)] + [0] * (len(pieces) - 1)

        def place(
            offset: int, pieces: list[str] = pieces, offsets: list[int] = offsets, first: int = first
        ) -> tuple[int, int]:
            for row, piece in enumerate(pieces):
                if offset <= len(piece):
                    return first + row + 1, offset + offsets[row] + 1
                offset -= len(piece) + 1
            return first + 1, 1

        joined = " ".join(piece[:-1] + " " if piece.endswith("\\") else piece for piece in pieces)
        words = shell.words_of(joined, place)
        for word in words:
            yield from key_in(word, path)
        if found[1] == "Environment":
            environment += [word for word in words if "=" in word.text]
        else:
            starts.append(words)
    for words in starts:
        yield from commands.examine([*environment, *words], path, place=Place.SHELL)
