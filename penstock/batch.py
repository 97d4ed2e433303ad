"""A file of requests against a server, in the format of OpenAI's batches: work that nobody waits for.

    input.jsonl  {"custom_id": …, "method": "POST", "url": "/v1/chat/completions", "body": {…}}
        ─▶ checked whole ─▶ asked, so many at a time ─▶ output.jsonl.part, line by line ─▶ output.jsonl

What ends in the middle goes on from the `.part` the next time, as `server.batches.file` has it. A refusal
(4xx) is an answer, and stands in the output; a server that does not answer is asked again after a while, and
then the run ends without the output's name.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from penstock.core.errors import StartupError
from penstock.http.reading import read_at_most
from penstock.server.batches.ask import Answer
from penstock.server.batches.file import Totals, run_file
from penstock.server.batches.lines import URLS, BadLine, Line, checked

MOST_ANSWER = 64 << 20
"""Bytes of an answer."""
_AGAIN = frozenset({408, 429, 500, 502, 503, 504})
_LONGEST_WAIT = 60.0
"""Seconds between two tries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How the server is asked. Seconds."""

    concurrency: int = 16
    timeout: float = 600.0
    retries: int = 8
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep


async def run(source: Path, output: Path, root: str, headers: dict[str, str], patience: Patience) -> Totals:
    """Ask everything that has no answer yet.

    Args:
        root: of the server, without /v1.

    Raises StartupError: the input cannot be read, a line of it is none, or the server refuses the key.
    """
    check(source)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        async with aiohttp.ClientSession(auto_decompress=True) as session:

            async def answer(line: Line) -> Answer | None:
                found = await _ask(line, session, root, headers, patience)
                if found is not None and found.status in (401, 403):
                    raise StartupError(
                        f"{root}{line.url} answered HTTP {found.status}.",
                        advice="The key is read from PENSTOCK_API_KEY, else from OPENAI_API_KEY.",
                    )
                return found

            return await run_file(answer, source, output, concurrency=patience.concurrency)
    except OSError as error:
        raise StartupError(f"{output} cannot be written: {error.strerror or error}.") from error


def check(source: Path) -> None:
    """Raises StartupError for the first line that cannot be asked, and where there is none."""
    empty = True
    try:
        with source.open("rb") as file:
            for number, line in checked(file, URLS):
                empty = False
                if isinstance(line, BadLine):
                    raise StartupError(f"{source}:{number}: {line}")
    except OSError as error:
        raise StartupError(f"{source} cannot be read: {error.strerror or error}.") from error
    if empty:
        raise StartupError(f"{source} has no lines.")


async def _ask(
    line: Line, session: aiohttp.ClientSession, root: str, headers: dict[str, str], patience: Patience
) -> Answer | None:
    """The answer, asked again while there is none; None where there is none in the end."""
    for attempt in range(patience.retries + 1):
        after = 0.0
        try:
            async with (
                asyncio.timeout(patience.timeout),
                session.post(
                    root + line.url,
                    data=line.body,
                    headers={"Content-Type": "application/json", **headers},
                    allow_redirects=False,
                ) as response,
            ):
                body = await read_at_most(response, MOST_ANSWER)
                if response.status not in _AGAIN:
                    return Answer(response.status, body, response.headers.get("X-Request-Id", ""))
                after = _retry_after(response)
        except (TimeoutError, aiohttp.ClientError, OSError):
            pass  # nobody is there
        if attempt < patience.retries:
            await patience.sleep(min(max(0.5 * 2**attempt, after), _LONGEST_WAIT))
    return None


def _retry_after(response: aiohttp.ClientResponse) -> float:
    text = response.headers.get("Retry-After", "")
    return float(text) if text.isascii() and text.isdigit() and len(text) < 6 else 0.0
