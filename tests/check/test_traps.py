"""Traps of the source documents (T1–T22) and others, each set into a manifest that is right."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.check import Options, check_text, rules

from .bundle import options

RIGHT = Path(__file__).with_name("right.yaml").read_text(encoding="utf-8")

_ENGINE = "            - --shutdown-timeout=110\n"
_SPREAD = RIGHT[RIGHT.index("      topologySpreadConstraints") : RIGHT.index("      securityContext")]
_STARTUP = RIGHT[RIGHT.index("          startupProbe") : RIGHT.index("          readinessProbe")]
_ALERT = RIGHT[RIGHT.index("---\napiVersion: monitoring.coreos.com/v1\nkind: PrometheusRule") : RIGHT.index(
    "---\napiVersion: autoscaling")]  # fmt: skip

TRAPS: list[tuple[str, str, str, str, str]] = [
    # trap, rule, what stands there, what is written instead, where the finding is
    ("T1", "flag-unknown", "--gpu-memory-utilization", "--gpu-memory-utilisation", "utilisation"),
    ("T2", "metric-removed", "vllm:num_requests_running", "vllm:gpu_cache_usage_perc", "gpu_cache"),
    ("T5", "flag-removed", _ENGINE, f"{_ENGINE}            - --num-scheduler-steps=10\n", "scheduler-steps"),
    ("T5 swap", "flag-removed", _ENGINE, f"{_ENGINE}            - --swap-space=4\n", "swap-space"),
    ("T9", "pdb-blocks-drain", "minAvailable: 1", "minAvailable: 2", "minAvailable"),
    ("T9 scaler", "pdb-blocks-drain", "minReplicas: 2", "minReplicas: 1", "minAvailable"),
    (
        "T10 labels",
        "monitor-selects-nothing",
        "  labels: {app: mistral}\nspec:\n  selector: {app",
        "spec:\n  selector: {app",
        "  selector:\n    matchLabels: {app: mistral}\n  endpoints",
    ),
    ("T10 port", "monitor-port", "- name: http\n      port: 80", "- port: 80", "- port: http\n      path"),
    (
        "T11",
        "selector-mismatch",
        "  selector:\n    matchLabels: {app: mistral}\n  strategy",
        "  strategy",
        "spec:\n  strategy",
    ),
    (
        "T11 labels",
        "selector-mismatch",
        "      labels: {app: mistral}\n    spec",
        "      labels: {}\n    spec",
        "  selector:\n    matchLabels: {app: mistral}\n  strategy",
    ),
    (
        "T12",
        "rollout-deadlock",
        "  strategy:\n    rollingUpdate: {maxSurge: 0, maxUnavailable: 1}\n",
        "",
        "spec:\n  selector",
    ),
    ("T13", "prestop-kill", '[sleep, "15"]', '[/bin/sh, -c, "sleep 15 && kill 1"]', "preStop"),
    (
        "T13 grace",
        "grace-short",
        "terminationGracePeriodSeconds: 140",
        "terminationGracePeriodSeconds: 60",
        "terminationGracePeriodSeconds",
    ),
    ("T13 drain", "drain-missing", _ENGINE, "", "args"),
    (
        "T13 preStop",
        "grace-short",
        '[sleep, "15"]',
        '["sh", "-c", "sleep 2m"]',
        "terminationGracePeriodSeconds",
    ),
    ("T14", "probe-progress", _ALERT, "", "{path: /health, port: 8000}"),
    (
        "T15",
        "readiness-delay",
        "port: http}\n            periodSeconds: 5\n          livenessProbe",
        "port: http}\n            initialDelaySeconds: 120\n          livenessProbe",
        "initialDelaySeconds",
    ),
    ("T15 startup", "startup-missing", _STARTUP, "", "- name: vllm"),
    ("T15 liveness", "startup-short", _STARTUP, "", "livenessProbe"),
    ("T15 short", "startup-short", "failureThreshold: 120", "failureThreshold: 3", "startupProbe"),
    (
        "T17",
        "env-not-read",
        "- name: HF_HOME\n              value: /cache",
        '- name: MAX_NUM_SEQS\n              value: "32"\n'
        "            - name: HF_HOME\n              value: /cache",
        'value: "32"',
    ),
    (
        "T18",
        "mig-resource",
        "nvidia.com/gpu.product: NVIDIA-A100-SXM4-80GB",
        "nvidia.com/mig.config: all-3g.40gb",
        "nvidia.com/gpu: 1",
    ),
    ("T18 profile", "mig-resource", "nvidia.com/gpu: 1", "nvidia.com/mig-3g.39gb: 1", "mig-3g.39gb"),
    ("T22 image", "image-latest", ":v0.32.0", ":latest", "image"),
    ("T22 untagged", "image-latest", "vllm/vllm-openai:v0.32.0", "vllm/vllm-openai", "image"),
    ("T22 code", "trust-remote-code", _ENGINE, f"{_ENGINE}            - --trust-remote-code\n", "--trust"),
    ("S19", "gpu-count", "--tensor-parallel-size=1", "--tensor-parallel-size=2", "nvidia.com/gpu: 1"),
    (
        "S41",
        "ingress-buffering",
        'proxy-read-timeout: "300"',
        'proxy-read-timeout: "300"\n    nginx.ingress.kubernetes.io/proxy-buffering: "on"',
        "proxy-buffering",
    ),
    (
        "S41 time-out",
        "entry-timeout",
        '  annotations:\n    nginx.ingress.kubernetes.io/proxy-read-timeout: "300"\n',
        "",
        "metadata:\n  name: mistral\n  namespace: serving\nspec:\n  ingressClassName",
    ),
    ("S44", "pdb-missing", "kind: PodDisruptionBudget", "kind: PodDisruptionBudgets", "apiVersion: apps/v1"),
    ("S45", "spread-missing", _SPREAD, "", "    spec:\n      terminationGrace"),
    ("S95 shm", "shm-missing", "            - {name: shm, mountPath: /dev/shm}\n", "", "volumeMounts"),
    ("S95 cache", "weights-uncached", "persistentVolumeClaim: {claimName: cache}", "emptyDir: {}", "args"),
    ("S95 replicas", "single-replica", "minReplicas: 2", "minReplicas: 1", "spec:\n  selector"),
    (
        "S92",
        "key-in-text",
        "- name: HF_HOME",
        "- name: HF_TOKEN_OLD\n              value: hf_aZ4kPq9LmX2vBn7RtY5w\n            - name: HF_HOME",
        "value: hf_",
    ),
    (
        "scaled twice",
        "scaled-twice",
        "kind: HorizontalPodAutoscaler\nmetadata:\n  name: mistral\n",
        "kind: HorizontalPodAutoscaler\nmetadata:\n  name: first\n  namespace: serving\nspec:\n"
        "  scaleTargetRef: {kind: Deployment, name: mistral}\n  minReplicas: 2\n  maxReplicas: 3\n---\n"
        "apiVersion: autoscaling/v2\nkind: HorizontalPodAutoscaler\nmetadata:\n  name: mistral\n",
        "  scaleTargetRef: {apiVersion",
    ),
    ("time-slicing", "time-slicing", "nvidia.com/gpu: 1", "nvidia.com/gpu.shared: 1", "limits"),
    ("fraction", "device-requests", "nvidia.com/gpu: 1", 'nvidia.com/gpu: "0.5"', "0.5"),
    (
        "spot",
        "spot-toleration",
        "nvidia.com/gpu.product: NVIDIA-A100-SXM4-80GB",
        "kubernetes.azure.com/scalesetpriority: spot",
        "    spec:\n      terminationGrace",
    ),
    (
        "spot drain",
        "spot-grace",
        "nvidia.com/gpu.product: NVIDIA-A100-SXM4-80GB",
        'cloud.google.com/gke-spot: "true"',
        "terminationGracePeriodSeconds",
    ),
    ("root", "runs-as-root", "{runAsNonRoot: true, runAsUser: 1000}", "{}", "- name: vllm"),
    (
        "node's processes",
        "host-access",
        "      securityContext",
        "      hostPID: true\n      securityContext",
        "hostPID",
    ),
    (
        "privileged",
        "privileged",
        "          resources",
        "          securityContext: {privileged: true}\n          resources",
        "privileged",
    ),
]


def test_what_is_right_is_left_alone() -> None:
    found = check_text(RIGHT, "right.yaml", options())
    # the metric of the HPA is made by an adapter that is not among these objects
    assert {each.rule.id for each in found} <= {"object-external", "hpa-metric-unseen"}, found
    told = [each.what for each in found if each.rule.id == "object-external"]
    assert told == ["Secret hub with key, token is not among the objects."]


@pytest.mark.parametrize(
    ("rule", "old", "new", "place"), [pytest.param(*each[1:], id=each[0]) for each in TRAPS]
)
def test_a_trap_is_found_where_it_is(rule: str, old: str, new: str, place: str) -> None:
    assert RIGHT.count(old) >= 1
    text = RIGHT.replace(old, new, 1)
    found = [each for each in check_text(text, "right.yaml", options()) if each.rule.id == rule]
    assert found, rule
    line = text.count("\n", 0, text.index(place)) + 1
    assert line in {each.line for each in found}, [(each.line, each.what) for each in found]


def test_a_surge_is_right_where_gpus_are_free() -> None:
    text = RIGHT.replace("{maxSurge: 0, maxUnavailable: 1}", "{maxSurge: 1, maxUnavailable: 0}")
    for free, told in ((None, True), (0, True), (1, False)):
        found = check_text(text, "right.yaml", Options(crds=options().crds, free_gpus=free))
        assert ("rollout-deadlock" in {each.rule.id for each in found}) is told
    said = text.replace(
        "  name: mistral\n", '  name: mistral\n  annotations: {penstock.dev/free-devices: "2"}\n', 1
    )
    assert "rollout-deadlock" not in {each.rule.id for each in check_text(said, "right.yaml", options())}


def test_every_rule_says_why_and_what_to_do() -> None:
    for rule in rules():
        assert all((rule.summary, rule.why, rule.fix)), rule.id
        assert rule.id == rule.id.lower().replace(" ", "-")
    assert len({rule.id for rule in rules()}) == len(rules())
