"""Tables of other programs' metrics: what is in them, what is gone, and that ours agree with vLLM's."""

from __future__ import annotations

import pytest

from penstock.observe import foreign
from penstock.observe.gateway_names import METRICS as GATEWAY
from penstock.observe.names import METRICS, OLD_NAMES, Kind


def test_each_table_says_version_and_source() -> None:
    sources = foreign.sources()
    others = {"dcgm", "kube", "node", "container", "prometheus", "keda", "production-stack", "aibrix"}
    assert set(sources) == {"vllm", *others}
    assert "vLLM 0.32.0" in sources["vllm"]
    for name, source in sources.items():
        assert any(sign.isdigit() for sign in source), name
        assert "(" in source, name


def test_every_name_of_ours_is_known_in_all_its_parts() -> None:
    for metric in (*METRICS, *GATEWAY):
        for series in metric.series():
            known = foreign.find(series)
            assert known is not None, series
            assert known.kind is metric.kind
            assert set(metric.labels) <= known.labels


def test_what_we_call_as_vllm_does_vllm_has_too() -> None:
    for metric in METRICS:
        if not metric.name.startswith("vllm:"):
            continue
        known = foreign.find(metric.series()[0])
        assert known is not None
        assert "vLLM 0.32.0" in known.who, metric.name
        assert known.kind is metric.kind


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("kv_cache_usage_perc", Kind.GAUGE),  # its gateway plugin's, without vllm:
        ("time_to_first_token_seconds_bucket", Kind.HISTOGRAM),
        ("time_to_first_token_seconds_p99", Kind.GAUGE),
        ("gateway_input_tokens_total", Kind.COUNTER),
        ("aibrix_prefix_cache_routing_decisions_total", Kind.COUNTER),
    ],
)
def test_what_aibrix_shows_is_known_as_its_own(name: str, kind: Kind) -> None:
    known = foreign.find(name)
    assert known is not None
    assert known.kind is kind
    assert known.who[0].startswith("AIBrix")
    assert known.may_have("model")


def test_what_aibrix_would_show_of_an_older_vllm_is_not() -> None:
    """Its dashboards ask for them, and no engine has them any more."""
    for name in ("gpu_cache_usage_perc", "time_per_output_token_seconds_bucket", "num_requests_swapped"):
        assert foreign.find(name) is None


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("vllm:gpu_cache_usage_perc", "vllm:kv_cache_usage_perc"),
        ("vllm:time_per_output_token_seconds_bucket", "vllm:inter_token_latency_seconds_bucket"),
        ("vllm:time_per_output_token_seconds", "vllm:inter_token_latency_seconds"),
        ("vllm:num_requests_swapped", "vllm:num_preemptions_total"),
        ("vllm:cpu_cache_usage_perc", "vllm:kv_cache_usage_perc"),
        ("cpu_cache_usage", "vllm:kv_cache_usage_perc"),
        ("vllm:avg_generation_throughput_toks_per_s", "rate(vllm:generation_tokens_total[5m])"),
        ("vllm:avg_generation_throughput_toks_per_sec", "rate(vllm:generation_tokens_total[5m])"),
        ("vllm:gpu_prefix_cache_hits_total", "vllm:prefix_cache_hits_total"),
        ("vllm:gpu_prefix_cache_hits", "vllm:prefix_cache_hits_total"),
        ("vllm:time_in_queue_requests_sum", "vllm:request_queue_time_seconds_sum"),
        ("keda_scaled_object_errors", "keda_scaled_object_errors_total"),
    ],
)
def test_what_is_gone_has_a_successor_that_is_there(name: str, use: str) -> None:
    gone = foreign.gone(name)
    assert gone is not None
    assert gone.use == use
    assert foreign.find(name) is None
    plain = use.removeprefix("rate(").partition("[")[0]
    assert foreign.find(plain) is not None or foreign.find(f"{plain}_bucket") is not None


def test_nothing_that_is_there_is_called_gone() -> None:
    for old in OLD_NAMES:
        assert foreign.find(old.old) is None
    for name in foreign._known():
        assert foreign.gone(name) is None, name
    assert foreign.gone("vllm:no_such_thing") is None


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("vllm:num_request_waiting", "vllm:num_requests_waiting"),
        ("vllm_num_requests_waiting", "vllm:num_requests_waiting"),
        ("DCGM_FI_DEV_GPU_TEMPERATURE", "DCGM_FI_DEV_GPU_TEMP"),
        ("kube_deployment_status_replica_available", "kube_deployment_status_replicas_available"),
        ("my_own_counter_total", None),
    ],
)
def test_what_was_meant(name: str, meant: str | None) -> None:
    assert foreign.find(name) is None
    assert foreign.near(name) == meant


def test_labels() -> None:
    known = foreign.find("vllm:request_success_total")
    assert known is not None
    assert known.may_have("finished_reason")
    assert known.may_have("job")
    assert not known.may_have("model")
    assert not known.may_have("le")
    assert known.grows
    bucket = foreign.find("vllm:e2e_request_latency_seconds_bucket")
    assert bucket is not None
    assert bucket.may_have("le")
    info = foreign.find("vllm:cache_config_info")
    assert info is not None
    assert info.may_have("gpu_memory_utilization")  # its labels are vLLM's configuration
    assert foreign.kind_of("DCGM_FI_DEV_GPU_TEMP") is Kind.GAUGE
    assert foreign.kind_of("DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION") is Kind.COUNTER
    assert foreign.kind_of("node_cpu_seconds_total") is Kind.COUNTER
    assert foreign.kind_of("nothing") is None
