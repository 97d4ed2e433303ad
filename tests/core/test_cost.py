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


UNITS = Coefficients(fixed=1.0, per_token=0.5, per_context=0.25, per_sample=2.0)


def test_a_prediction_counts_each_part_once() -> None:
    """Two items of (start 3, 2 tokens) and (start 0, 1 token): contexts 4 + 5 and 1, two samples."""
    assert StepCost(UNITS).predict(plan((3, 2), (0, 1))) == pytest.approx(1.0 + 0.5 * 3 + 0.25 * 10 + 2.0 * 2)


def test_a_share_is_what_the_item_makes_the_device_do_and_a_part_of_what_is_fixed() -> None:
    whole = 0.5 + 0.5 * 2 + 0.25 * 9 + 2.0, 0.5 + 0.5 + 0.25 + 2.0
    shares = StepCost(UNITS).attribute(plan((3, 2), (0, 1)), 3.0)
    assert shares == pytest.approx([3.0 * part / sum(whole) for part in whole])


def test_a_chunk_pays_for_no_sample_and_drafts_for_each() -> None:
    parts = Plan(0, items=(PlanItem("a", 0, 0, 1), PlanItem("b", 0, 0, 1, samples=3)))
    shares = StepCost(UNITS).attribute(parts, 1.0)
    assert shares == pytest.approx([1.25 / (2.5 + 6.0), (1.25 + 6.0) / (2.5 + 6.0)])


def test_where_nothing_costs_anything_tokens_are_paid() -> None:
    free = StepCost(Coefficients(0.0, 0.0, 0.0, 0.0))
    assert free.attribute(plan((0, 3), (0, 1)), 8.0) == pytest.approx([6.0, 2.0])
    free.observe(plan((0, 3)), 1.0)
    assert free.coefficients == Coefficients(0.0, 0.0, 0.0, 0.0)  # what is not in the prior is not learnt


def test_the_prior_unless_told() -> None:
    assert StepCost().prior == Coefficients(fixed=1e-3, per_token=1e-4, per_context=1e-8, per_sample=1e-5)
    assert StepCost().coefficients == StepCost().prior


def only_fixed(**options: float) -> StepCost:
    """A model with one coefficient, 1 to begin with: what is learnt can be written down."""
    return StepCost(Coefficients(1.0, 0.0, 0.0, 0.0), **options)  # type: ignore[arg-type]


def test_what_is_learnt_is_the_least_squares_of_relative_errors() -> None:
    """With rows r = 1 / seconds, weights w = forgetting^age and a pull λ to 1: (λ + Σ w r) / (λ + Σ w r²)."""
    cost = only_fixed(forgetting=0.5, ridge=0.25)
    for seconds in (2.0, 4.0, 5.0):
        cost.observe(plan((0, 1)), seconds)
    rows = [(0.25, 1 / 2), (0.5, 1 / 4), (1.0, 1 / 5)]
    fixed = (0.25 + sum(w * r for w, r in rows)) / (0.25 + sum(w * r * r for w, r in rows))
    assert cost.coefficients.fixed == pytest.approx(fixed)
    assert cost.observed == 3


def test_the_pull_and_the_memory_unless_told() -> None:
    cost = only_fixed()
    cost.observe(plan((0, 1)), 2.0)
    cost.observe(plan((0, 1)), 2.0)
    memory = 0.99 + 1
    assert cost.coefficients.fixed == pytest.approx((0.05 + memory / 2) / (0.05 + memory / 4))


def test_the_fit_is_made_anew_at_first_and_then_now_and_again() -> None:
    changed = []
    cost = only_fixed(every=4)
    for step in range(1, 14):
        before = cost.coefficients
        cost.observe(plan((0, 1)), 1.0 + step)
        if cost.coefficients != before:
            changed.append(step)
    assert changed == [1, 2, 3, 4, 8, 12]
    changed.clear()
    cost = only_fixed()
    for step in range(1, 26):
        before = cost.coefficients
        cost.observe(plan((0, 1)), 1.0 + step)
        if cost.coefficients != before:
            changed.append(step)
    assert changed == [*range(1, 9), 16, 24]


def test_no_coefficient_is_learnt_below_nothing() -> None:
    """A step of twice the tokens that takes half the time: the line through both would fall."""
    cost = StepCost(Coefficients(1.0, 1.0, 0.0, 0.0))
    for _ in range(50):
        cost.observe(plan((0, 1)), 4.0)
        cost.observe(plan((0, 2)), 2.0)
    assert cost.coefficients.per_token == 0.0
    assert cost.coefficients.fixed > 0.0


def test_a_step_without_a_duration_teaches_nothing() -> None:
    cost = StepCost()
    for seconds in (0.0, -1.0):
        cost.observe(plan((0, 1)), seconds)
    assert (cost.observed, cost.coefficients) == (0, cost.prior)


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


def test_the_meter_of_several_devices() -> None:
    meter = DeviceMeter(started=10.0, devices=2)
    meter.step(2.0)
    meter.step(1.0)
    assert (meter.busy, meter.idle(20.0)) == (6.0, 14.0)
    assert meter.idle(11.0) == 0.0  # a step's seconds may be known before the clock shows them
    assert DeviceMeter(started=0.0) == DeviceMeter(started=0.0, devices=1, busy=0.0)
