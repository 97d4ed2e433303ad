"""A file of requests, asked of an engine of this process (`run-batch`) or of a server (`penstock batch`).

    in.jsonl ─▶ checked line by line ─▶ asked, so many at a time ─▶ out.jsonl.part ─▶ out.jsonl

What is in the `.part` is not asked again: each of its lines is written before it is counted. A line that
cannot be asked has its place in the output, with an error.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import msgspec
from starlette.types import ASGIApp

from .ask import Answer, ask
from .lines import URLS, BadLine, Line, answered, checked, unasked

Ask = Callable[[Line], Awaitable[Answer | None]]
"""Answers a line; None where nothing is answered any more, which ends the run."""
_WAIT = 0.5
_LONGEST_WAIT = 10.0
_TRIES = 12
"""Of a line that the engine has no place for."""


@dataclass(slots=True)
class Totals:
    """How it went."""

    answered: int = 0
    failed: int = 0
    """Lines whose answer, or whose place, is an error."""
    before: int = 0
    """Done by an earlier run."""
    unasked: int = 0
    """Without an answer: none was given any more."""

    @property
    def whole(self) -> bool:
        """Whether every line is done."""
        return self.unasked == 0


async def run_file(answer: Ask, source: Path, output: Path, *, concurrency: int) -> Totals:
    """Ask every line that an earlier run has not answered; the output when all are done."""
    part = output.with_name(output.name + ".part")
    totals = Totals()
    done = _done(part)
    places = asyncio.Semaphore(concurrency)
    numbers: list[int] = []
    with source.open("rb") as file, part.open("ab") as written:

        async def one(number: int, line: Line) -> None:
            found = None if totals.unasked else await answer(line)
            if found is None:
                totals.unasked += 1
                return
            status, body = found.status, found.body
            _write(written, number, answered(_id(number), line.custom_id, status, found.request_id, body))
            totals.answered += status == 200
            totals.failed += status != 200

        async with asyncio.TaskGroup() as group:
            for number, line in checked(file, URLS):
                numbers.append(number)
                known = number in done and done[number][1] == line.custom_id  # the same line as it was then
                totals.before += known
                if known:
                    continue
                if isinstance(line, BadLine):
                    _write(written, number, unasked(_id(number), number, line))
                    totals.failed += 1
                    continue
                await places.acquire()
                asked = group.create_task(one(number, line))
                asked.add_done_callback(lambda _: places.release())
        os.fsync(written.fileno())
    if totals.whole:
        _assemble(part, output, numbers)
    return totals


def application(app: ASGIApp) -> Ask:
    """Asks an application of this process; a full queue is waited for."""

    async def answer(line: Line) -> Answer | None:
        wait = _WAIT
        found = await ask(app, line.url, line.body)
        for _ in range(_TRIES - 1):
            if found.status != 503 or _is_over(found.body):
                break
            await asyncio.sleep(min(found.retry_after or wait, _LONGEST_WAIT))
            wait = min(2 * wait, _LONGEST_WAIT)
            found = await ask(app, line.url, line.body)
        return None if found.status == 503 and _is_over(found.body) else found

    return answer


def _is_over(body: bytes) -> bool:
    return any(word in body for word in (b'"engine_dead"', b'"draining"'))


def _write(written: IO[bytes], number: int, text: bytes) -> None:
    """One line of the part: the line's number, and what the output says of it."""
    written.write(b"%d %b\n" % (number, text))
    written.flush()


class _Written(msgspec.Struct):
    """What is read of a line of the part."""

    custom_id: str | None
    response: Any
    error: Any


def _done(part: Path) -> dict[int, tuple[int, str | None]]:
    """Lines that an earlier run has written whole → where their text begins, and their custom_id; what is
    cut off goes."""
    if not part.exists():
        return {}
    done: dict[int, tuple[int, str | None]] = {}
    at = 0
    with part.open("r+b") as file:
        for line in file:
            number, _, text = line.partition(b" ")
            if not line.endswith(b"\n") or not number.isdigit():
                break
            try:
                done[int(number)] = at + len(number) + 1, msgspec.json.decode(text, type=_Written).custom_id
            except (ValueError, RecursionError):
                break
            at += len(line)
        file.truncate(at)
    return done


def _assemble(part: Path, output: Path, numbers: Collection[int]) -> None:
    """The output, in the order of the input, and the part gone."""
    fresh = output.with_name(output.name + ".new")
    done = _done(part)
    with part.open("rb") as file, fresh.open("wb") as written:
        for number in numbers:
            file.seek(done[number][0])
            written.write(file.readline())
        written.flush()
        os.fsync(written.fileno())
    os.replace(fresh, output)
    part.unlink()


def _id(number: int) -> str:
    return f"batch_req_{number}"
