"""Brings each answer to its grader: to a process of ours, a server, or a judge.

A grader that fails, hangs or answers nonsense has not said that the answer is wrong: the example is *not
graded* then, with the reason, and takes no part in the comparison.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import aiohttp
import msgspec

from penstock.bench.client import reason
from penstock.core.errors import StartupError, brief
from penstock.evaluate.answer import Answer, Refusal
from penstock.evaluate.asking import Asker, read_body
from penstock.evaluate.dataset import CHAT, Example

from . import judge as judging
from .spec import Http, Judge, Python
from .worker import ANSWER, REQUEST, verdict

SECONDS = 5.0
"""For a pattern or a schema and one answer."""
_MEMORY = 1 << 30
_MOST_TEXT = 4 << 20
"""Characters of an answer that patterns and schemas see."""
_MOST_VERDICT = 1 << 20
_AT_ONCE = 8
_IN_A_ROW = 5


class GraderDown(Exception):
    """Somebody else's grader does not answer any more."""


@dataclass(frozen=True, slots=True)
class Grade:
    """What an answer is worth."""

    score: float | None
    """From 0 to 1; None where it could not be graded."""
    why: str


class Desk:
    """All graders of a run; `async with` ends its processes."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        judge: Asker | None = None,
        *,
        seconds: float = SECONDS,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """
        Args:
            judge: who is asked by graders of that name.
            seconds: for a pattern or a schema and one answer.
        """
        self._session = session
        self._judge = judge
        self._seconds = seconds
        self._sleep = sleep
        self._texts, self._functions = _Process(_MEMORY), _Process(0)
        self._places = asyncio.Semaphore(_AT_ONCE)
        self._failed = 0

    async def __aenter__(self) -> Desk:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._texts.close()
        await self._functions.close()

    async def grade(self, example: Example, answer: Answer | Refusal) -> Grade:
        """The grade of an answer. Raises ServerDown (the judge), GraderDown, StartupError."""
        if isinstance(answer, Refusal):
            status = f"HTTP {answer.status}: " if answer.status > 0 else ""
            return Grade(0.0, f"no answer: {status}{answer.message}")
        grader = example.grader
        if isinstance(grader, Http):
            async with self._places:
                return await self._http(grader, example, answer)
        if isinstance(grader, Judge):
            return await self._ask_judge(grader, example, answer)
        if len(answer.text) > _MOST_TEXT:
            return Grade(
                0.0, f"the answer has {len(answer.text):,} characters, and {_MOST_TEXT:,} are looked at"
            )
        if isinstance(grader, Python):
            about = example.about() | {"answer": answer.text}
            return await self._functions.grade(grader.timeout, [grader, "", (), about])
        return await self._texts.grade(self._seconds, [grader, answer.text, example.expected, None])

    async def _http(self, grader: Http, example: Example, answer: Answer) -> Grade:
        about = example.about() | {"answer": answer.text}
        grade = Grade(None, "")
        for attempt in range(3):
            if attempt:
                await self._sleep(0.2 * 2**attempt)
            grade, final = await self._post(grader, about)
            if final:
                self._failed = 0
                return grade
        self._failed += 1
        if self._failed >= _IN_A_ROW:
            raise GraderDown(f"the grader {grader.url.partition('?')[0]} does not answer: {grade.why}")
        return grade

    async def _post(self, grader: Http, about: dict[str, Any]) -> tuple[Grade, bool]:
        """(grade, whether that is its word)"""
        try:
            async with (
                asyncio.timeout(grader.timeout),
                self._session.post(
                    grader.url,
                    data=msgspec.json.encode(about),
                    headers={"Content-Type": "application/json"},
                    allow_redirects=False,
                ) as response,
            ):
                content = await read_body(response, _MOST_VERDICT)
                if response.status != 200:
                    final = 400 <= response.status < 500 and response.status not in (408, 429)
                    return Grade(None, f"the grader answered HTTP {response.status}"), final
        except TimeoutError:
            return Grade(None, f"the grader did not answer within {grader.timeout:g} s"), False
        except (aiohttp.ClientError, OSError) as error:
            return Grade(None, f"no answer from the grader: {reason(error)}"), False
        try:
            return Grade(*verdict(msgspec.json.decode(content or b""))), True
        except (msgspec.DecodeError, RecursionError) as error:
            return Grade(None, f"the grader's answer is no JSON: {brief(str(error))}"), True

    async def _ask_judge(self, grader: Judge, example: Example, answer: Answer) -> Grade:
        if self._judge is None:
            raise StartupError(
                f"The example {example.id} is graded by a judge, and there is none.",
                advice="Name one with --judge URL or --judge MODEL.",
            )
        body = judging.question(grader, dict(example.request), example.expected, answer.text)
        said = await self._judge.ask(CHAT, body | {"temperature": 0})
        if isinstance(said, Refusal):
            return Grade(None, f"the judge refused: {said.message}")
        score = judging.read_grade(said.text, grader.scale)
        if score is None:
            return Grade(None, f"the judge gave no grade: {brief(said.text[-200:], 200)}")
        return Grade(score, f"the judge: {brief(said.text[-400:], 400)}")


class _Process:
    """A worker, started when it is first needed, and again after it has ended."""

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()

    async def grade(self, seconds: float, request: Sequence[Any]) -> Grade:
        """One request. It has `seconds`; the process ends itself after them, and is ended a little later."""
        body = msgspec.msgpack.encode(request)
        async with self._turn:
            process = self._process or await self._start()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                async with asyncio.timeout(seconds + 5.0):
                    process.stdin.write(REQUEST.pack(seconds, len(body)) + body)
                    await process.stdin.drain()
                    (length,) = ANSWER.unpack(await process.stdout.readexactly(ANSWER.size))
                    score, why = msgspec.msgpack.decode(await process.stdout.readexactly(length))
                    return Grade(score, why)
            except (TimeoutError, asyncio.IncompleteReadError, ConnectionError):
                await self.close()
                late = process.returncode in (-14, -9)  # SIGALRM, or ours
                how = (
                    f"took longer than {seconds:g} s" if late else f"ended its process ({process.returncode})"
                )
                return Grade(None, f"the grader {how}")
            except BaseException:
                await self.close()  # what it answers now would be taken for the next one's
                raise

    async def _start(self) -> asyncio.subprocess.Process:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "penstock.evaluate.graders.worker",
            str(self._memory),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            start_new_session=True,  # the terminal's Ctrl-C is for us
        )
        return self._process

    async def close(self) -> None:
        """End it."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), 0.5)
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


def with_rubric(example: Example, rubric: str | None) -> Example:
    """The example, with a rubric for a judge that has none of its own."""
    if rubric is None or not isinstance(example.grader, Judge) or example.grader.rubric is not None:
        return example
    return replace(example, grader=msgspec.structs.replace(example.grader, rubric=rubric))
