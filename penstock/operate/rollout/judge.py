"""When a step is over, and how: wait, go on, or give up. Pure.

The rules, in this order:

1. So many of the candidate's attempts went wrong that with 95 % confidence more do than may: give up, however
   few there were.
2. It is slower than it may be, on `min_requests` timed answers: give up.
3. Fewer than `min_requests` attempts, or the step has not lasted `hold` seconds: wait.
4. More of its attempts went wrong than may: give up.
5. Go on.

What goes wrong is an attempt that failed, whether another target made it good or not, and an answer of 4xx:
clients may be to blame for that, but then for as large a share of the others', to which it is compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

_Z = 1.6449
"""95 % on one side."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a candidate may do."""

    error_rate: float = 0.01
    """Share of its attempts that may go wrong beyond the share of the others'."""
    latency_ratio: float = 1.25
    """How many times the others' P95 its own may be, to the first byte and to the end; 0 does not compare."""
    ttft_p95: float | None = None
    """Seconds to the first byte that it must keep, whatever the others do."""
    e2e_p95: float | None = None
    """Seconds to the end of the answer that it must keep."""
    min_requests: int = 100
    """Attempts, and timed answers, below which nothing good is said of it."""
    hold: float = 300.0
    """Seconds that each step lasts at least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Of one target, or of several together, since the step began."""

    attempts: int = 0
    failed: int = 0
    refused: int = 0
    timed: int = 0
    """Answers whose times are known."""
    first: float | None = None
    """P95 of seconds to the first byte."""
    total: float | None = None
    """P95 of seconds to the end."""

    @property
    def bad(self) -> int:
        """Attempts that went wrong."""
        return self.failed + self.refused

    @property
    def bad_share(self) -> float:
        """Of all attempts."""
        return self.bad / self.attempts if self.attempts else 0.0

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> Figures:
        """As the admin API has them."""
        return cls(
            attempts=data["attempts"],
            failed=data["failed"],
            refused=data["refused"],
            timed=data["timed"],
            first=(data["first_byte_seconds"] or {}).get("p95"),
            total=(data["total_seconds"] or {}).get("p95"),
        )

    def plus(self, other: Figures) -> Figures:
        """Both together; of the P95s, the greater one, which favours the candidate."""
        return Figures(
            attempts=self.attempts + other.attempts,
            failed=self.failed + other.failed,
            refused=self.refused + other.refused,
            timed=self.timed + other.timed,
            first=_greater(self.first, other.first),
            total=_greater(self.total, other.total),
        )


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do now, and why."""

    kind: Literal["wait", "go on", "give up"]
    reason: str


def judge(candidate: Figures, others: Figures | None, limits: Limits, elapsed: float) -> Decision:
    """What to do after `elapsed` seconds of a step.

    Args:
        candidate: what it has done in this step.
        others: what the other targets have done, in this step or when they last had enough requests; None
            where they never had.
    """
    allowed = limits.error_rate + (others.bad_share if others else 0.0)
    said = (
        f"{candidate.bad:,} of {candidate.attempts:,} attempts went wrong "
        f"({100 * candidate.bad_share:.1f} %: {candidate.failed:,} failed, "
        f"{candidate.refused:,} were answered with 4xx), "
        f"and {100 * allowed:.1f} % may"
    )
    if candidate.bad > 1 and lower_bound(candidate.bad, candidate.attempts) > allowed:
        return Decision("give up", said)
    if candidate.timed >= limits.min_requests and (slow := _slow(candidate, others, limits)):
        return Decision("give up", slow)
    if candidate.attempts < limits.min_requests:
        return Decision("wait", f"{candidate.attempts:,} of {limits.min_requests:,} requests so far")
    if elapsed < limits.hold:
        return Decision("wait", f"{elapsed:.0f} of {limits.hold:g} s have passed")
    if candidate.bad_share > allowed:
        return Decision("give up", said)
    return Decision("go on", said)


def _slow(candidate: Figures, others: Figures | None, limits: Limits) -> str | None:
    for what, ours, theirs, bound in (
        ("to the first byte", candidate.first, others and others.first, limits.ttft_p95),
        ("to the end", candidate.total, others and others.total, limits.e2e_p95),
    ):
        if ours is None:
            continue
        if bound is not None and ours > bound:
            return f"P95 {what} is {1000 * ours:,.0f} ms, and {1000 * bound:,.0f} ms may be"
        if theirs and limits.latency_ratio and ours > limits.latency_ratio * theirs:
            return (
                f"P95 {what} is {1000 * ours:,.0f} ms, {ours / theirs:.2g} times the others' "
                f"{1000 * theirs:,.0f} ms; {limits.latency_ratio:g} times may be"
            )
    return None


def lower_bound(count: int, of: int) -> float:
    """What the true share is above, with 95 % confidence, where `count` of `of` were seen (Wilson, 1927)."""
    if not of:
        return 0.0
    share, square = count / of, _Z * _Z
    middle = share + square / (2 * of)
    reach = _Z * math.sqrt(share * (1 - share) / of + square / (4 * of * of))
    return max(0.0, (middle - reach) / (1 + square / of))


def weights_for(
    share: float, names: list[str], candidate: str, before: Mapping[str, float]
) -> dict[str, float]:
    """Weights with which the candidate gets `share` of the requests, and the others the rest as they divided
    it among themselves before.

    Args:
        share: from 0 to 1.
        names: of all targets.
        before: their weights.
    """
    others = [name for name in names if name != candidate]
    total = sum(before[name] for name in others)
    parts = {name: before[name] / total if total else 1 / len(others) for name in others}
    return {name: share if name == candidate else (1 - share) * parts[name] for name in names}


def _greater(one: float | None, other: float | None) -> float | None:
    return max((each for each in (one, other) if each is not None), default=None)
