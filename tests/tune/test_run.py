"""From requests to a run, from runs to a trial, and what holds it back: numbers computed by hand."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.bench.client import Outcome, RequestRecord
from penstock.observe.page import Page
from penstock.tune.diagnosis import Pressure, diagnose
from penstock.tune.load import _Gauges, account
from penstock.tune.run import Engine, Run, Trial, enough, measured, noise
from penstock.tune.slo import Slo

SLO = Slo(ttft=100.0, tpot=20.0, e2el=1000.0)


def record(
    sent: float, first: float | None = None, end: float | None = None, tokens: int = 11
) -> RequestRecord:
    """Sent, first token and end, in seconds; without an end it is under way."""
    made = RequestRecord(0, sent, sent=sent, output_tokens=tokens)
    made.chunk_times = [time for time in (first, end) if time is not None]
    if end is not None:
        made.finished, made.outcome = end, Outcome.COMPLETED
    return made


def run(**given_: Any) -> Run:
    fields = {"seconds": 10.0, "completed": 10, "failed": 0, "goodput": 1.0, "throughput": 1.0, "tokens": 9.0}
    return Run(**{**fields, "share": 1.0, **given_})


def test_a_run_counts_what_ended_in_its_window() -> None:
    records = [
        record(0.0, 0.05, 0.25),  # before the window
        record(1.0, 1.05, 1.25),  # good: 50 ms, 20 ms per token, 250 ms
        record(1.0, 1.2, 1.4),  # TTFT of 200 ms
        record(2.0, 2.05, 2.35),  # 30 ms per token
        record(4.5, 4.55),  # under way, and in time so far
        record(3.5),  # under way, and has missed TTFT and the end by now
    ]
    found = measured(records, start=1.0, end=5.0, slo=SLO, engine=Engine())
    assert (found.completed, found.failed, found.sent) == (3, 0, 6)
    assert found.throughput == pytest.approx(3 / 4)
    assert found.goodput == pytest.approx(1 / 4)
    assert found.share == pytest.approx(1 / 4)  # of three, and of one that is late already
    assert found.tokens == pytest.approx(33 / 4)
    assert found.p95["e2el"] > 1000
    assert found.broken(SLO) == ["ttft", "tpot", "e2el"]


def test_failures_are_counted_by_cause_and_are_not_good() -> None:
    failed = record(1.0)
    failed.fail("HTTP 503", "full", 1.5)
    found = measured([failed, record(1.0, 1.05, 1.2)], start=0.0, end=2.0, slo=SLO, engine=Engine())
    assert (found.completed, found.failed, found.share) == (1, 1, 0.5)
    assert found.errors == {"HTTP 503": 1}


def test_a_run_without_an_answer_misses_everything() -> None:
    found = measured([], start=0.0, end=1.0, slo=SLO, engine=Engine())
    assert found.broken(SLO) == ["ttft", "tpot", "e2el"]
    assert diagnose(found, SLO).pressure is Pressure.UNKNOWN


#: (P95 in ms, engine's means in s and gauges, verdict)
CASES = [
    # within all targets, nobody waits; somebody waits
    ({"ttft": 50, "tpot": 10, "e2el": 300}, {"queue": 0.0, "prefill": 0.04, "decode": 0.2}, Pressure.NONE),
    (
        {"ttft": 90, "tpot": 10, "e2el": 300},
        {"queue": 0.05, "prefill": 0.03, "decode": 0.2, "waiting": 4},
        Pressure.QUEUE,
    ),
    # TTFT of 400: 300 in the queue, 50 of computing would do
    ({"ttft": 400, "tpot": 10}, {"queue": 0.3, "prefill": 0.02, "decode": 0.1, "waiting": 9}, Pressure.QUEUE),
    # TTFT of 400: computing alone takes 380
    ({"ttft": 400, "tpot": 10}, {"queue": 0.01, "prefill": 0.19, "decode": 0.1}, Pressure.COMPUTE),
    # both parts are over
    ({"ttft": 400, "tpot": 10}, {"queue": 0.1, "prefill": 0.1, "decode": 0.1, "waiting": 1}, Pressure.BOTH),
    # those that ended have waited little; those that have not, for ever
    (
        {"ttft": 8000, "tpot": 10},
        {"queue": 0.05, "prefill": 0.05, "decode": 0.1, "waiting": 9},
        Pressure.QUEUE,
    ),
    ({"ttft": 90, "tpot": 30}, {"queue": 0.0, "prefill": 0.05, "decode": 0.3}, Pressure.COMPUTE),
    # the queue breaks TTFT, computing breaks TPOT
    (
        {"ttft": 400, "tpot": 30},
        {"queue": 0.3, "prefill": 0.01, "decode": 0.1, "waiting": 9},
        Pressure.BOTH,
    ),
    # the whole answer: 1,500 of which 1,200 are queueing
    (
        {"ttft": 90, "e2el": 1500},
        {"queue": 0.8, "prefill": 0.05, "decode": 0.15, "waiting": 9},
        Pressure.QUEUE,
    ),
    # blocks, not places, are what is short
    (
        {"ttft": 400, "tpot": 10},
        {"queue": 0.3, "prefill": 0.02, "decode": 0.1, "waiting": 9, "cache": 0.99, "running": 7},
        Pressure.MEMORY,
    ),
    ({"ttft": 400}, {}, Pressure.UNKNOWN),
]


@pytest.mark.parametrize(("p95", "engine", "pressure"), CASES)
def test_queueing_is_told_from_computing(
    p95: dict[str, float], engine: dict[str, float], pressure: Pressure
) -> None:
    found = diagnose(run(p95=p95, engine=Engine(**engine)), SLO, places=64)
    assert found.pressure is pressure, found.why
    assert found.why


def test_the_engines_account_is_the_difference_of_two_pages() -> None:
    def page(count: int, total: float, ended: int) -> Page:
        lines = [
            line
            for name in ("queue", "prefill", "decode")
            for line in (
                f"# TYPE vllm:request_{name}_time_seconds histogram",
                f'vllm:request_{name}_time_seconds_bucket{{le="+Inf"}} {count}',
                f"vllm:request_{name}_time_seconds_count {count}",
                f"vllm:request_{name}_time_seconds_sum {total}",
            )
        ]
        return Page("\n".join([*lines, f"vllm:request_success_total {ended}", ""]))

    gauges = _Gauges()
    for running, cache in ((3, 0.5), (9, 0.2)):
        gauges.look(Page(f"vllm:num_requests_running {running}\nvllm:kv_cache_usage_perc {cache}\n"))
    found = account(page(10, 5.0, 10), page(30, 9.0, 30), gauges)
    assert found.queue == found.prefill == found.decode == pytest.approx(0.2)
    assert (found.finished, found.running, found.cache, found.waiting) == (20, 9, 0.5, None)
    # started again in between: all of the second page is new
    assert account(page(10, 5.0, 10), page(4, 1.0, 4), gauges).queue == pytest.approx(0.25)
    assert account(None, None, gauges).queue is None


def trial(*goodputs: float, value: int = 1) -> Trial:
    return Trial(value, tuple(run(goodput=each) for each in goodputs))


def test_medians_and_spread() -> None:
    assert trial(1.0, 9.0, 2.0).goodput == 2.0
    assert trial(1.0, 9.0, 2.0).spread == 4.0
    assert trial(1.0, 9.0, 2.0).typical.goodput == 2.0
    assert noise(trial(10.0), trial(10.0, 12.0)) == 1.0
    assert noise(trial(10.0), trial(100.0)) == pytest.approx(3.0)


def test_it_repeats_until_it_is_settled_and_no_longer() -> None:
    rival = trial(10.0, 10.2)
    assert not enough([], rival, 3)
    assert enough([2.0], rival, 3)  # far away: a repeat would change nothing
    assert not enough([9.9], rival, 3)
    assert not enough([2.0], None, 3)
    assert not enough([2.0], trial(10.0), 3)  # who knows how the rival varies
    assert enough([9.9, 10.0], rival, 3)
    assert not enough([8.0, 10.0], rival, 3)
    assert enough([8.0, 10.0, 9.0], rival, 3)
    assert enough([0.0, 0.0], None, 3)
    assert enough([0.0], rival, 3)


@given(st.lists(st.floats(0, 1e6), max_size=10), st.integers(1, 8))
def test_there_are_never_more_runs_than_asked_for(goodputs: list[float], most: int) -> None:
    count = next((n for n in range(len(goodputs) + 1) if enough(goodputs[:n], None, most)), None)
    assert count is None or count <= most
