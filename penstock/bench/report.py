"""From records to numbers: percentiles, throughput, goodput; as JSON and as a table.

Pure functions of what was recorded, except for `describe_machine`. Names of keys follow the result file
of `vllm bench serve` where it has them, so that its plotting scripts read these results.

Formulas, times in seconds inside and milliseconds in the report:

    ttft = first chunk - sent                        time to first token
    itl  = gaps between consecutive chunks           a chunk may carry several tokens, as in vLLM
    tpot = (e2el - ttft) / (output tokens - 1)       time per output token; requests of 2 tokens or more
    e2el = last chunk - sent                         end-to-end latency
    client_queue_time = sent - intended              how late the client was, and why the next two exist
    ttft_including_client_queue, e2el_including_client_queue: as above, from the intended time

Measured from the intended time, latencies are safe from coordinated omission: a stall of the server
that also delays the sending of later requests counts for each of them.
"""

from __future__ import annotations

import math
import os
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.bench.client import Outcome, RequestRecord
from penstock.bench.errors import BenchError

if TYPE_CHECKING:
    from rich.console import Console

METRICS = {
    "ttft": "Time to first token",
    "tpot": "Time per output token",
    "itl": "Inter-token latency",
    "e2el": "End-to-end latency",
    "ttft_including_client_queue": "TTFT from intended time",
    "e2el_including_client_queue": "E2E from intended time",
    "client_queue_time": "Client queue (send lag)",
}
"""Latency metrics by the name used in keys and flags, with their titles."""

SLO_METRICS = ("ttft", "tpot", "e2el")


def percentile(values: Sequence[float], rank: float) -> float:
    """The `rank`-th percentile (0 to 100) of `values`, interpolated linearly, as numpy's default."""
    if not values or not 0 <= rank <= 100:
        raise ValueError(f"percentile {rank} of {len(values)} values: need a rank in [0, 100] and values")
    ordered = sorted(values)
    position = rank / 100 * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    # Written from the lower value, so that equal neighbours give exactly that value.
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def latencies(record: RequestRecord) -> dict[str, list[float]]:
    """The values in seconds that one completed request adds to each metric."""
    if record.sent is None or record.finished is None or not record.chunk_times:
        return {metric: [] for metric in METRICS}
    ttft, e2el = record.chunk_times[0] - record.sent, record.finished - record.sent
    lag = record.sent - record.intended
    tokens = record.output_tokens
    return {
        "ttft": [ttft],
        "tpot": [(e2el - ttft) / (tokens - 1)] if tokens > 1 else [],
        "itl": [later - earlier for earlier, later in pairwise(record.chunk_times)],
        "e2el": [e2el],
        "ttft_including_client_queue": [ttft + lag],
        "e2el_including_client_queue": [e2el + lag],
        "client_queue_time": [lag],
    }


def summarise(metric: str, values: Sequence[float], percentiles: Iterable[float]) -> dict[str, float | None]:
    """`mean_`, `median_`, `std_` and `pNN_` keys of `metric` in ms from seconds; None without values."""
    scaled = [value * 1000 for value in values]
    summary = {
        f"mean_{metric}_ms": statistics.fmean(scaled) if scaled else None,
        f"median_{metric}_ms": percentile(scaled, 50) if scaled else None,
        f"std_{metric}_ms": statistics.pstdev(scaled) if scaled else None,
    }
    for rank in percentiles:
        summary[f"p{rank:g}_{metric}_ms"] = percentile(scaled, rank) if scaled else None
    return summary


def parse_goodput(pairs: Iterable[str]) -> dict[str, float]:
    """`["ttft:500", "tpot:50"]` → bounds in ms by metric."""
    bounds: dict[str, float] = {}
    for pair in pairs:
        name, _, text = pair.partition(":")
        try:
            bound = float(text)
        except ValueError:
            bound = -1.0
        if name not in SLO_METRICS or not 0 <= bound < math.inf:
            raise BenchError(
                f"--goodput {pair!r}: write METRIC:MILLISECONDS with a metric of {', '.join(SLO_METRICS)}"
            )
        bounds[name] = bound
    return bounds


