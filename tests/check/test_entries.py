"""Certificates and the entries that serve them; paths that an entry admits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from .bundle import Bundle, new_findings
from .finding import rules
from .test_mutations import drop, on, put

_ISSUER = ("metadata", "annotations", "cert-manager.io/cluster-issuer")
_PATH = ("spec", "rules", 0, "http", "paths", 0)


def _certificate(secret: str, host: str = "llm.example.com") -> dict[str, Any]:
    return {
        "apiVersion": "cert-manager.io/v1",
        "kind": "Certificate",
        "metadata": {"name": "gateway-tls", "namespace": "llm-serving"},
        "spec": {
            "secretName": secret,
            "dnsNames": [host],
            "issuerRef": {"name": "a", "kind": "ClusterIssuer"},
        },
    }


def _with(
    secret: str, change: Callable[[Any], object], host: str = "llm.example.com"
) -> Callable[[Bundle], None]:
    """A Certificate in place of the annotation, and an Ingress that is changed."""

    def apply(bundle: Bundle) -> None:
        drop(*_ISSUER)(bundle.get("Ingress"))
        bundle.objects.append(_certificate(secret, host))
        change(bundle.get("Ingress"))

    return apply


def _nothing(ingress: Any) -> None:
    pass


@pytest.mark.parametrize(
    ("mutate", "rule"),
    [
        pytest.param(on("Ingress", None, drop("spec", "tls")), "tls-missing", id="an issuer and no tls"),
        pytest.param(_with("gateway-tls", drop("spec", "tls")), "tls-missing", id="a Certificate and no tls"),
        pytest.param(
            _with("a", drop("spec", "tls"), "*.example.com"), "tls-missing", id="a wildcard and no tls"
        ),
        pytest.param(_with("gatway-tls", _nothing), "certificate-unused", id="a Certificate's secretName"),
        pytest.param(
            _with("gateway-tls", put("other", "spec", "tls", 0, "secretName")), "certificate-unused",
            id="an Ingress's secretName",
        ),
        pytest.param(on("Ingress", None, put("v1", *_PATH, "path")), "object-refused", id="no slash"),
        pytest.param(on("Ingress", None, put("Exact", *_PATH, "pathType")), "entry-path", id="one folder"),
    ],
)  # fmt: skip
def test_a_mutation_is_found(mutate: Callable[[Bundle], object], rule: str) -> None:
    new = list(new_findings("hub", mutate))
    assert rule in {each.rule.id for each in new}, [f"{each.rule.id}: {each.what}" for each in new]


@pytest.mark.parametrize(
    "mutate",
    [
        pytest.param(_with("gateway-tls", _nothing), id="both name one Secret"),
        pytest.param(_with("other", _nothing, "another.example.com"), id="a Certificate of another host"),
        pytest.param(
            lambda bundle: bundle.objects.append(_certificate("other")),
            id="a Certificate beside the annotation, whose Secret cert-manager makes",
        ),
        pytest.param(on("Ingress", None, put("/v1/chat/completions", *_PATH, "path")), id="one endpoint"),
    ],
)
def test_what_is_right_is_left_alone(mutate: Callable[[Bundle], object]) -> None:
    # that nobody has brought the definition of a Certificate, or a Secret, is right
    told = {each.rule.id for each in new_findings("hub", mutate)}
    assert told <= {"schema-unchecked", "object-external"}


INGRESS = (
    "apiVersion: networking.k8s.io/v1\nkind: Ingress\nmetadata:\n  name: NAME\n  annotations: {ANNOTATION}\n"
    "spec:\n  TLSrules:\n    - host: a.example.com\n      http: {paths: [{path: /, pathType: Prefix, "
    "backend: {service: {name: web, port: {number: 80}}}}]}\n"
)
CERTIFICATE = (
    "---\napiVersion: cert-manager.io/v1\nkind: Certificate\nmetadata: {name: web}\n"
    "spec: {secretName: web-tls, dnsNames: [a.example.com], issuerRef: {name: a}}\n---\n"
)
PLAIN = INGRESS.replace("TLS", "").replace("NAME", "plain")
SECURED = INGRESS.replace("TLS", "tls: [{hosts: [a.example.com], secretName: web-tls}]\n  ").replace(
    "NAME", "a"
)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(PLAIN.replace("ANNOTATION", "a/b: c"), id="nobody asks for a certificate"),
        pytest.param(
            PLAIN.replace("ANNOTATION", "a/b: c") + CERTIFICATE + SECURED.replace("ANNOTATION", ""),
            id="beside it is one with TLS",
        ),
        pytest.param(
            PLAIN.replace("ANNOTATION", "alb.ingress.kubernetes.io/certificate-arn: 'arn:a'") + CERTIFICATE,
            id="a load balancer has the certificate",
        ),
        pytest.param(
            PLAIN.replace("ANNOTATION", "traefik.ingress.kubernetes.io/router.tls: 'true'") + CERTIFICATE,
            id="Traefik's own way",
        ),
    ],
)  # fmt: skip
def test_an_entry_without_tls_may_be_right(text: str) -> None:
    assert "tls-missing" not in rules(text, "a.yaml")


def test_a_certificate_that_something_else_uses_is_left_alone() -> None:
    other = SECURED.replace("ANNOTATION", "").replace("web-tls", "made-by-hand")
    assert "certificate-unused" in rules(other + CERTIFICATE, "a.yaml")
    controller = (
        "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {containers: [{name: a, image: 'a:1', "
        "args: [--default-ssl-certificate=default/web-tls]}]}\n"
    )
    assert "certificate-unused" not in rules(other + CERTIFICATE + controller, "a.yaml")
