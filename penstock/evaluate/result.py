"""From answers and grades to what is reported. Pure; money is nanodollars, times are nanoseconds.

Costs and latencies are those of the examples that are compared, on both sides; an answer that two examples
share is paid for once.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from penstock.bench.report import percentile
from penstock.gateway.policy.price import Used, by_device, by_tokens

from .answer import Answer, Refusal
from .dataset import Example
from .graders.desk import Grade
from .run import Answered, Outcome
from .sides import Price
from .statistics import Finding, Pair, compare

OK, WORSE, REFUSED, TOO_SMALL, INCOMPLETE = 0, 1, 2, 3, 4
"""Exit statuses of the command."""
_MOST_SHOWN = 200
"""Examples on which the sides differ that a report holds."""
_LONGEST = 4000
"""Characters of a text in it."""


@dataclass(frozen=True, slots=True)
class Spent:
    """What the answers of one side took."""

    answers: int
    refused: int
    """Examples without an answer, which count as wrong."""
    latency_mean: float
    latency_p50: float
    latency_p95: float
    prompt_tokens: int | None
    """None where a server does not count."""
    completion_tokens: int | None
    cached_tokens: int | None
    device_time: int | None
    nanodollars: int | None
    """None where there is no price, or nothing that it could be multiplied with."""
    cut: int
    """Answers that ended at a limit of tokens."""
    concurrency: tuple[int, ...]
    """Requests that were kept under way, in all the runs that these answers come from."""
    first_asked: float | None
    """Seconds since 1970."""
    last_asked: float | None
    fingerprints: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SideResult:
    """One side."""

    name: str
    about: Mapping[str, Any]
    price: str
    score: float | None
    asked: int
    """Answers that this run has asked for."""
    cached: int
    spent: Spent
    down: str | None


@dataclass(frozen=True, slots=True)
class Difference:
    """An example on which a candidate and the baseline have different scores."""

    id: str
    line: int
    question: str
    expected: str
    baseline: str
    baseline_score: float
    baseline_why: str
    candidate: str
    candidate_score: float
    candidate_why: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """A candidate against the baseline."""

    candidate: str
    finding: Finding | None
    """None without a pair."""
    by_tag: Mapping[str, Finding]
    ungraded: Sequence[tuple[str, str]]
    """(id, why) of examples that a grader could not grade on one of the sides."""
    differences: Sequence[Difference]
    """The first of them: those that the candidate lost, then those that it won."""


@dataclass(frozen=True, slots=True)
class Result:
    """All that is reported."""

    set: str
    sha256: str
    examples: int
    skipped: Sequence[str]
    margin: float
    confidence: float
    baseline: SideResult
    candidates: Sequence[SideResult]
    comparisons: Sequence[Comparison]
    stopped: str | None

    @property
    def status(self) -> int:
        """The command's exit status: the gravest of what was found."""
        verdicts = {
            each.finding.verdict if each.finding else "too small to tell" for each in self.comparisons
        }
        if self.stopped is not None:
            return INCOMPLETE
        if "worse" in verdicts:
            return WORSE
        return TOO_SMALL if "too small to tell" in verdicts else OK

    def as_json(self) -> dict[str, Any]:
        """For `--output-json`."""
        return {**asdict(self), "status": self.status}


def build_result(outcome: Outcome, *, margin: float, confidence: float, most_ungraded: int = 0) -> Result:
    """Everything.

    Args:
        margin, confidence: as `statistics.compare` takes them.
        most_ungraded: pairs without a grade that may be left out; with more, the result is not complete.
    """
    baseline, *candidates = outcome.sides
    dataset = outcome.evaluation.dataset
    stopped = outcome.stopped
    comparisons = [_compare(outcome, each, margin, confidence) for each in candidates]
    for each in comparisons:
        if len(each.ungraded) > most_ungraded and stopped is None:
            name, why = each.ungraded[0]
            stopped = (
                f"{len(each.ungraded)} examples could not be graded (--max-ungraded {most_ungraded}); "
                f"the first is {name}: {why}"
            )
    return Result(
        set=dataset.name,
        sha256=dataset.sha256,
        examples=len(dataset.examples),
        skipped=dataset.skipped,
        margin=margin,
        confidence=confidence,
        baseline=_side(outcome, baseline),
        candidates=[_side(outcome, each) for each in candidates],
        comparisons=comparisons,
        stopped=stopped,
    )


