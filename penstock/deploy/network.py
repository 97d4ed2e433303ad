"""Who may talk to whom, and how clients come in.

    clients ─▶ Ingress | HTTPRoute (TLS) ─▶ gateway ─▶ engines        monitoring ─▶ gateway, engines
                    /v1 only                  │
                                              └─▶ clouds, the ledger's database

An engine talks to nobody but the resolver of names, and the other nodes of its own replica.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from penstock.spec.cluster import Entry

from . import engines, gateway, google, names
from .objects import kinds
from .objects.base import Object
from .objects.kinds import EgressRule, IngressRule, PolicyPeer, PolicyPort
from .objects.pod import LabelSelector
from .pods import metadata
from .workloads import Bundle

PATH = "/v1"
"""What is reached from outside: not metrics, not the admin API."""
CERTIFICATE = "gateway-tls"
"""Name of the Secret that cert-manager writes."""


def objects(bundle: Bundle) -> Iterator[Object]:
    """NetworkPolicies, and the entry where there is one."""
    yield from _policies(bundle)
    entry = bundle.spec.cluster.entry
    if entry is not None:
        yield from _ingress(bundle, entry) if entry.kind == "ingress" else _route(bundle, entry)
        labels = names.labels("gateway", names.GATEWAY, bundle.namespace)
        yield from google.objects(bundle, metadata(bundle, names.GATEWAY, labels), patience(bundle))


def _policies(bundle: Bundle) -> Iterator[Object]:
    http = (PolicyPort(port=names.PORT),)
    monitoring = PolicyPeer(
        namespace_selector=LabelSelector(
            match_labels={"kubernetes.io/metadata.name": bundle.spec.cluster.monitoring_namespace}
        )
    )
    dns = EgressRule(ports=(PolicyPort(port=53, protocol="UDP"), PolicyPort(port=53, protocol="TCP")))
    labels = names.labels("engine", "engine", bundle.namespace)
    group = tuple(
        PolicyPeer(pod_selector=LabelSelector(match_labels=engines.selector(each)))
        for each in bundle.workloads
        if each.nodes > 1
    )
    yield kinds.network_policy(
        metadata(bundle, "engines", labels),
        LabelSelector(match_labels={names.COMPONENT: "engine"}),
        (
            IngressRule(
                from_=(
                    PolicyPeer(pod_selector=LabelSelector(match_labels=gateway.selector())),
                    monitoring,
                ),
                ports=http,
            ),
        ),
        (dns,)
        if bundle.spec.cluster.storage.access == "ReadWriteMany"
        else (dns, EgressRule(ports=(PolicyPort(port=443, protocol="TCP"),))),  # they fetch for themselves
    )
    for workload, peer in zip((each for each in bundle.workloads if each.nodes > 1), group, strict=True):
        # NCCL takes whatever port is free
        yield kinds.network_policy(
            metadata(bundle, f"{workload.name}-peers", workload.labels),
            LabelSelector(match_labels=engines.selector(workload)),
            (IngressRule(from_=(peer,)),),
            (EgressRule(to=(peer,)),),
        )
    yield kinds.network_policy(
        metadata(bundle, "gateway", names.labels("gateway", names.GATEWAY, bundle.namespace)),
        LabelSelector(match_labels=gateway.selector()),
        (
            IngressRule(ports=http),
            *(
                (
                    IngressRule(
                        from_=(PolicyPeer(pod_selector=LabelSelector()),),
                        ports=(PolicyPort(port=names.ADMIN_PORT),),
                    ),
                )
                if bundle.gateway.admin_port is not None
                else ()
            ),
        ),
        None,
    )
    yield kinds.network_policy(
        metadata(bundle, "others", names.labels("job", "job", bundle.namespace)),
        LabelSelector(
            match_labels={names.NAME: "penstock", names.PART_OF: bundle.namespace},
            match_expressions=(_neither("engine", "gateway"),),
        ),
        (),
        None,
    )


def _neither(*components: str) -> Any:
    from .objects.pod import Requirement

    return Requirement(key=names.COMPONENT, operator="NotIn", values=components)


def patience(bundle: Bundle) -> int:
    """Seconds for which a proxy must wait for the next byte: as long as the gateway itself waits for an
    answer to begin, and for a model to start."""
    waits = [300.0, *(route.wait for route in bundle.spec.routes.values())]
    headers = [600.0, *(upstream.timeout_headers for upstream in bundle.spec.upstreams.values())]
    return math.ceil(max(waits) + max(headers))


def _body(bundle: Bundle) -> int:
    """Largest body in bytes: files where some upstream takes them."""
    spec = bundle.spec.gateway
    files = any(upstream.files for upstream in bundle.spec.upstreams.values())
    return max(spec.max_body_bytes, spec.files.max_bytes if files else 0)


def entry_annotations(bundle: Bundle, entry: Entry) -> dict[str, str]:
    """What makes a controller wait for slow answers, and pass on each piece of a stream at once."""
    seconds, kind = str(patience(bundle)), entry.class_name or "nginx"
    found: dict[str, str] = {}
    if google.by_ingress(bundle):  # its time-outs are the BackendConfig's
        found = {google.CLASS_ANNOTATION: entry.class_name or google.INGRESS_CLASSES[0]}
    elif "nginx" in kind or "webapprouting" in kind:
        prefix = "nginx.ingress.kubernetes.io"
        found = {
            f"{prefix}/proxy-connect-timeout": "10",
            f"{prefix}/proxy-read-timeout": seconds,
            f"{prefix}/proxy-send-timeout": seconds,
            f"{prefix}/proxy-buffering": "off",
            f"{prefix}/proxy-request-buffering": "off",
            f"{prefix}/proxy-http-version": "1.1",
            f"{prefix}/proxy-body-size": str(_body(bundle)),
            f"{prefix}/proxy-next-upstream": "off",  # the gateway repeats what may be repeated
        }
    elif "alb" in kind:
        prefix = "alb.ingress.kubernetes.io"
        found = {
            f"{prefix}/target-type": "ip",
            f"{prefix}/healthcheck-path": "/readyz",
            f"{prefix}/load-balancer-attributes": f"idle_timeout.timeout_seconds={min(4000, int(seconds))}",
        }
    elif "haproxy" in kind:
        found = {"haproxy.org/timeout-server": f"{seconds}s"}
    if entry.tls is not None and entry.tls.issuer is not None:
        found["cert-manager.io/cluster-issuer"] = entry.tls.issuer
    return found


def _ingress(bundle: Bundle, entry: Entry) -> Iterator[Object]:
    backend = {"service": {"name": names.GATEWAY, "port": {"name": names.PORT}}}
    spec: dict[str, Any] = {}
    if entry.class_name is not None and not google.by_ingress(bundle):
        spec["ingressClassName"] = entry.class_name
    if entry.tls is not None:
        spec["tls"] = [{"hosts": [entry.host], "secretName": entry.tls.secret or CERTIFICATE}]
    spec["rules"] = [
        {
            "host": entry.host,
            "http": {"paths": [{"path": PATH, "pathType": "Prefix", "backend": backend}]},
        }
    ]
    labels = names.labels("gateway", names.GATEWAY, bundle.namespace)
    yield Object(
        api_version="networking.k8s.io/v1",
        kind="Ingress",
        metadata=metadata(bundle, names.GATEWAY, labels, entry_annotations(bundle, entry)),
        body={"spec": spec},
    )


def _route(bundle: Bundle, entry: Entry) -> Iterator[Object]:
    """A route that joins a Gateway of somebody's. Its `request` time-out is for all of a stream, so there is
    none; `backendRequest` neither. The certificate is the Gateway's to name. GKE's controller accepts no
    route that says anything of time-outs: there they are a policy's."""
    parent: dict[str, Any] = {"name": entry.class_name}
    if entry.gateway_namespace is not None:
        parent["namespace"] = entry.gateway_namespace
    labels = names.labels("gateway", names.GATEWAY, bundle.namespace)
    yield Object(
        api_version="gateway.networking.k8s.io/v1",
        kind="HTTPRoute",
        metadata=metadata(bundle, names.GATEWAY, labels),
        body={
            "spec": {
                "parentRefs": [parent],
                "hostnames": [entry.host],
                "rules": [
                    {
                        "matches": [{"path": {"type": "PathPrefix", "value": PATH}}],
                        **(
                            {}
                            if google.by_gateway(bundle)
                            else {"timeouts": {"request": "0s", "backendRequest": "0s"}}
                        ),
                        "backendRefs": [{"name": names.GATEWAY, "port": bundle.gateway.port}],
                    }
                ],
            }
        },
    )
    if entry.tls is None:
        return
    if entry.tls.issuer is not None:
        yield Object(
            api_version="cert-manager.io/v1",
            kind="Certificate",
            metadata=metadata(bundle, CERTIFICATE, labels),
            body={
                "spec": {
                    "secretName": CERTIFICATE,
                    "dnsNames": [entry.host],
                    "issuerRef": {"name": entry.tls.issuer, "kind": "ClusterIssuer"},
                }
            },
        )
    if entry.gateway_namespace not in (None, bundle.namespace):
        yield Object(
            api_version="gateway.networking.k8s.io/v1",
            kind="ReferenceGrant",
            metadata=metadata(bundle, CERTIFICATE, labels),
            body={
                "spec": {
                    "from": [
                        {
                            "group": "gateway.networking.k8s.io",
                            "kind": "Gateway",
                            "namespace": entry.gateway_namespace,
                        }
                    ],
                    "to": [{"group": "", "kind": "Secret", "name": entry.tls.secret or CERTIFICATE}],
                }
            },
        )
