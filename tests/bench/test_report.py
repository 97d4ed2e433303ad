import io
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from penstock.bench.client import Outcome, RequestRecord
from penstock.bench.errors import BenchError
from penstock.bench.report import (
    build_report,
    describe_machine,
    meets,
    parse_goodput,
    peak_concurrency,
    percentile,
    print_report,
)

finite = st.floats(-1e6, 1e6)


@given(values=st.lists(finite, min_size=1), rank=st.floats(0, 100))
def test_a_percentile_lies_among_its_neighbours(values: list[float], rank: float) -> None:
    ordered = sorted(values)
    position = rank / 100 * (len(ordered) - 1)
    found = percentile(values, rank)
    slack = 1e-9 * max(1.0, abs(ordered[0]), abs(ordered[-1]))
    assert ordered[math.floor(position)] - slack <= found <= ordered[math.ceil(position)] + slack


@given(values=st.lists(finite, min_size=1), low=st.floats(0, 100), high=st.floats(0, 100))
def test_percentiles_rise_with_the_rank(values: list[float], low: float, high: float) -> None:
    low, high = sorted((low, high))
    assert percentile(values, low) <= percentile(values, high) + 1e-6


@pytest.mark.parametrize(
    ("rank", "expected"), [(0, 1.0), (25, 1.75), (50, 2.5), (90, 3.7), (99, 3.97), (100, 4.0)]
)
def test_percentiles_are_those_of_numpy(rank: float, expected: float) -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], rank) == pytest.approx(expected)


@pytest.mark.parametrize(("values", "rank"), [([], 50), ([1.0], 101), ([1.0], math.nan)])
def test_percentiles_of_nothing_are_refused(values: list[float], rank: float) -> None:
    with pytest.raises(ValueError, match="need a rank"):
        percentile(values, rank)


def done(
    index: int, intended: float, sent: float, *chunks: float, tokens: int | None = None
) -> RequestRecord:
    return RequestRecord(
        index,
        intended,
        sent,
        list(chunks),
        chunks[-1],
        Outcome.COMPLETED,
        prompt_tokens=10,
        output_tokens=len(chunks) if tokens is None else tokens,
        tokens_from_usage=True,
    )


def failed(index: int, sent: float, finished: float, cause: str = "HTTP 503") -> RequestRecord:
    record = RequestRecord(index, sent, sent)
    record.fail(cause, f"message {index}", finished)
    return record


def report_of(*records: RequestRecord, **options: Any) -> dict[str, Any]:
    options = {"start": 100.0, "end": 110.0, "num_prompts": len(records), **options}
    return build_report(records, **options)


def test_the_arithmetic_of_one_request() -> None:
    # due at 100, sent at 101, tokens at 103, 104 and 107; the last chunk carries two
    report = report_of(done(0, 100.0, 101.0, 103.0, 104.0, 107.0, tokens=4))
    assert report["mean_ttft_ms"] == pytest.approx(2000)
    assert report["mean_e2el_ms"] == pytest.approx(6000)
    assert report["mean_tpot_ms"] == pytest.approx((6000 - 2000) / 3)
    assert report["requests"][0]["itl"] == [1.0, 3.0]
    assert report["mean_itl_ms"] == pytest.approx(2000)
    assert report["median_itl_ms"] == report["p50_itl_ms"] == pytest.approx(2000)
    assert report["p99_itl_ms"] == pytest.approx(2980)
    assert report["std_itl_ms"] == pytest.approx(1000)
    assert report["mean_ttft_including_client_queue_ms"] == pytest.approx(3000)
    assert report["mean_e2el_including_client_queue_ms"] == pytest.approx(7000)
    assert report["mean_client_queue_time_ms"] == report["max_send_lag_ms"] == pytest.approx(1000)
    assert report["requests"][0]["intended_time"] == 0.0
    assert report["requests"][0]["start_time"] == 1.0


def test_throughput_counts_completed_requests_only() -> None:
    unfinished = RequestRecord(2, 100.0, 100.0)
    report = report_of(
        done(0, 100.0, 100.0, 101.0, 102.0),
        failed(1, 100.0, 101.0),
        unfinished,
        num_prompts=7,
    )
    assert [report[key] for key in ("completed", "failed", "unfinished", "not_sent")] == [1, 1, 1, 4]
    assert report["request_throughput"] == pytest.approx(0.1)
    assert report["input_throughput"] == pytest.approx(1.0)
    assert report["output_throughput"] == pytest.approx(0.2)
    assert report["total_token_throughput"] == pytest.approx(1.2)
    assert (report["total_input_tokens"], report["total_output_tokens"]) == (10, 2)
    assert report["max_concurrent_requests"] == 3


