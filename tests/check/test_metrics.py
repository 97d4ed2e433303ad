"""Rules on queries, dashboards, scalers and adapters: each trap is found, and what is right is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("promql_parser", reason="promql-parser is not installed (penstock[check])")

from penstock.check import metrics, promql, run
from penstock.check.finding import Finding
from penstock.check.metrics_texts import expressions
from penstock.check.sources import read_text

MANIFESTS = Path(__file__).parents[3] / "shared" / "sources" / "manifests"
OURS = {rule.id for rule in metrics.RULES}


def found(text: str, path: str = "x.yaml") -> list[Finding]:
    """What rules on metrics find in a text."""
    documents = read_text(text, path).documents
    return [finding for each in documents for finding in metrics.rules_of(each, documents)]


def test_names_of_a_router_that_begins_as_vllm_does() -> None:
    text = "groups: [{name: a, rules: [{alert: A, expr: 'sum(rate(%s[5m])) > 1'}]}]"
    assert "metric-unknown" not in ids(text % "vllm:num_incoming_requests_total")
    assert "metric-unknown" in ids(text % "vllm:num_incoming_requestz_total")


def ids(text: str, path: str = "x.yaml") -> list[str]:
    return [each.rule.id for each in found(text, path)]


def alert(expr: str) -> str:
    rule = {"alert": "A", "expr": expr, "for": "5m"}
    body = {"groups": [{"name": "g", "rules": [rule]}]}
    return yaml.safe_dump({"apiVersion": "monitoring.coreos.com/v1", "kind": "PrometheusRule",
                           "metadata": {"name": "r"}, "spec": body}, width=500)  # fmt: skip


def trigger(query: str, threshold: str = "10", **more: str) -> str:
    metadata = {"serverAddress": "http://p:9090", "query": query, "threshold": threshold,
                "ignoreNullValues": "false"}  # fmt: skip
    one = {"type": "prometheus", "metadata": {**metadata, **more.pop("metadata", {})}, **more}  # type: ignore[call-overload,dict-item]
    hold = {"type": "prometheus", "metadata": {**metadata, "threshold": "1", "query":
            "sum(vllm:num_requests_running) / 12.8"}}  # fmt: skip
    fallback = {"failureThreshold": 3, "replicas": 1, "behavior": "currentReplicas"}
    spec = {"scaleTargetRef": {"name": "d"}, "fallback": fallback, "triggers": [one, hold]}
    top = {"apiVersion": "keda.sh/v1alpha1", "kind": "ScaledObject", "metadata": {"name": "s"}}
    return yaml.safe_dump({**top, "spec": spec}, width=500)


@pytest.mark.parametrize(
    ("expr", "rule"),
    [
        ("vllm:gpu_cache_usage_perc > 0.9", "metric-removed"),  # T2
        (
            "histogram_quantile(0.99, sum by (le) (rate(vllm:time_per_output_token_seconds_bucket[5m]))) > 1",
            "metric-removed",
        ),  # T3
        ("vllm:num_requests_swapped > 0", "metric-removed"),
        ("vllm:cpu_cache_usage_perc > 0.5", "metric-removed"),
        ("vllm:avg_generation_throughput_toks_per_s < 10", "metric-removed"),  # T4
        ("rate(vllm:num_requests_running[5m]) > 1", "rate-of-gauge"),
        ("increase(DCGM_FI_DEV_GPU_TEMP[5m]) > 1", "rate-of-gauge"),
        ("sum(rate(vllm:kv_cache_usage_perc[1m])) > 0", "rate-of-gauge"),
        ("vllm:num_request_waiting > 20", "metric-unknown"),
        ("penstock:gateway_request_total > 20", "metric-unknown"),
        ("DCGM_FI_DEV_GPU_TEMPERATURE > 85", "metric-unknown"),
        ("vllm_num_requests_waiting > 20", "metric-unknown"),
        ("somebody_elses_metric > 1", "metric-unlisted"),
        ("vllm:kv_cache_usage_perc > 90", "threshold-unit"),
        ("90 < vllm:kv_cache_usage_perc", "threshold-unit"),
        ("max by (pod) (avg_over_time(vllm:kv_cache_usage_perc[5m])) >= 85", "threshold-unit"),
        ("vllm:kv_cache_usage_perc * 100 > 0.9", "threshold-unit"),
        ("DCGM_FI_DEV_GPU_UTIL > 0.7", "threshold-unit"),
        (
            "histogram_quantile(0.9, sum by (le) (rate(vllm:e2e_request_latency_seconds_bucket[5m]))) > 1000",
            "threshold-unit",
        ),
        ("histogram_quantile(95, rate(vllm:e2e_request_latency_seconds_bucket[5m])) > 1", "quantile-range"),
        ("quantile(-0.5, vllm:num_requests_waiting) > 1", "quantile-range"),
        ("DCGM_FI_PROF_GR_ENGINE_ACTIVE > 70", "threshold-unit"),
        (
            "histogram_quantile(0.95, sum by (le) (rate(vllm:time_to_first_token_seconds_bucket[5m]))) > 500",
            "threshold-unit",
        ),
        (
            'sum(rate(penstock:gateway_requests_total{code=~"5.."}[5m])) / '
            "sum(rate(penstock:gateway_requests_total[5m])) > 5",
            "threshold-unit",
        ),
        ("histogram_quantile(0.95, sum(rate(vllm:e2e_request_latency_seconds_bucket[5m]))) > 1",
         "quantile-without-le"),
        ("histogram_quantile(0.95, sum by (job) (rate(vllm:e2e_request_latency_seconds_bucket[5m]))) > 1",
         "quantile-without-le"),
        ("histogram_quantile(0.95, sum without (le) (rate(vllm:e2e_request_latency_seconds_bucket[5m]))) > 1",
         "quantile-without-le"),
        ("histogram_quantile(0.95, sum by (le) (rate(vllm:e2e_request_latency_seconds_sum[5m]))) > 1",
         "quantile-of-no-buckets"),
        ("histogram_quantile(0.95, vllm:num_requests_waiting) > 1", "quantile-of-no-buckets"),
        ("DCGM_FI_DEV_FB_USED / DCGM_FI_DEV_FB_FREE > 0.85", "used-over-free"),  # T6
        ("sum(DCGM_FI_DEV_FB_USED) / sum(DCGM_FI_DEV_FB_FREE) > 0.85", "used-over-free"),
        ('vllm:num_requests_waiting{model="llama"} > 20', "label-unknown"),
        ("sum by (model) (vllm:num_requests_waiting) > 20", "label-unknown"),
        ("vllm:generation_tokens_total > 1000000", "counter-as-level"),
        ("sum(vllm:request_success_total) > 100", "counter-as-level"),
        ("sum(vllm:num_requests_waiting > 20", "promql-broken"),
        ("vllm:num_requests_waiting >> 20", "promql-broken"),
        ("(" * 5000 + "a" + ")" * 5000, "promql-broken"),
        ("+".join(["a"] * 9000), "promql-broken"),
    ],
)  # fmt: skip
def test_a_trap_in_an_alert(expr: str, rule: str) -> None:
    assert rule in ids(alert(expr))


@pytest.mark.parametrize(
    "expr",
    [
        "vllm:kv_cache_usage_perc > 0.9",
        "vllm:kv_cache_usage_perc * 100 > 90",
        "DCGM_FI_DEV_GPU_UTIL / 100 > 0.9",
        "avg_over_time(vllm:num_requests_running[5m]) > 10",
        "deriv(vllm:num_requests_waiting[5m]) > 1",
        "rate(vllm:iteration_tokens_total_count[5m]) == 0",
        "rate(vllm:request_queue_time_seconds_sum[5m]) / rate(vllm:request_queue_time_seconds_count[5m]) > 2",
        "histogram_quantile(0.99, rate(vllm:e2e_request_latency_seconds_bucket[5m])) > 120",
        "histogram_quantile(0.9, sum without (pod) (rate(vllm:e2e_request_latency_seconds_bucket[5m]))) > 1",
        "DCGM_FI_DEV_FB_USED / (DCGM_FI_DEV_FB_USED + DCGM_FI_DEV_FB_FREE) > 0.95",
        'sum by (job, finished_reason) (rate(vllm:request_success_total{job="a"}[5m])) > 1',
        'count by (shard) (label_replace(vllm:num_requests_running, "shard", "$1", "pod", ".*-(.*)")) > 3',
        "absent(up == 1)",
        'kube_pod_labels{label_app="x"} > 0',
        "vllm:cache_config_info == 1",
        "increase(penstock:gateway_dollars_total[1h]) > 5",
        "node_memory_MemAvailable_bytes < 1e9",
        "time() - process_start_time_seconds < 60",
        'ALERTS{alertname="A"} > 0',
    ],
)
def test_what_is_right_in_an_alert(expr: str) -> None:
    assert found(alert(expr)) == []


def test_a_name_that_a_recording_rule_makes_is_known() -> None:
    group = {"name": "g", "rules": [
        {"record": "job:waiting:sum", "expr": "sum by (job) (vllm:num_requests_waiting)"},
        {"alert": "A", "expr": "job:waiting:sum > 20"},
    ]}  # fmt: skip
    assert ids(yaml.safe_dump({"groups": [group]})) == []
    group["rules"] = group["rules"][1:]
    assert ids(yaml.safe_dump({"groups": [group]})) == ["metric-unlisted"]


@pytest.mark.parametrize(
    ("query", "more", "rule"),
    [
        ("avg(vllm:num_requests_waiting)", {}, "scaler-average"),  # T7
        ("max(vllm:num_requests_waiting)", {}, "scaler-average"),
        ("avg_over_time(avg(vllm:num_requests_waiting)[1m:])", {}, "scaler-average"),
        ("vllm:num_requests_waiting", {}, "scaler-many-elements"),
        ('vllm:num_requests_waiting{model_name="m"}', {}, "scaler-many-elements"),
        ("sum by (pod) (vllm:num_requests_waiting)", {}, "scaler-many-elements"),
        ("sum(DCGM_FI_DEV_FB_USED)", {}, "scaler-on-memory"),  # T6
        ("sum(container_memory_working_set_bytes)", {}, "scaler-on-memory"),
        ("sum(DCGM_FI_DEV_GPU_UTIL)", {}, "scaler-on-gpu-util"),  # T8
        ("avg(DCGM_FI_DEV_GPU_UTIL)", {}, "scaler-on-gpu-util"),
        ("sum(vllm:num_requests_waiting) or vector(0)", {}, "scaler-absent-is-zero"),
        (
            "sum(vllm:num_requests_waiting)",
            {"metadata": {"ignoreNullValues": "true"}},
            "scaler-absent-is-zero",
        ),
        ("sum(vllm:num_requests_waiting)", {"metricType": "Value"}, "scaler-value-type"),
        ("max(vllm:kv_cache_usage_perc)", {"threshold": "80", "metricType": "Value"}, "threshold-unit"),
        ("sum(vllm:requests_waiting)", {}, "metric-unknown"),
        ("sum(no_such_thing)", {}, "metric-unknown"),
        ("sum(vllm:avg_prompt_throughput_toks_per_s)", {}, "metric-removed"),
    ],
)
def test_a_trap_in_a_trigger(query: str, more: dict[str, Any], rule: str) -> None:
    threshold = more.get("threshold", "10")
    rest = {key: value for key, value in more.items() if key != "threshold"}
    assert rule in ids(trigger(query, threshold, **rest))


@pytest.mark.parametrize(
    ("query", "more"),
    [
        ("sum(vllm:num_requests_waiting)", {}),
        ('clamp_min(sum(vllm:num_requests_waiting{job="chat"}) - 10, 0)', {}),
        ("sum(vllm:num_requests_waiting) + sum(vllm:num_requests_running)", {}),
        ("max(vllm:kv_cache_usage_perc)", {"metricType": "Value", "threshold": "0.8"}),
        (
            "histogram_quantile(0.95, sum by (le) (rate(vllm:e2e_request_latency_seconds_bucket[5m])))",
            {"metricType": "Value"},
        ),
    ],
)
def test_what_is_right_in_a_trigger(query: str, more: dict[str, str]) -> None:
    threshold = more.get("threshold", "10")
    rest = {key: value for key, value in more.items() if key != "threshold"}
    assert found(trigger(query, threshold, **rest)) == []  # type: ignore[arg-type]


def test_a_scaler_on_waiting_alone_flaps_and_one_without_fallback_is_noted() -> None:
    data = yaml.safe_load(trigger("sum(vllm:num_requests_waiting)"))
    del data["spec"]["triggers"][1], data["spec"]["fallback"]
    assert ids(yaml.safe_dump(data)) == ["scaler-no-fallback", "scaler-flaps"]


def hpa(name: str, kind: str = "Pods", target: str = "AverageValue") -> dict[str, Any]:
    part = {"Pods": "pods", "External": "external"}[kind]
    metric = {
        "type": kind,
        part: {"metric": {"name": name}, "target": {"type": target, "averageValue": "10"}},
    }
    return {"apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler", "metadata": {"name": "h"},
            "spec": {"scaleTargetRef": {"kind": "Deployment", "name": "d"}, "metrics": [metric]}}  # fmt: skip


ADAPTER = {"rules": [{
    "seriesQuery": "vllm:num_requests_waiting", "name": {"matches": "(.*)", "as": "waiting_requests"},
    "resources": {"overrides": {"namespace": {"resource": "namespace"}, "pod": {"resource": "pod"}}},
    "metricsQuery": "sum(<<.Series>>{<<.LabelMatchers>>}) by (<<.GroupBy>>)",
}]}  # fmt: skip


@pytest.mark.parametrize(
    ("documents", "rule"),
    [
        ([hpa("DCGM_FI_DEV_GPU_UTIL")], "scaler-on-gpu-util"),
        ([hpa("DCGM_FI_DEV_FB_USED")], "scaler-on-memory"),
        ([hpa("waiting_requests")], "hpa-metric-unseen"),
        ([hpa("waiting_request"), ADAPTER], "hpa-metric-unknown"),
        ([hpa("waiting_requests"), ADAPTER], "scaler-flaps"),
        ([hpa("vllm_gpu_cache_usage_perc")], "metric-removed"),
    ],
)
def test_a_trap_in_an_hpa(documents: list[Any], rule: str) -> None:
    assert rule in ids(yaml.safe_dump_all(documents))


def _adapter(**more: Any) -> str:
    rule = {**ADAPTER["rules"][0], **more}
    return yaml.safe_dump({"rules": [rule]}, width=300)


def test_an_adapter() -> None:
    assert found(_adapter()) == []
    assert ids(_adapter(metricsQuery="avg(<<.Series>>{<<.LabelMatchers>>}) by (<<.GroupBy>>)")) == [
        "adapter-average"
    ]
    assert "adapter-without-matchers" in ids(_adapter(metricsQuery="sum(<<.Series>>) by (<<.GroupBy>>)"))
    assert "metric-removed" in ids(_adapter(seriesQuery="vllm:gpu_cache_usage_perc"))
    external = {"rules": {"external": [{**ADAPTER["rules"][0], "metricsQuery": "avg(<<.Series>>)"}]}}
    assert "scaler-average" in ids(yaml.safe_dump(external))


def test_an_engines_cpu_and_memory_are_no_signals() -> None:
    limits = {"nvidia.com/gpu": 1}
    pod = {"containers": [{"name": "c", "resources": {"limits": limits}}]}
    deployment = {"kind": "Deployment", "apiVersion": "apps/v1", "metadata": {"name": "d"},
                  "spec": {"template": {"spec": pod}}}  # fmt: skip
    scaler = hpa("x")
    for resource, rule in (("cpu", "scaler-on-cpu"), ("memory", "scaler-on-memory")):
        scaler["spec"]["metrics"] = [{"type": "Resource", "resource": {"name": resource}}]
        assert ids(yaml.safe_dump_all([scaler, deployment])) == [rule]
    limits.clear()  # a gateway may well be scaled by its CPU
    assert ids(yaml.safe_dump_all([scaler, deployment])) == []


def dashboard(expr: str, query: str = "label_values(vllm:num_requests_running, job)") -> dict[str, Any]:
    target = {"refId": "A", "expr": expr}
    return {"title": "t", "panels": [
        {"type": "row", "panels": [{"type": "timeseries", "title": "p", "targets": [target]}]},
        {"type": "timeseries", "datasource": {"type": "loki"}, "targets": [{"expr": '{app="x"} |= "y"'}]},
    ], "templating": {"list": [{"name": "job", "type": "query", "query": query}]}}  # fmt: skip


def test_a_dashboard_and_one_in_a_configmap() -> None:
    right = dashboard('sum by (job) (rate(vllm:generation_tokens_total{job=~"$job"}[$__rate_interval]))')
    wrong = dashboard('sum(rate(vllm:gpu_prefix_cache_hits_total{job=~"$job"}[$__rate_interval]))')
    assert found(json.dumps(right), "d.json") == []
    assert ids(json.dumps(wrong, indent=1), "d.json") == ["metric-removed"]
    assert ids(json.dumps(dashboard("up", "label_values(vllm:gpu_cache_usage_perc, pod)")), "d.json") == [
        "metric-removed"
    ]
    for data, expected in ((right, []), (wrong, ["metric-removed"])):
        text = yaml.safe_dump({"kind": "ConfigMap", "apiVersion": "v1", "metadata": {"name": "d"},
                               "data": {"d.json": json.dumps(data, indent=1)}})  # fmt: skip
        assert ids(text) == expected


def test_the_line_of_a_query_in_a_dashboard_in_a_configmap() -> None:
    body = json.dumps(dashboard("vllm:gpu_cache_usage_perc"), indent=1)
    indented = "\n".join("    " + line for line in body.splitlines())
    text = f"kind: ConfigMap\napiVersion: v1\nmetadata: {{name: d}}\ndata:\n  d.json: |\n{indented}\n"
    (finding,) = found(text)
    assert "gpu_cache_usage_perc" in text.splitlines()[finding.line - 1]


def test_places_are_exact() -> None:
    text = (
        "groups:\n- name: g\n  rules:\n  - alert: A\n    expr: |\n      sum(up) > 0\n"
        "      and vllm:gpu_cache_usage_perc > 0.9\n"
    )
    (finding,) = found(text)
    assert (finding.line, finding.column) == (7, 11)
    assert finding.fix == "Use vllm:kv_cache_usage_perc."


def _bundle() -> list[dict[str, Any]]:
    from tests.deploy.monitoring import specs

    objects: list[dict[str, Any]] = [json.loads(json.dumps(each)) for each in specs.compiled()]
    for kind, names in (
        ("Service", ("chat", "small-model", "gateway")),
        ("Deployment", ("chat", "chat-burst", "small-model", "gateway")),
    ):
        objects += [
            {"kind": kind, "apiVersion": "v1", "metadata": {"name": name, "namespace": "llm-serving"}}
            for name in names
        ]
    return objects


def test_nothing_is_found_in_what_is_compiled() -> None:
    text = yaml.safe_dump_all(_bundle(), width=200)
    documents = read_text(text, "x.yaml").documents
    assert sum(len(list(expressions(each))) for each in documents) > 100
    assert found(text) == []


@pytest.mark.parametrize(
    ("kind", "old", "new"),
    [
        ("PrometheusRule", 'job="chat"', 'job="chatt"'),
        ("PrometheusRule", 'job="gateway"', 'job="penstock-gateway"'),
        ("PrometheusRule", 'deployment="chat-burst"', 'deployment="chat-spot"'),
        ("PrometheusRule", 'scaledObject="chat-burst"', 'scaledObject="chat"'),
        ("PrometheusRule", "keda-hpa-chat-burst", "keda-hpa-chat"),
        ("PrometheusRule", "chat|small-model", "chat|small"),
        ("ScaledObject", 'job="chat"', 'job="other"'),
        ("ScaledObject", 'deployment="chat-burst"', 'deployment="chat-spot"'),
    ],
)
def test_a_name_that_is_not_there(kind: str, old: str, new: str) -> None:
    objects = _bundle()
    for index, each in enumerate(objects):
        if each["kind"] == kind:
            changed = json.dumps(each).replace(old.replace('"', '\\"'), new.replace('"', '\\"'))
            assert changed != json.dumps(each)
            objects[index] = json.loads(changed)
    assert set(ids(yaml.safe_dump_all(objects, width=200))) == {"query-selects-nothing"}


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc", "metric-removed"),
        ("vllm:num_requests_waiting", "vllm:num_requests_waitng", "metric-unknown"),
        ("> 0.9", "> 90", "threshold-unit"),
        ("namespace, job, le", "namespace, job", "quantile-without-le"),
        ("time_to_first_token_seconds_bucket", "time_to_first_token_seconds_sum", "quantile-of-no-buckets"),
        ("increase(vllm:iteration_tokens_total_count", "increase(vllm:num_requests_running", "rate-of-gauge"),
        ("penstock:gateway_upstream_weight", "penstock:gateway_upstream_wait", "metric-unknown"),
        ("DCGM_FI_DEV_GPU_TEMP)", "DCGM_FI_DEV_TEMP)", "metric-unknown"),
        ('team=\\"search\\"', 'teams=\\"search\\"', "label-unknown"),
        ("by (replica)", "by (replicas)", "label-unknown"),
        ("max by (namespace, job, pod)", "max by (namespace, job)", "alert-label-lost"),
        ("kube_deployment_spec_replicas", "kube_deployment_replicas", "metric-unknown"),
        ("[5m]))) > 0.5", "[5m]))) > 500", "threshold-unit"),
        ("absent(up", "absent((up", "promql-broken"),
    ],
)
def test_a_mutated_alert_is_found(old: str, new: str, rule: str) -> None:
    objects = _bundle()
    changed = json.dumps(objects).replace(old, new)
    assert changed != json.dumps(objects), old
    assert rule in ids(yaml.safe_dump_all(json.loads(changed), width=200))


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("clamp_min(sum(", "clamp_min(avg(", "scaler-average"),
        (
            "clamp_min(sum(vllm:num_requests_waiting",
            "clamp_min((vllm:num_requests_waiting",
            "scaler-many-elements",
        ),
        ('"ignoreNullValues": "false"', '"ignoreNullValues": "true"', "scaler-absent-is-zero"),
        ('"metricType": "AverageValue"', '"metricType": "Value"', "scaler-value-type"),
        ('"fallback"', '"fallbacks"', "scaler-no-fallback"),
        ("vllm:num_requests_waiting", "DCGM_FI_DEV_FB_USED", "scaler-on-memory"),
        ("vllm:num_requests_waiting", "DCGM_FI_DEV_GPU_UTIL", "scaler-on-gpu-util"),
    ],
)
def test_a_mutated_scaler_is_found(old: str, new: str, rule: str) -> None:
    objects = _bundle()
    for index, each in enumerate(objects):
        if each["kind"] == "ScaledObject":
            changed = json.dumps(each).replace(old, new)
            assert changed != json.dumps(each)
            objects[index] = json.loads(changed)
    assert rule in ids(yaml.safe_dump_all(objects, width=200))


@pytest.mark.skipif(not MANIFESTS.is_dir(), reason="the source documents are not here")
def test_the_source_documents_manifests() -> None:
    texts = {path.name: path for path in sorted(MANIFESTS.glob("*.yaml"))}
    by_file: dict[str, set[tuple[int, str]]] = {}
    for finding in run.check([MANIFESTS]):
        if finding.rule.id in OURS:
            by_file.setdefault(Path(finding.path).name, set()).add((finding.line, finding.rule.id))
    assert set(texts) >= set(by_file)
    assert by_file["001-alerts.yaml"] == {(11, "metric-removed")}  # T2
    rules = {rule for _, rule in by_file["001-serving.yaml"]}
    assert rules >= {
        *("scaler-average", "scaler-on-memory", "used-over-free"),  # T7, T6
        *("scaler-on-gpu-util", "scaler-many-elements"),  # T8
    }
    assert {rule for _, rule in by_file["003-adapter-values.yaml"]} >= {"adapter-average"}


@pytest.mark.parametrize(
    ("expr", "lost"),
    [
        ("max(vllm:kv_cache_usage_perc) > 0.9", True),
        ("max by (job) (vllm:kv_cache_usage_perc) > 0.9", True),
        (
            "histogram_quantile(0.9, sum by (le) (rate(vllm:e2e_request_latency_seconds_bucket[5m]))) > 1",
            True,
        ),
        ("sum by (job) (up) / sum by (job) (up) > 0.9 and sum by (pod) (up) > 1", True),
        ("max by (pod) (vllm:kv_cache_usage_perc) > 0.9", False),
        ("max without (engine) (vllm:kv_cache_usage_perc) > 0.9", False),
        ("vllm:kv_cache_usage_perc > 0.9", False),
        ("topk(3, vllm:kv_cache_usage_perc) > 0.9", False),
        ("sum by (pod) (up) or sum by (job) (up)", False),
        ("sum by (job) (up) * on (job) group_left (pod) up > 1", False),
    ],
)
def test_a_label_that_an_alerts_text_has_lost(expr: str, lost: bool) -> None:
    data = yaml.safe_load(alert(expr))
    data["spec"]["groups"][0]["rules"][0]["annotations"] = {"summary": "{{ $labels.pod }} is {{ $value }}"}
    assert ("alert-label-lost" in ids(yaml.safe_dump(data, width=500))) == lost


def test_names_in_code_and_in_code_blocks() -> None:
    shell = (
        "curl -s localhost:8000/metrics | grep vllm:gpu_cache_usage_perc\n"
        "# vllm:num_requests_swapped: removed\n"
    )
    (finding,) = (each for each in run.check_text(shell, "x.sh") if each.rule.id == "metric-named")
    assert (finding.line, finding.column, finding.fix) == (1, 39, "Use vllm:kv_cache_usage_perc.")
    code = 'QUEUE = "vllm:num_requests_waiting"\nCACHE = "vllm:cpu_cache_usage_perc"\n'
    assert [each.line for each in run.check_text(code, "x.py") if each.rule.id == "metric-named"] == [2]


def test_promql_in_a_document() -> None:
    pytest.importorskip("markdown_it")
    text = (
        "# Metrics\n\n```promql\n# throughput\nrate(vllm:num_requests_running[5m])\n\n"
        "vllm:kv_cache_usage_perc > 90\nrate(vllm:avg_generation_throughput_toks_per_s[5m])\n```\n"
    )
    found = [(each.line, each.rule.id) for each in run.check_text(text, "x.md") if each.rule.id in OURS]
    assert found == [(5, "rate-of-gauge"), (7, "threshold-unit"), (8, "metric-removed")]


def test_long_and_strange_texts_end_soon() -> None:
    for text in ("{" * 300, "a" * 30_000, "[" * 300, '"' * 99, "$" * 5000, "sum(" * 250, "\x00", "€", ""):
        assert "promql-broken" in ids(alert(text)) or text == ""
    assert not promql.parse(" or ".join(["up"] * 240)).single
