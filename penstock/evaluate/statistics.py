"""What a set can tell of a difference in quality: intervals for pairs, a verdict, and how many examples more.

Both sides answer the same examples, so the differences are looked at example by example: what is hard for
both cancels out (Miller 2024, "Adding Error Bars to Evals", arXiv:2411.00640, 4). Scores are from 0 to 1; the
difference is candidate - baseline. Pure, and the same numbers give the same interval.

    scores of 0 and 1, one   the asymptotic score interval of Tango 1998 (Statistics in Medicine 17:891-908),
    weight and no groups     recommended by Fagerland, Lydersen and Laake 2014 (Statistics in Medicine
                             33:2850-2875); beside it the p value of McNemar's mid-p test (the same, 2013, BMC
                             Medical Research Methodology 13:91)
    anything else            Student's interval of the weighted mean over groups, with one pair for each side
                             added (Bonett and Price 2012, Journal of Educational and Behavioral Statistics
                             37:479-488: theirs are binary, and these the extremes of any score)

The added pairs keep the second one honest where a set is small and most differences are 0: five ties would
otherwise be an interval of no width. They are why no bootstrap stands here: resampling cannot find what few
examples do not show (`tests/evaluate/test_coverage.py` has both beside each other).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

Verdict = Literal["better", "not worse", "worse", "too small to tell"]
MOST_NEEDED = 10_000_000
"""Examples; no set has more."""
POWER = 0.8
"""Probability that a set of the estimated size tells, if the truth is what was seen."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One example, graded on both sides."""

    baseline: float
    candidate: float
    weight: float = 1.0
    group: str | None = None
    """Examples of one group are not independent; they count as one draw."""


