"""Which name somebody meant who wrote another one: few edits away, or the same but for case and separators.

    "temprature" ─▶ temperature      "maxTokens" ─▶ max_tokens      "num_ctx" ─▶ None

Names are compared without case and separators. An edit is a character too many, too few, another one, or two
neighbours exchanged: optimal string alignment, one edit in a known name of 4 to 7 characters and two in a
longer one. Names of up to three characters are too short to be near to.

It knows no field. The work for a name is bounded, whoever made it up: it has at most LONGEST characters, and
is aligned only with names of about its length that have about its characters.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

LONGEST = 64
"""Characters of a name that is compared; all known ones are shorter."""
_REMEMBERED = 1024
"""Names whose answer is kept: those of clients that send the same ones again and again."""
_UNASKED = ""
"""No name."""


class Names:
    """A set of names that may be meant."""

    def __init__(self, known: Iterable[str], never: Iterable[str] = ()) -> None:
        """never: names that are no typing errors, however near they are to a known one."""
        self.known = frozenset(known)
        self._never = frozenset(never)
        self._answers: dict[str, str | None] = {}

    def near(self, name: str) -> str | None:
        """The known name that `name` seems to mean; None if there is none."""
        if name in self._never or len(name) > LONGEST:
            return None
        known = self._answers.get(name, _UNASKED)
        if known is not _UNASKED:
            return known
        found = self._find(_plain(name))
        if len(self._answers) >= _REMEMBERED:  # other threads may be here, too
            self._answers.clear()
        self._answers[name] = found
        return found

    def _find(self, plain: str) -> str | None:
        best, nearest = LONGEST, None
        letters = frozenset(plain)
        for known, known_letters, most, name in self._compared:
            if plain == known:
                return name
            # an edit takes away a letter and brings another one, at most
            if abs(len(plain) - len(known)) <= most and len(letters ^ known_letters) <= 2 * most:
                distance = edits(plain, known)
                if distance <= most and distance < best:
                    best, nearest = distance, name
        return nearest

    @cached_property
    def _compared(self) -> list[tuple[str, frozenset[str], int, str]]:
        """(as it is compared, its letters, edits within which it counts as meant, name)"""
        plain = [(_plain(name), name) for name in sorted(self.known)]
        return [
            (known, frozenset(known), 0 if len(known) < 4 else 1 if len(known) < 8 else 2, name)
            for known, name in plain
        ]


def _plain(name: str) -> str:
    return name.casefold().replace("_", "").replace("-", "")


def edits(a: str, b: str) -> int:
    """Optimal string alignment distance."""
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        two_before, before, row = before, row, [i]
        for j, y in enumerate(b, start=1):
            row.append(min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (x != y)))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                row[j] = min(row[j], two_before[j - 2] + 1)
    return row[-1]
