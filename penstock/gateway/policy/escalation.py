"""Whether an attempt's answer is good enough, and what follows from that.

    answer ──judge──▶ findings, verifier by verifier ──decide──▶ the one that counts ──follows──▶ escalate?

What verifiers measure needs nothing but the answer, so that it is decided here; whom a hook asks is decided
elsewhere, and its word is taken in as a finding like the others. A choice that calls tools has no text that
could be wrong: verifiers of texts pass it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from penstock.gateway.records import Verdict
from penstock.spec.routes import Escalation, Length, Verifier
from penstock.spec.verifying import Pattern, Schema, TooMuch

Finish = Literal["stop", "length", "content_filter", "tool_calls", ""]
"""How a choice ended, in OpenAI's words; empty where nobody said."""
ATTEMPT = "attempt"
"""The verifier's name where there was no answer to look at."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One of an answer's choices."""

    text: str
    finish: Finish = ""
    logprobs: tuple[float, ...] | None = None
    """Of its tokens; None where they were not told."""
    calls_tools: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer, whatever its dialect."""

    choices: tuple[Choice, ...]
    tokens: int | None = None
    """Of all choices, as the upstream has counted them."""

    def texts(self) -> Iterator[str]:
        """Of the choices that have one."""
        return (choice.text for choice in self.choices if choice.text or not choice.calls_tools)


class Unclear(Exception):
    """A verifier cannot say anything: what it looks at is not there."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a verifier said, as it stands in the ledger."""

    verifier: str
    verdict: Verdict
    score: float | None = None
    reason: str = ""

    @property
    def passes(self) -> bool:
        """Whether the answer is good as far as this goes."""
        return self.verdict in ("passed", "open")


class Judge:
    """One verifier, with what it needs compiled. Of a hook it knows the name and what its failure means."""

    def __init__(self, verifier: Verifier) -> None:
        self.verifier = verifier
        self.name: str = verifier.name or verifier.kind
        self.takes_time = verifier.kind in ("json_schema", "regex", "not_regex")
        """Whether it belongs into a thread."""
        self._schema = None if verifier.json_schema is None else Schema(verifier.json_schema)
        wanted = verifier.regex if verifier.not_regex is None else verifier.not_regex
        self._pattern = None if wanted is None else Pattern(wanted)

    @property
    def wants_logprobs(self) -> bool:
        """Whether the attempt must be asked for log-probabilities."""
        return self.verifier.mean_logprob is not None

    def say(self, passed: bool, score: float | None = None, reason: str = "") -> Finding:
        """Its word."""
        return Finding(self.name, "passed" if passed else "failed", score, "" if passed else reason)

    def failed(self, why: str) -> Finding:
        """It has failed itself."""
        return Finding(self.name, self.verifier.on_failure, None, why)

    def judge(self, answer: Answer) -> Finding:
        """Look at an answer. Not of hooks. Never raises."""
        try:
            return self._judge(answer)
        except Unclear as error:
            return self.failed(str(error))
        except TooMuch:
            return self.failed("the text is too long, or takes too long to search")
        except Exception as error:  # whose message may quote the text
            return self.failed(type(error).__name__)

    def _judge(self, answer: Answer) -> Finding:
        verifier = self.verifier
        if not answer.choices:
            raise Unclear("an answer without choices")
        if verifier.mean_logprob is not None:
            return self._mean_logprob(answer, verifier.mean_logprob)
        if verifier.finish_reason is not None:
            wrong = next(
                (each.finish for each in answer.choices if each.finish not in verifier.finish_reason), None
            )
            return self.say(wrong is None, reason=f"ended with {wrong or 'no reason'}")
        if verifier.length is not None:
            return self._length(answer, verifier.length)
        if self._schema is not None:
            problem = next(filter(None, map(self._schema.problem, answer.texts())), None)
            return self.say(problem is None, reason=problem or "")
        assert self._pattern is not None
        found = [self._pattern.found(text) for text in answer.texts()]
        if verifier.regex is not None:
            return self.say(all(found), reason="not found")
        return self.say(not any(found), reason="found")

    def _mean_logprob(self, answer: Answer, least: float) -> Finding:
        """The least certain choice decides."""
        means = []
        for choice in answer.choices:
            if choice.logprobs:
                means.append(sum(choice.logprobs) / len(choice.logprobs))
            elif choice.logprobs is None or choice.text:
                raise Unclear("no log-probabilities in the answer")
        if not means:
            raise Unclear("an answer without tokens")
        mean = min(means)
        return self.say(mean >= least, round(mean, 6), f"a mean of {mean:.3f} is below {least:g}")

    def _length(self, answer: Answer, length: Length) -> Finding:
        tokens, lengths = answer.tokens, [len(text) for text in answer.texts()]
        if length.min_tokens is not None or length.max_tokens is not None:
            if tokens is None:
                raise Unclear("its tokens were not counted")
            if why := _outside(tokens, length.min_tokens, length.max_tokens):
                return self.say(False, tokens, f"{tokens} tokens are {why}")
        for characters in lengths:
            if why := _outside(characters, length.min_characters, length.max_characters):
                return self.say(False, characters, f"{characters} characters are {why}")
        counted = length.min_tokens is not None or length.max_tokens is not None
        return self.say(True, tokens if counted else min(lengths, default=None))


def _outside(count: int, least: int | None, most: int | None) -> str:
    if least is not None and count < least:
        return f"fewer than {least}"
    if most is not None and count > most:
        return f"more than {most}"
    return ""


def errored(why: str) -> Finding:
    """The attempt has come to nothing."""
    return Finding(ATTEMPT, "failed", None, why)


def decide(findings: Iterable[Finding]) -> Finding:
    """Which of the verifiers' findings stands in the ledger: the first that the answer did not pass; if there
    is none, one whose verifier has failed, else the first with a score, else the last."""
    chosen: Finding | None = None
    for finding in findings:
        if not finding.passes:
            return finding
        better = chosen is None or (chosen.verdict, chosen.score) == ("passed", None)
        if finding.verdict == "open" and chosen is not None and chosen.verdict != "open":
            better = True
        if better:
            chosen = finding
    assert chosen is not None
    return chosen


def follows(escalation: Escalation, finding: Finding, *, refused: bool, errored: bool) -> bool:
    """Whether somebody dearer is asked.

    Args:
        refused: the attempt's upstream has said what is wrong with the request.
        errored: there is no whole answer.
    """
    if refused:
        return escalation.on_refusal == "escalate"
    if errored:
        return escalation.on_error == "escalate"
    return not finding.passes
