"""One evaluation from its set to graded answers.

servers            all at the same time, so that what disturbs one disturbs the others
models             one after another, with the machine to itself; none is started for what is kept
a side is down     nobody begins another example; what is under way elsewhere ends and is kept
grading            when all answers are there, of the examples that both sides have answered
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import aiohttp

from penstock.core.errors import StartupError
from penstock.gateway.tasks import ended

from . import engine
from .answer import Answer, Refusal
from .asking import Asker, Patience, ServerDown, describe
from .cache import Cache
from .dataset import Dataset, Example, canonical
from .graders.desk import Desk, Grade, GraderDown, with_rubric
from .graders.spec import Judge
from .sides import Local, Remote, Side

DEFAULTS: Mapping[str, Any] = {"temperature": 0}
"""Of every request that says nothing else: the same question has the same answer, as far as a server can."""


class Watch(Protocol):
    """Who is told how it goes."""

    def begin(self, name: str, total: int) -> None:
        """So many answers, or grades, will be there."""
        ...

    def advance(self, name: str) -> None:
        """One more is."""
        ...

    def say(self, text: str) -> None:
        """Something that takes a while begins."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What is asked, and who."""

    dataset: Dataset
    baseline: Side
    candidates: tuple[Side, ...]
    judge: Side | None = None
    rubric: str | None = None
    """For judges of the set that have none of their own."""
    cache: Path
    again: bool = False
    """Ask everything, whatever is kept."""
    patience: Patience = field(default_factory=Patience)

    @property
    def sides(self) -> tuple[Side, ...]:
        """All who answer."""
        return (self.baseline, *self.candidates)


@dataclass(slots=True)
class Answered:
    """One side, as far as it has come."""

    side: Side
    about: Mapping[str, Any]
    """What tells its server from others."""
    answers: dict[str, Answer | Refusal] = field(default_factory=dict)
    """By the id of the example."""
    keys: dict[str, str] = field(default_factory=dict)
    """Of the answers in the cache, by the id of the example."""
    grades: dict[str, Grade] = field(default_factory=dict)
    asked: int = 0
    cached: int = 0
    down: str | None = None
    """Why there is no more of it."""


@dataclass(slots=True)
class Outcome:
    """All answers and grades."""

    evaluation: Evaluation
    sides: list[Answered]
    """The baseline first."""
    stopped: str | None = None
    """Why it is not complete."""

    def pairs(self, candidate: Answered) -> Iterator[tuple[Example, Grade, Grade]]:
        """The examples that both have answered, and their grades."""
        for example in self.evaluation.dataset.examples:
            ours, theirs = self.sides[0].grades.get(example.id), candidate.grades.get(example.id)
            if ours is not None and theirs is not None:
                yield example, ours, theirs


async def evaluate(evaluation: Evaluation, watch: Watch) -> Outcome:
    """Ask and grade. What a server's or grader's failure has left is in the outcome; raises StartupError for
    what is wrong with the command. Whoever cancels it finds all answers kept."""
    if evaluation.judge is None and any(
        isinstance(each.grader, Judge) for each in evaluation.dataset.examples
    ):
        raise StartupError(
            "The set has examples that a judge grades.", advice="Name one: --judge URL or MODEL."
        )
    async with _Run(evaluation, watch) as run:
        await run.ask_everybody()
        await run.grade()
    return run.outcome


