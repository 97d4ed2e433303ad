"""The report, key by key and line by line, of runs that can be reckoned by hand."""

from __future__ import annotations

import io
import os
import platform
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from penstock.bench import report as module
from penstock.bench.client import RequestRecord
from penstock.bench.errors import BenchError
from penstock.bench.report import (
    METRICS,
    SLO_METRICS,
    build_report,
    describe_machine,
    latencies,
    meets,
    parse_goodput,
    peak_concurrency,
    percentile,
    print_report,
    summarise,
    timestamp,
)

from .test_report import done, failed, report_of

# ---- numbers ----


def test_a_percentile_of_one_value_is_that_value() -> None:
    for rank in (0, 33.3, 100):
        assert percentile([7.0], rank) == 7.0
    with pytest.raises(ValueError, match=r"percentile -1 of 2 values: need a rank in \[0, 100\] and values"):
        percentile([1.0, 2.0], -1)


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=9), st.lists(st.integers(0, 100), max_size=3))
def test_a_summary_is_in_milliseconds(values: list[float], ranks: list[int]) -> None:
    summary = summarise("x", values, ranks)
    mean = sum(values) / len(values)
    assert list(summary) == [
        *("mean_x_ms", "median_x_ms", "std_x_ms"),
        *dict.fromkeys(f"p{rank}_x_ms" for rank in ranks),
    ]
    assert summary["mean_x_ms"] == pytest.approx(1000 * mean, abs=1e-6)
    spread = (sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5
    assert summary["std_x_ms"] == pytest.approx(1000 * spread, abs=1e-3)
    assert summary["median_x_ms"] == pytest.approx(1000 * percentile(values, 50), abs=1e-6)
    for rank in ranks:
        assert summary[f"p{rank}_x_ms"] == pytest.approx(1000 * percentile(values, rank), abs=1e-6)
    assert set(summarise("x", [], (50,)).values()) == {None}
    assert "p99.9_x_ms" in summarise("x", [], (99.9,))


def test_what_has_not_been_answered_has_no_latencies() -> None:
    sent = RequestRecord(0, 1.0, 2.0)
    unsent = RequestRecord(0, 1.0)
    unsent.chunk_times, unsent.finished = [3.0], 4.0
    empty = RequestRecord(0, 1.0, 2.0)
    empty.finished = 4.0
    for record in (sent, unsent, empty):
        assert latencies(record) == {metric: [] for metric in METRICS}


@pytest.mark.parametrize(("tokens", "tpot"), [(0, []), (1, []), (2, [4.0]), (3, [2.0]), (5, [1.0])])
def test_time_per_output_token_is_without_the_first(tokens: int, tpot: list[float]) -> None:
    found = latencies(done(0, 10.0, 11.0, 13.0, 17.0, tokens=tokens))
    assert found == {
        "ttft": [2.0],
        "tpot": tpot,
        "itl": [4.0],
        "e2el": [6.0],
        "ttft_including_client_queue": [3.0],
        "e2el_including_client_queue": [7.0],
        "client_queue_time": [1.0],
    }


# ---- goodput ----


def test_bounds_are_kept_exactly() -> None:
    record = done(0, 10.0, 10.25, 10.5, 11.0, tokens=3)  # 250 ms late, 250 to the first, 250 for each
    for metric, least in (("ttft", 500.0), ("tpot", 250.0), ("e2el", 1000.0)):
        assert meets(record, {metric: least})
        assert not meets(record, {metric: least - 0.001})
    assert meets(record, {})
    assert not meets(record, {"ttft": 1000.0, "tpot": 1.0})


def test_objectives_are_read() -> None:
    assert SLO_METRICS == ("ttft", "tpot", "e2el")
    assert parse_goodput([]) == {}
    assert parse_goodput(["ttft:0", "e2el:1.5", "ttft:2"]) == {"ttft": 2.0, "e2el": 1.5}
    for wrong in ("", ":5", "ttft=5", "TTFT:5", "ttft:1e999"):
        with pytest.raises(BenchError) as caught:
            parse_goodput([wrong])
        assert str(caught.value).startswith(f"--goodput {wrong!r}: ")


def test_a_share_is_of_those_that_ended() -> None:
    good, slow = done(0, 100.0, 100.0, 100.5), done(1, 100.0, 100.0, 109.0)
    bounds = {"ttft": 1000.0}
    found = report_of(good, slow, failed(2, 100.0, 101.0), RequestRecord(3, 100.0, 100.0), goodput_ms=bounds)
    assert found["goodput_share"] == pytest.approx(1 / 3)
    assert found["request_goodput"] == pytest.approx(1 / 10)
    assert found["goodput_slo_ms"] == bounds
    nothing = report_of(RequestRecord(3, 100.0, 100.0), goodput_ms=bounds)
    assert (nothing["goodput_share"], nothing["request_goodput"]) == (0.0, 0.0)


# ---- concurrency ----


def test_a_place_that_is_handed_on_is_one() -> None:
    first, second = failed(0, 1.0, 2.0), failed(1, 2.0, 3.0)
    assert peak_concurrency([first, second], 9.0) == 1
    unfinished = RequestRecord(2, 0.0, 2.5)
    assert peak_concurrency([first, second, unfinished], 9.0) == 2
    assert peak_concurrency([unfinished, failed(3, 8.9, 9.5)], 9.0) == 2
    assert peak_concurrency([unfinished, failed(3, 9.0, 9.5)], 9.0) == 1
    assert peak_concurrency([RequestRecord(4, 1.0)], 9.0) == 0
    assert peak_concurrency([], 9.0) == 0


# ---- the whole ----


def run_by_hand() -> tuple[RequestRecord, ...]:
    """Two that end, one that fails, one under way, one that waits."""
    one = done(0, 100.0, 100.0, 101.0, 102.0, tokens=3)
    two = done(1, 100.5, 101.0, 103.0, 105.0, tokens=2)
    two.tokens_from_usage, two.prompt_tokens, two.cached_tokens, two.device_seconds = False, None, 4, 0.25
    one.finish_reason = "stop"
    broken = failed(2, 101.0, 104.0)
    return one, two, broken, RequestRecord(3, 102.0, 104.5), RequestRecord(4, 103.0)


def test_every_key_of_a_report() -> None:
    found = build_report(
        run_by_hand(), start=100.0, end=108.0, num_prompts=9, percentiles=(25,), goodput_ms={"ttft": 1500.0}
    )
    rows = found.pop("requests")
    numbers = {key: found.pop(key) for key in list(found) if key.endswith("_ms") and "slo" not in key}
    assert found == {
        "duration": 8.0,
        "completed": 2,
        "failed": 1,
        "unfinished": 2,
        "not_sent": 4,
        "total_input_tokens": 10,
        "requests_without_input_tokens": 1,
        "total_output_tokens": 5,
        "tokens_counted_from": "usage and chunks",
        "total_cached_tokens": 4,
        "total_device_seconds": 0.25,
        "request_throughput": 2 / 8,
        "output_throughput": 5 / 8,
        "input_throughput": 10 / 8,
        "total_token_throughput": 15 / 8,
        "max_concurrent_requests": 3,
        "goodput_slo_ms": {"ttft": 1500.0},
        "request_goodput": 1 / 8,
        "goodput_share": 1 / 3,
        "errors": [{"cause": "HTTP 503", "count": 1, "example": "message 2"}],
    }
    assert numbers.pop("max_send_lag_ms") == 2500.0
    assert {key: value for key, value in numbers.items() if key.startswith("mean")} == {
        "mean_ttft_ms": 1500.0,
        "mean_tpot_ms": 1250.0,
        "mean_itl_ms": 1500.0,
        "mean_e2el_ms": 3000.0,
        "mean_ttft_including_client_queue_ms": 1750.0,
        "mean_e2el_including_client_queue_ms": 3250.0,
        "mean_client_queue_time_ms": 250.0,
    }
    assert numbers["p25_ttft_ms"] == 1250.0
    assert len(numbers) == 4 * len(METRICS)
    empty = {"ttft": None, "latency": None, "itl": [], "cached_tokens": None, "device_seconds": None}
    nothing = {**empty, "prompt_len": None, "output_tokens": 0, "finish_reason": None}
    fine = {"outcome": "completed", "cause": None, "error": None}
    assert rows == [
        {
            **fine,
            "index": 0,
            "intended_time": 0.0,
            "start_time": 0.0,
            "ttft": 1.0,
            "latency": 2.0,
            "itl": [1.0],
            "prompt_len": 10,
            "output_tokens": 3,
            "cached_tokens": None,
            "device_seconds": None,
            "finish_reason": "stop",
        },
        {
            **fine,
            "index": 1,
            "intended_time": 0.5,
            "start_time": 1.0,
            "ttft": 2.0,
            "latency": 4.0,
            "itl": [2.0],
            "prompt_len": None,
            "output_tokens": 2,
            "cached_tokens": 4,
            "device_seconds": 0.25,
            "finish_reason": None,
        },
        {
            **nothing,
            "index": 2,
            "outcome": "failed",
            "intended_time": 1.0,
            "start_time": 1.0,
            "cause": "HTTP 503",
            "error": "message 2",
        },
        {
            **nothing,
            "index": 3,
            "outcome": "unfinished",
            "intended_time": 2.0,
            "start_time": 4.5,
            "cause": None,
            "error": None,
        },
        {
            **nothing,
            "index": 4,
            "outcome": "unfinished",
            "intended_time": 3.0,
            "start_time": None,
            "cause": None,
            "error": None,
        },
    ]


def test_percentiles_of_a_report_are_those_of_vllm_by_default() -> None:
    found = build_report([], start=5.0, end=5.0, num_prompts=0)
    assert [key for key in found if key.endswith("_itl_ms")] == [
        *("mean_itl_ms", "median_itl_ms", "std_itl_ms"),
        *("p50_itl_ms", "p90_itl_ms", "p99_itl_ms"),
    ]
    assert found["duration"] == pytest.approx(1e-9), "and nothing is divided by nothing"
    assert found["max_send_lag_ms"] == 0.0
    assert found["tokens_counted_from"] is None


def printed(found: dict[str, Any], **options: Any) -> list[str]:
    out = io.StringIO()
    options = {"metrics": ("ttft", "tpot"), "percentiles": (50, 99.9), **options}
    print_report(found, Console(file=out, width=110), **options)
    return [" ".join(line.split()) for line in out.getvalue().splitlines() if line.strip(" ─━╴╶")]


def test_every_line_of_the_table() -> None:
    records = run_by_hand()
    found = build_report(
        records,
        start=100.0,
        end=108.0,
        num_prompts=1234,
        percentiles=(50, 99.9),
        goodput_ms={"ttft": 1500.0, "e2el": 9e9},
    )
    assert printed(found) == [
        "Serving benchmark",
        "Successful requests 2",
        "Failed requests 1",
        "Cut off by the end of the run 2",
        "Not sent before the end 1,229",
        "Duration (s) 8.00",
        "Input tokens (unknown for 1 requests) 10",
        "of them cached 4",
        "Output tokens (from usage and chunks) 5",
        "Request throughput (req/s) 0.25",
        "Input throughput (tok/s) 1.25",
        "Output throughput (tok/s) 0.62",
        "Total throughput (tok/s) 1.88",
        "Peak concurrent requests 3",
        "Largest send lag (ms) 2,500.00",
        "Goodput (req/s; ttft≤1500ms e2el≤9e+09ms) 0.12",
        "Requests that met it 33.3%",
        "Device seconds of the requests 0.250",
        "Latency in ms",
        "mean p50 p99.9",
        "Time to first token 1,500.00 1,500.00 1,999.00",
        "Time per output token 1,250.00 1,250.00 1,998.50",
        "1 failed: HTTP 503, for example: message 2",
    ]


def test_what_there_is_not_has_no_line() -> None:
    found = report_of(done(0, 100.0, 100.0, 101.0))
    lines = "\n".join(printed(found, percentiles=(50, 90)))
    for absent in ("Cut off", "Not sent", "unknown for", "cached", "Goodput", "met it", "Device seconds"):
        assert absent not in lines
    assert "Output tokens (from usage) 1" in lines
    assert "Time per output token – – –" in lines
    nothing = "\n".join(printed(report_of(failed(0, 100.0, 101.0)), percentiles=(50,)))
    assert "Output tokens 0" in nothing
    unsent = "\n".join(printed(report_of(done(0, 100.0, 100.0, 101.0), num_prompts=2), percentiles=(50,)))
    assert "Cut off by the end of the run 0" in unsent
    assert "Not sent before the end 1" in unsent


def test_the_most_frequent_error_comes_first_whatever_it_says() -> None:
    records = [failed(0, 1.0, 2.0, "[bold]a[/bold]"), *(failed(n, 1.0, 2.0, "b") for n in (1, 2))]
    lines = printed(report_of(*records), percentiles=(50,))
    assert lines[-2:] == [
        "2 failed: b, for example: message 1",
        "1 failed: [bold]a[/bold], for example: message 0",
    ]


# ---- where and when ----


def test_the_machine_is_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"/proc/cpuinfo": "processor: 0\nmodel name\t: A: B \nmodel name\t: C\n"}

    def read_text(self: Path, encoding: str | None = None) -> str:
        assert encoding == "utf-8"
        if str(self) not in texts:
            raise FileNotFoundError(self)
        return texts[str(self)]

    monkeypatch.setattr(Path, "read_text", read_text)
    found = describe_machine()
    assert found["cpu"] == "A: B"
    assert found["cores"] == len(os.sched_getaffinity(0))
    assert found["memory_bytes"] == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert found["platform"] == platform.platform()
    assert list(found["versions"]) == ["python", "penstock", "aiohttp"]
    assert found["versions"]["python"] == platform.python_version()
    texts.clear()

    def no_sysconf(name: str) -> int:
        raise OSError(name)

    monkeypatch.setattr(module.os, "sysconf", no_sysconf)
    monkeypatch.setattr(module.os, "cpu_count", lambda: 7)
    assert describe_machine()["cores"] == 7
    monkeypatch.setattr(module.os, "cpu_count", lambda: None)

    def no_version(name: str) -> str:
        raise module.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(module.metadata, "version", no_version)
    found = describe_machine()
    assert found["cpu"] == (platform.processor() or platform.machine())
    assert (found["memory_bytes"], found["cores"]) == (None, 0)
    assert found["versions"]["aiohttp"] == "not installed as a package"


def test_a_date_is_vllms() -> None:
    assert re.fullmatch(r"20\d{6}-\d{6}", timestamp())
