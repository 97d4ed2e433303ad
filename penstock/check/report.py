"""Findings as text, JSON and SARIF 2.1.0."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from penstock.core.errors import brief

from .finding import Finding, Rule, Severity

CLEAN, FOUND, CANNOT = 0, 1, 2
"""Exit statuses: nothing (that counts) found; something found; not checked."""

_LEVELS = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.NOTE: "note"}
_STYLES = {Severity.ERROR: "bold red", Severity.WARNING: "yellow", Severity.NOTE: "cyan"}
_HELP = "https://github.com/penstock/penstock/blob/main/docs/check.md"
_SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"

Style = Callable[[str, str], str]
"""(text, style) → the text with it."""


def status(findings: Iterable[Finding], *, strict: bool = False) -> int:
    """1 for errors, and with `strict` for warnings; else 0. Notes never count."""
    wrong = {Severity.ERROR, Severity.WARNING} if strict else {Severity.ERROR}
    return FOUND if any(finding.rule.severity in wrong for finding in findings) else CLEAN


def text(findings: Sequence[Finding], *, files: int, style: Style = lambda text, style: text) -> str:
    """One line for each finding, `path:line:column: severity rule: what`, with why and the fix below.

    Why is told once for each rule and file: the same again and again is not read.
    """
    lines: list[str] = []
    told: set[tuple[str, str]] = set()
    for finding in findings:
        rule = finding.rule
        place = f"{_printable(finding.path)}:{finding.line}:{finding.column}:"
        lines.append(
            f"{style(place, 'bold')} {style(rule.severity.value, _STYLES[rule.severity])} "
            f"{style(rule.id, 'magenta')}: {_printable(finding.what)}"
        )
        if (rule.id, finding.path) not in told:
            told.add((rule.id, finding.path))
            lines.append(f"    why: {rule.why}")
            lines.append(f"    fix: {_printable(finding.fix or rule.fix)}")
        elif finding.fix:
            lines.append(f"    fix: {_printable(finding.fix)}")
    counts = Counter(finding.rule.severity for finding in findings)
    told_of = [_count(counts[severity], severity.value) for severity in Severity if counts[severity]]
    summary = f"{', '.join(told_of) or 'Nothing found'} in {_count(files, 'file')}."
    return "\n".join([*lines, *([""] if lines else []), summary]) + "\n"


def as_json(findings: Sequence[Finding], *, files: int, version: str, strict: bool = False) -> str:
    """An object with `findings` (rule, severity, path, line, column, what, why, fix) and counts."""
    counts = Counter(finding.rule.severity.value for finding in findings)
    record = {
        "version": version,
        "files": files,
        "counts": {severity.value: counts[severity.value] for severity in Severity},
        "status": status(findings, strict=strict),
        "findings": [
            {
                "rule": finding.rule.id,
                "severity": finding.rule.severity.value,
                "path": finding.path,
                "line": finding.line,
                "column": finding.column,
                "what": finding.what,
                "why": finding.rule.why,
                "fix": finding.fix or finding.rule.fix,
            }
            for finding in findings
        ],
    }
    return json.dumps(record, indent=2, ensure_ascii=False) + "\n"


def sarif(
    findings: Sequence[Finding], rules: Sequence[Rule], lines: Mapping[str, Sequence[str]], *, version: str
) -> str:
    """A log of SARIF 2.1.0, as GitHub's code scanning reads it.

    Args:
        rules: all of them; only those with findings are listed.
        lines: path → the file's lines. A finding's fingerprint is its rule, path and the text of its line, so
            that it stays the same finding when lines are put in before it.
    """
    found = {finding.rule.id for finding in findings}
    listed = [rule for rule in rules if rule.id in found]
    listed += [
        each
        for each in {finding.rule.id: finding.rule for finding in findings}.values()
        if each not in listed
    ]
    index = {rule.id: number for number, rule in enumerate(listed)}
    seen: Counter[str] = Counter()
    results = []
    for finding in findings:
        fingerprint = _fingerprint(finding, lines.get(finding.path, ()))
        seen[fingerprint] += 1
        results.append(
            {
                "ruleId": finding.rule.id,
                "ruleIndex": index[finding.rule.id],
                "level": _LEVELS[finding.rule.severity],
                "message": {"text": f"{finding.what} {finding.fix or finding.rule.fix}".strip()},
                "locations": [
                    {
                        "physicalLocation": {
                            "artifactLocation": _artifact(finding.path),
                            "region": {
                                "startLine": max(1, finding.line),
                                "startColumn": max(1, finding.column),
                            },
                        }
                    }
                ],
                "partialFingerprints": {"primaryLocationLineHash": f"{fingerprint}:{seen[fingerprint]}"},
            }
        )
    log = {
        "$schema": _SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "penstock check",
                        "semanticVersion": version,
                        "informationUri": _HELP,
                        "rules": [_rule(rule) for rule in listed],
                    }
                },
                "originalUriBaseIds": {"ROOT": {"description": {"text": "Where `penstock check` was run."}}},
                "columnKind": "unicodeCodePoints",
                "results": results,
            }
        ],
    }
    return json.dumps(log, indent=2, ensure_ascii=False) + "\n"


def explain(rule: Rule) -> str:
    """All that is known of a rule."""
    return (
        f"{rule.id} ({rule.severity.value}): {rule.summary}.\n\nWhy: {rule.why}\n\nFix: {rule.fix}\n\n"
        "To accept one, write in a comment at its line, with the reason: penstock: "
        f"ignore[{rule.id}] …\n"
    )


def list_of(rules: Sequence[Rule]) -> str:
    """A line for each rule."""
    width = max((len(rule.id) for rule in rules), default=0)
    return "".join(f"{rule.id:<{width}}  {rule.severity.value:<7}  {rule.summary}\n" for rule in rules)


def _rule(rule: Rule) -> dict[str, Any]:
    return {
        "id": rule.id,
        "name": "".join(part.capitalize() for part in rule.id.split("-")),
        "shortDescription": {"text": rule.summary[:1].upper() + rule.summary[1:] + "."},
        "fullDescription": {"text": rule.why},
        "help": {
            "text": f"{rule.why}\n\n{rule.fix}",
            "markdown": f"**Why:** {rule.why}\n\n**Fix:** {rule.fix}",
        },
        "helpUri": f"{_HELP}#{rule.id}",
        "defaultConfiguration": {"level": _LEVELS[rule.severity]},
        "properties": {"problem.severity": _LEVELS[rule.severity].replace("note", "recommendation")},
    }


def _artifact(path: str) -> dict[str, str]:
    """A file as a URI: relative to where the check was run, if it is under there."""
    if path == "-":
        return {"uri": "stdin"}
    if path.startswith("/"):
        return {"uri": f"file://{quote(path)}"}
    return {"uri": quote(path.removeprefix("./")), "uriBaseId": "ROOT"}


def _fingerprint(finding: Finding, lines: Sequence[str]) -> str:
    line = lines[finding.line - 1].strip() if 0 < finding.line <= len(lines) else ""
    text = "\0".join((finding.rule.id, finding.path.removeprefix("./"), line))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _printable(text: str) -> str:
    """As it may stand in one line of a terminal."""
    if text.isprintable():
        return text
    return brief("".join(char if char.isprintable() else ascii(char)[1:-1] for char in text), 2000)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
