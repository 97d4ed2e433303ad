"""A replica under load, and dollars."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.fleet import catalogue
from penstock.fleet.facts import SCHEMES
from penstock.fleet.load import BUSY, Replica, Targets
from penstock.fleet.prices import Cloud, break_even, costs
from penstock.fleet.roofline import Machine, fitted

DOLLAR = 10**9


def replica(most: int = 64, prompt: int = 1000, output: int = 200, gpu: str = "A100-80GB") -> Replica:
    facts = catalogue.find_model("llama-3.1-8b")
    machine = Machine(facts, catalogue.find_device(gpu), 1, SCHEMES["none"], 2, 2, fitted().efficiency)
    return Replica(machine, most, prompt, output)


def test_littles_law_holds() -> None:
    """Requests under way are the rate times how long each decodes."""
    one = replica()
    point = one.at(2.0)
    assert point is not None
    assert point.sequences == pytest.approx(2.0 * 200 * point.tpot, rel=1e-3)
    assert point.tokens_per_second == 400


def test_nothing_goes_below_the_floor_or_above_the_capacity() -> None:
    one = replica()
    light = one.at(0.001)
    assert light is not None
    assert light.ttft_p50 >= one.floor("ttft_p99")
    assert light.tpot == pytest.approx(one.floor("itl_p99"), rel=0.01)
    assert one.at(one.capacity) is None
    assert one.at(one.capacity * 0.99) is not None


@settings(deadline=None, max_examples=30)
@given(st.floats(0.05, 0.9), st.floats(1.01, 1.1))
def test_more_load_makes_everything_slower(share: float, factor: float) -> None:
    one = replica()
    a, b = one.at(share * one.capacity), one.at(share * factor * one.capacity)
    assert a is not None
    assert b is not None
    assert b.tpot >= a.tpot
    assert b.ttft_p99 >= a.ttft_p99 - 1e-9
    assert b.e2e_p95 >= a.e2e_p95 - 1e-9
    assert a.ttft_p50 <= a.ttft_p95 <= a.ttft_p99


def test_what_is_usable_keeps_the_targets_and_a_little_more_does_not() -> None:
    one = replica()
    targets = Targets(ttft_p99=0.5, itl_p95=0.03)
    usable = one.usable(targets)
    assert 0 < usable < BUSY * one.capacity
    assert one.holds(usable * 0.999, targets)
    assert not one.holds(usable * 1.01, targets)


def test_without_targets_the_capacity_is_used_to_85_percent() -> None:
    one = replica()
    assert one.usable(Targets()) == pytest.approx(BUSY * one.capacity)


def test_targets_below_the_floor_are_kept_at_no_rate() -> None:
    assert replica().usable(Targets(ttft_p99=0.001)) < 1e-3


def test_a_small_cache_holds_back() -> None:
    assert replica(most=4).capacity < 0.5 * replica(most=64).capacity


def test_costs_by_hand() -> None:
    """$3.60 an hour and one request a second: $0.001 a request, of 1,200 tokens."""
    bill = costs(per_hour=3_600_000_000, rate=1.0, usable=4.0, prompt=1000, output=200)
    assert bill.per_thousand_requests == DOLLAR
    assert bill.full_per_thousand_requests == DOLLAR // 4
    assert bill.per_million_tokens == 833_333_333
    assert bill.per_million_output == 5 * DOLLAR
    assert bill.per_month == 7305 * 360_000_000


def test_break_even_by_hand() -> None:
    """A cloud that takes $1 for a million tokens in and $5 out takes $0.002 for 1,000 and 200. $3.60 an
    hour is that at half a request a second; of a capacity of four, an eighth."""
    cloud = Cloud(input=DOLLAR, output=5 * DOLLAR)
    even = break_even(cloud, per_hour=3_600_000_000, rate=1.0, usable=4.0, prompt=1000, output=200)
    assert even.cloud_per_thousand == 2 * DOLLAR
    assert even.rate == pytest.approx(0.5)
    assert even.utilisation == pytest.approx(0.125)
    assert even.saving == pytest.approx(0.5)


def test_idle_devices_cost_more_than_the_cloud() -> None:
    """S86 and S108: a negative saving at a low rate."""
    cloud = Cloud(input=DOLLAR, output=5 * DOLLAR)
    even = break_even(cloud, per_hour=3_600_000_000, rate=10 / 86_400, usable=4.0, prompt=1000, output=200)
    assert even.saving < -1000
    free = break_even(Cloud(0, 0), per_hour=1, rate=1.0, usable=1.0, prompt=1, output=1)
    assert free.utilisation == float("inf")


@given(st.integers(1, 10**12), st.floats(0.001, 1000), st.integers(1, 10**5), st.integers(1, 10**5))
def test_at_break_even_both_cost_the_same(per_hour: int, usable: float, prompt: int, output: int) -> None:
    cloud = Cloud(input=DOLLAR, output=4 * DOLLAR)
    even = break_even(cloud, per_hour=per_hour, rate=1.0, usable=usable, prompt=prompt, output=output)
    there = break_even(cloud, per_hour=per_hour, rate=even.rate, usable=usable, prompt=prompt, output=output)
    assert there.saving == pytest.approx(0.0, abs=1e-6)
