"""What GKE wants before NVIDIA's GPU Operator: node pools without GKE's own device plugin, Google's installer
of drivers, and leave to run pods of the system's priority. As in NVIDIA's guide for GKE; not run there."""

from __future__ import annotations

from collections.abc import Iterator

from penstock.deploy.objects import dump
from penstock.deploy.objects.base import Metadata, Object

NAMESPACE = "gpu-operator"
LABEL = "gke-no-default-nvidia-gpu-device-plugin=true"
"""Of nodes: GKE's own device plugin stays away. Two would both announce nvidia.com/gpu."""
INSTALLER = (
    "https://raw.githubusercontent.com/GoogleCloudPlatform/container-engine-accelerators/master/"
    "nvidia-driver-installer/cos/daemonset-preloaded.yaml"
)
"""For Container-Optimized OS, which is what nodes have unless they are told otherwise."""
_PODS = 100
_PRIORITIES = ("system-node-critical", "system-cluster-critical")


def quota() -> Object:
    """Pods of these priorities run on GKE only in namespaces that have a quota for them."""
    scope = {"scopeName": "PriorityClass", "operator": "In", "values": list(_PRIORITIES)}
    return Object(
        api_version="v1",
        kind="ResourceQuota",
        metadata=Metadata(name=f"{NAMESPACE}-quota", namespace=NAMESPACE),
        body={"spec": {"hard": {"pods": str(_PODS)}, "scopeSelector": {"matchExpressions": [scope]}}},
    )


def before() -> Iterator[str]:
    """Lines of the folder's README.md."""
    yield from (
        "GKE's node pools are made without GKE's driver, which comes with its own device plugin, and with a",
        "label that keeps that plugin away. The label must be on every node with a GPU, from its start:",
        "",
        "```",
        "gcloud container node-pools create POOL --cluster CLUSTER \\",
        "  --accelerator type=TYPE,count=COUNT,gpu-driver-version=disabled \\",
        f"  --node-labels {LABEL}",
        "```",
        "",
        "The driver is from Google's installer: this one on Container-Optimized OS, the folder `ubuntu`",
        "beside it on Ubuntu. And the operator's pods have priorities that GKE lets run only under a quota:",
        "",
        "```",
        f"kubectl apply -f {INSTALLER}",
        f"kubectl create namespace {NAMESPACE}",
        "kubectl apply -f - <<EOF",
        *dump(quota().to_dict()).rstrip().splitlines(),
        "EOF",
        "```",
        "",
    )
