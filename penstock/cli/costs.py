"""`penstock costs`: what requests cost, by whom and for what, and whether self-hosting pays."""

from __future__ import annotations

import argparse
import csv
import sys
import time
from pathlib import Path
from typing import Any

from penstock import writing
from penstock.core.errors import InvalidRequest
from penstock.gateway.tags import read_tags

from . import costs_estimate, ledger_at
from .ledger import cell, moment_of, text

_BY = ("key", "team", "feature", "route", "upstream", "model", "pool", "day")
_COLUMNS = {
    "requests": "requests",
    "input_tokens": "in",
    "output_tokens": "out",
    "cached_tokens": "cached",
    "dollars": "dollars",
    "lost_dollars": "lost",
    "idle_dollars": "idle",
    "cost_dollars": "cost",
    "idle_share": "idle share",
    "comparator_dollars": "cloud",
    "break_even_utilization": "break-even",
    "escalation_rate": "escalated",
    "unverified_requests": "unverified",
    "dollars_per_success": "per success",
}
"""Figures of the table → their heads."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what is grouped by, which requests, the form, and `estimate`."""
    parser.add_argument(
        "--by",
        default="feature",
        metavar="NAMES",
        help=f"groups, with commas between several: {', '.join(_BY)} (default: feature)",
    )
    parser.add_argument(
        "--format", choices=("table", "csv", "json"), default="table", help="(default: table)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write there (default: standard output)")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write a page with charts, too; it needs nothing else"
    )
    parser.add_argument(
        "--top", type=int, default=50, metavar="N", help="most lines of a table or page; the rest is one more"
    )
    parser.add_argument(
        "--evals",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="reports of `penstock eval --output-json`, a file or a folder of them: where a smaller model "
        "passed, what it would have saved",
    )
    rows = parser.add_argument_group("which requests")
    rows.add_argument("--since", metavar="TIME", help="2026-11-21, 2026-11-21T08:30 (UTC), or 30d ago as 30d")
    rows.add_argument("--until", metavar="TIME", help="before that")
    for name, what in (("key", "its id or its name"), ("team", ""), ("route", ""), ("upstream", "")):
        rows.add_argument(f"--{name}", metavar=name.upper(), help=what or None)
    for name in ("model", "pool"):
        rows.add_argument(f"--{name}", metavar=name.upper())
    rows.add_argument("--tag", action="append", default=[], metavar="TAG=VALUE", help="as feature=search")
    ledger_at.add_arguments(parser)
    commands = parser.add_subparsers(dest="costs_command", metavar="COMMAND")
    estimate = commands.add_parser("estimate", help="what self-hosting would cost, before anything runs")
    costs_estimate.add_arguments(estimate)


def run(args: argparse.Namespace) -> int:
    """Read, reckon and print."""
    if args.costs_command == "estimate":
        return costs_estimate.run(args)
    from penstock.gateway.costs import patterns, records
    from penstock.gateway.costs.evaluations import read
    from penstock.gateway.costs.read import Found, Wanted, find
    from penstock.gateway.costs.show import remarks

    by = [each.strip() for each in args.by.split(",") if each.strip()]
    unknown = [each for each in by if each not in _BY]
    if unknown or len(set(by)) != len(by):
        what = f"there is no {unknown[0]}" if unknown else "one stands twice"
        raise InvalidRequest(f"--by {args.by}: {what}.", advice=f"Choose from {', '.join(_BY)}.")
    now = time.time_ns()
    since, until = moment_of(args.since, "--since"), moment_of(args.until, "--until")
    if since is not None and until is not None and since > until:
        raise InvalidRequest(f"--since {args.since} is after --until {args.until}.")
    if args.top < 1:
        raise InvalidRequest(f"--top {args.top}: it is 1 or more.")
    equal = {
        name: getattr(args, name)
        for name in ("key", "team", "route", "upstream", "model", "pool")
        if getattr(args, name) is not None
    }
    given = read_tags(args.tag, "--tag")
    if "feature" in given:
        equal["feature"] = given.pop("feature")
    tags = tuple(given.items())
    evaluations = [each for path in args.evals for each in read(path)]
    store = ledger_at.open_store(args)
    found: Found = find(store, by, Wanted(since, until, equal, tags), now)
    said = list(patterns.verdicts(found.report, found.days, whole=found.whole))
    notes = list(remarks(found.report, tags))
    findings = patterns.find(found.report, found.seen, found.days, whole=found.whole, evaluations=evaluations)
    if args.html is not None:
        from penstock.gateway.costs.page import page

        _write(args.html, page(found, said, notes, findings, now=now, top=args.top))
    if args.format == "json":
        import msgspec

        whole = records.whole(found, said, notes, findings)
        text = msgspec.json.format(msgspec.json.Encoder(decimal_format="number").encode(whole))
        return _write(args.output, text.decode() + "\n")
    if args.format == "csv":
        return _csv(args, list(records.lines(found.report)), found)
    return _table(args, found, said, notes, findings)


def _csv(args: argparse.Namespace, rows: list[dict[str, Any]], found: Any) -> int:
    import io

    from penstock.gateway.costs.records import FIGURES, group

    values = [None] * len(found.report.by)
    writer = csv.DictWriter(
        out := io.StringIO(), [*group(found.report.by, values), *FIGURES], lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows({name: cell(value) for name, value in row.items()} for row in rows)
    return _write(args.output, out.getvalue())


def _table(args: argparse.Namespace, found: Any, said: list[str], notes: list[str], findings: Any) -> int:
    import io

    from rich.console import Console
    from rich.table import Table

    from penstock.gateway.costs import records
    from penstock.gateway.costs.show import NONE, heads, shortened, shown

    report = shortened(found.report, args.top)
    names, totals = heads(report.by), records.figures(report.total)
    # what is nowhere known is no column
    columns = [name for name in _COLUMNS if totals[name] not in (None, 0)] or ["requests", "cost_dollars"]
    table = Table(box=None, pad_edge=False)
    for name in names:
        table.add_column(name)
    for name in columns:
        table.add_column(_COLUMNS[name], justify="right")
    for line in report.lines:
        figures = records.figures(line)
        group = records.group(report.by, line.group)
        values = (NONE if group[name] in (None, "") else text(group[name]) for name in names)
        table.add_row(*values, *(shown(name, figures[name]) for name in columns))
    if len(report.lines) > 1:
        table.add_section()
        table.add_row(
            *(["total"] + [""] * (len(names) - 1) if names else []),
            *(shown(name, totals[name]) for name in columns),
        )
    out = io.StringIO()
    console = Console(file=out, highlight=False, markup=False)
    console.width = 180
    console.print(table)
    for title, some in (
        ("", said),
        ("To know:", notes),
        ("Found:", [_finding(each) for each in findings]),
    ):
        if some:
            print(*(["", title] if title else [""]), *(f"- {each}" if title else each for each in some),
                  sep="\n", file=out)  # fmt: skip
    return _write(args.output, "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n")


def _finding(found: Any) -> str:
    from penstock.gateway.costs.words import money

    amount = "" if found.dollars is None else f" ({money(found.dollars)})"
    return f"{found.kind}{amount}: {found.text}"


def _write(to: Path | None, content: str) -> int:
    if to is None:
        sys.stdout.write(content)
        return 0
    writing.write(to, content)
    return 0
