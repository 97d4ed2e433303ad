"""One word, port, name or path of a compiled bundle is misspelt, and a finding names it."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.check import check_text
from penstock.check.run import Options

from .bundle import Bundle, new_findings, options
from .test_mutations import Mutation, argument, gateway_file, in_container, in_pod, on, put

WORDS: list[tuple[str, str, Mutation]] = [
    ("hub", "Recreat", on("Deployment", "chat", put("Recreat", "spec", "strategy", "type"))),
    ("hub", "Sometimes", on("Job", None, put("Sometimes", "spec", "template", "spec", "restartPolicy"))),
    ("hub", "ClusterFist", in_pod("chat", put("ClusterFist", "dnsPolicy"))),
    ("hub", "Sometime", in_container("vision", put("Sometime", "imagePullPolicy"))),
    ("hub", "Exist", in_pod("chat", put("Exist", "tolerations", 0, "operator"))),
    ("hub", "NoShedule", in_pod("chat", put("NoShedule", "tolerations", 0, "effect"))),
    (
        "hub",
        "Notin",
        in_pod(
            "chat",
            put(
                "Notin", "affinity", "nodeAffinity", "requiredDuringSchedulingIgnoredDuringExecution",
                "nodeSelectorTerms", 0, "matchExpressions", 1, "operator",
            ),
        ),
    ),
    ("hub", "Egres", on("NetworkPolicy", "engines", put("Egres", "spec", "policyTypes", 1))),
    ("hub", "HTTP", on("Service", "chat", put("HTTP", "spec", "ports", 0, "protocol"))),
    ("hub", "TPC", in_container("chat", put("TPC", "ports", 0, "protocol"))),
    (
        "hub",
        "ReadWriteMay",
        on("PersistentVolumeClaim", "weights", put("ReadWriteMay", "spec", "accessModes", 0)),
    ),
    ("hub", "Headless", on("Service", "chat", put("Headless", "spec", "type"))),
    ("hub", "prefix", on("Ingress", None, put("prefix", "spec", "rules", 0, "http", "paths", 0, "pathType"))),
    ("hub", "Runtime", in_pod("chat", put("Runtime", "securityContext", "seccompProfile", "type"))),
    (
        "hub",
        "ScheduleAnyways",
        in_pod("chat", put("ScheduleAnyways", "topologySpreadConstraints", 0, "whenUnsatisfiable")),
    ),
    (
        "tp4",
        "Averagevalue",
        on(
            "HorizontalPodAutoscaler",
            None,
            put("Averagevalue", "spec", "metrics", 0, "external", "target", "type"),
        ),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "word", "mutate"), WORDS, ids=[f"{a}: {b}" for a, b, _ in WORDS])
def test_a_word_that_kubernetes_does_not_have(spec: str, word: str, mutate: Mutation) -> None:
    said = [each.what for each in new_findings(spec, mutate) if each.rule.id == "schema"]
    assert any(f"{word} is none of " in each for each in said), said


def test_a_strategy_that_is_none_is_no_deadlock_too() -> None:
    mutate = on("Deployment", "chat", put("Recreat", "spec", "strategy", "type"))
    assert {each.rule.id for each in new_findings("hub", mutate)} == {"schema"}
    (finding,) = new_findings("hub", mutate)
    assert finding.what.startswith(
        "spec.strategy.type: Recreat is none of Recreate, RollingUpdate. Did you mean Recreate?"
    )


def test_an_empty_word_is_the_default() -> None:
    mutate = in_container("vision", put("", "imagePullPolicy"))
    assert not list(new_findings("hub", mutate))


def test_words_of_older_versions_are_checked_too() -> None:
    text = Bundle("hub").text().replace("type: RollingUpdate", "type: Rolling")
    for version in ("1.25", "1.30"):
        found = check_text(text, "bundle.yaml", Options(crds=options().crds, kubernetes=version))
        assert any("Rolling is none of" in each.what for each in found)


def mount_of(name: str, path: str, new: str, container: int = 0) -> Mutation:
    def change(bundle: Bundle) -> None:
        for each in bundle.pod(name)["containers"][container]["volumeMounts"]:
            if each["mountPath"] == path:
                each["mountPath"] = new

    return change


def store(bundle: Bundle) -> None:
    job = bundle.get("Job")["spec"]["template"]["spec"]["containers"][0]
    job["args"] = ["--store=/modles" if each == "--store=/models" else each for each in job["args"]]


def dns(port: int, *indices: int) -> Mutation:
    def change(policy: Any) -> None:
        for index in indices:
            policy["spec"]["egress"][0]["ports"][index]["port"] = port

    return on("NetworkPolicy", "engines", change)


ODD: list[tuple[str, str, str, Mutation]] = [
    # ports
    (
        "hub",
        "listen-port",
        "listens to 8001; its ports are 8000",
        argument("chat", "--port=8000", "--port=8001"),
    ),
    ("hub", "listen-port", "listens to 8001; its ports are 8000", argument("vision", "=8000", "=8001")),
    ("hub", "listen-port", "The gateway listens to 8081", gateway_file("port: 8080", "port: 8081")),
    ("hub", "url-service", "no port 8001", gateway_file(".svc:8000", ".svc:8001")),
    ("mig", "url-service", "no port 8001", gateway_file(".svc:8000", ".svc:8001")),
    ("tp4", "url-service", "no port 8001", gateway_file(".svc:8000", ".svc:8001")),
    ("nodes", "url-service", "no port 8001", gateway_file(".svc:8000", ".svc:8001")),
    ("hub", "policy-without-dns", "no rule admits port 53", dns(35, 0)),
    ("hub", "policy-without-dns", "no rule admits port 53", dns(35, 0, 1)),
    # names
    (
        "hub",
        "model-not-served",
        "is asked for chat; Deployment chat-burst serves chatt",
        argument("chat-burst", "=chat", "=chatt"),
    ),
    (
        "hub",
        "model-not-served",
        "is asked for vision; Deployment vision serves vison",
        argument("vision", "=vision", "=vison"),
    ),
    (
        "hub",
        "model-not-served",
        "is asked for chad; Deployment chat serves chat",
        gateway_file("      chat:\n        context", "      chad:\n        context"),
    ),
    (
        "hub",
        "file-missing",
        "no /etc/penstock/penstok.yaml",
        argument("gateway", "penstock.yaml", "penstok.yaml"),
    ),
    (
        "hub",
        "variable-undefined",
        "no variable PENSTOCK_ENGIN_KEY, which api_key_env names",
        gateway_file("PENSTOCK_ENGINE_KEY", "PENSTOCK_ENGIN_KEY"),
    ),
    # paths
    (
        "hub",
        "path-unmounted",
        "/models/chat/current is under no mount; there is /model.",
        mount_of("chat", "/models", "/model"),
    ),
    ("hub", "path-unmounted", "/modles is under no mount; there is /models.", store),
    ("hub", "weights-path", "and no curent", argument("vision", "/current", "/curent")),
    ("hub", "weights-path", "and no visoin", argument("vision", "/vision/", "/visoin/")),
]


@pytest.mark.parametrize(
    ("spec", "rule", "what", "mutate"), ODD, ids=[f"{a}: {b}: {c[:30]}" for a, b, c, _ in ODD]
)
def test_what_does_not_match(spec: str, rule: str, what: str, mutate: Mutation) -> None:
    found = [(each.rule.id, each.what) for each in new_findings(spec, mutate)]
    assert any(name == rule and what in said for name, said in found), found
