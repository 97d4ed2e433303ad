"""StepCost: learns what steps cost, and divides it fairly and completely."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.cost import Coefficients, DeviceMeter, StepCost, plan_features
from penstock.core.plan import Plan, PlanItem

items = st.lists(
    st.builds(
        PlanItem,
        request=st.uuids().map(str),
        epoch=st.just(0),
        start=st.integers(0, 5000),
        tokens=st.integers(1, 2000),
        blocks=st.just(()),
        samples=st.integers(0, 3),
        drafts=st.just(()),
        pools=st.just(False),
    ),
    min_size=1,
    max_size=12,
    unique_by=lambda item: item.request,
)


def plan(*parts: tuple[int, int]) -> Plan:
    """A plan of (start, tokens) items."""
    return Plan(
        0, items=tuple(PlanItem(str(i), 0, start, n, samples=1) for i, (start, n) in enumerate(parts))
    )


@given(items, st.floats(1e-6, 100.0))
def test_the_shares_add_up_to_the_step(parts: list[PlanItem], seconds: float) -> None:
    shares = StepCost().attribute(Plan(0, items=tuple(parts)), seconds)
    assert len(shares) == len(parts)
    assert all(share > 0 for share in shares)
    assert sum(shares) == pytest.approx(seconds, rel=1e-12)


def test_a_long_prompt_pays_more_than_a_decode_beside_it() -> None:
    shares = StepCost().attribute(plan((0, 500), (100, 1)), 1.0)
    assert shares[0] > 10 * shares[1]


def test_equal_work_costs_the_same() -> None:
    shares = StepCost().attribute(plan((10, 1), (10, 1), (10, 1)), 0.3)
    assert shares == pytest.approx([0.1] * 3)


def test_long_context_costs_more_than_short() -> None:
    shares = StepCost().attribute(plan((100_000, 1), (10, 1)), 1.0)
    assert shares[0] > shares[1]


def test_the_fit_finds_the_truth() -> None:
    truth = Coefficients(fixed=0.05, per_token=3e-4, per_context=2e-8, per_sample=1e-4)
    cost = StepCost(Coefficients(fixed=0.01, per_token=1e-3, per_context=1e-7, per_sample=1e-5))
    shapes = [plan((0, 500)), plan(*[(200, 1)] * 8), plan((4000, 1)), plan((0, 100), (1000, 1)), plan((7, 1))]
    for turn in range(400):
        shape = shapes[turn % len(shapes)]
        seconds = sum(a * b for a, b in zip(plan_features(shape), truth.as_tuple(), strict=True))
        cost.observe(shape, seconds)
    for shape in (*shapes, plan((0, 250), (3000, 1), (5, 1))):
        seconds = sum(a * b for a, b in zip(plan_features(shape), truth.as_tuple(), strict=True))
        assert cost.predict(shape) == pytest.approx(seconds, rel=0.05)


@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(1, 500), st.floats(1e-6, 10)), max_size=30))
def test_coefficients_stay_usable_whatever_is_measured(steps: list[tuple[int, int, float]]) -> None:
    cost = StepCost()
    for start, tokens, seconds in steps:
        cost.observe(plan((start, tokens)), seconds)
    assert all(value >= 0 for value in cost.coefficients.as_tuple())
    assert cost.predict(plan((0, 10), (5, 1))) >= 0
    assert sum(cost.attribute(plan((0, 10), (5, 1)), 1.0)) == pytest.approx(1.0)


def test_nothing_to_do_costs_nothing() -> None:
    cost = StepCost()
    cost.observe(Plan(0), 1.0)
    assert cost.predict(Plan(0)) == 0.0
    assert cost.attribute(Plan(0), 0.0) == []
    assert cost.observed == 0


def test_the_meter_accounts_for_every_second() -> None:
    meter = DeviceMeter(started=10.0)
    meter.step(2.0)
    assert (meter.busy, meter.idle(20.0)) == (2.0, 8.0)
