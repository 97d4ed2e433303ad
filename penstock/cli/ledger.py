"""`penstock ledger`: what a gateway has written of each request, as a table, JSON lines or CSV."""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any

from penstock.core.errors import InvalidRequest
from penstock.gateway.ledger import report
from penstock.gateway.ledger.idle import idle, remarks
from penstock.gateway.ledger.outcomes import MOST_WORDS, Telling, outcome_of, tell, words
from penstock.gateway.ledger.report import COLUMNS, Filter
from penstock.gateway.tags import read_tags

from . import ledger_at

_TABLE = ["time", "key", "team", "feature", "route", "inference.backend", "status", "settlement", "verdict"]
_TABLE += ["input_tokens", "output_tokens", "gpu_seconds", "dollars", "total_seconds"]
_IDLE = ["pool", "device", "paid_hours", "used_hours", "idle_hours", "utilization"]
_IDLE += ["paid_dollars", "used_dollars", "idle_dollars"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add list, show, outcome, export and idle."""
    commands = parser.add_subparsers(dest="ledger_command", metavar="COMMAND", required=True)
    listed = commands.add_parser("list", help="the newest rows, last first")
    listed.add_argument("--limit", type=int, default=20, metavar="N", help="how many (default: 20)")
    listed.add_argument("--json", action="store_true", help="as JSON lines")
    show = commands.add_parser("show", help="everything about one request")
    show.add_argument("id", help="request id, as in the header x-request-id")
    outcome = commands.add_parser("outcome", help="say how a request turned out, as POST /v1/outcomes does")
    outcome.add_argument("id", help="request id, as in the header x-request-id")
    outcome.add_argument("outcome", help="success, failure, or a score from 0 to 1")
    export = commands.add_parser("export", help="all rows, oldest first, to standard output")
    export.add_argument(
        "--format", choices=("csv", "json"), default="csv", help="json: a line a row (default: csv)"
    )
    idle = commands.add_parser("idle", help="of the paid hours of each pool, what was used and what was idle")
    idle.add_argument("--pool", metavar="POOL", help="this one only")
    idle.add_argument("--json", action="store_true", help="as JSON lines")
    for command in (listed, export, idle):
        rows = command.add_argument_group("which time" if command is idle else "which rows")
        rows.add_argument(
            "--since", metavar="TIME", help="2026-11-21, 2026-11-21T08:30 (UTC), or 24h ago as 24h"
        )
        rows.add_argument("--until", metavar="TIME", help="before that")
        if command is idle:
            continue
        rows.add_argument("--key", metavar="KEY", help="id or name of a key")
        rows.add_argument("--team", metavar="TEAM")
        rows.add_argument("--tag", action="append", default=[], metavar="TAG=VALUE", help="as feature=search")
        rows.add_argument("--route", metavar="ROUTE")
        rows.add_argument("--upstream", metavar="NAME", help="a model of ours, or an upstream")
        rows.add_argument("--model", metavar="MODEL")
        rows.add_argument("--settlement", choices=("settled", "estimated", "unsettled"))
        rows.add_argument(
            "--verdict", choices=("passed", "failed", "open", "closed"), help="of a verifier on an attempt"
        )
    for command in (listed, show, outcome, export, idle):
        ledger_at.add_arguments(command)


def run(args: argparse.Namespace) -> int:
    """Read and print; 1 where `show` finds nothing."""
    if args.ledger_command == "show":
        store = ledger_at.open_store(args)
        found = list(report.rows(store, Filter(id=args.id)))
        for attempt in filter(None, [row["escalated_from"] for row in found]):
            found += report.rows(store, Filter(id=attempt))
        for row in found:
            width = max(map(len, row))
            print("\n".join(f"{name:{width}}  {text(value)}" for name, value in row.items()), end="\n\n")
        for word in words(store, args.id):
            print(
                f"told at {word['time']} by {text(word['key_id']) or 'an operator'}: {text(word['outcome'])}"
            )
        if not found:
            print(f"penstock ledger: there is no request {args.id!r}.", file=sys.stderr)
        return 0 if found else 1
    if args.ledger_command == "outcome":
        return _tell(args)
    if args.ledger_command == "idle":
        since, until = moment_of(args.since, "--since"), moment_of(args.until, "--until")
        if since is not None and until is not None and since > until:
            raise InvalidRequest(f"--since {args.since} is after --until {args.until}.")
        uses = idle(ledger_at.open_store(args), since, until, args.pool)
        records = (use.record() for use in uses)
        _lines(records) if args.json else _table(records, _IDLE)
        for use in uses:
            for line in remarks(use):
                print(f"penstock ledger: {line}", file=sys.stderr)
        return 0
    wanted = _filter(args)
    store = ledger_at.open_store(args)
    if args.ledger_command == "list":
        newest = report.rows(store, wanted, newest=args.limit)
        _lines(newest) if args.json else _table(newest, _TABLE)
    elif args.format == "json":
        _lines(report.rows(store, wanted))
    else:
        writer = csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {name: cell(value) for name, value in row.items()} for row in report.rows(store, wanted)
        )
    return 0


def _tell(args: argparse.Namespace) -> int:
    """An operator's word: of anybody's request, however old it is."""
    wanted = outcome_of(args.outcome)
    if wanted is None:
        raise InvalidRequest(
            f"{args.outcome!r} is no outcome: it is success, failure, or a score from 0 to 1."
        )
    [told] = tell(ledger_at.open_store(args), [Telling(args.id, wanted)], now=time.time_ns(), since=0)
    if told.verdict == "unknown":
        print(f"penstock ledger: there is no request {args.id!r}.", file=sys.stderr)
        return 1
    if told.verdict == "too_many":
        raise InvalidRequest(f"Of {args.id!r} {MOST_WORDS} outcomes have been told; the last one stays.")
    print(f"{text(args.id)}: {wanted}" + (f" (before: {told.before})" if told.before else ""))
    return 0


def _filter(args: argparse.Namespace) -> Filter:
    return Filter(
        since=moment_of(args.since, "--since"),
        until=moment_of(args.until, "--until"),
        key=args.key,
        team=args.team,
        tags=tuple(read_tags(args.tag, "--tag").items()),
        route=args.route,
        upstream=args.upstream,
        model=args.model,
        settlement=args.settlement,
        verdict=args.verdict,
    )


def moment_of(text: str | None, flag: str) -> int | None:
    """A time in Unix nanoseconds: a date (UTC where it does not say), or so long ago."""
    if text is None:
        return None
    try:
        return report.instant(text, time.time_ns())
    except ValueError:
        raise InvalidRequest(
            f"{flag} {text} is no time.", advice="Write 2026-11-21, or 24h for a day ago."
        ) from None


def _lines(rows: Iterable[dict[str, Any]]) -> None:
    for row in rows:
        # numbers, not texts: a float holds a nanodollar exactly enough up to millions of dollars
        print(json.dumps(row, default=float, separators=(",", ":")))


def _table(rows: Iterable[dict[str, Any]], columns: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, box=None)
    for row in rows:
        table.add_row(*(text(row[name]) for name in columns))
    # a line a row, whatever the terminal: it can be scrolled, and a cell that is cut says nothing
    console = Console(highlight=False, markup=False)
    console.width = max(console.width, 180)
    console.print(table)


def text(value: Any) -> str:
    """For eyes: bounded, and without what a terminal would obey."""
    if value is None:
        return "-"
    if isinstance(value, Decimal):
        return f"{value:.9f}".rstrip("0").rstrip(".")
    if isinstance(value, dict):
        return " ".join(f"{name}={each}" for name, each in sorted(value.items())) or "-"
    text = str(value)
    return text if text.isprintable() else repr(text)[1:-1]


def cell(value: Any) -> Any:
    """For a spreadsheet, which must not take a client's text for a formula."""
    if value is None:
        return ""
    if isinstance(value, Decimal):
        return f"{value:.9f}"
    if isinstance(value, dict):
        return json.dumps(value, separators=(",", ":"), sort_keys=True)
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value
