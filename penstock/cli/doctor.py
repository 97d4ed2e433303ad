"""`penstock doctor URL`: the checklists, point by point; and with `--logs`, the error tables."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO

from penstock.bench.errors import BenchError

from .bench import _headers

if TYPE_CHECKING:
    from penstock.doctor.logs import Match
    from penstock.doctor.points import Point
    from penstock.doctor.snapshot import Snapshot

_CHUNK = 1 << 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the URL and the log."""
    parser.add_argument("url", nargs="?", metavar="URL", help="a running engine, Penstock or vLLM")
    parser.add_argument(
        "--logs",
        metavar="FILE",
        help="match a log against the error tables; - is standard input",
    )
    parser.add_argument("--api-key", metavar="KEY", help="bearer key (default: OPENAI_API_KEY)")
    parser.add_argument(
        "--header", metavar="KEY=VALUE", nargs="+", action="extend", default=[], help="extra request headers"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--strict", action="store_true", help="exit with 1 for warnings, too")


def run(args: argparse.Namespace) -> int:
    """0 if nothing is wrong, 1 if something fails (--strict: or warns), 2 if nothing could be examined."""
    try:
        return _run(args)
    except BenchError as error:
        print(f"penstock doctor: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    from penstock.doctor.logs import examine
    from penstock.doctor.points import Verdict
    from penstock.doctor.report import as_json, match_lines, point_lines, shown, worst

    logs = args.logs
    if logs is None and args.url is None:
        if sys.stdin is None or sys.stdin.isatty():
            raise BenchError("give the URL of an engine, or a log: --logs FILE, or on standard input")
        logs = "-"
    snapshot, points = asyncio.run(_look(args)) if args.url is not None else (None, [])
    matches: list[Match] | None = None
    lines = 0
    if logs is not None:
        matches, lines = examine(_chunks(logs))
        if args.url is None and not lines:
            raise BenchError("the log is empty: nothing could be examined")
    if args.json:
        print(json.dumps(as_json(snapshot, points, matches, lines), indent=1))
    else:
        if snapshot is not None:
            print(f"{shown(snapshot.url)}: {snapshot.engine} {shown(snapshot.version or '')}".rstrip())
            print("\n".join(point_lines(points)))
        if matches is not None:
            print("\n".join(match_lines(matches, lines)).lstrip("\n" if snapshot is None else ""))
    verdict = worst(points, matches or ())
    return int(verdict is Verdict.FAIL or (args.strict and verdict is Verdict.WARN))


async def _look(args: argparse.Namespace) -> tuple[Snapshot, list[Point]]:
    from penstock.bench.client import open_session, split_base_url
    from penstock.doctor.points import examine
    from penstock.doctor.snapshot import look

    try:
        url = split_base_url(args.url)
    except BenchError:
        raise BenchError(f"{args.url!r} is no URL; write it as http://HOST:PORT") from None
    async with open_session() as session:
        snapshot = await look(session, url, _headers(args))
    return snapshot, examine(snapshot)


def _chunks(name: str) -> Iterator[bytes]:
    """A file's bytes, or those of standard input, as they come."""
    if name == "-":
        yield from _read(sys.stdin.buffer)
        return
    try:
        with open(name, "rb") as file:
            yield from _read(file)
    except OSError as error:
        raise BenchError(f"cannot read --logs {name}: {error.strerror or error}") from error


def _read(file: BinaryIO) -> Iterator[bytes]:
    while chunk := os.read(file.fileno(), _CHUNK):
        yield chunk
