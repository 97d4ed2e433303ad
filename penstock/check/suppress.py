"""Findings that somebody has looked at and wants no more.

    replicas: 1  # penstock: ignore[single-replica] a demo, which may be away

A comment at the end of a line covers that line and what is nested in it; alone on its line, it covers the
next one that way; above the first line of a YAML document, the whole document. `ignore-file[…]` covers the
file. A comment without a reason, or that names a rule that is not there, or that covers nothing, is a note.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from .finding import Finding, Rule, Severity
from .sources import Source

REASON = Rule(
    "ignore-reason",
    Severity.NOTE,
    "an ignored finding has no reason",
    "Nobody knows later whether it still holds.",
    "Write the reason after the brackets.",
)
UNKNOWN = Rule(
    "ignore-unknown",
    Severity.WARNING,
    "a comment ignores a rule that is not there",
    "It ignores nothing.",
    "Name a rule of docs/check.md.",
)
UNUSED = Rule(
    "ignore-unused",
    Severity.NOTE,
    "a comment ignores nothing",
    "What was wrong has been put right, or stands elsewhere.",
    "Take the comment away.",
)
RULES: tuple[Rule, ...] = (REASON, UNKNOWN, UNUSED)

_COMMENT = re.compile(r"(?:#|//|<!--|--|;)\s*penstock:\s*ignore(-file)?\[([^\]\n]*)\][ \t]*([^\n]*)")


@dataclass(slots=True)
class _Ignored:
    rules: tuple[str, ...]
    line: int
    column: int
    reason: str
    first: int
    last: int
    used: bool = False


def apply(source: Source, findings: Sequence[Finding], known: Collection[str]) -> Iterator[Finding]:
    """The findings of a source that its comments do not cover, and what is wrong with the comments."""
    comments = list(_comments(source)) if "penstock:" in source.text else []
    for finding in findings:
        covering = [
            each
            for each in comments
            if finding.rule.id in each.rules and each.first <= finding.line <= each.last
        ]
        for each in covering:
            each.used = True
        if not covering:
            yield finding
    for each in comments:
        unknown = [name for name in each.rules if name not in known]
        for name in unknown:
            yield Finding(UNKNOWN, source.path, each.line, each.column, f"There is no rule `{name}`.")
        if not each.reason:
            names = ", ".join(each.rules)
            yield Finding(
                REASON, source.path, each.line, each.column, f"Why is {names or 'nothing'} ignored?"
            )
        if not each.used and not unknown:
            names = ", ".join(each.rules)
            yield Finding(UNUSED, source.path, each.line, each.column, f"Nothing of [{names}] is found here.")


def _comments(source: Source) -> Iterator[_Ignored]:
    lines = source.text.splitlines()
    starts = {_content(lines, each.first): each.last for each in source.documents}
    for match in _COMMENT.finditer(source.text):
        line = source.text.count("\n", 0, match.start()) + 1
        begin = source.text.rfind("\n", 0, match.start()) + 1
        rules = tuple(name.strip() for name in match[2].split(",") if name.strip())
        reason = match[3].removesuffix("-->").strip(" -:")
        if match[1]:
            first, last = 1, len(lines)
        elif source.text[begin : match.start()].strip():
            first, last = line, _nested(lines, line)
        else:
            first = _content(lines, line + 1)
            last = starts.get(first) or _nested(lines, first)
        yield _Ignored(rules, line, match.start() - begin + 1, reason, first, last)


def _content(lines: Sequence[str], line: int) -> int:
    """The first line from this on that is neither empty, nor a comment, nor a separator."""
    while line <= len(lines):
        text = lines[line - 1].strip()
        if text and not text.startswith(("#", "//", "---", "<!--")):
            return line
        line += 1
    return line


def _nested(lines: Sequence[str], line: int) -> int:
    """The last line that is nested in this one."""
    if line > len(lines):
        return line
    indent = _indent(lines[line - 1])
    last = line
    for number in range(line + 1, len(lines) + 1):
        text = lines[number - 1]
        if text.strip() and _indent(text) <= indent:
            break
        last = number
    return last


def _indent(text: str) -> int:
    return len(text) - len(text.lstrip(" \t"))
