"""What the API server, the kubelet or KEDA refuse though the schema allows it, set into compiled bundles."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from penstock.check import check_text

from .bundle import Bundle, new_findings, options
from .test_mutations import argument, drop, gateway_file, in_container, in_pod, on, put

_NEITHER = {"maxSurge": 0, "maxUnavailable": 0}
_VARIABLE = {"name": "A", "value": "x"}


def _appended(*keys: str | int, value: Any) -> Callable[[Any], None]:
    """Put something at the end of the list at a path."""

    def apply(data: Any) -> None:
        for key in keys:
            data = data[key]
        data.append(copy.deepcopy(value))

    return apply


def _without_tmp(pod: Any) -> None:
    mounts = pod["containers"][0]["volumeMounts"]
    pod["containers"][0]["volumeMounts"] = [each for each in mounts if each["mountPath"] != "/tmp"]
    pod["volumes"] = [each for each in pod["volumes"] if each["name"] != "tmp"]


_DOWN = ("behavior", "scaleDown")
_KEDA = ("spec", "advanced", "horizontalPodAutoscalerConfig")
_TRIGGER = ("spec", "triggers", 0)

MUTATIONS: list[tuple[str, str, Callable[[Bundle], object], str]] = [
    (
        "hub",
        "two ports of one name",
        in_container("vision", _appended("ports", value={"name": "http", "containerPort": 9001})),
        "object-refused",
    ),
    (
        "hub",
        "two containers of one name",
        in_pod("vision", lambda pod: pod["containers"].append(copy.deepcopy(pod["containers"][0]))),
        "object-refused",
    ),
    (
        "hub",
        "two volumes of one name",
        in_pod("vision", lambda pod: pod["volumes"].append(copy.deepcopy(pod["volumes"][0]))),
        "object-refused",
    ),
    (
        "hub",
        "a variable given twice",
        in_container("vision", lambda each: each["env"].extend([_VARIABLE, _VARIABLE])),
        "variable-twice",
    ),
    (
        "hub",
        "no surge and none away",
        on("Deployment", "vision", put(_NEITHER, "spec", "strategy", "rollingUpdate")),
        "object-refused",
    ),
    (
        "hub",
        "ready for longer than the deadline",
        on("Deployment", "vision", put(100_000, "spec", "minReadySeconds")),
        "object-refused",
    ),
    (
        "hub",
        "a deadline before the load is over",
        on("Deployment", "vision", put(30, "spec", "progressDeadlineSeconds")),
        "progress-deadline",
    ),
    ("hub", "an image in capitals", in_container("vision", put("VLLM/openai:v1", "image")), "image-invalid"),
    ("hub", "an image with a blank", in_container("vision", put("vllm/a: v1", "image")), "image-invalid"),
    (
        "hub",
        "a liveness that wants two successes",
        in_container("vision", put(2, "livenessProbe", "successThreshold")),
        "object-refused",
    ),
    (
        "hub",
        "a probe of two kinds",
        in_container("vision", put({"port": 8000}, "livenessProbe", "tcpSocket")),
        "object-refused",
    ),
    (
        "hub",
        "a period below zero",
        in_container("vision", put(-1, "readinessProbe", "periodSeconds")),
        "object-refused",
    ),
    (
        "hub",
        "a Job whose pods start again for ever",
        on("Job", None, put("Always", "spec", "template", "spec", "restartPolicy")),
        "object-refused",
    ),
    ("hub", "an engine without /tmp", in_pod("vision", _without_tmp), "tmp-missing"),
    (
        "hub",
        "an engine whose HOME is not mounted",
        in_container("vision", _appended("env", value={"name": "HOME", "value": "/home/other"})),
        "tmp-missing",
    ),
    (
        "hub",
        "a probe with HTTPS",
        in_container("vision", put("HTTPS", "livenessProbe", "httpGet", "scheme")),
        "probe-scheme",
    ),
    (
        "hub",
        "a certificate, and probes with HTTP",
        in_container("vision", lambda each: each["args"].extend(["--ssl-certfile=/a", "--ssl-keyfile=/b"])),
        "probe-scheme",
    ),
    (
        "hub",
        "a headless NodePort",
        on("Service", "gateway", lambda each: each["spec"].update(clusterIP="None", type="NodePort")),
        "object-refused",
    ),
    (
        "hub",
        "a window of ten hours, KEDA's",
        on("ScaledObject", None, put(36_000, *_KEDA, *_DOWN, "stabilizationWindowSeconds")),
        "object-refused",
    ),
    (
        "tp4",
        "a window of ten hours, the HPA's",
        on("HorizontalPodAutoscaler", None, put(36_000, "spec", *_DOWN, "stabilizationWindowSeconds")),
        "object-refused",
    ),
    (
        "tp4",
        "a policy of no time",
        on("HorizontalPodAutoscaler", None, put(0, "spec", *_DOWN, "policies", 0, "periodSeconds")),
        "object-refused",
    ),
    (
        "hub",
        "a trigger that KEDA has not",
        on("ScaledObject", None, put("promethues", *_TRIGGER, "type")),
        "scaler-trigger",
    ),
    (
        "hub",
        "a trigger that asks nobody",
        on("ScaledObject", None, drop(*_TRIGGER, "metadata", "serverAddress")),
        "scaler-trigger",
    ),
    (
        "hub",
        "a fallback to nothing",
        on("ScaledObject", None, put(0, "spec", "fallback", "replicas")),
        "scaler-no-fallback",
    ),
    (
        "hub",
        "TLS for another host",
        on("Ingress", None, put(["llm.example.org"], "spec", "tls", 0, "hosts")),
        "entry-tls",
    ),
    (
        "hub",
        "a Service of UDP",
        on("Service", "chat", put("UDP", "spec", "ports", 0, "protocol")),
        "service-port",
    ),
    ("hub", "the gateway's file is no YAML", gateway_file("version: 1", "version: [1"), "spec-invalid"),
    ("hub", "the gateway's file has a slip", gateway_file("upstreams:", "upstraems:"), "spec-invalid"),
    (
        "hub",
        "another port than the one that is declared",
        in_container("vision", lambda each: each["args"].append("--port=8001")),
        "flag-twice",
    ),
    (
        "hub",
        "a name that the gateway does not ask for",
        argument("vision", "--served-model-name=vision", "--served-model-name=visoin"),
        "model-not-served",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "mutate", "rule"), [pytest.param(a, c, d, id=f"{a}: {b}") for a, b, c, d in MUTATIONS]
)
def test_what_would_be_refused_is_found(spec: str, mutate: Callable[[Bundle], object], rule: str) -> None:
    new = list(new_findings(spec, mutate))
    assert rule in {each.rule.id for each in new}, [f"{each.rule.id}: {each.what}" for each in new]


def test_a_slip_in_a_mounted_file_is_told_at_its_line() -> None:
    text = (
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: gateway}\ndata:\n  penstock.yaml: |\n"
        "    version: 1\n    modles: {}\n"
    )
    (finding,) = [each for each in check_text(text, "a.yaml", options()) if each.rule.id == "spec-invalid"]
    assert finding.line == 7
    assert "modles" in finding.what


@pytest.mark.parametrize(
    "image",
    [
        "vllm/vllm-openai:v0.32.0",
        "registry.example.com:5000/llm/penstock:0.1.0-cpu",
        "localhost:5000/a",
        "ghcr.io/org.x/a",
        "nginx",
        "nvcr.io/nvidia/k8s/dcgm-exporter:4.2.0-4.1.0-ubuntu22.04",
        "a/b__c@sha256:" + "0" * 64,
        "123456789012.dkr.ecr.eu-west-1.amazonaws.com/a:1",
    ],
)
def test_images_that_there_are(image: str) -> None:
    text = (
        "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec:\n  containers:\n"
        f"    - {{name: a, image: '{image}'}}\n"
    )
    assert "image-invalid" not in {each.rule.id for each in check_text(text, "a.yaml")}