@dataclass(frozen=True, slots=True)
class Interval:
    """Where the difference lies, with a given confidence."""

    low: float
    high: float
    method: Literal["tango", "student"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What a set of pairs says."""

    pairs: int
    baseline: float
    """Weighted mean score."""
    candidate: float
    difference: float
    interval: Interval
    verdict: Verdict
    wins: int
    """Pairs in which the candidate's score is the higher one."""
    losses: int
    p_value: float | None
    """Two-sided mid-p of McNemar's test; of binary scores only."""
    needed: int | None
    """Examples with which the set would tell, about; None where it does, or where none would."""


def compare(pairs: Sequence[Pair], *, margin: float, confidence: float = 0.95) -> Finding:
    """The finding of all pairs.

    Args:
        margin: how much worse still counts as not worse, in the scores' unit (0.02: two points of a hundred).
        confidence: of the two-sided interval.

    Raises ValueError without pairs.
    """
    if not pairs:
        raise ValueError("no pairs")
    weight = math.fsum(pair.weight for pair in pairs)
    baseline = math.fsum(pair.weight * pair.baseline for pair in pairs) / weight
    candidate = math.fsum(pair.weight * pair.candidate for pair in pairs) / weight
    wins = sum(pair.candidate > pair.baseline for pair in pairs)
    losses = sum(pair.candidate < pair.baseline for pair in pairs)
    difference = math.fsum(pair.weight * (pair.candidate - pair.baseline) for pair in pairs) / weight
    binary = all(pair.baseline in (0, 1) and pair.candidate in (0, 1) for pair in pairs)
    plain = all(pair.weight == pairs[0].weight and pair.group is None for pair in pairs)
    if binary and plain:
        low, high = tango(wins, losses, len(pairs), confidence)
        interval = Interval(low, high, "tango")
    else:
        interval = Interval(*student(pairs, confidence), "student")
    found = judge(interval.low, interval.high, margin)
    return Finding(
        pairs=len(pairs),
        baseline=baseline,
        candidate=candidate,
        difference=difference,
        interval=interval,
        verdict=found,
        wins=wins,
        losses=losses,
        p_value=mcnemar_mid_p(wins, losses) if binary and plain else None,
        needed=needed(pairs, difference, margin, confidence) if found == "too small to tell" else None,
    )


def judge(low: float, high: float, margin: float) -> Verdict:
    """The verdict of an interval.

    better              all of it is above 0
    not worse           all of it is above -margin
    worse               all of it is below 0, and some of it at -margin or below
    too small to tell   it reaches from -margin or below to 0 or above
    """
    if low > 0:
        return "better"
    if low > -margin:
        return "not worse"
    return "worse" if high < 0 else "too small to tell"


def tango(wins: float, losses: float, pairs: float, confidence: float = 0.95) -> tuple[float, float]:
    """Tango's interval of (wins - losses) / pairs.

    The difference d is inside as long as |wins - losses - n d| <= z sqrt(n (2 q + d (1 - d))), where q is
    what is most likely of the probability of a loss, given d.
    """
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    seen = (wins - losses) / pairs

    def statistic(d: float) -> float:
        # wins is Tango's b, losses c: their probabilities are q + d and q
        linear = (2 * pairs - wins + losses) * d - wins - losses
        constant = -losses * d * (1 - d)
        q = (math.sqrt(max(linear * linear - 8 * pairs * constant, 0.0)) - linear) / (4 * pairs)
        variance = pairs * (2 * q + d * (1 - d))
        distance = wins - losses - pairs * d
        if variance <= 0:
            return 0.0 if abs(distance) < 1e-12 * pairs else math.copysign(math.inf, distance)
        return distance / math.sqrt(variance)

    low = -1.0 if statistic(-1.0) <= z else _bisect(lambda d: statistic(d) > z, -1.0, seen)
    high = 1.0 if statistic(1.0) >= -z else _bisect(lambda d: statistic(d) >= -z, seen, 1.0)
    return low, high


def student(pairs: Sequence[Pair], confidence: float = 0.95) -> tuple[float, float]:
    """Student's interval of the weighted mean difference, over groups, with a pair for each side added.

    A group is one draw with its summed weight; its degrees of freedom are the groups' less one. The variance
    is that of a ratio: sum of (weight (difference - mean))^2, over (sum of weights)^2 (Cochran, Sampling
    Techniques, 6.4; the factor n / (n - 1) of small samples with it).
    """
    groups: dict[object, list[Pair]] = defaultdict(list)
    for number, pair in enumerate(pairs):
        groups[number if pair.group is None else pair.group].append(pair)
    drawn = [
        (
            math.fsum(pair.weight for pair in group),
            math.fsum(pair.weight * (pair.candidate - pair.baseline) for pair in group),
        )
        for group in groups.values()
    ]
    usual = math.fsum(weight for weight, _ in drawn) / len(drawn)
    drawn += [(usual, usual), (usual, -usual)]
    total = math.fsum(weight for weight, _ in drawn)
    mean = math.fsum(value for _, value in drawn) / total
    squares = math.fsum((value - mean * weight) ** 2 for weight, value in drawn)
    count = len(drawn)
    error = math.sqrt(squares * count / (count - 1)) / total
    half = student_quantile(0.5 + confidence / 2, count - 1) * error
    return max(-1.0, mean - half), min(1.0, mean + half)


def mcnemar_mid_p(wins: int, losses: int) -> float:
    """Two-sided mid-p value of wins and losses being equally probable: twice the smaller tail of the binomial
    distribution, with half the probability of what was seen."""
    count, least = wins + losses, min(wins, losses)
    if wins == losses:
        return 1.0

    def logarithm(seen: int) -> float:
        ways = math.lgamma(count + 1) - math.lgamma(seen + 1) - math.lgamma(count - seen + 1)
        return ways - count * math.log(2)

    last = logarithm(least)
    terms = [math.exp(logarithm(seen) - last) for seen in range(max(0, least - 10_000), least)]
    return min(1.0, (2 * math.fsum(terms) + 1) * math.exp(last))


def needed(pairs: Sequence[Pair], difference: float, margin: float, confidence: float) -> int | None:
    """How many examples like these would tell, with a probability of POWER, if what was seen is the truth.

    n = (z_confidence + z_power)^2 variance / distance^2, where the distance is that to -margin, or to 0 if
    the candidate was seen to be so much worse that nothing would show it not to be. The variance is that of
    the seen differences, with a pair for each side added; so without any difference it shrinks as the set
    grows, and n is where the two meet. None where no set would tell.
    """
    distance = difference + margin if difference > -margin else -difference
    if distance <= 0:
        return None
    factor = (NormalDist().inv_cdf(0.5 + confidence / 2) + NormalDist().inv_cdf(POWER)) ** 2
    weight = math.fsum(pair.weight for pair in pairs)
    squares = math.fsum(pair.weight * (pair.candidate - pair.baseline) ** 2 for pair in pairs) / weight

    def tells(count: float) -> bool:
        variance = (squares * count + 2) / (count + 2) - difference * difference
        return count * distance * distance >= factor * variance

    if not tells(MOST_NEEDED):
        return None
    return max(len(pairs) + 1, math.ceil(_bisect(lambda count: not tells(count), 1.0, MOST_NEEDED)))


def student_quantile(probability: float, freedom: int) -> float:
    """Student's t, by bisection on its distribution function."""
    return _bisect(lambda t: student_distribution(t, freedom) < probability, 0.0, 1e6)


def student_distribution(t: float, freedom: int) -> float:
    """P(T <= t) for t >= 0, in closed form for whole degrees of freedom (Abramowitz and Stegun 26.7.3, 4)."""
    if freedom > 5000:
        return NormalDist().cdf(t * (1 - 1 / (4 * freedom)) / math.sqrt(1 + t * t / (2 * freedom)))
    angle = math.atan(t / math.sqrt(freedom))
    cosine, sine = math.cos(angle), math.sin(angle)
    if freedom % 2:
        term = total = cosine if freedom > 1 else 0.0
        for k in range(3, freedom - 1, 2):
            term *= cosine * cosine * (k - 1) / k
            total += term
        inside = 2 / math.pi * (angle + sine * total)
    else:
        term = total = 1.0
        for k in range(2, freedom - 1, 2):
            term *= cosine * cosine * (k - 1) / k
            total += term
        inside = sine * total
    return 0.5 + inside / 2


def _bisect(is_left: Callable[[float], bool], low: float, high: float) -> float:
    """Where `is_left` turns from true to false."""
    for _ in range(100):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if is_left(middle) else (low, middle)
    return (low + high) / 2
