"""The HTML report: one page, without scripts or anything from elsewhere; light, dark, and for phones.

Every text of a set or a model is escaped by the template (autoescape); only the charts, which are made of
numbers here, are not.
"""

from __future__ import annotations

from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from .report import explanation, notes, percent, points, rows, warnings, write
from .result import Comparison, Result
from .statistics import Finding


def write_html(path: Path, result: Result) -> None:
    """Write the page. Raises StartupError."""
    write(path, render(result))


def render(result: Result) -> str:
    """The page."""
    text = resources.files("penstock.evaluate").joinpath("page.html.j2").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    sides = [result.baseline, *result.candidates]
    columns = [{"name": side.name, "rows": rows(side)} for side in sides]
    candidates = ", ".join(each.candidate for each in result.comparisons)
    return environment.from_string(text).render(
        title=f"{candidates} against the baseline",
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        result=result,
        warnings=warnings(result),
        notes=notes(result),
        points=points,
        sides=columns,
        names=list(columns[0]["rows"]),
        comparisons=[_comparison(result, each) for each in result.comparisons],
    )


def _comparison(result: Result, each: Comparison) -> dict[str, Any]:
    finding = each.finding
    about: dict[str, Any] = {"candidate": each.candidate, "differences": each.differences, "tags": []}
    if finding is None:
        return about | {
            "tone": "too-small-to-tell", "verdict": "nothing to compare", "chart": "", "binary": "",
            "omitted": False, "explanation": "No example was answered by both sides and graded.",
        }  # fmt: skip
    changed = finding.wins + finding.losses
    return about | {
        "tone": finding.verdict.replace(" ", "-"),
        "verdict": finding.verdict,
        "explanation": explanation(finding, result.margin, result.confidence),
        "chart": Markup(chart(finding, result.margin)),
        "binary": _counts(finding),
        "changed": changed,
        "omitted": changed > len(each.differences),
        "tags": [
            {
                "name": tag,
                "pairs": some.pairs,
                "baseline": percent(some.baseline),
                "candidate": percent(some.candidate),
                "difference": f"{points(some.difference)} "
                f"({points(some.interval.low)} to {points(some.interval.high)})",
            }
            for tag, some in each.by_tag.items()
        ],
    }


def _counts(finding: Finding) -> str:
    said = f"Higher than the baseline on {finding.wins} examples, lower on {finding.losses}."
    if finding.p_value is not None:
        said += f" McNemar's mid-p: {finding.p_value:.3g}. Interval: Tango's score interval for pairs."
    else:
        said += " Interval: Student's, of the paired differences, with a pair for each side added."
    return said


def chart(finding: Finding, margin: float) -> str:
    """The interval over a scale of points: what is acceptable is shaded, from -margin on. HTML made of
    numbers; places are shares of the width, so that its text has the page's size on a phone, too."""
    low, high = finding.interval.low, finding.interval.high
    reach = max(abs(low), abs(high), 1.5 * margin, 0.005) * 1.25

    def at(difference: float) -> float:
        return round(50 + 50 * difference / reach, 2)

    said = f"difference {points(finding.difference)} points, from {points(low)} to {points(high)}"
    marks = [
        f'<i class="zone" style="left:{at(-margin)}%"></i>',
        f'<i class="zero" style="left:{at(0)}%"></i>',
        f'<i class="span" style="left:{at(low)}%;width:{round(at(high) - at(low), 2)}%"></i>',
        f'<i class="dot" style="left:{at(finding.difference)}%"></i>',
        f'<b class="low" style="right:{round(100 - at(low), 2)}%">{points(low)}</b>',
        f'<b class="high" style="left:{at(high)}%">{points(high)}</b>',
        f'<b class="foot" style="left:{at(0)}%">0</b>',
    ]
    if margin:
        marks.append(f'<b class="foot second" style="left:{at(-margin)}%">margin {points(-margin)}</b>')
    return f'<div class="chart" role="img" aria-label="{said}">{"".join(marks)}</div>'
