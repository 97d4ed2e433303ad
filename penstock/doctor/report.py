"""What was found, for a terminal and as JSON; and whether that is well."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from .checklist import Point, Verdict
from .logs import Match
from .node.points import HEADINGS as NODE_HEADINGS
from .snapshot import Snapshot

_MARKS = {Verdict.OK: "ok  ", Verdict.WARN: "WARN", Verdict.FAIL: "FAIL", Verdict.UNKNOWN: "?   "}
_HEADINGS = {"health": "Health", "memory": "Memory checklist", "throughput": "Throughput checklist"}


def worst(points: Sequence[Point], matches: Sequence[Match]) -> Verdict:
    """Of all; what is unknown counts as well."""
    verdicts = {point.verdict for point in points}
    verdicts |= {Verdict.FAIL if match.problem.severe else Verdict.WARN for match in matches}
    return next((verdict for verdict in (Verdict.FAIL, Verdict.WARN) if verdict in verdicts), Verdict.OK)


def point_lines(points: Sequence[Point]) -> Iterator[str]:
    """The checklists."""
    heading = ""
    for point in points:
        if point.list != heading:
            heading = point.list
            yield from ("", (_HEADINGS | NODE_HEADINGS)[heading])
        yield f"  {_MARKS[point.verdict]}  {point.title}: {shown(point.value)}"
        if point.advice:
            yield f"        {shown(point.advice)}"


def match_lines(matches: Sequence[Match], count: int) -> Iterator[str]:
    """The problems of a log."""
    if not matches:
        yield f"\nLog: nothing that is known in {count:,} lines."
        return
    yield f"\nLog: {len(matches)} known {'problem' if len(matches) == 1 else 'problems'} in {count:,} lines"
    for match in matches:
        where = ", ".join(map(str, match.lines)) + (", …" if match.count > len(match.lines) else "")
        word = "line" if match.count == 1 else "lines"
        yield f"  {'FAIL' if match.problem.severe else 'WARN'}  {match.problem.title} ({word} {where})"
        yield f"        {match.excerpt}"
        yield f"        Cause: {match.problem.cause}"
        yield from (f"        Fix: {fix}" for fix in match.problem.fixes)


def shown(text: str) -> str:
    """Text of a server's, without what a terminal would obey."""
    return "".join(letter if letter.isprintable() else "�" for letter in text)


def as_json(
    snapshot: Snapshot | None, points: Sequence[Point], matches: Sequence[Match] | None, lines: int
) -> dict[str, Any]:
    """Everything."""
    found: dict[str, Any] = {"verdict": worst(points, matches or ()).value}
    if snapshot is not None:
        found |= {
            "url": snapshot.url,
            "engine": snapshot.engine,
            "version": snapshot.version,
            "model": snapshot.model,
            "points": [asdict(point) for point in points],
        }
    if matches is not None:
        found["log"] = {"lines": lines, "problems": [_problem(match) for match in matches]}
    return found


def _problem(match: Match) -> dict[str, Any]:
    problem = match.problem
    return {
        "id": problem.id,
        "title": problem.title,
        "severe": problem.severe,
        "count": match.count,
        "lines": match.lines,
        "excerpt": match.excerpt,
        "cause": problem.cause,
        "fixes": list(problem.fixes),
    }