def meets(record: RequestRecord, bounds_ms: Mapping[str, float]) -> bool:
    """Whether a completed request met all bounds, its latencies taken from the intended time.

    A request of one token has no TPOT and meets any bound on it, as in vLLM.
    """
    values = latencies(record)
    metrics = {"ttft": "ttft_including_client_queue", "e2el": "e2el_including_client_queue", "tpot": "tpot"}
    return all(value * 1000 <= bound for name, bound in bounds_ms.items() for value in values[metrics[name]])


def peak_concurrency(records: Iterable[RequestRecord], end: float) -> int:
    """Most requests in flight at one moment; those without an end are taken to last until `end`."""
    changes: list[tuple[float, int]] = []
    for record in records:
        if record.sent is not None:
            finished = end if record.finished is None else record.finished
            changes += [(record.sent, 1), (finished, -1)]
    in_flight = peak = 0
    # At equal times the departure sorts first: a place handed on is one request, not two.
    for _, change in sorted(changes):
        in_flight += change
        peak = max(peak, in_flight)
    return peak


def group_errors(records: Iterable[RequestRecord]) -> list[dict[str, Any]]:
    """Failures by cause, most frequent first, each with its count and one message."""
    groups: dict[str, dict[str, Any]] = {}
    for record in records:
        if record.outcome is Outcome.FAILED and record.cause is not None:
            group = groups.setdefault(
                record.cause, {"cause": record.cause, "count": 0, "example": record.message}
            )
            group["count"] += 1
    return sorted(groups.values(), key=lambda group: -int(group["count"]))


