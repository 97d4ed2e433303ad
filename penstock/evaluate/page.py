"""The HTML report: one page, without scripts or anything from elsewhere; light, dark, and for phones.

Every text of a set or a model is escaped by the template (autoescape); only the charts, which are made of
numbers here, are not.
"""

from __future__ import annotations

from datetime import UTC, datetime
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from .report import explanation, percent, points, remarks, rows, shown
from .result import Comparison, Result
from .statistics import Finding

_WIDTH, _HEIGHT, _EDGE = 640, 92, 48


def render(result: Result) -> str:
    """The page."""
    text = resources.files("penstock.evaluate").joinpath("page.html.j2").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    sides = [result.baseline, *result.candidates]
    columns = [{"name": side.name, "rows": rows(side), "shown": shown(side)} for side in sides]
    candidates = ", ".join(each.candidate for each in result.comparisons)
    return environment.from_string(text).render(
        title=f"{candidates} against the baseline",
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        result=result,
        remarks=remarks(result),
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
    """The interval over a scale of points: what is acceptable is shaded, from -margin on. SVG."""
    low, high = finding.interval.low, finding.interval.high
    reach = max(abs(low), abs(high), 1.5 * margin, 0.005) * 1.1

    def x(difference: float) -> float:
        return round(_EDGE + (difference + reach) / (2 * reach) * (_WIDTH - 2 * _EDGE), 1)

    middle = 34
    labels = [(0.0, "0"), (-margin, f"margin {points(-margin)}")] if margin else [(0.0, "0")]
    zone, left, right = x(-margin), x(low), x(high)
    lines = [
        f'<rect x="{zone}" y="8" width="{round(_WIDTH - _EDGE - zone, 1)}" height="52" fill="var(--zone)"/>',
        f'<line x1="{x(0)}" y1="8" x2="{x(0)}" y2="60" stroke="var(--soft)"/>',
        f'<line x1="{zone}" y1="8" x2="{zone}" y2="60" stroke="var(--soft)" stroke-dasharray="4 3"/>',
        f'<path d="M{left} {middle}H{right}" stroke="var(--tone)" stroke-width="4" stroke-linecap="round"/>',
        f'<circle cx="{x(finding.difference)}" cy="{middle}" r="7" fill="var(--tone)"/>',
        *(
            f'<text class="name" x="{at}" y="{middle - 12}" text-anchor="{anchor}">{points(end)}</text>'
            for at, anchor, end in ((left, "end", low), (right, "start", high))
        ),
    ]
    for place, (difference, label) in enumerate(labels):
        y = 74 if place == 0 else 88
        lines.append(f'<text x="{x(difference)}" y="{y}" text-anchor="middle">{label}</text>')
    said = f"difference {points(finding.difference)} points, from {points(low)} to {points(high)}"
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{said}">' + "".join(lines) + "</svg>"
    )
