"""What follows the load: the numbers as an HPA takes them, KEDA's and the HPA's objects, the adapter."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("promql_parser", reason="promql-parser is not installed (penstock[check])")

from penstock.deploy import monitoring
from penstock.deploy.monitoring import scaling
from penstock.deploy.workloads import Workload

from . import specs
from .autoscaler import Autoscaler, Engines, run
from .evaluate import Samples, evaluate

PROMTOOL = shutil.which("promtool")
S, Q, USERS = 16, 10, 50


def _object(
    kind: str, engine: str = "penstock", scaler: str = "keda", slots: int = S, load_time: int = 60
) -> dict[str, Any]:
    (found,) = (each for each in specs.compiled(engine, scaler, slots, load_time) if each["kind"] == kind)
    return dict(found["spec"])


def _burst(engine: str = "penstock", scaler: str = "keda") -> Workload:
    (found,) = scaling.scaled(specs.bundle(engine, scaler))
    return found


def _keda(*only: str, slots: int = S, load_time: int = 60) -> Autoscaler:
    """As the ScaledObject has it; only: some of its triggers."""
    spec = _object("ScaledObject", slots=slots, load_time=load_time)
    return Autoscaler(
        metrics=[
            (each["metadata"]["query"], float(each["metadata"]["threshold"]))
            for each in spec["triggers"]
            if not only or each["name"] in only
        ],
        least=spec["minReplicaCount"],
        most=spec["maxReplicaCount"],
        behavior=spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"],
        cooldown=spec["cooldownPeriod"],
    )


def _hpa() -> Autoscaler:
    """As the HPA has it, with the adapter's rules behind the names of its metrics."""
    spec = _object("HorizontalPodAutoscaler", scaler="hpa")
    rules = scaling.adapter_values(specs.bundle("penstock", "hpa"))["rules"]["external"]
    queries = {each["name"]["as"]: each["metricsQuery"] for each in rules}
    return Autoscaler(
        metrics=[
            (queries[each["external"]["metric"]["name"]], float(each["external"]["target"]["averageValue"]))
            for each in spec["metrics"]
        ],
        least=spec["minReplicas"],
        most=spec["maxReplicas"],
        behavior=spec["behavior"],
    )


@pytest.mark.parametrize("load_time", [30, 240, 600])
def test_fifty_users_have_three_replicas_asked_for_within_ninety_seconds(load_time: int) -> None:
    history = run(_keda(load_time=load_time), Engines(S, load_time), lambda now: USERS, 90)
    assert history[-1][1] >= 2, history  # and one of the floor
    assert 1 + max(count for _, count in history) >= 3


def test_the_same_with_an_hpa_whose_burst_is_never_empty() -> None:
    engines = Engines(S, 30, burst=[0])
    # 50 would do with the two that there always are: 9 wait at each, and the threshold is 10
    history = run(_hpa(), engines, lambda now: 60 if now >= 60 else 0, 60 + 90)
    assert history[-1][1] >= 2, history


@pytest.mark.parametrize(("slots", "by_cache"), [(S, None), (256, 12)])
@pytest.mark.parametrize("users", [30, 50, 64, 90])
def test_full_replicas_do_not_flap(users: int, slots: int, by_cache: int | None) -> None:
    """Once there are enough, few wait; that is no reason to take one away. Two hours."""
    engines = Engines(slots, 60, by_cache=by_cache)
    history = run(_keda(slots=slots), engines, lambda now: users, 7200)
    assert max(when for when, _ in history) < 900, history
    assert history[-1][1] > 0
    waiting = [value for (name, _), value in engines.samples(7200, users).items() if name.endswith("waiting")]
    assert sum(waiting) <= Q * len(waiting)


@pytest.mark.parametrize(("slots", "by_cache", "users"), [(S, None, 64), (256, 12, 50)])
def test_waiting_requests_alone_would_flap(slots: int, by_cache: int | None, users: int) -> None:
    """What the other two numbers are for."""
    engines = Engines(slots, 60, by_cache=by_cache)
    history = run(_keda("waiting", slots=slots), engines, lambda now: users, 7200)
    assert len(history) > 8, history


