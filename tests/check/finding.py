"""What a check finds, in short."""

from __future__ import annotations

from penstock.check import code, run
from penstock.check.finding import Finding


def of(text: str, path: str) -> list[Finding]:
    """Findings of a text under the name of a file."""
    return run.check_text(text, path)


def places(found: list[Finding]) -> set[tuple[str, int]]:
    """Rule and line of each."""
    return {(each.rule.id, each.line) for each in found}


def rules(text: str, path: str) -> set[str]:
    """Rules that find something in a text."""
    return {each.rule.id for each in of(text, path)}


def in_code(text: str, path: str) -> list[Finding]:
    """Findings of a text that is neither YAML nor JSON."""
    return sorted(code.examine(path, text), key=lambda each: (each.line, each.column))
