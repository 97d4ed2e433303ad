"""Intervals against published figures and a likelihood found by search; verdicts; how many are needed."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.evaluate.statistics import (
    Pair,
    compare,
    judge,
    mcnemar_mid_p,
    needed,
    student,
    student_quantile,
    tango,
)


def pairs(wins: int, losses: int, ties: int) -> list[Pair]:
    """Binary pairs."""
    return [Pair(0, 1)] * wins + [Pair(1, 0)] * losses + [Pair(1, 1)] * ties


def test_tango_as_published() -> None:
    """Fagerland et al. 2014, of the airway data of Bentur et al. 2009 (1, 1, 7, 12): -0.517 to -0.026."""
    assert tango(1, 7, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)


def test_mid_p_as_published() -> None:
    """Fagerland et al. 2013, the same data: 0.039; and without any difference, and by hand."""
    assert mcnemar_mid_p(1, 7) == pytest.approx(0.0390625)
    assert mcnemar_mid_p(5, 5) == 1.0
    assert mcnemar_mid_p(0, 4) == pytest.approx(1 / 16)
    exact = (2 * sum(math.comb(2200, k) for k in range(1000)) + math.comb(2200, 1000)) / (1 << 2200)
    assert mcnemar_mid_p(1000, 1200) == pytest.approx(exact, rel=1e-9)
    assert mcnemar_mid_p(400_000, 600_000) == 0.0


def likelihood_q(wins: int, losses: int, count: int, d: float) -> float:
    """The most likely probability of a loss, where that of a win is d more; by search, not by formula."""

    def log(q: float) -> float:
        cells = ((wins, q + d), (losses, q), (count - wins - losses, 1 - 2 * q - d))
        return sum(seen * math.log(p) if p > 0 else -math.inf for seen, p in cells if seen)

    low, high = max(0.0, -d), (1 - d) / 2
    for _ in range(200):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        low, high = (left, high) if log(left) < log(right) else (low, right)
    return (low + high) / 2


@given(wins=st.integers(0, 30), losses=st.integers(0, 30), ties=st.integers(0, 60))
def test_the_ends_of_tango_solve_its_equation(wins: int, losses: int, ties: int) -> None:
    """Against the likelihood's maximum found by search: at each end the statistic is the normal quantile."""
    count = wins + losses + ties
    if not count:
        return
    low, high = tango(wins, losses, count)
    seen = (wins - losses) / count
    assert -1 <= low <= seen <= high <= 1
    z = NormalDist().inv_cdf(0.975)
    for end in (low, high):
        if -0.999 < end < 0.999:
            q = likelihood_q(wins, losses, count, end)
            error = math.sqrt(count * (2 * q + end * (1 - end)))
            assert abs(wins - losses - count * end) / error == pytest.approx(z, rel=1e-3)


@given(wins=st.integers(0, 50), losses=st.integers(0, 50), ties=st.integers(0, 200))
def test_the_sides_may_be_exchanged(wins: int, losses: int, ties: int) -> None:
    if wins + losses + ties:
        low, high = tango(wins, losses, wins + losses + ties)
        assert tango(losses, wins, wins + losses + ties) == pytest.approx((-high, -low), abs=1e-9)


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.7062), (2, 4.3027), (5, 2.5706), (30, 2.0423), (120, 1.9799), (9999, 1.9602)],
)
def test_students_quantiles_are_those_of_the_tables(freedom: int, quantile: float) -> None:
    assert student_quantile(0.975, freedom) == pytest.approx(quantile, abs=1e-4)


def test_student_by_hand() -> None:
    """Eight differences and the added pair of +1 and -1."""
    seen = [0.5, 0.25, 0.0, 0.0, 0.0, -0.25, 0.0, 0.0]
    low, high = student([Pair(0.5, 0.5 + each) for each in seen])
    values = [*seen, 1.0, -1.0]
    mean = sum(values) / 10
    error = math.sqrt(sum((value - mean) ** 2 for value in values) / 9 / 10)
    assert (low + high) / 2 == pytest.approx(mean)
    assert high - mean == pytest.approx(2.2622 * error, rel=1e-4)


