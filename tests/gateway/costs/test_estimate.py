"""Estimates: by hand, by their own laws, and the case study against its own figures."""

from __future__ import annotations

import datetime
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.gateway.costs.case_study import Study, checks, consistent
from penstock.gateway.costs.estimate import (
    HOURS,
    Cloud,
    Dated,
    Hosted,
    Request,
    at_rate,
    at_utilization,
    break_even,
    rates,
    verdict,
)

DATED = Dated(datetime.date(2026, 11, 1), "a price list")
DOLLAR = 10**9
L4 = Hosted(71 * DOLLAR // 100, DATED, Fraction(2500))
API = Cloud(DOLLAR // 2, 3 * DOLLAR // 2, DATED)
REQUEST = Request(500, 150)


def test_by_hand() -> None:
    """50,000 requests a day: 650 tokens each, of 2,500 a second."""
    case = at_rate(L4, API, REQUEST, Fraction(50_000, 86_400), Fraction(85, 100))
    assert (case.replicas, round(float(case.utilization), 4)) == (1, 0.1505)
    assert float(case.hosted) / DOLLAR == pytest.approx(0.71 * 730.5)
    assert case.cloud is not None
    assert float(case.cloud) / DOLLAR == pytest.approx(50_000 / 24 * 730.5 * (500 * 0.5e-6 + 150 * 1.5e-6))
    assert case.saving is not None
    assert float(case.saving) == pytest.approx(1 - 518.655 / 722.89, abs=1e-4)


def test_the_savings_table_goes_from_much_cheaper_to_negative() -> None:
    words = [verdict(case.saving) for case in rates(L4, API, REQUEST, Fraction(85, 100))]
    assert words[0] == words[1] == "negative: depreciation exceeds the API bill"
    assert words[-1] == "much cheaper"
    order = ["negative: depreciation exceeds the API bill", "about the same", "cheaper", "much cheaper"]
    assert [order.index(each) for each in words] == sorted(order.index(each) for each in words)
    high = at_utilization(L4, API, REQUEST, Fraction(60, 100)).saving
    assert high is not None
    assert Fraction(70, 100) <= high <= Fraction(95, 100)  # as the cost document has it


@given(
    st.integers(1, 10**11),
    st.integers(1, 10**5),
    st.integers(1, 10**11),
    st.integers(1, 10**11),
    st.integers(1, 10**4),
    st.integers(1, 10**4),
)
def test_at_break_even_both_cost_the_same(
    price: int, throughput: int, cloud_in: int, cloud_out: int, tokens_in: int, tokens_out: int
) -> None:
    hosted = Hosted(price, DATED, Fraction(throughput), 2)
    cloud, request = Cloud(cloud_in, cloud_out, DATED), Request(tokens_in, tokens_out)
    even = break_even(hosted, cloud, request)
    rate = even * hosted.throughput / request.tokens
    assert rate * 3600 * request.cost(cloud) == hosted.hour
    if even <= 1:
        case = at_utilization(hosted, cloud, request, even)
        assert (case.replicas, case.saving, case.utilization) == (1, 0, even)


@given(st.fractions(Fraction(1, 10**6), 1000), st.fractions(Fraction(1, 10), 1))
def test_replicas_are_as_many_as_the_load_takes(rate: Fraction, most: Fraction) -> None:
    case = at_rate(L4, None, REQUEST, rate, most)
    assert case.utilization <= most
    assert case.replicas == 1 or rate * 650 / 2500 > most * (case.replicas - 1)
    assert case.hosted == case.replicas * L4.price * HOURS
    assert case.saving is None


def test_the_case_study_does_not_hold_and_says_where() -> None:
    found = list(checks(Study()))
    assert len(found) == 8
    assert not any(each.holds for each in found)
    texts = [f"{each.arithmetic} {each.finding}" for each in found]
    assert "50,000/day × 30 × $0.04 = $60,000; $180,000 / 1,500,000 = $0.12" in texts[0]
    assert "3 times" in texts[0]
    assert "$60,000 - $9,000 = $51,000" in texts[1]
    assert "5,840 GPU-hours" in texts[2]
    assert "does not change" in texts[3]
    assert "5.7 times the GPU time" in texts[4]
    assert "0.69 of 256" in texts[5]
    assert "32x" in texts[6]
    assert any("$19,710 saved (75 %)" in line for line in consistent(Study()))


def test_figures_that_fit_hold() -> None:
    """The checks can pass: nothing in them is said whatever the figures are."""
    phase = Study().before
    good = Study(
        requests=1000,
        spent=30_000,
        saved=27_000,
        quoted=(30_000, 3_000),
        times=2,
        hourly=Fraction(30_000, 8 * 730),
        before=phase.__class__(8, Fraction(1, 2), 8, Fraction(600), Fraction(1)),
        after=phase.__class__(4, Fraction(1, 2), 16, Fraction(1200), Fraction(1, 10)),
    )
    assert [each.holds for each in checks(good)] == [True] * 8
