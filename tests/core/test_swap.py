"""Preempted requests whose keys and values wait in the host's memory. The world (world.py) checks at every
step that what an item reads is really there, copies included; any history is in test_scheduler.py."""

from __future__ import annotations

from dataclasses import replace

import pytest

from penstock.core.cost import Coefficients, StepCost
from penstock.core.plan import Plan
from penstock.core.request_spec import Pooling
from penstock.core.sampling_params import Sampling
from tests.core.world import World, config, request

COPIES_ARE_CHEAP = Coefficients(fixed=1.0, per_token=1.0, per_context=0.0, per_sample=0.0, per_copy=0.5)


class Known(StepCost):
    """It has learnt all it will."""

    def observe(self, plan: Plan, seconds: float) -> None:
        pass


def squeezed(
    host_blocks: int, prior: Coefficients = COPIES_ARE_CHEAP, depth: int = 1, **fields: object
) -> World:
    """Two requests that grow until there is no room for both."""
    # no prefix is found again: what is resumed is computed again, or copied
    settings = config(watermark=0.0, enable_prefix_caching=False, max_num_batched_tokens=24)
    world = World(settings, num_blocks=7, depth=depth, host_blocks=host_blocks, cost=Known(prior))
    for name in ("a", "b"):
        world.add(request(name, [ord(name)] * 10, max_tokens=9, **fields))
    return world


def tokens(world: World) -> dict[str, tuple[int, ...]]:
    made: dict[str, tuple[int, ...]] = {}
    for event in world.events:
        made[event.request] = made.get(event.request, ()) + event.tokens
    return made


def plans(world: World) -> list[Plan]:
    return [Plan.from_json(line, world.specs) for line in world.log]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_victim_goes_on_where_it_was(depth: int) -> None:
    plain, swapped = squeezed(0, depth=depth), squeezed(16, depth=depth)
    for world in (plain, swapped):
        world.run()
    assert tokens(swapped) == tokens(plain)
    assert plain.scheduler.totals.preemptions == swapped.scheduler.totals.preemptions == 1
    assert plain.scheduler.totals.recomputed_tokens > 10
    assert swapped.scheduler.totals.recomputed_tokens == 0
    stored, loaded = swapped.scheduler.totals.stored_blocks, swapped.scheduler.totals.loaded_blocks
    assert stored == loaded >= 3
    out = next(plan for plan in plans(swapped) if plan.swap_out)
    back = next(plan for plan in plans(swapped) if plan.swap_in)
    assert {target for _, target in out.swap_out} == {source for source, _ in back.swap_in}
    (item,) = (each for each in back.items if each.request == "b")
    assert item.tokens == 1  # nothing but the next token


def test_where_copies_take_longer_it_computes_again() -> None:
    """Two copies of each block of four tokens, against the tokens."""
    for per_copy, stored in ((1.9, True), (2.1, False)):
        world = squeezed(16, replace(COPIES_ARE_CHEAP, per_copy=per_copy))
        world.run()
        assert bool(world.scheduler.totals.stored_blocks) is stored


def test_a_host_that_is_full_keeps_nobody_in_part() -> None:
    world = squeezed(2)
    world.run()
    assert (world.scheduler.totals.stored_blocks, world.scheduler.totals.preemptions) == (0, 1)


def until_swapped(world: World) -> None:
    for _ in range(40):
        world.step()
        if world.scheduler.swaps.usage:
            return
    raise AssertionError("nobody was copied")


def test_who_leaves_gives_the_hosts_blocks_back() -> None:
    world = squeezed(16)
    until_swapped(world)
    world.abort("b")
    assert world.scheduler.swaps.usage == 0
    world.run()
    assert world.scheduler.totals.loaded_blocks == 0


def test_a_reset_forgets_what_the_host_has() -> None:
    world = squeezed(16)
    until_swapped(world)
    world.scheduler.reset()
    assert world.scheduler.swaps.usage == 0
    world.scheduler.check()


@pytest.mark.parametrize("depth", [2, 3])
def test_what_was_copied_of_a_step_that_failed_is_not_used(depth: int) -> None:
    """b shares a's first blocks; the step that fills them fails when b is on the host already."""
    for length in range(4, 12):
        settings = config(watermark=0.0, max_num_batched_tokens=24)
        cost = Known(COPIES_ARE_CHEAP)
        world = World(settings, num_blocks=6, depth=depth, host_blocks=16, cost=cost)
        world.add(request("a", [1] * length, max_tokens=8))
        world.add(request("b", [1] * (length + 1), max_tokens=8))
        for _ in range(12):
            world.step(frozenset({"a"}))
        world.run()
        assert all(-7 not in event.tokens for event in world.events)
        assert len(tokens(world)["b"]) == 8


@pytest.mark.parametrize(
    ("fields", "stored"),
    [
        ({}, True),
        ({"pooling": Pooling(), "sampling": None}, False),
        ({"sampling": Sampling(prompt_logprobs=0)}, False),
    ],
)
def test_what_a_preemption_forgets_is_computed_again(fields: dict[str, object], stored: bool) -> None:
    """Vectors, and logprobs of a prompt, hang on every position: these are not resumed in the middle."""
    settings = config(watermark=0.0, enable_prefix_caching=False, long_prefill_token_threshold=2)
    world = World(settings, num_blocks=6, host_blocks=16, cost=Known(COPIES_ARE_CHEAP))
    world.add(request("b", [6] * 4, max_tokens=20))
    world.add(request("a", [5] * 16, **fields))
    world.run()
    assert world.scheduler.totals.preemptions > 0
    assert bool(world.scheduler.totals.stored_blocks) is stored


def test_copies_are_predicted_and_teach_nothing() -> None:
    cost = StepCost(COPIES_ARE_CHEAP)
    plan = Plan(0, items=squeezed(0).plan().items)
    copying = replace(plan, swap_out=((1, 0), (2, 1)), swap_in=((5, 3),))
    assert cost.predict(copying) == pytest.approx(cost.predict(plan) + 3 * 0.5)
    cost.observe(copying, 100.0)
    assert cost.observed == 0
    assert sum(cost.attribute(copying, 7.0)) == pytest.approx(7.0)
    cost.observe(plan, 100.0)
    assert cost.coefficients.per_copy == 0.5


def test_copies_survive_json_and_old_logs_have_none() -> None:
    plan = Plan(3, swap_out=((1, 0),), swap_in=((0, 4), (1, 2)))
    assert Plan.from_json(plan.to_json(), {}) == plan
    assert "swap" not in Plan(3).to_json()
