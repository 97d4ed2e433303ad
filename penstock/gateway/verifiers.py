"""Verifiers at work: those that only look (policy/escalation.py), and those that somebody else stands behind.

    verifier ─▶ {id, endpoint, route, key_id, team, tags, body, tokens,
                 choices: [{text, finish_reason, calls_tools}]}
             ◀─ {"pass": true, "score": 0.93, "reason": "…"}, of which `pass` must be there

One that is late, raises, or answers something else has failed: its `on_failure` says what that means. Texts
are searched in threads, since a search of a long one would hold up all other requests.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

from penstock.core.errors import brief
from penstock.spec.model import Spec

from .outside import OUTSIDE, Function, Hanging, Outside, find
from .policy.escalation import Answer, Finding, Judge, decide

logger = logging.getLogger("penstock.gateway")

About = Callable[[], dict[str, Any]]


class Verifiers:
    """All of a spec."""

    def __init__(self, spec: Spec) -> None:
        """Raises StartupError for a callable that cannot be found."""
        self._of: dict[str, list[tuple[Judge, Function | None]]] = {}
        for name, route in spec.routes.items():
            if route.escalate is not None:
                where = f"routes.{name}.escalate.verifiers"
                self._of[name] = [
                    (Judge(each), None if each.python is None else find(each.python, where))
                    for each in route.escalate.verifiers
                ]
        self._outside = Outside("verifier")

    def wants_logprobs(self, route: str) -> bool:
        """Whether an attempt of this route must be asked for log-probabilities."""
        return any(judge.wants_logprobs for judge, _ in self._of[route])

    async def verify(self, route: str, answer: Answer, about: About, *, stays: bool) -> Finding:
        """What counts in the end.

        Args:
            about: what hooks are told beside the answer.
            stays: it must not leave the house: who is outside of it is not asked, and has failed.
        """
        findings: list[Finding] = []
        for judge, function in self._of[route]:
            if stays and judge.verifier.url is not None and not judge.verifier.local:
                finding = judge.failed(OUTSIDE)
            else:
                finding = await self._ask(judge, function, answer, about)
            findings.append(finding)
            if finding.verdict in ("open", "closed"):
                logger.error("the verifier %s of %s failed: %s", judge.name, route, finding.reason)
            if not finding.passes:
                break
        return decide(findings)

    async def close(self) -> None:
        """End connections and threads."""
        await self._outside.close()

    async def _ask(self, judge: Judge, function: Function | None, answer: Answer, about: About) -> Finding:
        verifier = judge.verifier
        try:
            async with asyncio.timeout(verifier.timeout):
                if verifier.url is not None or function is not None:
                    told = {**about(), "choices": _choices(answer), "tokens": answer.tokens}
                    return _finding(judge, await self._outside.ask(verifier.url, function, told))
                if judge.takes_time:
                    return await self._outside.aside(lambda: judge.judge(answer))
                return judge.judge(answer)
        except TimeoutError:
            return judge.failed(f"no answer within {verifier.timeout:g} s")
        except Hanging as error:
            return judge.failed(str(error))
        except Exception as error:  # whose message may quote the answer
            return judge.failed(type(error).__name__)


def _choices(answer: Answer) -> Sequence[dict[str, Any]]:
    return [
        {"text": each.text, "finish_reason": each.finish, "calls_tools": each.calls_tools}
        for each in answer.choices
    ]


def _finding(judge: Judge, said: Any) -> Finding:
    """What a hook's answer means. Raises ValueError where it is none."""
    if not isinstance(said, dict) or not isinstance(said.get("pass"), bool):
        raise ValueError("it did not answer with pass")
    if not set(said) <= {"pass", "score", "reason"}:
        raise ValueError("it answered with more than pass, score and reason")
    score = said.get("score")
    if score is not None and (
        isinstance(score, bool) or not isinstance(score, int | float) or abs(score) > 1e300
    ):
        raise ValueError("its score is no number")
    if score is not None and score != score:
        raise ValueError("its score is no number")
    reason = said.get("reason")
    return judge.say(said["pass"], None if score is None else float(score), brief(str(reason or ""), 200))
