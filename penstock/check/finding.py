"""What a rule has found, and what a rule is."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    """How bad it is. SARIF's levels."""

    ERROR = "error"
    """It will not work, or it harms: exit status 1."""
    WARNING = "warning"
    """It will work badly one day: exit status 1 with --strict."""
    NOTE = "note"
    """Worth knowing."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One thing that `penstock check` looks for."""

    id: str
    """As `probe-missing`: small words and dashes. It stays when the wording changes."""
    severity: Severity
    summary: str
    """What is wrong, in a line."""
    why: str
    """What happens because of it."""
    fix: str
    """What to do in general."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One place where a rule has found something."""

    rule: Rule
    path: str
    """Of the file as it was named; `-` for standard input."""
    line: int
    """From 1."""
    column: int
    """From 1."""
    what: str
    """This case, with its value."""
    fix: str = ""
    """What to write here; the rule's if empty."""


@dataclass(frozen=True, slots=True)
class Word:
    """A word of a command line or an expression, and where it stands."""

    text: str
    line: int
    column: int
