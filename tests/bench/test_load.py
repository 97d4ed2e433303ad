import asyncio
import itertools
import math
import random
import statistics
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.bench.errors import BenchError
from penstock.bench.load import Stop, arrival_times, closed_loop, open_loop, stop_after


class VirtualTime:
    """A clock that only its own sleeps move."""

    def __init__(self) -> None:
        self.now = 100.0

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        # First a few turns of the loop, so that what is due at this moment happens at this moment.
        for _ in range(3):
            await asyncio.sleep(0)
        self.now += seconds


@given(
    count=st.integers(1, 200),
    rate=st.floats(0.01, 1000),
    burstiness=st.one_of(st.floats(0.01, 100), st.just(math.inf)),
    seed=st.integers(0, 2**32),
)
def test_arrivals_are_ordered_repeatable_and_offer_the_rate(
    count: int, rate: float, burstiness: float, seed: int
) -> None:
    times = arrival_times(count, rate, burstiness=burstiness, seed=seed)
    assert len(times) == count
    assert times == sorted(times)
    assert times[0] >= 0
    assert times[-1] == pytest.approx(count / rate)
    assert times == arrival_times(count, rate, burstiness=burstiness, seed=seed)


def test_burstiness_is_the_shape_of_the_gaps() -> None:
    def variation(burstiness: float) -> float:
        times = arrival_times(20_000, 10, burstiness=burstiness, seed=1)
        gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
        return statistics.pstdev(gaps) / statistics.fmean(gaps)

    # The coefficient of variation of a gamma distribution is 1/√shape.
    assert variation(1.0) == pytest.approx(1.0, rel=0.05)
    assert variation(0.25) == pytest.approx(2.0, rel=0.05)
    assert variation(4.0) == pytest.approx(0.5, rel=0.05)
    assert variation(math.inf) == pytest.approx(0.0, abs=1e-6)


def test_an_infinite_rate_makes_everything_due_at_once() -> None:
    assert arrival_times(3, math.inf) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("count", "rate", "burstiness", "flag"),
    [
        (0, 1.0, 1.0, "--num-prompts is 0"),
        (1, 0.0, 1.0, "--request-rate is 0.0"),
        (1, math.nan, 1.0, "--request-rate is nan"),
        (1, 1.0, -1.0, "--burstiness is -1.0"),
    ],
)
def test_a_bad_schedule_is_refused(count: int, rate: float, burstiness: float, flag: str) -> None:
    with pytest.raises(BenchError, match=flag):
        arrival_times(count, rate, burstiness=burstiness)


def test_the_open_loop_sends_on_time_though_nothing_finishes() -> None:
    time = VirtualTime()
    arrivals = [0.5, 1.0, 1.0, 4.0]
    sent: list[tuple[int, float, float]] = []

    async def main() -> None:
        all_sent = asyncio.Event()

        async def send(index: int, intended: float) -> None:
            sent.append((index, intended, time.now))
            if len(sent) == len(arrivals):
                all_sent.set()
            await all_sent.wait()

        await open_loop(arrivals, send, start=100.0, clock=time.clock, sleep=time.sleep)

    asyncio.run(main())
    assert sent == [(0, 100.5, 100.5), (1, 101.0, 101.0), (2, 101.0, 101.0), (3, 104.0, 104.0)]


def test_a_bounded_open_loop_keeps_the_intended_time_of_those_that_wait() -> None:
    time = VirtualTime()
    sent: list[tuple[float, float]] = []

    async def send(index: int, intended: float) -> None:
        sent.append((intended, time.now))
        await time.sleep(10.0)

    work = open_loop([1.0, 2.0], send, start=100.0, clock=time.clock, sleep=time.sleep, max_concurrency=1)
    asyncio.run(work)
    assert [intended for intended, _ in sent] == [101.0, 102.0]
    assert sent[1][1] >= 111.0


@given(count=st.integers(1, 30), concurrency=st.integers(1, 40), seed=st.randoms())
def test_the_closed_loop_keeps_its_places_full(count: int, concurrency: int, seed: random.Random) -> None:
    in_flight: set[int] = set()
    peaks: list[int] = []
    sent: list[int] = []

    async def main() -> None:
        async def send(index: int, intended: float) -> None:
            sent.append(index)
            in_flight.add(index)
            peaks.append(len(in_flight))
            for _ in range(seed.randint(1, 4)):
                await asyncio.sleep(0)
            in_flight.remove(index)

        await closed_loop(count, concurrency, send, clock=lambda: 0.0)

    asyncio.run(main())
    assert sent == list(range(count))
    assert max(peaks) == min(count, concurrency)


def _run_bounded(work: Callable[[Stop], Awaitable[None]], max_duration: float | None = None) -> str | None:
    async def main() -> str | None:
        stop = Stop()

        async def body() -> None:
            await work(stop)

        async with stop_after(stop, max_duration):
            await stop.bound(body())
        return stop.reason

    return asyncio.run(main())


def test_a_stop_cancels_what_is_in_flight_and_its_first_reason_stays() -> None:
    cancelled: list[int] = []

    async def work(stop: Stop) -> None:
        async def send(index: int, intended: float) -> None:
            if index == 1:
                stop.set("interrupt")
                stop.set("max-duration")
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.append(index)
                raise

        await closed_loop(10, 2, send, clock=lambda: 0.0)

    assert _run_bounded(work) == "interrupt"
    assert sorted(cancelled) == [0, 1]


def test_a_run_ends_at_its_longest_duration() -> None:
    async def work(stop: Stop) -> None:
        await asyncio.Event().wait()

    assert _run_bounded(work, max_duration=0.001) == "max-duration"


def test_a_run_that_ends_by_itself_has_no_reason() -> None:
    async def work(stop: Stop) -> None:
        await asyncio.sleep(0)

    assert _run_bounded(work, max_duration=1000.0) is None


def test_an_error_in_the_load_itself_is_not_swallowed() -> None:
    async def work(stop: Stop) -> None:
        raise LookupError("a bug")

    with pytest.raises(LookupError):
        _run_bounded(work)
