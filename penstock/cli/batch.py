"""`penstock batch`: a file of requests, in the format of OpenAI's batches, against a gateway or an engine."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from pathlib import Path

from penstock.core.errors import StartupError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the files, the server, and how it is asked."""
    parser.add_argument("input", metavar="FILE", help="requests (JSONL), as OpenAI's batches have them")
    parser.add_argument(
        "-o", "--output", required=True, metavar="FILE", help="answers; written when all lines have one"
    )
    parser.add_argument(
        "--url", default="http://127.0.0.1:8080/v1", help="of the gateway or engine (default: %(default)s)"
    )
    parser.add_argument(
        "--concurrency", type=int, default=16, metavar="N", help="requests at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="of one request (default: %(default)g)",
    )
    parser.add_argument(
        "--retries", type=int, default=8, metavar="N", help="more tries of each (default: %(default)s)"
    )
    parser.add_argument(
        "--background",
        action="store_true",
        help="have the gateway let everybody else go first; an engine takes that from gateways only",
    )


def run(args: argparse.Namespace) -> int:
    """Ask. 0 if every line has an answer, 1 if the server stopped giving any: run it again then."""
    from penstock.batch import Patience
    from penstock.batch import run as run_batch

    if not 1 <= args.concurrency <= 4096:
        raise StartupError(f"--concurrency {args.concurrency} must be from 1 to 4096.", param="--concurrency")
    if args.timeout <= 0 or args.retries < 0:
        raise StartupError("--timeout must be positive, and --retries no less than 0.", param="--timeout")
    root = args.url.rstrip("/").removesuffix("/v1")
    if not root.startswith(("http://", "https://")):
        raise StartupError(f"--url {args.url} is no URL.", param="--url", advice="Write http://HOST:PORT/v1.")
    key = os.environ.get("PENSTOCK_API_KEY") or os.environ.get("OPENAI_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    if args.background:
        headers["X-Penstock-Class"] = "background"
    patience = Patience(concurrency=args.concurrency, timeout=args.timeout, retries=args.retries)
    try:
        totals = asyncio.run(run_batch(Path(args.input), Path(args.output), root, headers, patience))
    except* StartupError as group:
        raise _first(group) from None
    print(
        f"{totals.answered} answered, {totals.failed} refused, {totals.before} answered before, "
        f"{totals.unasked} without an answer",
        file=sys.stderr,
    )
    if not totals.whole:
        print(
            f"penstock batch: the server gives no answers any more; what it gave is in {args.output}.part, "
            "and the same command goes on from there.",
            file=sys.stderr,
        )
    return 0 if totals.whole else 1


def _first(group: BaseExceptionGroup[StartupError]) -> StartupError:
    """The first of those that workers met."""
    found = group.exceptions[0]
    return _first(found) if isinstance(found, BaseExceptionGroup) else found
