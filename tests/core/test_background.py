"""Work that nobody waits for: it changes nothing for those who do, stays within the time, and goes on."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.background import Leftover
from penstock.core.cost import Coefficients, StepCost
from penstock.core.plan import Plan, PlanItem
from penstock.core.policy import ITL_SHARE, TTFT_SHARE, Slo
from penstock.core.request_spec import RequestSpec, ServiceClass

from .world import World, config, request

COSTS = Coefficients(fixed=0.01, per_token=0.001, per_context=1e-5, per_sample=0.0005)

arrivals = st.lists(
    st.tuples(
        st.integers(0, 12),  # in which step it comes
        st.booleans(),  # whether nobody waits for it
        st.integers(1, 30),  # tokens of its prompt
        st.integers(1, 10),  # tokens to generate
    ),
    min_size=1,
    max_size=14,
)
limits = st.fixed_dictionaries(
    {
        "max_num_seqs": st.integers(1, 4),
        "max_num_batched_tokens": st.integers(1, 24),
        "max_num_mixed_prefill_tokens": st.sampled_from([0, 4]),
        "long_prefill_token_threshold": st.sampled_from([0, 5]),
        "policy": st.sampled_from(["fcfs", "priority"]),
        "slo_itl": st.sampled_from([None, 0.02, 0.05]),
        "slo_ttft": st.sampled_from([None, 0.1, 1.0]),
    }
)


def made(number: int, background: bool, prompt: int, most: int) -> RequestSpec:
    tokens = [(number * 37 + i) % 91 for i in range(prompt)]
    kind = ServiceClass.BACKGROUND if background else ServiceClass.REALTIME
    return request(f"{'b' if background else 'r'}{number}", tokens, most, service_class=kind)


def plans(steps: Any, fields: dict[str, Any], *, only_realtime: bool) -> tuple[World, list[Plan]]:
    """What is planned, step by step, until nothing is left."""
    world = World(config(**{"enable_prefix_caching": False, **fields}), num_blocks=12)
    world.scheduler.cost.coefficients = COSTS
    world.scheduler.cost._every = 1 << 30  # nothing is learnt: predictions stay what they are
    found = []
    for step in range(600):
        for number, (at, *rest) in enumerate(steps):
            if at == step and not (only_realtime and rest[0]):
                world.add(made(number, *rest))
        world.scheduler.cost.coefficients = COSTS
        found.append(world.step())
        if step > 12 and not world.scheduler.has_work:
            break
    return world, found


def of_realtime(plan: Plan) -> list[PlanItem]:
    return [item for item in plan.items if item.request.startswith("r")]


@given(arrivals, limits)
@settings(max_examples=60, deadline=None)
def test_those_who_are_waited_for_do_not_notice_it(steps: Any, fields: dict[str, Any]) -> None:
    """Token for token, in every step, what is planned for them is what would be planned without it."""
    world, mixed = plans(steps, fields, only_realtime=False)
    _, alone = plans(steps, fields, only_realtime=True)
    told = [[(item.request, item.start, item.tokens, item.samples) for item in of_realtime(p)] for p in mixed]
    wanted = [
        [(item.request, item.start, item.tokens, item.samples) for item in of_realtime(p)] for p in alone
    ]
    width = max(len(told), len(wanted))
    assert told + [[]] * (width - len(told)) == wanted + [[]] * (width - len(wanted))
    assert not world.scheduler.has_work  # and background has ended, too
    assert {event.request for event in world.events if event.finish} == {
        made(number, *rest).id for number, (_, *rest) in enumerate(steps)
    }


@given(arrivals, limits)
@settings(max_examples=40, deadline=None)
def test_a_step_stays_within_its_time(steps: Any, fields: dict[str, Any]) -> None:
    cost = StepCost(COSTS)
    slo = Slo(fields["slo_ttft"], fields["slo_itl"])
    for plan in plans(steps, fields, only_realtime=False)[1]:
        realtime = of_realtime(plan)
        if len(realtime) == len(plan.items):
            continue
        alone = cost.predict(Plan(0, items=tuple(realtime)))
        decodes = any(item.samples and item.tokens == 1 for item in realtime)
        left = slo.left(alone, decodes=decodes) + (0 if realtime else COSTS.fixed)
        background = len(plan.items) - len(realtime)
        only = not realtime and background == 1  # which goes on whatever it takes
        assert only or cost.predict(plan) <= alone + left + 1e-9


def test_it_yields_within_a_step_to_whoever_comes() -> None:
    world = World(config(max_num_seqs=2, max_num_batched_tokens=64), num_blocks=8)
    for number in range(2):
        world.add(made(number, True, 12, 20))
    world.step()
    assert len(world.scheduler.running) == 2
    world.add(made(7, False, 14, 4))
    plan = world.step()
    assert plan.items[0].request == "r7"
    assert "r7" in {each.id for each in world.scheduler.running}
    assert world.scheduler.totals.preemptions >= 1
    world.run()
    assert {event.request for event in world.events if event.finish} == {"b0", "b1", "r7"}


def test_who_waits_and_does_not_fit_lets_no_background_in_before_him() -> None:
    world = World(config(max_num_seqs=4, max_num_batched_tokens=64), num_blocks=8)
    world.add(made(0, False, 20, 12))
    world.step()
    world.add(made(1, False, 20, 4))  # there are no blocks for it
    world.add(made(2, True, 2, 2))
    plan = world.step()
    assert [item.request for item in plan.items] == ["r0"]
    world.run()


@pytest.mark.parametrize(("ttft", "itl"), [(None, None), (1.0, None), (None, 0.1), (1.0, 0.1)])
def test_what_is_left_of_a_step(ttft: float | None, itl: float | None) -> None:
    slo = Slo(ttft, itl)
    inf = float("inf")
    assert slo.left(0.5, decodes=False) == (inf if ttft is None else TTFT_SHARE)
    wanted = min(inf if ttft is None else TTFT_SHARE, inf if itl is None else ITL_SHARE * 0.1 - 0.02)
    assert slo.left(0.02, decodes=True) == pytest.approx(wanted)
    assert slo.left(0.2, decodes=True) == (0 if itl is not None else wanted)


@given(st.integers(0, 50), st.integers(0, 400), st.floats(0, 2), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_chunks_are_as_long_as_they_may_be(
    position: int, most: int, ttft: float, alone: bool, whole: bool
) -> None:
    items = () if alone else (PlanItem("r", 0, 0, 3, (), 1),)

    def cost(count: int) -> float:
        return StepCost(COSTS).predict(Plan(0, items=(*items, PlanItem("b", 0, position, count, (), 1))))

    base = cost(0) - COSTS.per_sample  # what the step costs without it
    count = Leftover(Slo(ttft), COSTS, items).chunk(position, most, whole=whole)
    assert 0 <= count <= most
    limit = base + TTFT_SHARE * ttft
    forced = alone and count in ({most} if whole else {1})
    assert not count or forced or cost(count) <= limit + 1e-9
    if count < most and not whole:
        assert cost(count + 1) > limit - 1e-9
    if whole:
        assert count in (0, most)
    assert not alone or not most or count  # it goes on, whatever the bound