def test_occupancy_alone_does_not_see_a_cache_that_is_full() -> None:
    scaler = _keda("waiting", "occupancy", slots=256)
    history = run(scaler, Engines(256, 60, by_cache=12), lambda now: USERS, 7200)
    assert len(history) > 8, history


def test_replicas_go_one_by_one_and_not_before_the_load_was_lower_for_five_minutes() -> None:
    history = run(_keda(), Engines(S, 30), lambda now: 100 if now < 1800 else 4, 5400)
    most = max(count for _, count in history)
    assert most >= 4
    down = [(when, count) for when, count in history if when >= 1800]
    assert down[0][0] >= 1800 + 300
    assert [count for _, count in down] == list(range(most - 1, -1, -1))
    gaps = [after - before for (before, _), (after, _) in pairwise(down)]
    assert all(gap >= 180 for gap in gaps), down


def test_one_is_taken_away_exactly_when_the_rest_holds_the_load_at_the_utilization() -> None:
    """Two of the burst and the floor: 3 x 16 slots. 25 requests fit two at 80 % (25.6), 26 do not."""
    for users, expected in ((25, 1), (26, 2)):
        engines = Engines(S, 0, burst=[0, 0])
        history = run(_keda(), engines, lambda now, users=users: users, 1500)  # type: ignore[misc]
        assert history[-1][1] == expected, (users, history)


@pytest.mark.parametrize("load_time", [280, 900])
def test_who_is_loading_is_not_sent_away(load_time: int) -> None:
    """S61: while new replicas load, users give up for a while; the new ones come all the same."""
    scaler = _keda(load_time=load_time)
    history = run(scaler, Engines(S, load_time), lambda now: USERS if now < 120 else 3, load_time)
    assert all(after >= before for (_, before), (_, after) in pairwise(history)), history
    assert history[-1][1] >= 2


def test_patience_is_the_longer_of_cooldown_and_load_time() -> None:
    burst = _burst()
    for load, cooldown, expected in ((60.0, 300.0, 300), (900.4, 300.0, 901), (9999.0, 300.0, 3600)):
        assert scaling.patience(dataclasses.replace(burst, load_time=load, cooldown=cooldown)) == expected


def test_a_gap_of_prometheus_changes_nothing() -> None:
    def answers(now: int) -> bool:
        return not 1800 <= now < 3600

    history = run(_keda(), Engines(S, 30), lambda now: USERS, 5400, answers)
    assert max(when for when, _ in history) < 900, history


def test_before_the_first_scrape_there_is_no_number() -> None:
    """A fallback is for a query without a result: none of them is 0 when no engine has been seen."""
    for query, _ in scaling.queries(specs.bundle(), _burst()).values():
        assert evaluate(query, {}) is None


def test_without_kube_state_metrics_the_replicas_that_answer_are_counted() -> None:
    engines = Engines(S, 0, burst=[0, 0])
    samples = {key: value for key, value in engines.samples(0, 48).items() if key[0][:5] != "kube_"}
    query, _ = scaling.queries(specs.bundle(), _burst())["occupancy"]
    assert evaluate(query, samples) == pytest.approx(2)