class _Run:
    def __init__(self, evaluation: Evaluation, watch: Watch) -> None:
        self._evaluation = evaluation
        self._watch = watch
        self._stack = AsyncExitStack()
        self._caches: dict[str, Cache] = {}
        self.outcome = Outcome(evaluation, [])

    async def __aenter__(self) -> _Run:
        connector = aiohttp.TCPConnector(limit=0)
        self._session = await self._stack.enter_async_context(
            aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=30),
            )
        )
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._stack.aclose()

    # ---- asking ----

    async def ask_everybody(self) -> None:
        """Have every side answer every example, as far as it goes."""
        remote = []
        for side in self._evaluation.sides:
            if isinstance(side.where, Local):
                self.outcome.sides.append(Answered(side, side.where.identity))
                continue
            model, about = await self._describe(side, side.where)
            answered = Answered(side, about)
            self.outcome.sides.append(answered)
            remote.append((answered, model, side.where))
        self._check_different()
        if self.outcome.stopped is None:
            await _together([self._ask_remote(*each) for each in remote])
        for answered in self.outcome.sides:
            if isinstance(answered.side.where, Local) and self.outcome.stopped is None:
                await self._ask_local(answered, answered.side.where)

    async def _describe(self, side: Side, where: Remote) -> tuple[str, Mapping[str, Any]]:
        try:
            return await describe(
                self._session,
                f"The {side.name}",
                where.root,
                where.model,
                where.headers,
                f"--{side.name}-model",
            )
        except ServerDown as error:
            self._stop(side, str(error))
            return where.model or "", {"url": where.root, "model": where.model}

    def _check_different(self) -> None:
        seen: dict[str, str] = {}
        for answered in self.outcome.sides:
            if answered.down is not None:
                continue
            what = canonical([answered.about, answered.side.body])
            if what in seen:
                raise StartupError(
                    f"The {answered.side.name} is the same as the {seen[what]}: {_shown(answered.about)}.",
                    advice="Compare two servers, two models, or two ways to ask one (--candidate-body).",
                )
            seen[what] = answered.side.name

    async def _ask_remote(self, answered: Answered, model: str, where: Remote) -> None:
        asker = self._asker(answered, where.root, model, where.headers)
        await self._ask_all(answered, asker)

    async def _ask_local(self, answered: Answered, where: Local) -> None:
        idle = self._asker(answered, "", where.model, {})
        cache = self._cache(answered.about)
        wanted = [idle.key(example.path, self._body(answered.side, example)) for example in self._examples]
        if not self._evaluation.again and all(cache.get(each) is not None for each in wanted):
            await self._ask_all(answered, idle)
            return
        self._watch.say(f"{answered.side.name}: starting its engine")
        try:
            async with engine.running(where, self._session) as running:
                asker = self._asker(answered, running.root, where.model, running.headers)
                await self._ask_all(answered, asker)
                if answered.down is not None and (why := await running.fate()):
                    answered.down += f"; its engine has ended: {why}"
                    self.outcome.stopped = f"The {answered.side.name} is down: {answered.down}"
        except ServerDown as error:
            self._stop(answered.side, str(error))

    async def _ask_all(self, answered: Answered, asker: Asker) -> None:
        """Every example, several at a time, in their order."""
        name = answered.side.name
        self._watch.begin(name, len(self._examples))
        waiting = iter(self._examples)

        async def work() -> None:
            for example in waiting:
                if self.outcome.stopped is not None:
                    return
                body = self._body(answered.side, example)
                answer = await asker.ask(example.path, body, again=self._evaluation.again)
                answered.answers[example.id] = answer
                answered.keys[example.id] = asker.key(example.path, body)
                self._watch.advance(name)

        try:
            await _together([work() for _ in range(self._evaluation.patience.concurrency)])
        except ServerDown as error:
            for example, answer in list(answered.answers.items()):
                if isinstance(answer, Refusal) and (answer.status >= 500 or answer.status in (-1, 0, 200)):
                    del answered.answers[example]  # it was going down already: they are asked again
            self._stop(answered.side, str(error))
        finally:
            answered.asked, answered.cached = asker.asked, asker.cached

    def _stop(self, side: Side, why: str) -> None:
        for answered in self.outcome.sides:
            if answered.side is side:
                answered.down = why
        if self.outcome.stopped is None:
            self.outcome.stopped = f"The {side.name} is down: {why}"

    def _body(self, side: Side, example: Example) -> dict[str, Any]:
        return {**DEFAULTS, **example.request, **side.body}

    def _asker(self, answered: Answered, root: str, model: str, headers: Mapping[str, str]) -> Asker:
        return Asker(
            self._session,
            f"The {answered.side.name}",
            root,
            model,
            headers,
            self._cache(answered.about),
            self._evaluation.patience,
            self._watch.say,
        )

    def _cache(self, about: Mapping[str, Any]) -> Cache:
        """Two sides that are one server share one."""
        name = canonical(about)
        if name not in self._caches:
            self._caches[name] = Cache(self._evaluation.cache, about)
            self._stack.callback(self._caches[name].close)
        return self._caches[name]

    @property
    def _examples(self) -> Sequence[Example]:
        return self._evaluation.dataset.examples

    # ---- grading ----

    async def grade(self) -> None:
        """Grade what the baseline and some candidate have answered."""
        baseline, *candidates = self.outcome.sides
        jobs = [
            (example, answered)
            for example in self._examples
            if example.id in baseline.answers and any(example.id in each.answers for each in candidates)
            for answered in self.outcome.sides
            if example.id in answered.answers
        ]
        if not jobs:
            return
        try:
            async with AsyncExitStack() as stack:
                judge = (
                    await self._judge(stack) if any(isinstance(e.grader, Judge) for e, _ in jobs) else None
                )
                desk = await stack.enter_async_context(Desk(self._session, judge))
                self._watch.begin("grading", len(jobs))
                await self._grade_all(desk, jobs)
        except ServerDown as error:
            self.outcome.stopped = self.outcome.stopped or f"The judge is down: {error}"
        except GraderDown as error:
            self.outcome.stopped = self.outcome.stopped or f"A grader is down: {error}"

    async def _grade_all(self, desk: Desk, jobs: Sequence[tuple[Example, Answered]]) -> None:
        waiting = iter(jobs)

        async def work() -> None:
            for example, answered in waiting:
                ready = with_rubric(example, self._evaluation.rubric)
                answered.grades[example.id] = await desk.grade(ready, answered.answers[example.id])
                self._watch.advance("grading")

        await _together([work() for _ in range(self._evaluation.patience.concurrency)])

    async def _judge(self, stack: AsyncExitStack) -> Asker:
        side = self._evaluation.judge
        assert side is not None
        if isinstance(side.where, Local):
            self._watch.say("judge: starting its engine")
            answered = Answered(side, side.where.identity)
            running = await stack.enter_async_context(engine.running(side.where, self._session))
            return self._asker(answered, running.root, side.where.model, running.headers)
        model, about = await describe(
            self._session, "The judge", side.where.root, side.where.model, side.where.headers, "--judge-model"
        )
        return self._asker(Answered(side, about), side.where.root, model, side.where.headers)


async def _together(works: Sequence[Any]) -> None:
    """All of them; the first that fails ends the others, and is raised as it is."""
    if not works:
        return
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        # not gather, which waits for all of them where it is cancelled, also for one that has not noticed
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
    finally:
        await ended(tasks)  # which sees to it that a cancellation is not lost in a library


def _shown(about: Mapping[str, Any]) -> str:
    return f"{about.get('model')} at {about['url']}" if "url" in about else str(about.get("model"))
