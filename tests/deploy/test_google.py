"""GKE's load balancers cut answers off after 30 seconds, unless a Service's backend says otherwise; and their
controllers take Ingresses and routes in forms of their own."""

from __future__ import annotations

import json
from typing import Any

import pytest

from penstock.deploy import google
from penstock.deploy.bundle import objects
from penstock.deploy.network import patience
from penstock.deploy.resolve import resolve
from penstock.deploy.workloads import Bundle
from penstock.spec import loads

SPEC = """
pools: {gpu: {hardware: L4, count: 1}}
models: {small: {weights: Qwen/Qwen2.5-7B-Instruct, engine: vllm, pool: gpu}}
%s
cluster: {provider: %s, entry: {host: llm.example.com%s}}
"""


def bundle(entry: str = "", provider: str = "gke", more: str = "") -> Bundle:
    return resolve(loads(SPEC % (more, provider, entry), "penstock.yaml"))


def of(made: Bundle, kind: str) -> list[dict[str, Any]]:
    return [each.to_dict() for each in objects(made) if each.kind == kind]


def service(made: Bundle) -> dict[str, Any]:
    (found,) = [each for each in of(made, "Service") if each["metadata"]["name"] == "gateway"]
    return found


@pytest.mark.parametrize("name", [None, *google.INGRESS_CLASSES])
def test_an_ingress_of_gke_waits_for_long_answers(name: str | None) -> None:
    made = bundle(f", class_name: {name}" if name else "")
    (config,) = of(made, "BackendConfig")
    assert config["apiVersion"] == "cloud.google.com/v1"
    assert config["spec"]["timeoutSec"] == google.LONGEST >= patience(made)
    assert config["spec"]["healthCheck"] == {"type": "HTTP", "requestPath": "/readyz", "port": 8080}
    assert config["spec"]["connectionDraining"]["drainingTimeoutSec"] == made.gateway.grace
    notes = service(made)["metadata"]["annotations"]
    assert json.loads(notes["cloud.google.com/backend-config"]) == {"default": config["metadata"]["name"]}
    assert json.loads(notes["cloud.google.com/neg"]) == {"ingress": True}
    (ingress,) = of(made, "Ingress")
    assert ingress["metadata"]["annotations"] == {google.CLASS_ANNOTATION: name or "gce"}
    assert "ingressClassName" not in ingress["spec"]


def test_it_waits_longer_where_the_gateway_does() -> None:
    routes = "routes: {chat: {wait: 2h, targets: [{model: small}]}}"
    made = bundle(more=routes)
    assert of(made, "BackendConfig")[0]["spec"]["timeoutSec"] == patience(made) > 7200


@pytest.mark.parametrize("name", ["eg", "istio"])
def test_a_gateway_of_another_class_is_none_of_googles(name: str) -> None:
    """Its route has the time-outs, and nothing is written that only Google's controller reads."""
    made = bundle(f", kind: gateway-api, class_name: edge, gateway_class: {name}")
    (route,) = of(made, "HTTPRoute")
    assert route["spec"]["rules"][0]["timeouts"] == {"request": "0s", "backendRequest": "0s"}
    assert not of(made, "GCPBackendPolicy") + of(made, "HealthCheckPolicy")


@pytest.mark.parametrize("more", ["", ", gateway_class: gke-l7-regional-external-managed"])
def test_a_route_of_gke_waits_for_long_answers(more: str) -> None:
    """Its controller accepts no route that has time-outs; a policy has them."""
    made = bundle(f", kind: gateway-api, class_name: edge{more}")
    (route,) = of(made, "HTTPRoute")
    assert "timeouts" not in route["spec"]["rules"][0]
    (policy,), (check,) = of(made, "GCPBackendPolicy"), of(made, "HealthCheckPolicy")
    for each in (policy, check):
        assert each["apiVersion"] == "networking.gke.io/v1"
        assert each["metadata"]["namespace"] == made.namespace
        assert each["spec"]["targetRef"] == {"group": "", "kind": "Service", "name": "gateway"}
    assert policy["spec"]["default"]["timeoutSec"] == google.LONGEST
    assert check["spec"]["default"] == {
        "config": {"type": "HTTP", "httpHealthCheck": {"requestPath": "/readyz", "port": 8080}}
    }
    assert "annotations" not in service(made)["metadata"]


@pytest.mark.parametrize(
    ("entry", "provider"),
    [
        (", class_name: nginx", "gke"),
        ("", "aks"),
        (", class_name: nginx", "other"),
        (", kind: gateway-api, class_name: edge", "eks"),
    ],
)
def test_nothing_of_google_elsewhere(entry: str, provider: str) -> None:
    made = bundle(entry, provider)
    for kind in ("BackendConfig", "GCPBackendPolicy", "HealthCheckPolicy"):
        assert not of(made, kind)
    assert "annotations" not in service(made)["metadata"]


def test_no_entry_on_gke() -> None:
    text = (SPEC % ("", "gke", "")).replace(", entry: {host: llm.example.com}", "")
    assert not of(resolve(loads(text, "penstock.yaml")), "BackendConfig")
