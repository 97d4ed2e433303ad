"""Sends cases to a server over sockets, and notes what is wrong with the answers.

Each session has one connection that it keeps; it sends up to four cases at once (pipelining), reads their
answers in order, and connects again after clients that leave. Nothing waits longer than PATIENCE.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from random import Random

import uvloop

from .cases import Case, make
from .oracle import Answer, wrong

Maker = Callable[[int, int], Case]
"""Of a case, by seed and number."""
Oracle = Callable[[Case, Answer], str | None]
"""What is wrong with an answer."""
PATIENCE = 60.0
"""Seconds after which an answer counts as a hang."""
_BLOCK = 16
"""Cases that a session takes at once: who is pipelined with whom depends on the seed alone."""


@dataclass
class Report:
    """What became of the cases."""

    requests: int = 0
    served: int = 0
    """Valid requests of the generating endpoints among those with a 200."""
    left: int = 0
    """Clients that left early."""
    statuses: dict[str, int] = field(default_factory=dict)
    findings: dict[str, list[int]] = field(default_factory=dict)
    """What is wrong → numbers of the first cases of it."""
    times: dict[str, int] = field(default_factory=dict)
    """What is wrong → how often."""
    hangs: int = 0
    slowest: float = 0.0
    """Seconds of the slowest answer (in a pipeline: since the whole was sent)."""

    def count(self, status: int) -> None:
        """Add an answer."""
        _add(self.statuses, {str(status): 1})

    def note(self, problem: str, number: int) -> None:
        """Add a finding."""
        _add(self.times, {problem: 1})
        found = self.findings.setdefault(problem, [])
        if len(found) < 5:
            found.append(number)

    def merge(self, other: Report) -> None:
        """Add what another worker saw."""
        self.requests += other.requests
        self.served += other.served
        self.left += other.left
        self.hangs += other.hangs
        self.slowest = max(self.slowest, other.slowest)
        _add(self.statuses, other.statuses)
        _add(self.times, other.times)
        for problem, numbers in other.findings.items():
            self.findings[problem] = (self.findings.get(problem, []) + numbers)[:5]


def _add(counts: dict[str, int], more: dict[str, int]) -> None:
    for name, count in more.items():
        counts[name] = counts.get(name, 0) + count


def run(
    port: int,
    seed: int,
    blocks: Iterator[tuple[int, int]],
    sessions: int = 16,
    *,
    make: Maker = make,
    wrong: Oracle = wrong,
) -> Iterator[Report]:
    """Send all blocks (first case, one past the last); yields a report of each thousand or so."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        while True:
            some = list(islice(blocks, 1000 // _BLOCK))
            if not some:
                return
            yield runner.run(_drive(port, seed, some, sessions, make, wrong))


def blocks(first: int, count: int, worker: int = 0, workers: int = 1) -> Iterator[tuple[int, int]]:
    """Every `workers`-th block of these cases."""
    for start in range(first + worker * _BLOCK, first + count, workers * _BLOCK):
        yield start, min(start + _BLOCK, first + count)


async def _drive(
    port: int, seed: int, some: list[tuple[int, int]], sessions: int, make: Maker, wrong: Oracle
) -> Report:
    report = Report()
    queue = iter(some)

    async def session() -> None:
        connection = _Connection(port)
        try:
            for start, stop in queue:
                for group in _groups(seed, start, stop, make):
                    await _exchange(connection, group, report, wrong)
        finally:
            connection.close()

    async with asyncio.TaskGroup() as tasks:
        for _ in range(sessions):
            tasks.create_task(session())
    return report


def _groups(seed: int, start: int, stop: int, make: Maker) -> Iterator[list[Case]]:
    """Cases that are sent at once: a client that leaves is the last one of its group."""
    random = Random(f"{seed}:{start}")
    group: list[Case] = []
    size = 1
    for number in range(start, stop):
        case = make(seed, number)
        group.append(case)
        if len(group) >= size or case.leaves is not None:
            yield group
            group, size = [], random.choice((1, 1, 1, 1, 2, 4))
    if group:
        yield group


class _Connection:
    """A connection that is opened when it is needed."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None
        self.answered = False
        """Whether an answer came on it: a server may close one that was idle."""

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect, unless it is."""
        if self.reader is None or self.writer is None:
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 20)
            self.answered = False
        return self.reader, self.writer

    def close(self) -> None:
        """At once."""
        if self.writer is not None:
            self.writer.transport.abort()
        self.reader = self.writer = None


async def _exchange(connection: _Connection, group: list[Case], report: Report, wrong: Oracle) -> None:
    """Send a group, judge the answers. What a closed connection left unanswered is sent once more, alone."""
    report.requests += len(group)
    rest, again = group, False
    while rest:
        clock = asyncio.get_running_loop().time
        begun = clock()
        answered = 0
        reused = connection.answered
        try:
            async with asyncio.timeout(PATIENCE):
                reader, writer = await connection.open()
                reused = connection.answered
                *whole, last = rest
                data = b"".join(case.wire() for case in whole)
                wire = last.wire()
                keep = len(wire) if last.leaves is None else int(len(wire) * min(last.leaves, 1.0))
                writer.write(data + wire[:keep])
                for case in rest:
                    if case is last and last.leaves is not None:
                        if last.leaves > 1.0:
                            await reader.read(20)
                        break
                    answer = await _read(reader, case.method)
                    answered += 1
                    connection.answered = True
                    report.slowest = max(report.slowest, clock() - begun)
                    _judge(case, answer, report, wrong)
                    if answer.headers.get("connection") == "close":
                        connection.close()
                        break
        except TimeoutError:
            connection.close()
            report.hangs += 1
            report.note("no answer in time", rest[answered].number)
            return
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError) as error:
            connection.close()
            if answered == 0 and (again or not reused):
                report.note(f"a connection that breaks: {type(error).__name__}", rest[0].number)
                return
            again = answered == 0
        else:
            if answered < len(rest) and rest[-1].leaves is not None and answered == len(rest) - 1:
                report.left += 1
                connection.close()
                return
        rest = rest[answered:]


def _judge(case: Case, answer: Answer, report: Report, wrong: Oracle) -> None:
    report.count(answer.status)
    if answer.status == 200 and case.kind == "valid" and case.path.startswith("/v1/"):
        report.served += 1
    problem = wrong(case, answer)
    if problem is not None:
        report.note(problem, case.number)


async def _read(reader: asyncio.StreamReader, method: str) -> Answer:
    """One answer. Raises ValueError for what is no HTTP."""
    status = 100
    while status < 200:
        head = await reader.readuntil(b"\r\n\r\n")
        start, *lines = head[:-4].decode("latin-1").split("\r\n")
        if not start.startswith("HTTP/1.1 "):
            raise ValueError(start[:40])
        status = int(start[9:12])
    headers = dict(line.lower().split(": ", 1) if ": " in line else (line.lower(), "") for line in lines)
    if method == "HEAD" or status in (204, 304):
        return Answer(status, headers, b"")
    if headers.get("transfer-encoding") == "chunked":
        pieces = []
        while size := int(await reader.readuntil(b"\r\n"), 16):
            pieces.append((await reader.readexactly(size + 2))[:-2])
        await reader.readexactly(2)
        return Answer(status, headers, b"".join(pieces))
    if "content-length" in headers:
        return Answer(status, headers, await reader.readexactly(int(headers["content-length"])))
    with contextlib.suppress(asyncio.IncompleteReadError):
        return Answer(status, {**headers, "connection": "close"}, await reader.read(-1))
    raise ValueError("no body")
