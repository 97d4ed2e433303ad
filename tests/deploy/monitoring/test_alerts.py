"""The alerts, by Prometheus' own rule tests: each fires past its threshold, and is quiet at it."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from . import specs

PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (package prometheus)")

N = 'namespace="llm-serving"'
CHAT = f'{N},job="chat",pod="chat-0",instance="a"'
GATE = f'{N},job="gateway",pod="gateway-0",instance="b"'
GPU = 'Hostname="n1",gpu="0",UUID="GPU-1",job="dcgm",instance="c"'


def flat(value: float) -> str:
    """The same value for ever."""
    return f"{value}x3000"


def grows(step: float) -> str:
    """A counter."""
    return f"0+{step}x3000"


@dataclass(frozen=True)
class Case:
    """One alert: series at which it fires and at which it does not, and when."""

    hot: dict[str, str]
    quiet: dict[str, str]
    pending: str | None
    """A time at which it has not fired yet."""
    firing: str
    labels: str = ""
    interval: str = "15s"
    more_quiet: list[dict[str, str]] = field(default_factory=list)


def _latency(metric: str, bounds: tuple[float, float, float], below: float, all: float) -> dict[str, str]:
    low, slo, high = bounds
    return {
        f'vllm:{metric}_bucket{{{CHAT},le="{low}"}}': grows(0),
        f'vllm:{metric}_bucket{{{CHAT},le="{slo}"}}': grows(below),
        f'vllm:{metric}_bucket{{{CHAT},le="{high}"}}': grows(all),
        f'vllm:{metric}_bucket{{{CHAT},le="+Inf"}}': grows(all),
    }


def _stuck(running: float, waiting: float, step: float) -> dict[str, str]:
    return {
        f"vllm:num_requests_running{{{CHAT}}}": flat(running),
        f"vllm:num_requests_waiting{{{CHAT}}}": flat(waiting),
        f"vllm:iteration_tokens_total_count{{{CHAT}}}": f"100+{step}x3000",
    }


def _replicas(name: str, wanted: int, available: int) -> dict[str, str]:
    where = f'{N},deployment="{name}",job="ksm",instance="d"'
    return {
        f"kube_deployment_spec_replicas{{{where}}}": flat(wanted),
        f"kube_deployment_status_replicas_available{{{where}}}": flat(available),
    }


def _groups(name: str, wanted: int, ready: int) -> dict[str, str]:
    where = f'{N},statefulset="{name}",job="ksm",instance="d"'
    return {
        f"kube_statefulset_replicas{{{where}}}": flat(wanted),
        f"kube_statefulset_status_replicas_ready{{{where}}}": flat(ready),
    }


def _most(desired: int, most: int) -> dict[str, str]:
    where = f'{N},horizontalpodautoscaler="keda-hpa-chat-burst",job="ksm",instance="d"'
    return {
        f"kube_horizontalpodautoscaler_status_desired_replicas{{{where}}}": flat(desired),
        f"kube_horizontalpodautoscaler_spec_max_replicas{{{where}}}": flat(most),
    }


def _errors(failed: float) -> dict[str, str]:
    where = f'{GATE},route="chat",upstream="chat",end="done"'
    return {
        f'penstock:gateway_requests_total{{{where},code="200"}}': grows(100 - failed),
        f'penstock:gateway_requests_total{{{where},code="502"}}': grows(failed),
    }


_UP = f"up{{{CHAT}}}"
_GATE_UP = f"up{{{GATE}}}"
_WEIGHT = f'penstock:gateway_upstream_weight{{{GATE},replica="chat/0"}}'
_LOST = f'penstock:gateway_bills_total{{{GATE},upstream="chat",outcome="lost"}}'
_LATE = f'penstock:gateway_bills_total{{{GATE},upstream="chat",outcome="late"}}'
_DOLLARS = f'penstock:gateway_team_dollars_total{{{GATE},team="search"}}'
_SECONDS = f'penstock:gateway_team_device_seconds_total{{{GATE},team="search"}}'
_REFUSED = f"penstock:gateway_refusals_total{{{GATE},code="
_KV = f"vllm:kv_cache_usage_perc{{{CHAT}}}"
_KEDA = 'keda_scaled_object_errors_total{scaledObject="chat-burst",exported_namespace="llm-serving"}'

CASES: dict[tuple[str, str], Case] = {
    ("EngineKVCacheHigh", ""): Case({_KV: flat(0.901)}, {_KV: flat(0.9)}, "2m45s", "3m15s"),
    ("EngineKVCacheFilling", ""): Case({_KV: flat(0.851)}, {_KV: flat(0.85)}, "9m45s", "10m15s"),
    ("EngineQueueLong", ""): Case(
        {f"vllm:num_requests_waiting{{{CHAT}}}": flat(21)},
        {f"vllm:num_requests_waiting{{{CHAT}}}": flat(20)},
        "1m45s", "2m15s",
    ),
    ("EngineStuck", ""): Case(
        _stuck(1, 0, 0), _stuck(1, 0, 1), "1m", "4m",
        more_quiet=[_stuck(0, 0, 0), _stuck(64, 200, 0.1)],
    ),
    ("ModelDown", 'model="chat"'): Case({_UP: flat(0)}, {_UP: flat(1)}, "1m45s", "2m15s"),
    ("ModelDown", 'model="small.model"'): Case(
        {_UP: flat(1)}, {f'up{{{N},job="small-model",instance="a"}}': flat(1)}, "1m45s", "2m15s"
    ),
    ("LatencyOverSLO", 'slo="ttft_p95"'): Case(
        _latency("time_to_first_token_seconds", (0.25, 0.5, 0.75), 949, 1000),
        _latency("time_to_first_token_seconds", (0.25, 0.5, 0.75), 950, 1000),
        "5m", "12m",
    ),
    ("LatencyOverSLO", 'slo="itl_p99"'): Case(
        # P99 = 0.075 + 0.025 x (9900 - n) / (10000 - n): 80 ms at n = 9875
        _latency("inter_token_latency_seconds", (0.05, 0.075, 0.1), 9874, 10000),
        _latency("inter_token_latency_seconds", (0.05, 0.075, 0.1), 9876, 10000),
        "5m", "12m",
    ),
    ("LatencyOverSLO", 'slo="e2e_p95"'): Case(
        _latency("e2e_request_latency_seconds", (20.0, 30.0, 40.0), 949, 1000),
        _latency("e2e_request_latency_seconds", (20.0, 30.0, 40.0), 950, 1000),
        "5m", "12m",
    ),
    ("ReplicasMissing", 'model="chat"'): Case(_replicas("chat", 1, 0), _replicas("chat", 1, 1), "9m", "15m"),
    ("ReplicasMissing", 'model="small.model"'): Case(
        _replicas("small-model", 2, 1), _replicas("small-model", 2, 2), "9m", "15m"
    ),
    ("BurstReplicasMissing", ""): Case(
        _replicas("chat-burst", 3, 2), _replicas("chat-burst", 3, 3), "9m", "15m",
        more_quiet=[_replicas("chat-burst", 0, 0)],
    ),
    ("BurstAtItsMost", ""): Case(_most(7, 7), _most(6, 7), "14m", "16m"),
    ("ScalerFails", ""): Case({_KEDA: grows(1)}, {_KEDA: flat(7)}, "9m", "12m"),
    ("GatewayDown", ""): Case({_GATE_UP: flat(0)}, {_GATE_UP: flat(1)}, "1m45s", "2m15s"),
    ("GatewayErrors", ""): Case(_errors(5.1), _errors(5), "4m", "6m"),
    ("UpstreamOut", ""): Case({_WEIGHT: flat(0)}, {_WEIGHT: flat(0.01)}, "4m", "6m"),
    ("BillsLost", ""): Case({_LOST: grows(1)}, {_LOST: flat(3), _LATE: grows(1)}, None, "2m"),
    # a day's budget of 24 dollars used in six hours is 4 in an hour
    ("BudgetBurnsFast", 'budget="dollars_per_day"'): Case(
        {_DOLLARS: grows(4.05 / 60)}, {_DOLLARS: grows(3.95 / 60)}, None, "80m", interval="1m"
    ),
    # a month's 720 device-hours used in 15 days are 172,800 device-seconds in a day
    ("BudgetBurnsFast", 'budget="device_seconds_per_month"'): Case(
        {_SECONDS: grows(173_500 / 96)}, {_SECONDS: grows(172_000 / 96)}, None, "26h", interval="15m"
    ),
    ("BudgetExhausted", ""): Case(
        {_REFUSED + '"insufficient_quota"}': grows(1)},
        {_REFUSED + '"insufficient_quota"}': flat(9), _REFUSED + '"rate_limit_exceeded"}': grows(1)},
        None, "6m",
    ),
    ("GPUTemperatureHigh", ""): Case(
        {f"DCGM_FI_DEV_GPU_TEMP{{{GPU}}}": flat(86)},
        {f"DCGM_FI_DEV_GPU_TEMP{{{GPU}}}": flat(85)},
        "4m45s", "5m15s",
    ),
    ("GPUXidError", ""): Case(
        {f"DCGM_FI_DEV_XID_ERRORS{{{GPU}}}": flat(79)},
        {f"DCGM_FI_DEV_XID_ERRORS{{{GPU}}}": flat(0)},
        None, "2m",
    ),
}  # fmt: skip


def _test(
    series: dict[str, str], name: str, labels: str, interval: str, times: dict[str, int]
) -> dict[str, Any]:
    where = ",".join(each for each in (f'alertname="{name}"', 'alertstate="firing"', labels) if each)
    return {
        "interval": interval,
        "input_series": [{"series": each, "values": values} for each, values in series.items()],
        "promql_expr_test": [
            {
                "expr": f"count(ALERTS{{{where}}})",
                "eval_time": time,
                "exp_samples": [{"labels": "{}", "value": count}] if count else [],
            }
            for time, count in times.items()
        ],
    }


def _promtool(folder: Path, name: str, tests: list[dict[str, Any]], engine: str, evaluation: str) -> str:
    """Its output; the test fails where promtool does. Of the alerts it gets those of this name: all of them,
    evaluated for every series, take three times as long."""
    groups = []
    for group in specs.rules(engine)["groups"]:
        if rules := [rule for rule in group["rules"] if rule.get("alert", name) == name]:
            groups.append({**group, "rules": rules})
    (folder / "rules.yml").write_text(json.dumps({"groups": groups}))
    body = {"rule_files": ["rules.yml"], "evaluation_interval": evaluation, "tests": tests}
    (folder / "tests.yml").write_text(json.dumps(body))
    assert PROMTOOL is not None
    done = subprocess.run(
        [PROMTOOL, "test", "rules", "tests.yml"], cwd=folder, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_promtool
@pytest.mark.parametrize("key", CASES, ids=lambda key: "-".join(filter(None, key)).replace('"', ""))
def test_an_alert_fires_past_its_threshold_and_is_quiet_at_it(key: tuple[str, str], tmp_path: Path) -> None:
    name, labels = key
    case = CASES[key]
    hot: dict[str, int] = {case.firing: 1}
    if case.pending is not None:
        hot = {case.pending: 0, **hot}
    tests = [_test(case.hot, name, labels, case.interval, hot)]
    tests += [
        _test(series, name, labels, case.interval, {case.firing: 0})
        for series in (case.quiet, *case.more_quiet)
    ]
    _promtool(tmp_path, name, tests, "penstock", case.interval)


def test_every_alert_has_a_case() -> None:
    for engine, scaler in (("penstock", "keda"), ("vllm", "keda")):
        for rule in specs.alerts(engine, scaler):
            wanted = {
                key
                for key in CASES
                if key[0] == rule["alert"]
                and (not key[1] or tuple(key[1].replace('"', "").split("=")) in rule["labels"].items())
            }
            assert len(wanted) == 1, (rule["alert"], rule["labels"])


@needs_promtool
@pytest.mark.parametrize(
    ("name", "labels", "sets"),
    [
        ("ReplicasMissing", 'model="huge"', {"huge-nodes": 1, "huge-nodes-0": 0}),
        ("BurstReplicasMissing", 'model="huge"', {"huge-burst": 1}),
        ("GroupIncomplete", 'statefulset="huge-nodes-0"', {"huge-nodes": 0, "huge-nodes-0": 1}),
        ("GroupIncomplete", 'statefulset="huge-burst-12"', {"huge-burst-12": 1}),
    ],
)
def test_a_replica_of_several_nodes_that_is_short_of_one(
    name: str, labels: str, sets: dict[str, int], tmp_path: Path
) -> None:
    """A LeaderWorkerSet is a StatefulSet of leaders, and one of workers for each of them."""
    hot = {key: value for each, short in sets.items() for key, value in _groups(each, 1, 1 - short).items()}
    whole = {key: value for each in sets for key, value in _groups(each, 1, 1).items()}
    other = _groups("huge", 1, 0) | _groups("huge-nodes-extra", 1, 0)
    tests = [
        _test(hot, name, labels, "15s", {"9m": 0, "15m": 1}),
        _test(whole, name, labels, "15s", {"15m": 0}),
        _test(other, name, "", "15s", {"15m": 0}),
    ]
    _promtool(tmp_path, name, tests, "groups", "15s")


@needs_promtool
@pytest.mark.parametrize("engine", ["penstock", "vllm"])
@pytest.mark.parametrize("scaler", ["keda", "hpa"])
def test_promtool_takes_the_rules(engine: str, scaler: str, tmp_path: Path) -> None:
    assert PROMTOOL is not None
    path = tmp_path / "rules.yml"
    path.write_text(json.dumps(specs.rules(engine, scaler)))
    done = subprocess.run([PROMTOOL, "check", "rules", str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"SUCCESS: {len(specs.alerts(engine, scaler))} rules found" in done.stdout


@needs_promtool
def test_what_an_alert_says(tmp_path: Path) -> None:
    """Labels and texts as they arrive: templates are filled in."""
    case = CASES["EngineKVCacheHigh", ""]
    test = {
        "interval": "15s",
        "input_series": [{"series": each, "values": values} for each, values in case.hot.items()],
        "alert_rule_test": [
            {
                "alertname": "EngineKVCacheHigh",
                "eval_time": "5m",
                "exp_alerts": [
                    {
                        "exp_labels": {
                            "severity": "warning",
                            "namespace": "llm-serving",
                            "job": "chat",
                            "pod": "chat-0",
                        },
                        "exp_annotations": {
                            "summary": "KV cache over 90 %",
                            "description": "The KV cache of chat-0 of chat is at 90.1%: requests will "
                            "wait, or be put back.",
                        },
                    }
                ],
            }
        ],
    }
    _promtool(tmp_path, "EngineKVCacheHigh", [test], "penstock", "15s")


def test_the_numbers_of_the_documents() -> None:
    by_name = {rule["alert"]: rule for rule in specs.alerts()}
    assert by_name["EngineKVCacheHigh"]["expr"].endswith("> 0.9")
    assert by_name["EngineKVCacheHigh"]["for"] == "3m"
    assert by_name["EngineQueueLong"]["expr"].endswith("> 20")
    assert by_name["EngineQueueLong"]["for"] == "2m"
    assert by_name["GPUTemperatureHigh"]["expr"].endswith("> 85")
    assert by_name["GPUTemperatureHigh"]["for"] == "5m"
    assert by_name["EngineKVCacheFilling"]["expr"].endswith("> 0.85")
