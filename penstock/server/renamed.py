"""Errors and names of what is ignored in a dialect's own words, where a chat's code has found them.

It knows no dialect: each brings its table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from copy import copy
from typing import TypeVar

from penstock.core.errors import InvalidRequest, PenstockError

E = TypeVar("E", bound=PenstockError)


class Renamed:
    """A table of a chat's names for fields, and what they are called in a dialect."""

    def __init__(self, names: Iterable[tuple[str, str]]) -> None:
        """names: (pattern, replacement), tried in this order."""
        self._names = [(re.compile(pattern), own) for pattern, own in names]

    def text(self, text: str) -> str:
        """With the dialect's names."""
        for pattern, own in self._names:
            text = pattern.sub(own, text)
        return text

    def error(self, error: E) -> E:
        """A refusal with the dialect's names; other errors as they are."""
        if not isinstance(error, InvalidRequest):
            return error
        renamed = copy(error)
        renamed.message = self.text(error.message)
        renamed.param = None if error.param is None else self.text(error.param)
        return renamed
