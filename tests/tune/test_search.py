"""The search finds what is best, in few trials, whatever the curve and its noise; no setting is invalid."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from penstock.tune.diagnosis import Pressure
from penstock.tune.loop import FEW
from penstock.tune.search import MOST, Bisection, Stepwise, ladder


class Server:
    """Requests per second within the targets, by setting: an engine that takes base + slope·n for a token.

    The rate rises with n and saturates; of the requests, the share that waits too long falls with n, and none
    is good once a token takes longer than its target.
    """

    def __init__(self, *, slope: float, bound: float, demand: int, soft: float) -> None:
        self.slope, self.bound, self.demand, self.soft = slope, bound, demand, soft

    def good(self, n: int) -> float:
        """The share within the targets."""
        over = (1.0 + self.slope * min(n, self.demand)) / self.bound
        return 1.0 / (1.0 + math.exp(min(60.0, (over - 1.0) * self.soft)))

    def goodput(self, n: int) -> float:
        """Requests per second."""
        at_work, good = min(n, self.demand), self.good(n)
        token = 1.0 + self.slope * at_work
        return at_work / token * good if good >= FEW else 0.0

    def pressure(self, n: int) -> Pressure:
        """As a diagnosis has it: by the 95th percentile."""
        if self.good(n) < 0.95:
            return Pressure.COMPUTE
        return Pressure.QUEUE if n < self.demand else Pressure.NONE


SERVERS = st.builds(
    Server,
    slope=st.floats(0.001, 2.0),
    bound=st.floats(1.5, 40.0),
    demand=st.integers(1, 600),
    soft=st.floats(20.0, 400.0),
)


def search(server: Server, start: int, high: int, tells: bool, noise: list[float], most: int) -> Bisection:
    made = Bisection(start, low=1, high=high, most=most)
    tried: list[int] = []
    while (value := made.propose()) is not None:
        assert 1 <= value <= max(high, 1)
        assert value not in tried
        assert made.propose() == value  # asking again changes nothing
        tried.append(value)
        assert len(tried) <= most
        factor = noise[(len(tried) - 1) % len(noise)]
        pressure = server.pressure(value) if tells else Pressure.UNKNOWN
        same = server.demand if server.demand < value else None
        made.record(value, server.goodput(value) * factor, pressure, same_from=same if tells else None)
    assert made.ended
    return made


def best_of(server: Server, start: int, high: int) -> float:
    return max(server.goodput(n) for n in ladder(1, high, (min(start, high),)))


@given(server=SERVERS, start=st.integers(1, 600), high=st.integers(1, 1024), tells=st.booleans())
def test_without_noise_it_finds_the_best_of_the_ladder(
    server: Server, start: int, high: int, tells: bool
) -> None:
    made = search(server, start, high, tells, [1.0], most=10_000)
    assert made.best is not None
    # what a step of the ladder is worth at most, where a pressure stops one step short
    assert server.goodput(made.best) >= 0.75 * best_of(server, start, high)
    if not tells:
        assert server.goodput(made.best) == pytest.approx(best_of(server, start, high), rel=1e-9, abs=1e-9)


@given(server=SERVERS, start=st.integers(1, 600), high=st.integers(1, 1024))
def test_ten_restarts_are_enough(server: Server, start: int, high: int) -> None:
    made = search(server, start, high, True, [1.0], most=MOST)
    assert made.best is not None
    assert server.goodput(made.best) >= 0.75 * best_of(server, start, high)


@example(server=Server(slope=2.0, bound=2.0, demand=1, soft=20.0), start=1, high=20, tells=False, noise=[1.0])
@given(
    server=SERVERS,
    start=st.integers(1, 600),
    high=st.integers(1, 1024),
    tells=st.booleans(),
    noise=st.lists(st.floats(0.9, 1.1), min_size=1, max_size=20),
)
def test_noise_costs_no_more_than_some_of_itself(
    server: Server, start: int, high: int, tells: bool, noise: list[float]
) -> None:
    made = search(server, start, high, tells, noise, most=10_000)
    assert made.best is not None
    tried = set(made._seen)
    # among what it has tried, noise of a tenth misleads by no more than two of it
    assert server.goodput(made.best) >= 0.8 * max(map(server.goodput, tried))
    if server.goodput(min(start, high)) > 0:
        assert len(tried) <= 3 + 2 * math.ceil(math.log2(len(ladder(1, high, (min(start, high),))) + 1))


@given(start=st.integers(1, 4096), high=st.integers(1, 4096), pressure=st.sampled_from(Pressure))
@example(start=64, high=20, pressure=Pressure.COMPUTE)
def test_when_nothing_is_good_it_ends(start: int, high: int, pressure: Pressure) -> None:
    made = Bisection(start, low=1, high=high)
    tried = []
    while (value := made.propose()) is not None:
        assert 1 <= value <= high
        tried.append(value)
        made.record(value, 0.0, pressure)
    assert 1 <= len(set(tried)) == len(tried) <= MOST
    if pressure is Pressure.COMPUTE and len(tried) < MOST:
        assert tried[-1] == 1  # it has gone all the way down
    if pressure is Pressure.QUEUE and len(tried) < MOST:
        assert max(tried) == high


@given(
    low=st.integers(1, 5000), span=st.integers(0, 5000), also=st.lists(st.integers(-10, 20_000), max_size=5)
)
def test_a_ladder_rises_from_low_to_high(low: int, span: int, also: list[int]) -> None:
    steps = ladder(low, low + span, also)
    assert steps == sorted(set(steps))
    assert (steps[0], steps[-1]) == (low, low + span)
    assert all(below * 1.25 + 1 >= above for below, above in pairwise(steps))
    assert {each for each in also if low <= each <= low + span} <= set(steps)


def test_a_ladder_without_a_step_is_refused() -> None:
    with pytest.raises(ValueError, match="between 5 and 4"):
        ladder(5, 4)


def test_memory_and_idleness_end_it_at_once() -> None:
    for pressure in (Pressure.NONE, Pressure.MEMORY):
        made = Bisection(64, low=1, high=256)
        assert made.propose() == 64
        made.record(64, 5.0, pressure)
        assert made.propose() is None
        assert made.ended == "no other setting can be better"


def test_settings_that_make_the_same_engine_are_not_tried() -> None:
    made = Bisection(64, low=1, high=256)
    made.record(64, 1.0, Pressure.BOTH, same_from=20)
    assert made.propose() is not None
    tried = []
    while (value := made.propose()) is not None:
        tried.append(value)
        made.record(value, 0.5, Pressure.BOTH)
    assert tried
    assert max(tried) <= 20


def test_the_guides_loop_goes_down_by_steps() -> None:
    made = Stepwise(256, step=32)
    tried = []
    while (value := made.propose()) is not None:
        tried.append(value)
        made.record(value, 0.0, Pressure.COMPUTE, met=value <= 160)
    assert tried == [256, 224, 192, 160]
    assert made.best == 160
    assert made.ended == "the targets are met"


def test_the_guides_loop_ends_before_nothing_is_left() -> None:
    made = Stepwise(64, step=32)
    tried = []
    while (value := made.propose()) is not None:
        tried.append(value)
        made.record(value, 0.0, Pressure.COMPUTE)
    assert tried == [64, 32]
    assert made.best is None
    assert "32 fewer than 32 is none" in made.ended
