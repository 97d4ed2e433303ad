"""HTTP metrics are those of vLLM's instrumentation, clients cannot make series, and old names live on."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from penstock.core.stats import EngineStats, Totals
from penstock.observe.http_metrics import EXCLUDED, HttpMetrics
from penstock.observe.metrics import Metrics
from penstock.observe.names import OLD_NAMES, parse_version

Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def series(page: bytes, beginning: str) -> Series:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(page.decode())
        for sample in family.samples
        if sample.name.startswith(beginning)
    }


def test_one_request() -> None:
    metrics = Metrics("tiny", 10)
    metrics.http.observe("/v1/models", "GET", 200, 0.3, request_bytes=5, response_bytes=70)
    found = series(metrics.page(0.0), "http_")
    handler = ("handler", "/v1/models")
    method = ("method", "GET")
    assert found["http_requests_total", (handler, method, ("status", "2xx"))] == 1
    assert found["http_request_size_bytes_sum", (handler,)] == 5
    assert found["http_request_size_bytes_count", (handler,)] == 1
    assert found["http_response_size_bytes_sum", (handler,)] == 70
    assert found["http_request_duration_seconds_sum", (handler, method)] == 0.3
    assert found["http_request_duration_highr_seconds_sum", ()] == 0.3
    low = [labels for name, labels in found if name == "http_request_duration_seconds_bucket"]
    assert [dict(labels)["le"] for labels in low] == ["0.1", "0.5", "1.0", "+Inf"]
    high = [labels for name, labels in found if name == "http_request_duration_highr_seconds_bucket"]
    assert " ".join(dict(labels)["le"] for labels in high) == (
        "0.01 0.025 0.05 0.075 0.1 0.25 0.5 0.75 1.0 1.5 2.0 2.5 3.0 3.5 4.0 4.5 5.0 7.5 10.0 30.0 60.0 +Inf"
    )


@pytest.mark.parametrize(
    ("status", "shown"), [(100, "1xx"), (204, "2xx"), (308, "3xx"), (499, "4xx"), (503, "5xx")]
)
def test_statuses_are_grouped(status: int, shown: str) -> None:
    metrics = Metrics("tiny", 10)
    metrics.http.observe("/tokenize", "POST", status, 0.0)
    ((_, labels),) = series(metrics.page(0.0), "http_requests_total")
    assert dict(labels)["status"] == shown


@pytest.mark.parametrize("handler", EXCLUDED)
def test_probes_and_scrapes_are_not_counted(handler: str) -> None:
    metrics = Metrics("tiny", 10)
    metrics.http.observe(handler, "GET", 200, 0.1)
    assert not any(series(metrics.page(0.0), "http_").values())


@given(st.lists(st.tuples(st.text(max_size=8), st.integers(100, 599)), min_size=1, max_size=40))
def test_clients_cannot_make_series(asked: list[tuple[str, int]]) -> None:
    """Paths that nobody serves are one handler, methods that HTTP does not have one method."""
    registry = CollectorRegistry()
    metrics = HttpMetrics(registry)
    for method, status in asked:
        metrics.observe(None, method, status, 0.1)
    labels = [s.labels for f in registry.collect() for s in f.samples]
    assert {each.get("handler", "none") for each in labels} == {"none"}
    known = {"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"}
    assert {each.get("method", "other") for each in labels} <= {
        "other",
        *(known & {name for name, _ in asked}),
    }
    total = registry.get_sample_value("http_request_duration_highr_seconds_count")
    assert total == len(asked)


# ---- old names ----

PAST = {
    "0.8": {
        "time_in_queue_requests",
        "gpu_cache_usage_perc",
        "gpu_prefix_cache_queries",
        "gpu_prefix_cache_hits",
        "time_per_output_token_seconds",
    },
    "0.10": {
        "gpu_cache_usage_perc",
        "gpu_prefix_cache_queries",
        "gpu_prefix_cache_hits",
        "time_per_output_token_seconds",
    },
    "0.11": {"time_per_output_token_seconds"},
    "0.12": set(),
    "0.31": set(),
}


def exported(metrics: Metrics) -> set[str]:
    return {family.name for family in text_string_to_metric_families(metrics.page(0.0).decode())}


@pytest.mark.parametrize("version", PAST)
def test_names_that_a_version_of_vllm_had(version: str) -> None:
    plain = exported(Metrics("tiny", 10))
    shown = exported(Metrics("tiny", 10, old_names_of=parse_version(version)))
    assert shown - plain == {f"vllm:{name}" for name in PAST[version]}
    assert plain <= shown


def test_an_old_name_has_the_values_and_labels_of_the_new_one() -> None:
    metrics = Metrics("tiny", 10, old_names_of=(0, 8))
    metrics.observe_step(EngineStats(Totals(prefix_queries=40, prefix_hits=30), kv_usage=0.25))
    metrics.observe_gap(0.5)
    page = metrics.page(0.0)
    for each in OLD_NAMES:
        now = {
            (name.replace(each.now, each.old), labels): value
            for (name, labels), value in series(page, each.now).items()
        }
        assert series(page, each.old) == now
        assert now
    assert series(page, "vllm:gpu_cache_usage_perc")
    assert max(series(page, "vllm:gpu_prefix_cache_hits_total").values()) == 30
    assert max(series(page, "vllm:time_per_output_token_seconds_sum").values()) == 0.5


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("0.10", (0, 10)),
        ("v0.10.2", (0, 10)),
        (" 1.2.3rc1 ", (1, 2)),
        ("0.7.dev5+cpu", (0, 7)),
        ("0.9", (0, 9)),
    ],
)
def test_versions(text: str, version: tuple[int, int]) -> None:
    assert parse_version(text) == version


@pytest.mark.parametrize("text", ["", "x", "1", "0.x", "0.10;", "0.1 2", "٠.١", "0." + "1" * 5000])
def test_what_is_no_version(text: str) -> None:
    with pytest.raises(ValueError, match="must be a version"):
        parse_version(text)
