"""Which of some names somebody probably meant who wrote another one, for messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_LONGEST = 64
"""Characters of a name that are compared, whoever made it up."""


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name that is most like it; None where none is.

    Args:
        cutoff: how like it must be, from 0 (anything) to 1 (the same): difflib's ratio.
    """
    found = difflib.get_close_matches(name[:_LONGEST], sorted(known), n=1, cutoff=cutoff)
    return found[0] if found else None


def meant(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """`Did you mean NAME?`; empty where none is like it."""
    found = nearest(name, known, cutoff)
    return f"Did you mean {found}?" if found else ""
