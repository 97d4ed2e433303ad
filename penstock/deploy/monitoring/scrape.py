"""ServiceMonitors: which Services the Prometheus operator scrapes, and how. monitoring.coreos.com/v1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from penstock.deploy import names
from penstock.deploy.objects import Metadata, Object, Part
from penstock.deploy.workloads import Bundle

INTERVAL = 15
"""Seconds between scrapes: a scaler's queries are no younger."""


class SecretKey(Part, frozen=True, kw_only=True):
    """An entry of a Secret."""

    name: str
    key: str


class Authorization(Part, frozen=True, kw_only=True):
    """`Authorization: Bearer …`, from a Secret."""

    credentials: SecretKey


class Endpoint(Part, frozen=True, kw_only=True):
    """A port of the Services, by its name."""

    port: str
    path: str = "/metrics"
    """Written out, though it is the operator's default: readers need not know that."""
    interval: str = ""
    scheme: str | None = None
    tls_config: Mapping[str, Any] | None = None
    authorization: Authorization | None = None

    def to_dict(self) -> dict[str, Any]:
        """As Kubernetes has it."""
        return {**super().to_dict(), "path": self.path}


def monitors(bundle: Bundle) -> list[Object]:
    """Of the engines, all with one; and of the gateway."""
    gateway = bundle.spec.gateway
    variable = gateway.metrics_key_env
    secure = gateway.ssl_certfile is not None
    return [
        _monitor(bundle, "engines", "engine", Endpoint(port=names.PORT, interval=f"{INTERVAL}s")),
        _monitor(
            bundle,
            "gateway",
            "gateway",
            Endpoint(
                port=names.PORT,
                interval=f"{INTERVAL}s",
                scheme="https" if secure else None,
                # within the cluster it is asked by a name that its certificate does not have
                tls_config={"insecureSkipVerify": True} if secure else None,
                authorization=None
                if variable is None
                else Authorization(credentials=SecretKey(name=bundle.spec.cluster.secret, key=variable)),
            ),
        ),
    ]


def _monitor(bundle: Bundle, name: str, component: str, endpoint: Endpoint) -> Object:
    return Object(
        api_version="monitoring.coreos.com/v1",
        kind="ServiceMonitor",
        metadata=metadata(bundle, name, found=True),
        body={
            "spec": {
                # without a jobLabel the job is the Service's name, as all queries of this bundle have it
                "selector": {
                    "matchLabels": {names.COMPONENT: component, names.PART_OF: bundle.namespace},
                },
                "endpoints": [endpoint.to_dict()],
            }
        },
    )


def metadata(
    bundle: Bundle,
    name: str,
    component: str = "monitoring",
    *,
    found: bool = False,
    more: Mapping[str, str] | None = None,
) -> Metadata:
    """Of objects of monitoring. found: with the labels by which the Prometheus operator finds them."""
    own = names.labels(component, name, bundle.namespace)
    operator = dict(bundle.spec.cluster.prometheus_labels) if found else {}
    labels = {**own, names.MANAGED_BY: "penstock", **operator, **(more or {})}
    return Metadata(name=name, namespace=bundle.namespace, labels=labels)
