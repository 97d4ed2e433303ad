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
    kind = {"device": "cpu", "dtype": "float32", "quantization": "none"}
    metrics.describe_engine(**kind, max_num_seqs=4, max_num_batched_tokens=16, max_model_len=64)
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
    "kv_offload_cpu_cache_usage_perc",
    "kv_offload_load_bytes_total",
    "kv_offload_store_bytes_total",
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
    assert {"process_cpu_seconds_total", "python_info"} <= exported


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


LATENCY = "0.3 0.5 0.8 1 1.5 2 2.5 5 10 15 20 30 40 50 60 120 240 480 960 1920 7680"
GAP = "0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1 2.5 5 7.5 10 20 40 80"
TOKENS = "1 2 5 10 20 50 100 200 500 1000 2000"
DEVICE = "0.0001 0.0002 0.0005 0.001 0.002 0.005 0.01 0.02 0.05 0.1 0.2 0.5 1 2 5 10 20 50 100 200 500 1000"
#: As in vLLM 0.32 (`vllm/v1/metrics/buckets.py`), for a context of 2,000 tokens: dashboards name bounds.
BOUNDS = {
    "vllm:time_to_first_token_seconds": (
        "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1 2.5 5 7.5 10 20 40 80 160 640 2560"
    ),
    "vllm:inter_token_latency_seconds": GAP,
    "vllm:request_time_per_output_token_seconds": GAP,
    "vllm:e2e_request_latency_seconds": LATENCY,
    "vllm:request_queue_time_seconds": LATENCY,
    "vllm:request_inference_time_seconds": LATENCY,
    "vllm:request_prefill_time_seconds": LATENCY,
    "vllm:request_decode_time_seconds": LATENCY,
    "vllm:request_prompt_tokens": TOKENS,
    "vllm:request_generation_tokens": TOKENS,
    "vllm:request_max_num_generation_tokens": TOKENS,
    "vllm:request_params_max_tokens": TOKENS,
    "vllm:request_prefill_kv_computed_tokens": TOKENS,
    "vllm:request_params_n": "1 2 5 10 20",
    "vllm:request_num_preemptions": "1 2 3 4 5 10 20",
    "vllm:iteration_tokens_total": "1 8 16 32 64 128 256 512 1024 2048 4096 8192 16384",
    "penstock:step_seconds": DEVICE,
    "penstock:predicted_step_seconds": DEVICE,
    "penstock:request_device_seconds": DEVICE,
}


def test_bounds_are_those_that_dashboards_know(metrics: Metrics) -> None:
    exported = {
        family.name: [float(each.labels["le"]) for each in family.samples if "le" in each.labels]
        for family in families(metrics).values()
        if family.type == "histogram" and ":" in family.name
    }
    assert exported == {name: [*map(float, bounds.split()), float("inf")] for name, bounds in BOUNDS.items()}


LABELS = {
    "vllm:num_requests_waiting_by_reason": ("reason", {"capacity", "deferred"}),
    "vllm:prompt_tokens_by_source": ("source", {"local_compute", "local_cache_hit"}),
    "vllm:prompt_tokens_cached_by_source": ("source", {"device"}),
    "vllm:request_success": ("finished_reason", {"stop", "length", "abort", "error"}),
    "vllm:admission_rejections": ("reason", {"max_num_queued_reqs", "max_num_queued_tokens"}),
    "penstock:device_seconds": ("state", {"busy", "idle"}),
}


def test_labels_are_those_that_dashboards_know(metrics: Metrics) -> None:
    for family in families(metrics).values():
        if ":" not in family.name or family.name in [info.name for info in names.INFO]:
            continue
        own, values = LABELS.get(family.name, ("", {None}))
        for sample in family.samples:
            labels = {name: value for name, value in sample.labels.items() if name != "le"}
            assert (labels.pop("model_name"), labels.pop("engine")) == ("tiny", "3")
            assert set(labels) == ({own} if own else set())
        assert {sample.labels.get(own) for sample in family.samples} == values


def test_types_are_those_that_dashboards_know(metrics: Metrics) -> None:
    gauges = {name for name, family in families(metrics).items() if family.type == "gauge" and ":" in name}
    assert gauges == {
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:num_requests_waiting_by_reason",
        "vllm:kv_cache_usage_perc",
        "vllm:kv_offload_cpu_cache_usage_perc",
        "vllm:cache_config_info",
        "penstock:engine_config_info",
    }
    assert [kind.value for kind in Kind] == ["gauge", "counter", "histogram"]