def build_report(
    records: Sequence[RequestRecord],
    *,
    start: float,
    end: float,
    num_prompts: int,
    percentiles: Sequence[float] = (50, 90, 99),
    goodput_ms: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """All numbers of a run between `start` and `end` (seconds of its clock), ready for JSON."""
    completed = [record for record in records if record.outcome is Outcome.COMPLETED]
    failed = [record for record in records if record.outcome is Outcome.FAILED]
    duration = max(end - start, 1e-9)
    input_tokens = sum(record.prompt_tokens or 0 for record in completed)
    output_tokens = sum(record.output_tokens for record in completed)
    from_usage = sum(record.tokens_from_usage for record in completed)
    cached = [record.cached_tokens for record in completed if record.cached_tokens is not None]
    device = [record.device_seconds for record in completed if record.device_seconds is not None]
    lags = [record.sent - record.intended for record in records if record.sent is not None]
    report: dict[str, Any] = {
        "duration": duration,
        "completed": len(completed),
        "failed": len(failed),
        "unfinished": len(records) - len(completed) - len(failed),
        "not_sent": num_prompts - len(records),
        "total_input_tokens": input_tokens,
        "requests_without_input_tokens": sum(record.prompt_tokens is None for record in completed),
        "total_output_tokens": output_tokens,
        "tokens_counted_from": _token_source(from_usage, len(completed)),
        "total_cached_tokens": sum(cached) if cached else None,
        "total_device_seconds": sum(device) if device else None,
        "request_throughput": len(completed) / duration,
        "output_throughput": output_tokens / duration,
        "input_throughput": input_tokens / duration,
        "total_token_throughput": (input_tokens + output_tokens) / duration,
        "max_concurrent_requests": peak_concurrency(records, end),
        "max_send_lag_ms": max(lags, default=0.0) * 1000,
    }
    if goodput_ms:
        good = sum(meets(record, goodput_ms) for record in completed)
        report["goodput_slo_ms"] = dict(goodput_ms)
        report["request_goodput"] = good / duration
        # A failed request did not meet its objectives; one cut off by the end of the run says nothing.
        report["goodput_share"] = good / max(1, len(completed) + len(failed))
    values: dict[str, list[float]] = {metric: [] for metric in METRICS}
    for record in completed:
        for metric, found in latencies(record).items():
            values[metric] += found
    for metric, found in values.items():
        report |= summarise(metric, found, percentiles)
    report["errors"] = group_errors(records)
    report["requests"] = [_request_row(record, start) for record in records]
    return report


def _token_source(from_usage: int, completed: int) -> str | None:
    if completed == 0:
        return None
    return "usage" if from_usage == completed else "chunks" if from_usage == 0 else "usage and chunks"


def _request_row(record: RequestRecord, start: float) -> dict[str, Any]:
    values = latencies(record)
    return {
        "index": record.index,
        "outcome": record.outcome.value,
        "intended_time": record.intended - start,
        "start_time": None if record.sent is None else record.sent - start,
        "ttft": next(iter(values["ttft"]), None),
        "latency": next(iter(values["e2el"]), None),
        "itl": values["itl"],
        "prompt_len": record.prompt_tokens,
        "output_tokens": record.output_tokens,
        "cached_tokens": record.cached_tokens,
        "device_seconds": record.device_seconds,
        "finish_reason": record.finish_reason,
        "cause": record.cause,
        "error": record.message,
    }


def describe_machine() -> dict[str, Any]:
    """The client's machine and software, so that a number is never read without them."""
    cpu = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    except OSError:
        pass  # not Linux: the name that Python knows must do
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        cores = len(os.sched_getaffinity(0))
    except (AttributeError, ValueError, OSError):
        memory, cores = None, os.cpu_count() or 0
    versions = {"python": platform.python_version()}
    for package in ("penstock", "aiohttp"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed as a package"
    return {
        "cpu": cpu,
        "cores": cores,
        "memory_bytes": memory,
        "platform": platform.platform(),
        "versions": versions,
    }


def timestamp() -> str:
    """Now, in UTC, in the form of vLLM's result files: 20250131-235959."""
    return datetime.now(UTC).strftime("%Y%m%d-%H%M%S")


def print_report(
    report: Mapping[str, Any], console: Console, *, metrics: Sequence[str], percentiles: Sequence[float]
) -> None:
    """Show a report as two tables, totals and latencies, and the failures by cause."""
    from rich import box
    from rich.table import Table

    totals = Table(title="Serving benchmark", show_header=False, box=box.SIMPLE_HEAD)
    totals.add_column(style="bold", no_wrap=True)
    totals.add_column(justify="right")
    for name, value in _total_rows(report):
        totals.add_row(name, value)
    console.print(totals)
    latency = Table(title="Latency in ms", box=box.SIMPLE_HEAD)
    latency.add_column("")
    ranks = [f"p{rank:g}" for rank in percentiles]
    for heading in ("mean", *ranks):
        latency.add_column(heading, justify="right", no_wrap=True)
    for metric in metrics:
        cells = [report[f"{statistic}_{metric}_ms"] for statistic in ("mean", *ranks)]
        latency.add_row(METRICS[metric], *("–" if cell is None else f"{cell:,.2f}" for cell in cells))
    console.print(latency)
    for error in report["errors"]:
        line = f"{error['count']} failed: {error['cause']}, for example: {error['example']}"
        console.print(line, style="red", markup=False, highlight=False)


def _total_rows(report: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    yield "Successful requests", f"{report['completed']:,}"
    yield "Failed requests", f"{report['failed']:,}"
    if report["unfinished"] or report["not_sent"]:
        yield "Cut off by the end of the run", f"{report['unfinished']:,}"
        yield "Not sent before the end", f"{report['not_sent']:,}"
    yield "Duration (s)", f"{report['duration']:,.2f}"
    unknown = report["requests_without_input_tokens"]
    where = f" (unknown for {unknown:,} requests)" if unknown else ""
    yield f"Input tokens{where}", f"{report['total_input_tokens']:,}"
    if report["total_cached_tokens"] is not None:
        yield "  of them cached", f"{report['total_cached_tokens']:,}"
    counted = report["tokens_counted_from"]
    yield "Output tokens" + (f" (from {counted})" if counted else ""), f"{report['total_output_tokens']:,}"
    yield "Request throughput (req/s)", f"{report['request_throughput']:,.2f}"
    yield "Input throughput (tok/s)", f"{report['input_throughput']:,.2f}"
    yield "Output throughput (tok/s)", f"{report['output_throughput']:,.2f}"
    yield "Total throughput (tok/s)", f"{report['total_token_throughput']:,.2f}"
    yield "Peak concurrent requests", f"{report['max_concurrent_requests']:,}"
    yield "Largest send lag (ms)", f"{report['max_send_lag_ms']:,.2f}"
    if "request_goodput" in report:
        slo = " ".join(f"{name}≤{bound:g}ms" for name, bound in report["goodput_slo_ms"].items())
        yield f"Goodput (req/s; {slo})", f"{report['request_goodput']:,.2f}"
        yield "Requests that met it", f"{report['goodput_share']:.1%}"
    if report["total_device_seconds"] is not None:
        yield "Device seconds of the requests", f"{report['total_device_seconds']:,.3f}"