def test_a_group_is_one_draw() -> None:
    """Ten copies of an example in one group say no more than one does; without the group they would."""
    alone = [Pair(0.5, 0.6), Pair(0.5, 0.4), Pair(0.5, 0.5)]
    copied = [Pair(p.baseline, p.candidate, group=str(n)) for n, p in enumerate(alone) for _ in range(10)]
    assert student(copied) == pytest.approx(student(alone))
    loose = student([Pair(p.baseline, p.candidate) for p in copied])
    assert loose[1] - loose[0] < student(alone)[1] - student(alone)[0]


def test_weights_weigh() -> None:
    found = compare([Pair(0, 1, weight=3), Pair(1, 0, weight=1)], margin=0.02)
    assert (found.baseline, found.candidate, found.difference) == (0.25, 0.75, 0.5)
    assert found.interval.method == "student"
    assert found.p_value is None
    scaled = compare([Pair(0, 1, weight=300), Pair(1, 0, weight=100)], margin=0.02)
    assert (scaled.interval.low, scaled.interval.high) == pytest.approx(
        (found.interval.low, found.interval.high)
    )


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.01, 0.05, "better"),
        (0.0, 0.05, "not worse"),
        (-0.019, 0.05, "not worse"),
        (-0.019, -0.001, "not worse"),
        (-0.02, 0.05, "too small to tell"),
        (-0.05, 0.0, "too small to tell"),
        (-0.05, -0.001, "worse"),
        (-0.05, -0.03, "worse"),
    ],
)
def test_verdicts(low: float, high: float, verdict: str) -> None:
    assert judge(low, high, 0.02) == verdict


def test_without_a_margin_equal_is_never_proved() -> None:
    assert compare(pairs(0, 0, 100_000), margin=0).verdict == "too small to tell"
    assert compare(pairs(0, 0, 100_000), margin=0).needed is None


def test_ties_alone_need_a_set_of_some_size() -> None:
    """That five answers are equal shows nothing; 188 are what Tango's interval needs for two points."""
    few = compare(pairs(0, 0, 5), margin=0.02)
    assert few.verdict == "too small to tell"
    assert few.needed is not None
    assert 188 < few.needed < 1000
    assert compare(pairs(0, 0, 188), margin=0.02).verdict == "too small to tell"
    assert compare(pairs(0, 0, 189), margin=0.02).verdict == "not worse"


def test_as_many_as_are_needed_do_tell() -> None:
    """The estimate, put to the test: a set of that size, with the same shares, tells."""
    seen = compare(pairs(4, 6, 190), margin=0.03)
    assert seen.verdict == "too small to tell"
    assert seen.needed is not None
    scale = seen.needed / 200
    assert (
        compare(pairs(round(4 * scale), round(6 * scale), round(190 * scale)), margin=0.03).verdict
        == "not worse"
    )


def test_needed_for_a_candidate_that_seems_worse() -> None:
    """3 points worse with a margin of 2: more examples would show that it is, not that it is not."""
    seen = compare(pairs(1, 4, 95), margin=0.02)
    assert seen.verdict == "too small to tell"
    assert seen.needed is not None
    scale = seen.needed / 100
    assert compare(pairs(round(scale), round(4 * scale), round(95 * scale)), margin=0.02).verdict == "worse"


def test_needed_at_the_margin_itself_is_never() -> None:
    assert needed([Pair(1, 0), Pair(1, 1)], -0.5, 0.5, 0.95) is not None  # 0 is still far away
    assert needed([Pair(1, 1)], 0.0, 0.0, 0.95) is None


def test_no_pairs_is_an_error() -> None:
    with pytest.raises(ValueError, match="no pairs"):
        compare([], margin=0.02)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0.01, 100)), min_size=1, max_size=40))
def test_any_scores_have_an_interval(scores: list[tuple[float, float, float]]) -> None:
    found = compare([Pair(*each) for each in scores], margin=0.02)
    assert -1 <= found.interval.low <= found.interval.high <= 1
    assert found.wins + found.losses <= found.pairs