def test_the_cache_is_described_in_labels() -> None:
    metrics = Metrics("tiny", 100)
    metrics.describe_cache(block_size=16, num_blocks=20, dtype="bfloat16", prefix_caching=False)
    (sample,) = families(metrics)["vllm:cache_config_info"].samples
    assert sample.value == 1
    assert sample.labels == {
        "engine": "0",
        "block_size": "16",
        "num_gpu_blocks": "20",
        "cache_dtype": "bfloat16",
        "enable_prefix_caching": "False",
        "kv_cache_size_tokens": "320",
        "kv_cache_max_concurrency": "3.2",
    }


def test_the_engine_is_described_in_labels() -> None:
    metrics = Metrics("tiny", 100)
    limits = {"max_num_seqs": 64, "max_num_batched_tokens": 256, "max_model_len": 100}
    metrics.describe_engine(device="cpu", dtype="float32", quantization="int8", **limits)
    (sample,) = families(metrics)["penstock:engine_config_info"].samples
    assert sample.value == 1
    assert sample.labels == {
        "model_name": "tiny",
        "engine": "0",
        "device": "cpu",
        "dtype": "float32",
        "quantization": "int8",
        **{name: str(limit) for name, limit in limits.items()},
    }


def test_how_things_stand(metrics: Metrics) -> None:
    metrics.observe_step(EngineStats(running=3, waiting=4, deferred=1, kv_usage=0.25))
    assert value(metrics, "vllm:num_requests_running") == 3
    assert value(metrics, "vllm:num_requests_waiting") == 4
    assert value(metrics, "vllm:num_requests_waiting_by_reason", reason="capacity") == 3
    assert value(metrics, "vllm:num_requests_waiting_by_reason", reason="deferred") == 1
    assert value(metrics, "vllm:kv_cache_usage_perc") == 0.25


@pytest.mark.parametrize(
    ("totals", "tokens"),
    [
        (Totals(prompt_tokens=3), 3),
        (Totals(recomputed_tokens=4), 4),
        (Totals(generation_tokens=5), 5),
        (Totals(prompt_tokens=3, recomputed_tokens=4, generation_tokens=5, cached_tokens=9), 12),
    ],
)
def test_a_step_is_one_that_computed_tokens(metrics: Metrics, totals: Totals, tokens: int) -> None:
    for _ in range(2):  # the second time nothing was done
        metrics.observe_step(EngineStats(totals, seconds=0.5, predicted=0.25))
    for name in ("vllm:iteration_tokens_total", "penstock:step_seconds", "penstock:predicted_step_seconds"):
        assert value(metrics, f"{name}_count") == 1
    assert value(metrics, "vllm:iteration_tokens_total_sum") == tokens
    assert value(metrics, "vllm:prompt_tokens_total") == totals.prompt_tokens + totals.cached_tokens
    assert value(metrics, "vllm:prompt_tokens_cached_total") == totals.cached_tokens


def test_counters_move_by_what_is_new(metrics: Metrics) -> None:
    first = Totals(1, 2, 30, 4, 5, 6, 7, 8)
    metrics.observe_step(EngineStats(first))
    metrics.observe_step(EngineStats(Totals(2, 12, 50, 34, 45, 56, 67, 78)))
    assert value(metrics, "vllm:num_preemptions_total") == 12
    assert value(metrics, "vllm:prefix_cache_queries_total") == 50
    assert value(metrics, "vllm:prefix_cache_hits_total") == 34
    assert value(metrics, "vllm:prompt_tokens_total") == 45 + 78
    assert value(metrics, "vllm:prompt_tokens_by_source_total", source="local_compute") == 45
    assert value(metrics, "vllm:prompt_tokens_by_source_total", source="local_cache_hit") == 78
    assert value(metrics, "vllm:prompt_tokens_cached_by_source_total", source="device") == 78
    assert value(metrics, "penstock:recomputed_tokens_total") == 56
    assert value(metrics, "vllm:generation_tokens_total") == 67
    assert value(metrics, "vllm:iteration_tokens_total_sum") == 45 + 56 + 67


def test_device_seconds_never_go_back(metrics: Metrics) -> None:
    for busy, idle in ((1.0, 2.0), (0.5, 1.0), (1.5, 2.5)):
        metrics.observe_step(EngineStats(busy=busy, idle=idle, running=1))
    assert value(metrics, "penstock:device_seconds_total", state="busy") == 1.5
    assert value(metrics, "penstock:device_seconds_total", state="idle") == 2.5


