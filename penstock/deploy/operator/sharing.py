"""Time-slicing: several pods take turns on one GPU, without walls between them. For development only.

Latency then hangs on what the neighbours do, and whoever takes too much memory takes it from them. So a pool
with `time_slicing` serves no model that promises anything (`slo`) or follows a load (`scale`): it is refused.
The configuration is one that nodes must be labelled for; all others keep the device plugin's default.

Format: the configuration file of NVIDIA's k8s-device-plugin, `sharing.timeSlicing`.
"""

from __future__ import annotations

from typing import Any

from penstock.core.errors import StartupError
from penstock.fleet.catalogue import find_device
from penstock.spec.model import Spec

CONFIG = "development-only-{replicas}-pods"
"""Name of a configuration, and value of the nodes' label."""
LABEL = "nvidia.com/device-plugin.config"
"""Of nodes."""


def configs(spec: Spec, *, mig_strategy: str) -> dict[str, dict[str, Any]]:
    """Name → configuration of the device plugin, `default` first; empty where nobody shares in time.

    Raises StartupError where a model on such a pool promises something.
    """
    shared = {name: pool for name, pool in spec.pools.items() if pool.time_slicing is not None}
    if not shared:
        return {}
    for name, model in spec.models.items():
        burst = (model.scale.burst if model.scale else None) or model.pool
        for at in {model.pool, burst} & shared.keys():
            promised = "slo" if model.slo is not None else "scale" if model.scale is not None else None
            if promised is not None:
                raise StartupError(
                    f"models.{name} has {promised}, and its pool {at} is shared in time: its pods wait for "
                    "each other, so no latency can be promised.",
                    param=f"models.{name}.{promised}",
                    advice=f"Cut the devices with pools.{at}.mig, take whole ones, or leave {promised} out.",
                )
    made: dict[str, dict[str, Any]] = {"default": {"version": "v1", "flags": {"migStrategy": mig_strategy}}}
    for name, pool in shared.items():
        device = find_device(pool.hardware)
        if device.vendor != "nvidia":
            raise StartupError(
                f"pools.{name}.time_slicing: {device.name} is no GPU of NVIDIA's.",
                param=f"pools.{name}.time_slicing",
                advice="Leave it out: models on cpu share their machine anyway.",
            )
        made[config_of(pool.time_slicing or 0)] = {
            "version": "v1",
            "flags": {"migStrategy": mig_strategy},
            "sharing": {
                "timeSlicing": {
                    # the resource keeps its name, which pods ask for; and who asks for two gets an error,
                    # since two turns on one GPU are not two GPUs
                    "renameByDefault": False,
                    "failRequestsGreaterThanOne": True,
                    "resources": [{"name": "nvidia.com/gpu", "replicas": pool.time_slicing}],
                }
            },
        }
    return made


def config_of(replicas: int) -> str:
    """The configuration's name of a pool with so many pods on a GPU."""
    return CONFIG.format(replicas=replicas)
