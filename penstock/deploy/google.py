"""What Google's load balancers must be told of the gateway, on GKE: else they cut answers off after 30 s.

    Ingress    BackendConfig, which the Service names       (GKE's controller: no class, gce, gce-internal)
    HTTPRoute  GCPBackendPolicy, HealthCheckPolicy          (GKE's Gateway controller)

A backend's time-out there is for the whole of an answer, streams included, not for its next byte. Nothing
here has run on GKE; kinds and fields are those of Google's documentation.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Literal

from penstock.spec.cluster import Entry

from . import names
from .objects.base import Metadata, Object, Part
from .workloads import Bundle

INGRESS_CLASSES = ("gce", "gce-internal")
"""Of GKE's Ingress controller, which reads them in an annotation and does not look at `ingressClassName`."""
GATEWAY_CLASSES = "gke-"
"""How the names of GKE's own GatewayClasses begin."""
CLASS_ANNOTATION = "kubernetes.io/ingress.class"
LONGEST = 3600
"""Seconds of the longest answer, at least: some hundred thousand tokens. Google advises against a day."""


class HttpHealthCheck(Part, frozen=True, kw_only=True):
    """How a load balancer asks a pod, at the pod's own port."""

    type: Literal["HTTP"] | None = None
    """Said here for an Ingress; a policy has it beside this."""
    request_path: str
    port: int


class Draining(Part, frozen=True, kw_only=True):
    """How long requests of a pod that goes may take."""

    draining_timeout_sec: int


class BackendConfigSpec(Part, frozen=True, kw_only=True):
    """Of a Service behind an Ingress."""

    timeout_sec: int
    connection_draining: Draining
    health_check: HttpHealthCheck


class BackendPolicyDefault(Part, frozen=True, kw_only=True):
    """Of a Service behind a Gateway."""

    timeout_sec: int
    connection_draining: Draining


def by_ingress(bundle: Bundle) -> bool:
    """Whether the entry is an Ingress that GKE's own controller serves."""
    entry = _entry(bundle)
    return entry is not None and entry.kind == "ingress" and entry.class_name in (None, *INGRESS_CLASSES)


def by_gateway(bundle: Bundle) -> bool:
    """Whether the entry joins a Gateway of GKE's own classes, as one is on GKE of which nothing is said."""
    entry = _entry(bundle)
    if entry is None or entry.kind != "gateway-api":
        return False
    return entry.gateway_class is None or entry.gateway_class.startswith(GATEWAY_CLASSES)


def service_annotations(bundle: Bundle) -> dict[str, str]:
    """Of the gateway's Service: what its backend is like, and that pods are reached at their own addresses,
    which a Service without a port on nodes needs."""
    if not by_ingress(bundle):
        return {}
    return {
        "cloud.google.com/backend-config": json.dumps({"default": names.GATEWAY}),
        "cloud.google.com/neg": json.dumps({"ingress": True}),
    }


def objects(bundle: Bundle, metadata: Metadata, patience: int) -> Iterator[Object]:
    """What stands beside the entry.

    Args:
        patience: seconds until the next byte of an answer.
    """
    seconds = max(LONGEST, patience)
    draining = Draining(draining_timeout_sec=min(LONGEST, bundle.gateway.grace))
    path, port = "/readyz", bundle.gateway.port
    if by_ingress(bundle):
        spec = BackendConfigSpec(
            timeout_sec=seconds,
            connection_draining=draining,
            health_check=HttpHealthCheck(type="HTTP", request_path=path, port=port),
        )
        yield Object(
            api_version="cloud.google.com/v1",
            kind="BackendConfig",
            metadata=metadata,
            body={"spec": spec},
        )
    if by_gateway(bundle):
        target = {"group": "", "kind": "Service", "name": names.GATEWAY}
        policy = BackendPolicyDefault(timeout_sec=seconds, connection_draining=draining)
        asked = HttpHealthCheck(request_path=path, port=port)
        check = {"config": {"type": "HTTP", "httpHealthCheck": asked}}
        for kind, default in (("GCPBackendPolicy", policy), ("HealthCheckPolicy", check)):
            yield Object(
                api_version="networking.gke.io/v1",
                kind=kind,
                metadata=metadata,
                body={"spec": {"default": default, "targetRef": target}},
            )


def _entry(bundle: Bundle) -> Entry | None:
    return bundle.spec.cluster.entry if bundle.spec.cluster.provider == "gke" else None