def test_an_average_would_ask_for_fewer() -> None:
    """T7: 20 requests wait at each of four replicas; a threshold of 10 asks for eight in total."""
    labels = [(("namespace", "llm-serving"), ("job", "chat"), ("pod", f"p{index}")) for index in range(4)]
    samples: Samples = {("vllm:num_requests_waiting", each): 20.0 for each in labels}
    ask = Autoscaler([("sum(vllm:num_requests_waiting)", 10)], 1, 20, {})
    assert ask._replicas(evaluate("sum(vllm:num_requests_waiting)", samples), 10, 4) == 8
    assert ask._replicas(evaluate("avg(vllm:num_requests_waiting)", samples), 10, 4) == 2


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (package prometheus)")
def test_prometheus_has_the_same_numbers(tmp_path: Path) -> None:
    """The evaluator of these tests against Prometheus, on every number, in states with and without load."""
    tests = []
    states = [
        (engines.samples(1000, users), engines)
        for engines in (Engines(S, 0), Engines(S, 0, burst=[0, 0]), Engines(S, 5000, burst=[0, 0]),
                        Engines(256, 0, by_cache=12, burst=[0]))
        for users in (0, 7, 26, 50, 400)
    ]  # fmt: skip
    states.append(({}, Engines(S, 0)))
    for samples, _ in states:
        series = [
            {
                "series": f"{name}{{{','.join(f'{k}={json.dumps(v)}' for k, v in labels)}}}",
                "values": f"{value}x4",
            }
            for (name, labels), value in samples.items()
        ]
        checks = []
        for query, _ in scaling.queries(specs.bundle(), _burst()).values():
            value = evaluate(query, samples)
            expected = [] if value is None else [{"labels": "{}", "value": value}]
            checks.append({"expr": query, "eval_time": "1m", "exp_samples": expected})
        tests.append({"interval": "15s", "input_series": series, "promql_expr_test": checks})
    (tmp_path / "t.yml").write_text(
        json.dumps({"rule_files": [], "evaluation_interval": "15s", "tests": tests})
    )
    assert PROMTOOL is not None
    done = subprocess.run(
        [PROMTOOL, "test", "rules", "t.yml"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_scaled_object() -> None:
    spec = _object("ScaledObject")
    assert spec["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": "chat-burst"}
    assert (spec["minReplicaCount"], spec["maxReplicaCount"]) == (0, 7)
    assert spec["pollingInterval"] == 15
    assert spec["cooldownPeriod"] == 300 + 6 * 180  # KEDA ends all that there are, not only the last
    assert spec["fallback"] == {"failureThreshold": 3, "replicas": 1, "behavior": "currentReplicas"}
    config = spec["advanced"]["horizontalPodAutoscalerConfig"]
    up, down = config["behavior"]["scaleUp"], config["behavior"]["scaleDown"]
    assert up["stabilizationWindowSeconds"] == 30
    assert up["policies"] == [{"type": "Pods", "value": 2, "periodSeconds": 60}]
    assert down["stabilizationWindowSeconds"] == 300
    assert down["policies"] == [{"type": "Pods", "value": 1, "periodSeconds": 180}]
    triggers = {each["name"]: each for each in spec["triggers"]}
    assert triggers["waiting"]["metadata"]["threshold"] == "10"
    for each in triggers.values():
        assert each["metricType"] == "AverageValue"
        assert each["metadata"]["ignoreNullValues"] == "false"
        assert "memory" not in each["metadata"]["query"]
        assert "FB_" not in each["metadata"]["query"]


def test_the_hpa_and_the_adapter_name_each_other() -> None:
    spec = _object("HorizontalPodAutoscaler", "vllm", "hpa")
    (text,) = monitoring.files(specs.bundle("vllm", "hpa")).values()
    rules = yaml.safe_load(text)["rules"]["external"]
    assert [each["external"]["metric"]["name"] for each in spec["metrics"]] == [
        each["name"]["as"] for each in rules
    ]
    assert {each["external"]["target"]["type"] for each in spec["metrics"]} == {"AverageValue"}
    assert (spec["minReplicas"], spec["maxReplicas"]) == (1, 7)
    assert not monitoring.files(specs.bundle("vllm", "keda"))


def test_what_is_asked_of_gpus_the_exporter_is_told_to_export() -> None:
    from penstock.deploy.operator import dcgm

    texts = [json.dumps(each) for each in specs.compiled("vllm")]
    asked = set(re.findall(r"DCGM_FI_\w+", "".join(texts)))
    assert len(asked) > 8
    assert asked <= {field.name for field in dcgm.FIELDS}


def test_what_has_no_scale_has_no_scaler() -> None:
    kinds = [each["kind"] for each in specs.compiled()]
    assert kinds.count("ScaledObject") == 1  # of two models one has a scale
