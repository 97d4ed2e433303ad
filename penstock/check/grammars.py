"""Syntax trees of shell, JavaScript and TypeScript, by tree-sitter: it reads broken text, too.

The grammars are in the extra `check`. Without them such texts are not checked, and a finding says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING

from .finding import Rule, Severity

if TYPE_CHECKING:
    from tree_sitter import Node, Parser

MISSING = Rule(
    "grammar-missing",
    Severity.WARNING,
    "a text that was not checked, because its grammar is not installed",
    "Nothing is known about the commands or calls in it.",
    "pip install 'penstock[check]'",
)
RULES = (MISSING,)

MAX_BYTES = 4 << 20
"""Of one text; what is longer is generated, and is not read."""


class GrammarMissing(Exception):
    """A grammar is not installed; the message names its package."""


@cache
def parser(language: str) -> Parser:
    """The parser of `bash`, `javascript`, `typescript` or `tsx`. Raises GrammarMissing."""
    try:
        import tree_sitter

        if language == "bash":
            import tree_sitter_bash

            pointer = tree_sitter_bash.language()
        elif language == "javascript":
            import tree_sitter_javascript

            pointer = tree_sitter_javascript.language()
        else:
            import tree_sitter_typescript

            tsx = language == "tsx"
            pointer = (
                tree_sitter_typescript.language_tsx() if tsx else tree_sitter_typescript.language_typescript()
            )
    except ImportError as error:
        raise GrammarMissing(str(error.name).replace("_", "-")) from None
    return tree_sitter.Parser(tree_sitter.Language(pointer))


def walk(root: Node) -> Iterator[Node]:
    """All nodes in the order of the text; without recursion, since texts nest as deep as they like."""
    stack = [root]
    while stack:
        node = stack.pop()
        yield node
        stack.extend(reversed(node.children))


def text_of(node: Node) -> str:
    """Its source."""
    return (node.text or b"").decode("utf-8", "replace")


class Places:
    """Bytes of a text → lines and columns, from 1, in characters."""

    def __init__(self, data: bytes, line: int, column: int) -> None:
        self._lines = data.split(b"\n")
        self._line = line
        self._column = column

    def of(self, row: int, byte: int) -> tuple[int, int]:
        """Line and column of a point of tree-sitter's."""
        before = self._lines[row][:byte] if row < len(self._lines) else b""
        column = len(before.decode("utf-8", "replace")) + 1
        return self._line + row, column + (self._column - 1 if row == 0 else 0)
