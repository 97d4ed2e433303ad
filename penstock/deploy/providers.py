"""Labels and taints of nodes, by who sells them.

Sources: AKS, EKS and GKE's documentation of node labels, spot nodes and GPU nodes; Karpenter's well-known
labels; NVIDIA's GPU feature discovery for `nvidia.com/gpu.product`. Only AKS taints its spot nodes by itself;
GKE taints its GPU nodes; everybody may taint more, which a pool's `nodes.taints` says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from penstock.spec.cluster import Taint
from penstock.spec.model import Pool

Provider = Literal["aks", "eks", "gke", "other"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Marks:
    """What one provider's nodes carry."""

    spot: tuple[tuple[str, str], ...]
    """Labels of spot nodes; a node has one of them, whatever made it."""
    spot_taints: tuple[Taint, ...] = ()
    """Taints that are on every spot node."""
    notice: int
    """Seconds that pods have when a spot node goes."""
    zone: str = "topology.kubernetes.io/zone"


MARKS: Mapping[Provider, Marks] = {
    "aks": Marks(
        spot=(("kubernetes.azure.com/scalesetpriority", "spot"),),
        spot_taints=(Taint(key="kubernetes.azure.com/scalesetpriority", value="spot"),),
        notice=30,
    ),
    "eks": Marks(
        spot=(("eks.amazonaws.com/capacityType", "SPOT"), ("karpenter.sh/capacity-type", "spot")),
        notice=120,
    ),
    "gke": Marks(
        spot=(("cloud.google.com/gke-spot", "true"),),
        # not there by itself, but GKE's own advice, and what node auto-provisioning sets
        spot_taints=(Taint(key="cloud.google.com/gke-spot", value="true"),),
        # of the notice's 30 s, the kubelet keeps the later 15 for pods of the system
        notice=15,
    ),
    "other": Marks(spot=(), notice=120),
}
"""Provider → what its nodes carry."""

PRODUCTS: Mapping[str, tuple[str, ...]] = {
    "V100-16GB": ("Tesla-V100-SXM2-16GB", "Tesla-V100-PCIE-16GB"),
    "V100-32GB": ("Tesla-V100-SXM2-32GB", "Tesla-V100-SXM3-32GB", "Tesla-V100-PCIE-32GB"),
    "T4": ("Tesla-T4",),
    "A10G": ("NVIDIA-A10G",),
    "L4": ("NVIDIA-L4",),
    "L40S": ("NVIDIA-L40S",),
    "A100-40GB": ("NVIDIA-A100-SXM4-40GB", "NVIDIA-A100-PCIE-40GB"),
    "A100-80GB": ("NVIDIA-A100-SXM4-80GB", "NVIDIA-A100-80GB-PCIe"),
    "H100": ("NVIDIA-H100-80GB-HBM3", "NVIDIA-H100-PCIe", "NVIDIA-H100-NVL"),
    "H200": ("NVIDIA-H200", "NVIDIA-H200-NVL"),
    "B200": ("NVIDIA-B200",),
}
"""Kind of device → values of `nvidia.com/gpu.product`: what the driver calls it, spaces as dashes."""

_GKE: Mapping[str, str] = {
    "V100-16GB": "nvidia-tesla-v100",
    "T4": "nvidia-tesla-t4",
    "L4": "nvidia-l4",
    "A100-40GB": "nvidia-tesla-a100",
    "A100-80GB": "nvidia-a100-80gb",
    "H100": "nvidia-h100-80gb",
    "H200": "nvidia-h200-141gb",
    "B200": "nvidia-b200",
}
"""Kind of device → value of `cloud.google.com/gke-accelerator`."""

PRODUCT_LABEL = "nvidia.com/gpu.product"
_GKE_LABEL = "cloud.google.com/gke-accelerator"
_RESOURCES = {"nvidia": "nvidia.com/gpu", "amd": "amd.com/gpu", "tpu": "google.com/tpu"}
"""Vendor → what its device plugin calls a device."""


def resource_of(vendor: str, mig: str | None) -> str | None:
    """What a pod asks for; None on a CPU. A slice has a name of its own (strategy `mixed`)."""
    if mig is not None:
        return f"nvidia.com/mig-{mig}"
    return _RESOURCES.get(vendor)


def device_labels(provider: Provider, hardware: str, pool: Pool) -> tuple[str, tuple[str, ...]] | None:
    """(label, values) that tell nodes with such devices; None where none does, or the pool says it itself.

    A time-sliced device's product ends in -SHARED.
    """
    if {PRODUCT_LABEL, _GKE_LABEL} & pool.nodes.labels.keys():
        return None
    if provider == "gke" and hardware in _GKE:
        return _GKE_LABEL, (_GKE[hardware],)
    products = PRODUCTS.get(hardware)
    if products is None:
        return None
    if pool.time_slicing is not None:
        products = tuple(f"{product}-SHARED" for product in products)
    return PRODUCT_LABEL, products


def taints(provider: Provider, resource: str | None, pool: Pool) -> tuple[Taint, ...]:
    """What its pods tolerate: the GPU's, the provider's for spot nodes, the pool's own."""
    found: list[Taint] = []
    if resource is not None:
        vendor = resource.partition("/")[0]
        found.append(Taint(key="nvidia.com/gpu" if vendor == "nvidia.com" else resource))
    if pool.purchase == "spot":
        found += MARKS[provider].spot_taints
    found += pool.nodes.taints
    return tuple(dict.fromkeys(found))
