"""Markdown: code blocks by their language, and commands in the text.

A block is checked as a file of its language would be, with the lines of the document. In running text a
command is mentioned, not run: only what is wrong with it wherever it stands is found there, such as a flag
that does not exist.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

from . import clients, engines, flags, shell
from .finding import Finding, Rule, Severity

if TYPE_CHECKING:
    from markdown_it import MarkdownIt

MENTIONED = Rule(
    "flag-mentioned",
    Severity.NOTE,
    "a text that tells of a flag which vLLM no longer has",
    "Whoever follows it gets an engine that does not start.",
    "Say what has replaced it.",
)
RULES = (MENTIONED,)

_SPAN = re.compile(r"(`+)(?!`)(.+?)(?<!`)\1(?!`)")
_COMMAND = re.compile(
    r"(?:^|(?<=[\s(`#]))(?:vllm serve|python3? -m vllm\.entrypoints|docker run|hey -|wrk -|ab -|"
    r"penstock [a-z])"
)
_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9_]+(?:-[a-z0-9_]+)+")
_KNOWN_GONE = re.compile(r"remov|no longer|deprecat|replaced|gone\b|that is \w+'s name", re.IGNORECASE)
"""A line that tells it itself."""
_EVERYWHERE = frozenset(
    rule.id
    for rule in (
        engines.FLAG_UNKNOWN,
        engines.FLAG_REMOVED,
        engines.FLAG_VALUE,
        engines.PARALLEL,
        engines.KEY,
        clients.LOAD_GET,
        shell.CONTINUATION,
    )
)
"""Rules that hold for a command that is only mentioned."""


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced or indented code block."""

    language: str
    """In lower case; empty if it has none."""
    text: str
    line: int
    """Of its first line of code."""
    indent: int
    """Columns that its lines are indented by."""


def blocks(text: str) -> Iterator[Block]:
    """The code blocks of a document, those in lists and quotes, too."""
    lines = text.split("\n")
    for token in _parser().parse(text):
        if token.type not in ("fence", "code_block") or token.map is None:
            continue
        first = token.map[0] + (1 if token.type == "fence" else 0)
        words = re.split(r"[\s{,:]", token.info.strip().lower().removeprefix("{.").removeprefix("{"))
        language = words[0].rstrip("}")
        filled = next(
            ((row, each) for row, each in enumerate(token.content.split("\n")) if each.strip()), None
        )
        indent = 0
        if filled is not None and first + filled[0] < len(lines):
            indent = max(0, lines[first + filled[0]].find(filled[1]))
        yield Block(language, token.content, first + 1, indent)


@cache
def _parser() -> MarkdownIt:
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark").disable("inline")  # blocks are all that is wanted


def examine(text: str, path: str, of_block: Callable[[Block, str], Iterator[Finding]]) -> Iterator[Finding]:
    """What is wrong with a document.

    Args:
        of_block: what is wrong with a block of the file at a path, with its lines, as if it had no indent.
    """
    rows = text.split("\n")
    for block in blocks(text):
        for finding in of_block(block, path):
            yield replace(finding, column=finding.column + block.indent)
        for row in range(block.line - 1, min(len(rows), block.line - 1 + block.text.count("\n"))):
            rows[row] = ""
    tells_of_vllm = "vllm" in text.lower()
    for number, prose in enumerate(rows, 1):
        for span in _SPAN.finditer(prose):
            yield from mentioned(span[2], path, number, span.start(2) + 1)
        if tells_of_vllm:
            yield from flags_in(prose, path, number)


def mentioned(text: str, path: str, line: int, column: int) -> Iterator[Finding]:
    """What is wrong with a command in running text."""
    if _COMMAND.match(text) is None or " -" not in text:
        return
    for finding in shell.examine(text, path, line=line, column=column):
        if finding.rule.id in _EVERYWHERE:
            yield finding


def flags_in(row: str, path: str, line: int) -> Iterator[Finding]:
    """Flags in a line of text that vLLM had, or that are misspelled."""
    known = flags.vllm()
    if _KNOWN_GONE.search(row):
        return
    for match in _FLAG.finditer(row):
        name = flags.plain(match[0])
        if name in known.names:
            continue
        if name in flags.REMOVED and not flags.REMOVED[name].startswith("that is "):
            what, fix = f"vLLM {flags.VLLM_VERSION} has no {name}.", flags.REMOVED[name]
        elif (near := name.replace("isation", "ization")) in known.names:
            what, fix = f"vLLM has no {name}.", f"write {near}"
        else:
            continue
        yield Finding(MENTIONED, path, line, match.start() + 1, what, fix[:1].upper() + fix[1:] + ".")


def commands_in(row: str) -> Iterator[tuple[int, str]]:
    """Where commands begin in a line of plain text, and the text up to where they may end."""
    for match in _COMMAND.finditer(row):
        rest = row[match.start() :]
        opened = row[: match.start()].rstrip().endswith("(")
        end = rest.find(")") if opened else -1
        yield match.start(), rest if end < 0 else rest[:end]
