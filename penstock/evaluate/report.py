"""A result for people: a table in the terminal, JSON, and the sentences that both reports share."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from penstock import writing

from .answer import NANO
from .result import Comparison, Result, SideResult
from .statistics import Finding

if TYPE_CHECKING:
    from rich.console import Console


def percent(share: float | None) -> str:
    """`63.4 %`"""
    return "–" if share is None else f"{100 * share:.1f} %"


def points(difference: float) -> str:
    """A difference of shares, in points of 100: `+1.2`, `−0.4`."""
    text = f"{100 * difference:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def headline(comparison: Comparison) -> str:
    """The verdict in a line."""
    finding = comparison.finding
    if finding is None:
        return f"{comparison.candidate}: no example was answered by both and graded"
    return f"{comparison.candidate}: {finding.verdict}"


def explanation(finding: Finding, margin: float, confidence: float) -> str:
    """Why, in a sentence or two."""
    low, high = points(finding.interval.low), points(finding.interval.high)
    seen = (
        f"{points(finding.difference)} points on {finding.pairs} examples; with {100 * confidence:g} % "
        f"confidence the difference lies between {low} and {high}"
    )
    match finding.verdict:
        case "better":
            return f"{seen}: above 0."
        case "not worse" if finding.interval.high < 0:
            return f"{seen}: it is a little worse, by less than the margin of {points(margin)[1:]}."
        case "not worse":
            return f"{seen}: above the margin of −{points(margin)[1:]}."
        case "worse":
            return f"{seen}: below 0, and not within the margin of −{points(margin)[1:]}."
    more = (
        f"About {finding.needed:,} examples like these would tell, if the difference is what was seen."
        if finding.needed is not None
        else "No set would tell, if the difference is what was seen: it lies at the margin itself."
    )
    return (
        f"{seen}: it may be worse by more than the margin of {points(margin)[1:]}, or no worse at all. {more}"
    )


def shown(side: SideResult) -> str:
    """Who it is: `gpt-x at https://…`, `demo --quantization int8`."""
    about = side.about
    if "url" in about:
        return f"{about.get('model') or '?'} at {about['url']}"
    flags = list(about.get("flags", ()))
    if flags[-2:] == ["--quantization", "none"]:
        flags = [*flags[:-2], "in full precision"]
    return " ".join([str(about.get("model")), *flags])


def rows(side: SideResult) -> dict[str, str]:
    """What stands of a side beside the other's."""
    spent = side.spent
    answers = max(spent.answers, 1)
    return {
        "quality": percent(side.score),
        "answers asked now / kept": f"{side.asked} / {side.cached}",
        "without an answer (wrong)": str(spent.refused),
        "cut at a limit of tokens": str(spent.cut),
        "latency p50": _milliseconds(spent.latency_p50),
        "latency p95": _milliseconds(spent.latency_p95),
        "tokens in": _number(spent.prompt_tokens),
        "tokens out": _number(spent.completion_tokens),
        "device-seconds": "–" if spent.device_time is None else f"{spent.device_time / NANO:.2f}",
        "dollars for 1,000 answers": "–"
        if spent.nanodollars is None
        else f"${spent.nanodollars / NANO / answers * 1000:,.4f}",
        "price": side.price or "not given",
    }


def warnings(result: Result) -> list[str]:
    """What a reader must know before he believes the figures."""
    said = []
    if result.stopped:
        said.append(f"Not complete. {result.stopped}. What was answered is kept; the same command goes on.")
    if result.skipped:
        said.append(f"{len(result.skipped)} broken lines of the set were left out.")
    sides = [result.baseline, *result.candidates]
    for side in sides:
        if len(side.spent.fingerprints) > 1:
            said.append(
                f"{side.name}: its answers have {len(side.spent.fingerprints)} system fingerprints "
                f"({', '.join(side.spent.fingerprints)}): the server has changed (--again asks anew)."
            )
    if len({each for side in sides for each in side.spent.concurrency}) > 1:
        said.append(
            "Latencies were measured with different numbers of requests under way, and do not compare."
        )
    for each in result.comparisons:
        if each.ungraded:
            name, why = each.ungraded[0]
            said.append(f"{each.candidate}: {len(each.ungraded)} examples were not graded, as {name}: {why}.")
    return said


def notes(result: Result) -> list[str]:
    """Who the sides are, and from when their answers."""
    said = []
    for side in (result.baseline, *result.candidates):
        line = f"{side.name} is {shown(side)}"
        if side.cached and side.spent.first_asked is not None and side.spent.last_asked is not None:
            span = f"{when(side.spent.first_asked)} to {when(side.spent.last_asked)}"
            line += f"; {side.cached} answers were kept from before (of {span}; --again asks anew)"
        said.append(line)
    return said


def when(seconds: float) -> str:
    """`2026-11-21 09:14 UTC`"""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def print_report(result: Result, console: Console) -> None:
    """Show it in a terminal."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    sides = [result.baseline, *result.candidates]
    table = Table(box=box.SIMPLE_HEAD, title=f"{result.set}: {result.examples} examples")
    table.add_column("")
    for side in sides:
        table.add_column(escape(side.name), justify="right")
    columns = [rows(side) for side in sides]
    for name in columns[0]:
        table.add_row(name, *(escape(column[name]) for column in columns))
    console.print(table)
    for line in notes(result):
        console.print(escape(line), soft_wrap=True, highlight=False)
    for each in result.comparisons:
        console.print()
        console.print(f"[bold]{escape(headline(each))}[/bold]", highlight=False)
        if each.finding is not None:
            text = explanation(each.finding, result.margin, result.confidence)
            console.print(escape(text), soft_wrap=True, highlight=False)
            for tag, finding in each.by_tag.items():
                low, high = points(finding.interval.low), points(finding.interval.high)
                line = (
                    f"  {tag}: {percent(finding.baseline)} → {percent(finding.candidate)} of {finding.pairs}"
                )
                console.print(escape(f"{line} ({low} to {high})"), soft_wrap=True, highlight=False)
    if said := warnings(result):
        console.print()
    for line in said:
        console.print(escape(line), soft_wrap=True, highlight=False)


def write_json(path: Path, result: Result) -> None:
    """All of it, as one object."""
    write(path, json.dumps(result.as_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write(path: Path, text: str) -> None:
    """In one step: what stood there stays, or all of this does. Raises StartupError."""
    writing.write(path, text)
    print(f"Written to {path}")


def _milliseconds(nanoseconds: float) -> str:
    return f"{nanoseconds / 1e6:,.0f} ms"


def _number(count: int | None) -> str:
    return "not told" if count is None else f"{count:,}"
