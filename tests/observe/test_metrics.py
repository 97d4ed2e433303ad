"""The page: names, types, labels and buckets are those of the table, and values arrive where they belong."""

from __future__ import annotations

from dataclasses import replace

import pytest
from prometheus_client import Metric as Family
from prometheus_client.parser import text_string_to_metric_families

from penstock.core.stats import EngineStats, Totals
from penstock.observe import names
from penstock.observe.metrics import Metrics, RequestFigures
from penstock.observe.names import LABEL_VALUES, METRICS, Buckets, Kind, Metric


@pytest.fixture
def metrics() -> Metrics:
    metrics = Metrics("tiny", 2000, engine="3")
    metrics.describe_cache(block_size=16, num_blocks=8, dtype="auto", prefix_caching=True)
    return metrics


def families(metrics: Metrics) -> dict[str, Family]:
    return {family.name: family for family in text_string_to_metric_families(metrics.page(0.0).decode())}


def value(metrics: Metrics, name: str, **labels: str) -> float:
    wanted = {"model_name": "tiny", "engine": "3", **labels}
    (found,) = [
        sample.value
        for family in families(metrics).values()
        for sample in family.samples
        if sample.name == name and sample.labels == wanted
    ]
    return found


#: engines.md §4, as far as the features exist: the contract with dashboards, autoscalers and gateways.
VLLM = {
    "num_requests_running",
    "num_requests_waiting",
    "num_requests_waiting_by_reason",
    "kv_cache_usage_perc",
    "cache_config_info",
    "prompt_tokens_total",
    "prompt_tokens_by_source_total",
    "prompt_tokens_cached_total",
    "prompt_tokens_cached_by_source_total",
    "generation_tokens_total",
    "request_success_total",
    "admission_rejections_total",
    "num_preemptions_total",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "time_to_first_token_seconds_bucket",
    "inter_token_latency_seconds_bucket",
    "request_time_per_output_token_seconds_bucket",
    "e2e_request_latency_seconds_bucket",
    "request_queue_time_seconds_bucket",
    "request_inference_time_seconds_bucket",
    "request_prefill_time_seconds_bucket",
    "request_decode_time_seconds_bucket",
    "request_prompt_tokens_bucket",
    "request_generation_tokens_bucket",
    "request_max_num_generation_tokens_bucket",
    "request_params_n_bucket",
    "request_params_max_tokens_bucket",
    "request_prefill_kv_computed_tokens_bucket",
    "request_num_preemptions_bucket",
    "iteration_tokens_total_bucket",
}


def test_idle_time_goes_on_between_steps(metrics: Metrics) -> None:
    def idle(now: float) -> float:
        page = text_string_to_metric_families(metrics.page(now).decode())
        return next(s.value for f in page for s in f.samples if s.labels.get("state") == "idle")

    metrics.observe_step(EngineStats(running=1, waiting=0, kv_usage=0.1, busy=1.0, idle=2.0, at=3.0))
    assert idle(9.0) == 2.0  # a step may be under way
    metrics.observe_step(EngineStats(running=0, waiting=0, kv_usage=0.0, busy=7.0, idle=3.0, at=10.0))
    assert idle(12.5) == 5.5
    metrics.observe_step(EngineStats(running=1, waiting=0, kv_usage=0.1, busy=8.0, idle=6.0, at=14.0))
    assert idle(20.0) == 6.0


def test_the_names_that_others_rely_on(metrics: Metrics) -> None:
    exported = {sample.name for family in families(metrics).values() for sample in family.samples}
    assert {f"vllm:{name}" for name in VLLM} == {
        name for name in exported if name.startswith("vllm:") and not name.endswith(("_sum", "_count"))
    }
    assert {name for name in exported if name.startswith("penstock:")} >= {
        "penstock:device_seconds_total",
        "penstock:request_device_seconds_sum",
        "penstock:predicted_step_seconds_sum",
        "penstock:step_seconds_bucket",
    }
    assert not [name for name in exported if name.endswith("_created")]
    assert "process_cpu_seconds_total" in exported


def test_the_page_is_the_table(metrics: Metrics) -> None:
    page = families(metrics)
    exported = {sample.name for family in page.values() for sample in family.samples if ":" in sample.name}
    assert exported == set(names.series())
    for metric in METRICS:
        family = page[metric.name]  # the parser drops a counter's _total
        assert family.type == metric.kind.value
        assert family.documentation == metric.help
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(metric.labels)


def test_histograms_have_the_buckets_of_their_family(metrics: Metrics) -> None:
    page = families(metrics)
    for metric in METRICS:
        if metric.kind is Kind.HISTOGRAM:
            assert metric.buckets is not None
            bounds = [
                float(sample.labels["le"]) for sample in page[metric.name].samples if "le" in sample.labels
            ]
            assert bounds == [*names.boundaries(metric.buckets, 2000), float("inf")]


@pytest.mark.parametrize(
    ("limit", "series"),
    [(1, (1,)), (60, (1, 2, 5, 10, 20, 50)), (200, (1, 2, 5, 10, 20, 50, 100, 200))],
)
def test_token_buckets_end_at_the_context(limit: int, series: tuple[int, ...]) -> None:
    assert names.boundaries(Buckets.REQUEST_TOKENS, limit) == series


@pytest.mark.parametrize("family", [family for family in Buckets if family is not Buckets.REQUEST_TOKENS])
def test_boundaries_rise(family: Buckets) -> None:
    bounds = names.boundaries(family, 10)
    assert list(bounds) == sorted(set(bounds))


