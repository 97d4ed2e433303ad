"""All objects of a bundle, in the order in which a cluster should get them, and the files that they are in.

    00-namespace   Namespace, ServiceAccounts
    10-weights     the claim, and the Jobs that fill it
    20-engines     of each model: Service, budget, arguments, Deployments
    30-gateway     its file, ledger, Deployment, Service
    40-network     NetworkPolicies, the entry
    50-monitoring  ServiceMonitors, alerts
    51-dashboards  Grafana's
    52-scaling     what follows the load
    60-jobs        work that nobody waits for

`kubectl apply -f DIR` takes files in the order of their names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from . import engines, gateway, jobs, monitoring, names, network, storage
from .objects import kinds
from .objects.base import Metadata, Object
from .pods import metadata
from .workloads import Bundle

ACCOUNTS = ("engine", "gateway", "weights", "job")


def objects(bundle: Bundle) -> tuple[Object, ...]:
    """All of them."""
    return tuple(each for part in groups(bundle).values() for each in part)


def groups(bundle: Bundle) -> Mapping[str, tuple[Object, ...]]:
    """Name of a file, without its ending → its objects; empty ones are left out."""
    found = {
        "00-namespace": tuple(_beginning(bundle)),
        "10-weights": tuple(storage.objects(bundle)),
        "20-engines": tuple(engines.objects(bundle)),
        "30-gateway": tuple(gateway.objects(bundle)),
        "40-network": tuple(network.objects(bundle)),
        "50-monitoring": (*monitoring.monitors(bundle), *monitoring.rules(bundle)),
        "51-dashboards": tuple(monitoring.dashboards(bundle)),
        "52-scaling": tuple(monitoring.scalers(bundle)),
        "60-jobs": tuple(jobs.objects(bundle)),
    }
    return {name: part for name, part in found.items() if part}


def _beginning(bundle: Bundle) -> Iterator[Object]:
    """The namespace, in which the Pod Security Standard `restricted` is enforced; an account for each kind of
    pod, which can do nothing."""
    yield kinds.namespace(
        Metadata(
            name=bundle.namespace,
            labels={
                names.NAME: "penstock",
                names.MANAGED_BY: "penstock",
                "pod-security.kubernetes.io/enforce": "restricted",
                "pod-security.kubernetes.io/warn": "restricted",
            },
        )
    )
    for account in ACCOUNTS:
        yield kinds.service_account(
            metadata(bundle, account, names.labels(account, account, bundle.namespace)),
            bundle.spec.cluster.images.pull_secret,
        )
