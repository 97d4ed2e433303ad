"""Where a JSON value in a stream ends, found as its text comes.

Strict but for two things that models write: control characters in strings, such as line breaks, and numbers
are only looked at for their characters. Whoever takes the value decodes it, and finds the rest.
"""

from __future__ import annotations

import re

_SPACE = re.compile(r"[ \t\n\r]*")
_STRING_BODY = re.compile(r'[^"\\]*')
_SCALAR = re.compile(r"[-+.0-9A-Za-z]*")
_LITERALS = ("true", "false", "null")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_MAX_DEPTH = 64
"""As in bodies of requests: clients send the arguments back."""


class JsonScanner:
    """Walks over one value; `at` is how far it has come."""

    def __init__(self, at: int = 0) -> None:
        """Start at a place of the text."""
        self.at = at
        self.done = False
        """The value is whole; `at` is behind it. Of a bare number that is known with the character after
        it."""
        self.broken = False
        """It is no JSON; `at` is where that shows."""
        self._open: list[str] = []
        """Brackets that will close, the innermost last."""
        self._expects = "value"
        """value, first (value or end of a list), key, first key, colon, next (comma or end)."""
        self._in_string = False

    def run(self, text: str) -> None:
        """Go on with the text, which has grown."""
        while not (self.done or self.broken) and self._step(text):
            pass

    def _step(self, text: str) -> bool:
        """One token; False where there is not enough text for it."""
        if self._in_string:
            return self._string(text)
        space = _SPACE.match(text, self.at)
        self.at = space.end() if space else self.at
        if self.at >= len(text):
            return False
        character, expects = text[self.at], self._expects
        if self._open and character == self._open[-1] and expects in ("first", "first key", "next"):
            self.at += 1
            self._open.pop()
            self._valued()
        elif expects == "next":
            if self._went_on(character == ","):
                self._expects = "key" if self._open[-1] == "}" else "value"
        elif expects == "colon":
            if self._went_on(character == ":"):
                self._expects = "value"
        elif character == '"':
            self.at += 1
            self._in_string = True
        elif expects in ("key", "first key"):
            self.broken = True
        elif character in "{[" and len(self._open) < _MAX_DEPTH:
            self.at += 1
            self._open.append("}" if character == "{" else "]")
            self._expects = "first key" if character == "{" else "first"
        else:
            return self._scalar(text)
        return True

    def _went_on(self, right: bool) -> bool:
        self.at += right
        self.broken = not right
        return right

    def _string(self, text: str) -> bool:
        while True:
            body = _STRING_BODY.match(text, self.at)
            self.at = body.end() if body else self.at
            if self.at >= len(text):
                return False
            if text[self.at] == '"':
                self.at += 1
                self._in_string = False
                if self._expects in ("key", "first key"):
                    self._expects = "colon"
                else:
                    self._valued()
                return True
            if self.at + 1 >= len(text):  # what is escaped is still to come
                return False
            self.at += 2

    def _scalar(self, text: str) -> bool:
        match = _SCALAR.match(text, self.at)
        end = match.end() if match else self.at
        word = text[self.at : end]
        if end >= len(text):  # it may go on
            self.broken = not (
                _NUMBER_START.fullmatch(word) or any(name.startswith(word) for name in _LITERALS)
            )
            return False
        if word not in _LITERALS and not _NUMBER.fullmatch(word):
            self.broken = True
            return False
        self.at = end
        self._valued()
        return True

    def _valued(self) -> None:
        """A value has ended."""
        self._expects = "next"
        self.done = not self._open


_NUMBER_START = re.compile(r"-?(0|[1-9][0-9]*)?(\.[0-9]*)?([eE][-+]?[0-9]*)?")