@pytest.mark.parametrize(("running", "waiting", "idle"), [(0, 0, 6.0), (1, 0, 2.0), (0, 1, 2.0)])
def test_an_engine_is_idle_where_nobody_runs_or_waits(
    metrics: Metrics, running: int, waiting: int, idle: float
) -> None:
    metrics.observe_step(EngineStats(running=running, waiting=waiting, idle=2.0, at=10.0))
    for now in (14.0, 9.0):  # clocks of two threads: never backwards
        metrics.page(now)
    assert value(metrics, "penstock:device_seconds_total", state="idle") == idle


def test_what_only_the_server_knows(metrics: Metrics) -> None:
    metrics.observe_first_token(0.5)
    metrics.observe_gap(0.25)
    metrics.observe_gap(0.5)
    metrics.observe_prompt(3, 40)
    metrics.observe_rejection("max_num_queued_tokens")
    assert value(metrics, "vllm:time_to_first_token_seconds_sum") == 0.5
    assert value(metrics, "vllm:inter_token_latency_seconds_sum") == 0.75
    assert value(metrics, "vllm:inter_token_latency_seconds_count") == 2
    assert value(metrics, "vllm:request_params_n_sum") == 3
    assert value(metrics, "vllm:request_max_num_generation_tokens_sum") == 40
    assert value(metrics, "vllm:admission_rejections_total", reason="max_num_queued_tokens") == 1
    assert value(metrics, "vllm:admission_rejections_total", reason="max_num_queued_reqs") == 0


def figures(**changes: object) -> RequestFigures:
    plain = RequestFigures("length", 10, 2, 0, None, 0, 0.0)
    return replace(plain, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(("tokens", "mean"), [(0, None), (1, None), (2, 3.0), (4, 1.0)])
def test_the_mean_gap_needs_two_tokens(metrics: Metrics, tokens: int, mean: float | None) -> None:
    metrics.observe_sequence(figures(generation_tokens=tokens, decode=3.0))
    metrics.observe_sequence(figures(generation_tokens=tokens))
    name = "vllm:request_time_per_output_token_seconds"
    assert value(metrics, f"{name}_count") == (mean is not None)
    assert value(metrics, f"{name}_sum") == (mean or 0.0)


@pytest.mark.parametrize(("e2e", "queue", "count"), [(3.0, 1.0, 1), (3.0, None, 0), (None, 1.0, 0)])
def test_inference_is_what_follows_the_queue(
    metrics: Metrics, e2e: float | None, queue: float | None, count: int
) -> None:
    metrics.observe_sequence(figures(e2e=e2e, queue=queue))
    assert value(metrics, "vllm:request_inference_time_seconds_count") == count
    assert value(metrics, "vllm:request_inference_time_seconds_sum") == 2.0 * count


def test_figures_of_parts_that_were_never_reached() -> None:
    plain = figures()
    assert (plain.e2e, plain.queue, plain.prefill, plain.decode) == (None, None, None, None)


@pytest.mark.parametrize(
    ("limit", "series"),
    [
        (1, (1,)),
        (2, (1, 2)),
        (9, (1, 2, 5)),
        (10, (1, 2, 5, 10)),
        (60, (1, 2, 5, 10, 20, 50)),
        (200, (1, 2, 5, 10, 20, 50, 100, 200)),
    ],
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
        if own and metric not in names.INFO:
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
    assert Metric("x_total", Kind.COUNTER, "").series() == ("x_total",)
    assert Metric("x", Kind.GAUGE, "").series() == ("x",)
    assert Metric("x", Kind.GAUGE, "").labels == ("model_name", "engine")
    assert Metric("x_total", Kind.HISTOGRAM, "").series() == (
        "x_total_bucket",
        "x_total_count",
        "x_total_sum",
    )


def test_copies_to_the_host_are_told_in_bytes() -> None:
    metrics = Metrics("tiny", 128)
    metrics.describe_cache(
        block_size=16, num_blocks=8, dtype="bfloat16", prefix_caching=True, block_bytes=1000
    )
    metrics.observe_step(EngineStats(Totals(stored_blocks=3), host_usage=0.25))
    metrics.observe_step(EngineStats(Totals(stored_blocks=5, loaded_blocks=2), host_usage=0.5))
    page = metrics.page(0.0).decode()
    labels = '{engine="0",model_name="tiny"}'
    assert f"vllm:kv_offload_store_bytes_total{labels} 5000.0" in page
    assert f"vllm:kv_offload_load_bytes_total{labels} 2000.0" in page
    assert f"vllm:kv_offload_cpu_cache_usage_perc{labels} 0.5" in page