def test_closed_label_sets_are_there_from_the_start(metrics: Metrics) -> None:
    for metric in METRICS:
        own = set(metric.labels) - {"model_name", "engine"}
        if own and metric is not names.CACHE_CONFIG_INFO:
            (label,) = own
            for known in LABEL_VALUES[metric.name]:
                assert value(metrics, metric.series()[0], **{label: known}) == 0


def test_steps_add_up(metrics: Metrics) -> None:
    totals = Totals(
        steps=1,
        preemptions=1,
        prefix_queries=40,
        prefix_hits=10,
        prompt_tokens=30,
        recomputed_tokens=5,
        generation_tokens=2,
        cached_tokens=10,
    )
    metrics.observe_step(
        EngineStats(
            totals,
            running=3,
            waiting=4,
            deferred=1,
            kv_usage=0.25,
            seconds=0.02,
            predicted=0.01,
            busy=0.02,
            idle=1.0,
        )
    )
    later = replace(totals, steps=2, generation_tokens=5)
    metrics.observe_step(EngineStats(later, running=2, seconds=0.03, predicted=0.03, busy=0.05, idle=1.5))
    assert value(metrics, "vllm:num_requests_running") == 2
    assert value(metrics, "vllm:num_requests_waiting") == 0
    assert value(metrics, "vllm:prompt_tokens_total") == 40
    assert value(metrics, "vllm:prompt_tokens_by_source_total", source="local_compute") == 30
    assert value(metrics, "vllm:prompt_tokens_by_source_total", source="local_cache_hit") == 10
    assert value(metrics, "vllm:prompt_tokens_cached_by_source_total", source="device") == 10
    assert value(metrics, "vllm:generation_tokens_total") == 5
    assert value(metrics, "vllm:prefix_cache_queries_total") == 40
    assert value(metrics, "vllm:prefix_cache_hits_total") == 10
    assert value(metrics, "vllm:num_preemptions_total") == 1
    assert value(metrics, "vllm:iteration_tokens_total_sum") == 30 + 5 + 2 + 3
    assert value(metrics, "penstock:recomputed_tokens_total") == 5
    assert value(metrics, "penstock:step_seconds_sum") == pytest.approx(0.05)
    assert value(metrics, "penstock:predicted_step_seconds_sum") == pytest.approx(0.04)
    assert value(metrics, "penstock:device_seconds_total", state="busy") == pytest.approx(0.05)
    assert value(metrics, "penstock:device_seconds_total", state="idle") == pytest.approx(1.5)


def test_idle_reports_are_no_steps(metrics: Metrics) -> None:
    metrics.observe_step(EngineStats(idle=3.0))
    assert value(metrics, "penstock:step_seconds_count") == 0
    assert value(metrics, "penstock:device_seconds_total", state="idle") == 3.0


def test_a_finished_sequence(metrics: Metrics) -> None:
    metrics.observe_sequence(
        RequestFigures(
            finished_reason="stop",
            prompt_tokens=100,
            generation_tokens=5,
            cached_tokens=64,
            max_tokens=50,
            preemptions=2,
            device_seconds=0.5,
            e2e=4.0,
            queue=1.0,
            prefill=1.0,
            decode=2.0,
        )
    )
    expected = {
        names.E2E_LATENCY: 4.0,
        names.QUEUE_TIME: 1.0,
        names.INFERENCE_TIME: 3.0,
        names.PREFILL_TIME: 1.0,
        names.DECODE_TIME: 2.0,
        names.TIME_PER_OUTPUT_TOKEN: 0.5,
        names.REQUEST_PROMPT_TOKENS: 100,
        names.REQUEST_GENERATION_TOKENS: 5,
        names.REQUEST_PARAMS_MAX_TOKENS: 50,
        names.PREFILL_KV_COMPUTED_TOKENS: 36,
        names.REQUEST_NUM_PREEMPTIONS: 2,
        names.REQUEST_DEVICE_SECONDS: 0.5,
    }
    assert {metric: value(metrics, f"{metric.name}_sum") for metric in expected} == expected
    assert {value(metrics, f"{metric.name}_count") for metric in expected} == {1}
    assert value(metrics, "vllm:request_success_total", finished_reason="stop") == 1


def test_a_sequence_that_never_ran_has_no_times(metrics: Metrics) -> None:
    metrics.observe_sequence(
        RequestFigures(
            finished_reason="abort",
            prompt_tokens=10,
            generation_tokens=0,
            cached_tokens=0,
            max_tokens=None,
            preemptions=0,
            device_seconds=0.0,
        )
    )
    assert value(metrics, "vllm:e2e_request_latency_seconds_count") == 0
    assert value(metrics, "vllm:request_params_max_tokens_count") == 0
    assert value(metrics, "vllm:request_success_total", finished_reason="abort") == 1


def test_two_engines_do_not_share_a_registry() -> None:
    first, second = Metrics("a", 10), Metrics("b", 10)
    first.observe_gap(0.5)
    assert b'model_name="b"' not in first.page(0.0)
    assert b'model_name="a"' not in second.page(0.0)


def test_a_row_knows_its_series() -> None:
    assert Metric("x", Kind.COUNTER, "").series() == ("x_total",)
    assert Metric("x_total", Kind.HISTOGRAM, "").series() == (
        "x_total_bucket",
        "x_total_count",
        "x_total_sum",
    )
