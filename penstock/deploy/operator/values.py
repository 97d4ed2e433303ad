"""Values of the GPU Operator's Helm chart: what is installed on nodes with GPUs, and how they are cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from penstock.deploy.objects import dump
from penstock.deploy.providers import MARKS
from penstock.spec.cluster import Taint
from penstock.spec.model import Spec

from . import dcgm

CHART = "v26.7.0"
"""Version of the chart, whose keys these are. That it makes the ConfigMaps itself is newer than the v24.6.2
of older walk-throughs."""
MIG_CONFIG = "penstock-mig-parted"
PLUGIN_CONFIG = "penstock-device-plugin"
DCGM_CONFIG = "penstock-dcgm-metrics"


def values(
    spec: Spec, *, mig: Mapping[str, Any] | None, sharing: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """What is said to the chart; all else is its default.

    Args:
        mig: the document of mig.config, None where nothing is cut.
        sharing: name → configuration of the device plugin.
    """
    cluster = spec.cluster
    made: dict[str, Any] = {
        # nodes of clouds come with a driver; a second one does not load
        "driver": {"enabled": False},
        "toolkit": {"enabled": True},
        "devicePlugin": {"enabled": True},
        # mixed names slices for what they are (nvidia.com/mig-3g.40gb), beside whole GPUs
        "mig": {"strategy": "mixed"},
        "migManager": {"enabled": True},
        "dcgmExporter": {
            "enabled": True,
            "config": {"name": DCGM_CONFIG, "create": True, "data": dcgm.csv()},
            "serviceMonitor": {
                "enabled": True,
                "interval": "15s",
                # the labels that the Prometheus operator looks for
                "additionalLabels": dict(cluster.prometheus_labels),
                # whose pod uses a GPU, and not the exporter's own, is in `pod` and `namespace`
                "honorLabels": True,
            },
        },
        "daemonsets": {"tolerations": _tolerations(spec)},
    }
    if mig is not None:
        made["migManager"]["config"] = {
            "name": MIG_CONFIG,
            "create": True,
            "default": "all-disabled",
            "data": {"config.yaml": dump(mig)},
        }
        if cluster.provider != "other":
            # in clouds, MIG mode is switched by a reboot of the node
            made["migManager"]["env"] = [{"name": "WITH_REBOOT", "value": "true"}]
    if sharing:
        made["devicePlugin"]["config"] = {
            "name": PLUGIN_CONFIG,
            "create": True,
            "default": "default",
            "data": {name: dump(document) for name, document in sharing.items()},
        }
    if cluster.provider == "gke":
        # Google's installer puts the driver there, and nothing else of the root is writable
        made["hostPaths"] = {"driverInstallDir": "/home/kubernetes/bin/nvidia"}
        made["toolkit"]["installDir"] = "/home/kubernetes/bin/nvidia"
        # else the toolkit breaks containerd's configuration from GKE 1.33 on (NVIDIA/cloud-native-docs#312)
        made["toolkit"]["env"] = [{"name": "RUNTIME_CONFIG_SOURCE", "value": "file"}]
    return made


def _tolerations(spec: Spec) -> list[dict[str, str]]:
    """Of the operator's own pods, which run on every node with a GPU, spot ones as well."""
    made: dict[tuple[str, ...], dict[str, str]] = {}
    taints = [taint for pool in spec.pools.values() for taint in pool.nodes.taints]
    if any(pool.purchase == "spot" for pool in spec.pools.values()):
        taints += MARKS[spec.cluster.provider].spot_taints
    for taint in (GPU, *taints):
        each = {"key": taint.key, "operator": "Exists" if taint.value is None else "Equal"}
        if taint.value is not None:
            each["value"] = taint.value
        each["effect"] = taint.effect
        made.setdefault(tuple(each.values()), each)
    return list(made.values())


GPU = Taint(key="nvidia.com/gpu")
"""The chart's own default, which a list of ours replaces."""
