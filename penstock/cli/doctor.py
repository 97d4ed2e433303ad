"""`penstock doctor URL`: the checklists, point by point; with `--logs`, the error tables; and as `penstock
doctor node` whether this machine has what an engine needs."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from penstock.bench.errors import BenchError

from .bench import _headers

if TYPE_CHECKING:
    from penstock.doctor.checklist import Point
    from penstock.doctor.logs import Match
    from penstock.doctor.snapshot import Snapshot

_CHUNK = 1 << 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the URL and the log."""
    parser.add_argument(
        "url",
        nargs="?",
        metavar="URL|node",
        help="a running engine, Penstock or vLLM; or `node`: this machine",
    )
    parser.add_argument(
        "--logs",
        metavar="FILE",
        help="match a log against the error tables; - is standard input",
    )
    parser.add_argument("--api-key", metavar="KEY", help="bearer key (default: OPENAI_API_KEY)")
    parser.add_argument(
        "--header", metavar="KEY=VALUE", nargs="+", action="extend", default=[], help="extra request headers"
    )
    node = parser.add_argument_group("of this machine, before an engine runs on it (penstock doctor node)")
    node.add_argument("--gpus", type=int, metavar="N", help="devices, or slices of them, that there shall be")
    node.add_argument("--weights", type=Path, metavar="DIR", help="where weights are, or shall be, kept")
    node.add_argument("--need", metavar="SIZE", help="what they take, as 140GB")
    node.add_argument(
        "--ports", default="8000,8080", metavar="PORT,…", help="that shall be free (default: 8000,8080)"
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
    from penstock.doctor.checklist import Verdict
    from penstock.doctor.logs import examine
    from penstock.doctor.report import as_json, match_lines, point_lines, shown, worst

    if args.url == "node":
        return _node(args)
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


def _node(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from penstock.doctor.checklist import Verdict
    from penstock.doctor.node import host, points, smi
    from penstock.doctor.report import point_lines, worst

    wanted = points.Wanted(gpus=args.gpus, bytes=_size(args.need), ports=_ports(args.ports))
    node = points.Node(smi.ask(), host.look(weights=args.weights or Path.cwd(), ports=wanted.ports), wanted)
    found = points.examine(node)
    verdict = worst(found, ())
    if args.json:
        seen = {"smi": asdict(node.smi), "host": asdict(node.host)}
        listed = [asdict(point) for point in found]
        print(json.dumps({"verdict": verdict.value, "points": listed, "seen": seen}, indent=1))
    else:
        print("\n".join(point_lines(found)).lstrip("\n"))
    return int(verdict is Verdict.FAIL or (args.strict and verdict is Verdict.WARN))


def _size(text: str | None) -> int | None:
    from penstock.spec.units import size

    try:
        return None if text is None else size(text)
    except ValueError as error:
        raise BenchError(f"--need: {error}") from None


def _ports(text: str) -> tuple[int, ...]:
    ports = [each.strip() for each in text.split(",") if each.strip()]
    if not all(each.isdecimal() and 0 < int(each) < 65536 for each in ports):
        raise BenchError(f"--ports is {text!r}; write 8000,8080")
    return tuple(map(int, ports))


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