def _side(outcome: Outcome, answered: Answered) -> SideResult:
    examples = [example for example in outcome.evaluation.dataset.examples if example.id in answered.grades]
    graded = [
        (example.weight, grade.score)
        for example in examples
        if (grade := answered.grades[example.id]).score is not None
    ]
    weight = math.fsum(each for each, _ in graded)
    return SideResult(
        name=answered.side.name,
        about=answered.about,
        price=answered.side.price.said,
        score=math.fsum(each * (score or 0.0) for each, score in graded) / weight if weight else None,
        asked=answered.asked,
        cached=answered.cached,
        spent=spent(
            {answered.keys[example.id]: answered.answers[example.id] for example in examples}.values(),
            answered.side.price,
        ),
        down=answered.down,
    )


def spent(given: Any, price: Price) -> Spent:
    """What these answers took, all together."""
    all_of_them: list[Answer | Refusal] = list(given)
    answers = [each for each in all_of_them if isinstance(each, Answer)]
    latencies = [float(each.latency) for each in answers] or [0.0]
    asked = [each.asked_at for each in answers]
    prompt, completion = _sum(answers, "prompt_tokens"), _sum(answers, "completion_tokens")
    device = _sum(answers, "device_time")
    return Spent(
        answers=len(answers),
        refused=len(all_of_them) - len(answers),
        latency_mean=math.fsum(latencies) / len(latencies),
        latency_p50=percentile(latencies, 50),
        latency_p95=percentile(latencies, 95),
        prompt_tokens=prompt,
        completion_tokens=completion,
        cached_tokens=_sum(answers, "cached_tokens"),
        device_time=device,
        nanodollars=_dollars(answers, price),
        cut=sum(each.finish_reason == "length" for each in answers),
        concurrency=tuple(sorted({each.concurrency for each in answers})),
        first_asked=min(asked, default=None),
        last_asked=max(asked, default=None),
        fingerprints=tuple(sorted({each.fingerprint for each in answers if each.fingerprint})),
    )


def _dollars(answers: Sequence[Answer], price: Price) -> int | None:
    """Each answer rounded by itself, as the ledger does it."""
    total = 0
    for each in answers:
        if price.tokens is not None and each.prompt_tokens is not None and each.completion_tokens is not None:
            total += by_tokens(
                price.tokens, Used(each.prompt_tokens, each.completion_tokens, each.cached_tokens or 0)
            )
        elif price.device_hour is not None and each.device_time is not None:
            total += by_device(price.device_hour, each.device_time)
        else:
            return None
    return total if answers else None


def _sum(answers: Sequence[Answer], name: str) -> int | None:
    """None unless all of them say so."""
    values = [getattr(each, name) for each in answers]
    return None if not values or None in values else sum(values)


def _compare(outcome: Outcome, candidate: Answered, margin: float, confidence: float) -> Comparison:
    pairs: list[Pair] = []
    tagged: dict[str, list[Pair]] = defaultdict(list)
    ungraded: list[tuple[str, str]] = []
    lost: list[Difference] = []
    won: list[Difference] = []
    baseline = outcome.sides[0]
    for example, ours, theirs in outcome.pairs(candidate):
        if ours.score is None or theirs.score is None:
            side = f"baseline: {ours.why}" if ours.score is None else f"{candidate.side.name}: {theirs.why}"
            ungraded.append((example.id, side))
            continue
        pair = Pair(ours.score, theirs.score, example.weight, example.group)
        pairs.append(pair)
        for tag in example.tags:
            tagged[tag].append(pair)
        if ours.score != theirs.score:
            where = lost if theirs.score < ours.score else won
            if len(where) < _MOST_SHOWN:
                where.append(_difference(example, baseline, ours, candidate, theirs))
    return Comparison(
        candidate=candidate.side.name,
        finding=compare(pairs, margin=margin, confidence=confidence) if pairs else None,
        by_tag={
            tag: compare(some, margin=margin, confidence=confidence) for tag, some in sorted(tagged.items())
        },
        ungraded=ungraded,
        differences=(lost + won)[:_MOST_SHOWN],
    )


def _difference(
    example: Example, baseline: Answered, ours: Grade, candidate: Answered, theirs: Grade
) -> Difference:
    return Difference(
        id=example.id,
        line=example.line,
        question=_cut(_question(example)),
        expected=_cut(" · ".join(map(str, example.expected))),
        baseline=_cut(_text(baseline.answers[example.id])),
        baseline_score=ours.score or 0.0,
        baseline_why=ours.why,
        candidate=_cut(_text(candidate.answers[example.id])),
        candidate_score=theirs.score or 0.0,
        candidate_why=theirs.why,
    )


def _question(example: Example) -> str:
    """The last message, or the prompt."""
    if "prompt" in example.request:
        return str(example.request["prompt"])
    content = example.request["messages"][-1].get("content")
    if isinstance(content, list):
        return "\n".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return str(content or "")


def _text(answer: Answer | Refusal) -> str:
    return answer.text if isinstance(answer, Answer) else f"(no answer: {answer.message})"


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " …"
