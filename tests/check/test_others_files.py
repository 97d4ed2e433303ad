"""What public repositories write and is right: nothing, or only a note, is said of it.

Each text is a shortened form of what `penstock check` once found fault with in GoogleCloudPlatform's
kubernetes-engine-samples, awslabs' data-on-eks, NVIDIA's gpu-operator, GPUStack, KAITO and others.
"""

from __future__ import annotations

import pytest

from penstock.check import check_text

from .bundle import options

POD = (
    "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec:\n  containers:\n    - name: a\n      image: a:1\n"
)
SERVICE = (
    "---\napiVersion: v1\nkind: Service\nmetadata: {name: web}\n"
    "spec: {selector: {app: web}, ports: [{port: 80}]}\n"
)
WEB = (
    "---\napiVersion: apps/v1\nkind: Deployment\nmetadata: {name: web}\nspec:\n"
    "  selector: {matchLabels: {app: web}}\n  template:\n    metadata: {labels: {app: web}}\n"
    "    spec: {containers: [{name: web, image: 'web:1'}]}\n"
)
RAY = "---\napiVersion: ray.io/v1\nkind: RayService\nmetadata: {name: llama}\nspec: {}\n"
HPA = (
    "apiVersion: autoscaling/v2\nkind: HorizontalPodAutoscaler\nmetadata: {name: a}\nspec:\n"
    "  maxReplicas: 3\n  scaleTargetRef: {kind: Deployment, name: web}\n  metrics:\n    - type: Pods\n"
    "      pods: {metric: {name: 'METRIC'}, target: {type: AverageValue, averageValue: '5'}}\n"
)
RULES = "groups: [{name: a, rules: [{alert: A, expr: 'EXPR'}]}]\n"


def _rules(text: str, name: str) -> set[str]:
    return {each.rule.id for each in check_text(text, name, options())}


@pytest.mark.parametrize(
    ("text", "name", "rule"),
    [
        pytest.param(
            POD + '      command: [/bin/sh, -c, "echo $(date) $(hostname)"]\n',
            "a.yaml", "variable-undefined", id="a shell's substitutions",
        ),
        pytest.param(
            "learning_rate: 1.0e-4\nmax_steps: 1000\nbase_model: google/gemma\n",
            "train.yaml", "loop-unbounded", id="steps of a training",
        ),
        pytest.param(
            "from trl import SFTConfig\nvllm = 1\nSFTConfig(max_steps=-1, learning_rate=2e-4)\n",
            "train.py", "loop-unbounded", id="steps of a training in Python",
        ),
        pytest.param(
            POD + "  volumes: [{name: gke-gcsfuse-cache, emptyDir: {medium: Memory}}]\n",
            "a.yaml", "volume-unused", id="a volume of GKE's sidecar",
        ),
        pytest.param(
            POD + "      env: [{name: URL, value: 'http://llama-serve-svc:8000/v1'}]\n" + RAY + SERVICE + WEB,
            "a.yaml", "url-service", id="a Service that an operator makes",
        ),
        pytest.param(
            RAY + WEB + SERVICE.replace("app: web", "ray.io/cluster: llama"),
            "a.yaml", "service-selects-nothing", id="pods that an operator makes",
        ),
        pytest.param(
            WEB + SERVICE.replace("name: web", "name: a, namespace: kube-system").replace("app: web", "a: b"),
            "a.yaml", "service-selects-nothing", id="a Service of the cluster's own pods",
        ),
        pytest.param(
            "apiVersion: sparkoperator.k8s.io/v1beta2\nkind: SparkApplication\nmetadata: {name: a}\n",
            "a.yaml", "kind-unknown", id="a custom group that ends like the core's",
        ),
        pytest.param(
            HPA.replace("METRIC", "pubsub.googleapis.com|subscription|num_undelivered_messages"),
            "a.yaml", "hpa-metric-unseen", id="a metric of Google's adapter",
        ),
        pytest.param(
            RULES.replace("EXPR", "etcd_request_duration_seconds_bucket > 1"),
            "a.yaml", "metric-unknown", id="a metric of another program",
        ),
        pytest.param(
            RULES.replace("EXPR", "increase(prometheus_sd_refresh_failures_total[10m]) > 0"),
            "a.yaml", "metric-unknown", id="a metric of another version of Prometheus",
        ),
        pytest.param(
            RULES.replace("EXPR", "kube_state_metrics_total_shards > 1"),
            "a.yaml", "metric-unknown", id="a metric of kube-state-metrics about itself",
        ),
        pytest.param(
            RULES.replace("EXPR", 'kubelet_volume_stats_used_bytes{metrics_path="/metrics"} > 1'),
            "a.yaml", "label-unknown", id="a label that the kubelet's monitor gives",
        ),
        pytest.param(
            RULES.replace("EXPR", 'ray_vllm_num_requests_waiting{WorkerId="a"} > 20'),
            "a.yaml", "metric-unlisted", id="vLLM's metrics as Ray has them",
        ),
        pytest.param(
            RULES.replace("EXPR", 'up{group="starrocks"} == 0'),
            "a.yaml", "label-unknown", id="a label that somebody gives his targets",
        ),
        pytest.param(
            "vLLM and SGLang\n\nStart SGLang with --mem-fraction-static and --context-length.\n",
            "a.md", "flag-mentioned", id="a text about another engine",
        ),
        pytest.param(
            POD.replace("name: a}", "name: '${NAME}', namespace: '${SPACE:-a}'}"),
            "a.yaml", "name-invalid", id="a name that envsubst fills in",
        ),
        pytest.param(
            POD + "      resources: {limits: {nvidia.com/gpu: '${GPUS}'}}\n",
            "a.yaml", "quantity-invalid", id="a quantity that envsubst fills in",
        ),
        pytest.param(
            POD + "      env: [{name: HF_TOKEN, value: HF_TOKEN}]\n", "a.yaml", "key-in-text",
            id="a variable's name in place of its value",
        ),
    ],
)  # fmt: skip
def test_what_is_right_is_left_alone(text: str, name: str, rule: str) -> None:
    assert rule not in _rules(text, name)


def test_what_is_filled_in_is_told_once() -> None:
    text = POD.replace("name: a}", "name: '${NAME}', namespace: '${SPACE}'}")
    assert [each.rule.id for each in check_text(text, "a.yaml", options())].count(
        "placeholder-unchecked"
    ) == 1


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        pytest.param(
            POD + '      command: [/bin/sh, -c, "serve --model $(MODEL)"]\n', "variable-undefined",
            id="a variable of a script",
        ),
        pytest.param(
            HPA.replace("METRIC", "prometheus.googleapis.com|vllm:gpu_cache_usage_perc|gauge"),
            "metric-removed", id="a removed metric by Google's name",
        ),
        pytest.param(
            RULES.replace("EXPR", "ray_vllm_gpu_cache_usage_perc > 0.9"), "metric-removed",
            id="a removed metric by Ray's name",
        ),
        pytest.param(
            RULES.replace("EXPR", "num_requests_waitin > 2"), "metric-unknown", id="a slip in a metric"
        ),
        pytest.param(
            RULES.replace("EXPR", "vlm:num_requests_waiting > 2"), "metric-unknown", id="a slip in a prefix"
        ),
        pytest.param(
            POD + "      env: [{name: URL, value: 'http://wbe:8000/v1'}]\n" + RAY + SERVICE + WEB,
            "url-service", id="a Service that nobody makes",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_beside_it_is_still_found(text: str, rule: str) -> None:
    assert rule in _rules(text, "a.yaml")
