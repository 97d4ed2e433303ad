"""Plain text with commands and pieces of YAML in it, as a page of documentation that was saved as text.

Its structure is lost: what begins like a command is one, up to where its quotes and continuations end. Pieces
of YAML have no indentation any more, and are looked at line by line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from . import containers, shell
from .engines import TRUST
from .finding import Finding, Word
from .markdown import commands_in, flags_in, mentioned

_START = re.compile(
    r"^\s*(?:[$%] )?(?:sudo )?(?:vllm serve |python3? -m vllm\.|docker run |hey -|wrk -|ab -|curl |"
    r"helm |penstock [a-z]|export [A-Z_]+=)"
)
_IMAGE = re.compile(r"^\s*-?\s*image:\s*[\"']?([^\s\"']+)")
_VARIABLE = re.compile(r"^\s*- name:\s*[\"']?([A-Z][A-Z0-9_]+)[\"']?\s*$")
_TRUST = re.compile(r"[\"']--trust-remote-code[\"']")
_GLUED = re.compile(r"(--[a-z-]*[a-z])\d+\. [A-Z].*$")
"""A heading that has lost its line, behind a flag."""
_MOST_LINES = 60
"""Of a command whose quotes never end."""


def examine(text: str, path: str) -> Iterator[Finding]:
    """What is wrong with the commands and settings in a text."""
    lines = text.split("\n")
    tells_of_vllm = "vllm" in text.lower()
    number = 0
    while number < len(lines):
        row = lines[number]
        if _START.match(row):
            end = _end(lines, number)
            command = _GLUED.sub(r"\1", "\n".join(lines[number:end]))
            yield from shell.examine(command, path, line=number + 1)
            number = end
            continue
        for start, command in commands_in(row):
            yield from mentioned(command, path, number + 1, start + 1)
        if tells_of_vllm:
            yield from _settings(row, text, path, number + 1)
            yield from flags_in(row, path, number + 1)
        number += 1


def _end(lines: Sequence[str], first: int) -> int:
    """The line after a command: it goes on behind a backslash, and while a quote is open."""
    quoted = False
    for number in range(first, min(len(lines), first + _MOST_LINES)):
        line = lines[number]
        bare = line if quoted else re.sub(r"(^|\s)#.*$", "", line)
        if bare.count("'") % 2:
            quoted = not quoted
        if not quoted and not bare.rstrip().endswith("\\"):
            return number + 1
    return min(len(lines), first + (1 if quoted else _MOST_LINES))


def _settings(row: str, text: str, path: str, line: int) -> Iterator[Finding]:
    if found := _IMAGE.match(row):
        yield from containers.image(Word(found[1], line, found.start(1) + 1), path)
    if found := _VARIABLE.match(row):
        word = Word(found[1], line, found.start(1) + 1)
        yield from containers.environment([(found[1], word)], [text], path, is_known=False)
    if found := _TRUST.search(row):
        yield Finding(TRUST, path, line, found.start() + 2, "--trust-remote-code is given.")