def test_a_request_of_one_token_has_no_time_per_output_token() -> None:
    report = report_of(done(0, 100.0, 100.0, 101.0))
    assert report["mean_tpot_ms"] is None
    assert report["p99_itl_ms"] is None
    assert report["mean_ttft_ms"] == pytest.approx(1000)


def test_a_run_without_answers_is_a_report_without_numbers() -> None:
    report = report_of(failed(0, 100.0, 101.0))
    assert report["request_throughput"] == 0
    assert report["p99_ttft_ms"] is None
    assert report["tokens_counted_from"] is None
    json.dumps(report, allow_nan=False)


def test_where_tokens_were_counted_and_what_the_server_reported() -> None:
    first, second = done(0, 100.0, 100.0, 101.0), done(1, 100.0, 100.0, 101.0)
    assert report_of(first, second)["tokens_counted_from"] == "usage"
    assert report_of(first)["total_cached_tokens"] is None
    assert report_of(first)["total_device_seconds"] is None
    second.tokens_from_usage, second.cached_tokens, second.device_seconds = False, 8, 0.5
    second.prompt_tokens = None
    report = report_of(first, second)
    assert report["tokens_counted_from"] == "usage and chunks"
    assert (report["total_cached_tokens"], report["total_device_seconds"]) == (8, 0.5)
    assert report["requests_without_input_tokens"] == 1
    assert report_of(second)["tokens_counted_from"] == "chunks"


def test_errors_are_grouped_by_cause() -> None:
    report = report_of(failed(0, 100.0, 101.0, "timeout"), failed(1, 100.0, 101.0), failed(2, 100.0, 101.0))
    assert report["errors"] == [
        {"cause": "HTTP 503", "count": 2, "example": "message 1"},
        {"cause": "timeout", "count": 1, "example": "message 0"},
    ]


def test_goodput_counts_from_the_intended_time_and_over_failures() -> None:
    good = done(0, 100.0, 100.0, 100.4, 100.5)
    late = done(1, 100.0, 100.3, 100.7, 100.8)  # fast once sent, but sent late
    slow = done(2, 100.0, 100.0, 100.1, 103.0)
    bounds = parse_goodput(["ttft:500", "tpot:200"])
    assert [meets(record, bounds) for record in (good, late, slow)] == [True, False, False]
    report = report_of(good, late, slow, failed(3, 100.0, 101.0), goodput_ms=bounds)
    assert report["request_goodput"] == pytest.approx(0.1)
    assert report["goodput_share"] == pytest.approx(0.25)
    assert meets(done(0, 100.0, 100.0, 109.0), {"tpot": 1.0})
    assert not meets(good, {"e2el": 499.0})
    assert "request_goodput" not in report_of(good)


@pytest.mark.parametrize("pair", ["ttft", "ttft:", "ttft:fast", "itl:5", "ttft:-1", "ttft:nan", "ttft:inf"])
def test_goodput_must_be_readable(pair: str) -> None:
    with pytest.raises(BenchError, match="METRIC:MILLISECONDS with a metric of ttft, tpot, e2el"):
        parse_goodput([pair])


intervals = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20)), min_size=1, max_size=20)


@given(intervals=intervals)
def test_peak_concurrency_is_that_of_the_busiest_moment(intervals: list[tuple[int, int]]) -> None:
    records = [failed(0, float(start), float(start + length)) for start, length in intervals]
    busiest = max(sum(s <= moment < s + length for s, length in intervals) for moment in range(41))
    assert peak_concurrency(records, end=100.0) == busiest


def test_the_machine_is_described() -> None:
    machine = describe_machine()
    assert machine["cpu"]
    assert machine["cores"] >= 1
    assert {"python", "penstock", "aiohttp"} <= set(machine["versions"])


def test_the_table_shows_every_number_and_every_cause() -> None:
    record = done(0, 100.0, 101.0, 103.0, 104.0, 107.0)
    record.device_seconds, record.cached_tokens = 1.5, 4
    unsent = report_of(record, failed(1, 100.0, 101.0), num_prompts=5, goodput_ms={"ttft": 500.0})
    out = io.StringIO()
    metrics = ("ttft", "tpot", "itl", "e2el", "e2el_including_client_queue")
    print_report(unsent, Console(file=out, width=100), metrics=metrics, percentiles=(50, 90, 99))
    text = out.getvalue()
    for shown in (
        "2,000.00",
        "7,000.00",
        "Not sent before the end",
        "ttft≤500ms",
        "0.0%",
        "1.500",
        "from usage",
    ):
        assert shown in text
    assert "1 failed: HTTP 503, for example: message 1" in text
    out.seek(0)
    print_report(
        report_of(failed(0, 100.0, 101.0)), Console(file=out), metrics=metrics, percentiles=(50, 90, 99)
    )
    assert "–" in out.getvalue()
