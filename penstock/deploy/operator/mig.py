"""Multi-Instance GPUs: which slices each GPU of a node is cut into, in the format of NVIDIA's mig-parted.

    pools with `mig` ─▶ those on the same nodes together ─▶ slices on GPUs (first fit, largest first)
                     ─▶ one configuration for each node ─▶ config.yaml of the MIG manager

A pool counts slices. Pools of the same hardware, labels and taints are the same nodes: their slices are put
together on as few GPUs as hold them, so that 4g.40gb and 3g.40gb share one A100. What is legal on one GPU is
`fleet.hardware.pack`'s word. No slice is made that no pool names.

Format: https://github.com/NVIDIA/mig-parted, and the chart's `migManager.config`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from penstock.core.errors import StartupError
from penstock.fleet.catalogue import find_device
from penstock.fleet.hardware import Device, MigProfile, pack
from penstock.spec.model import Pool, Spec

Layout = tuple[tuple[str, int], ...]
"""What one GPU is cut into: (profile, instances), by name. Empty: not cut."""


@dataclass(frozen=True, slots=True)
class Node:
    """One node and its configuration; nodes with the same one share it."""

    config: str
    """Name of the configuration, and value of the node's label `nvidia.com/mig.config`."""
    hardware: str
    pools: tuple[str, ...]
    """Whose slices are on it."""
    layouts: tuple[Layout, ...]
    """Of its GPUs, in their order."""


def nodes(spec: Spec) -> tuple[Node, ...]:
    """Every node whose GPUs are cut.

    Raises StartupError, naming the pool, where the hardware cannot be cut, or not into that.
    """
    made: list[Node] = []
    for together in _groups(spec):
        device, slices = _slices(together)
        layouts = _place(device, slices)
        first = next(iter(together.values()))
        per_node = first.nodes.devices or device.node
        named: dict[tuple[Layout, ...], str] = {}
        for start in range(0, len(layouts), per_node):
            here = tuple(layouts[start : start + per_node])
            taken = {node.config for node in made}
            name = named.setdefault(here, _name(device, here, taken))
            made.append(Node(name, device.name, tuple(together), here))
    return tuple(made)


def config(found: Sequence[Node]) -> dict[str, Any]:
    """The document that mig-parted reads: every configuration, and `all-disabled`, the manager's default."""
    configs: dict[str, Any] = {"all-disabled": [{"devices": "all", "mig-enabled": False}]}
    for node in found:
        configs[node.config] = _entries(node.layouts)
    return {"version": "v1", "mig-configs": configs}


def _groups(spec: Spec) -> list[dict[str, Pool]]:
    """Pools with slices, those of the same nodes together."""
    groups: dict[tuple[Any, ...], dict[str, Pool]] = {}
    for name, pool in spec.pools.items():
        if pool.mig is not None:
            device = find_device(pool.hardware)
            labels = tuple(sorted(pool.nodes.labels.items()))
            taints = tuple((taint.key, taint.value, taint.effect) for taint in pool.nodes.taints)
            key = (device.name, labels, taints, pool.purchase)
            groups.setdefault(key, {})[name] = pool
    return list(groups.values())


def _slices(pools: Mapping[str, Pool]) -> tuple[Device, list[MigProfile]]:
    device = find_device(next(iter(pools.values())).hardware)
    found: list[MigProfile] = []
    for name, pool in pools.items():
        profile = device.profile(pool.mig or "")
        if profile is None:
            there = ", ".join(each.name for each in device.mig)
            raise StartupError(
                f"pools.{name}.mig: {device.name} has no slice {pool.mig}.",
                param=f"pools.{name}.mig",
                advice=f"It can be cut into {there}." if there else "It cannot be cut; leave mig out.",
            )
        found += [profile] * pool.count
    return device, found


def _place(device: Device, slices: Sequence[MigProfile]) -> list[Layout]:
    """Slices on as few GPUs as first fit needs, the largest first."""
    gpus: list[list[MigProfile]] = []
    for profile in sorted(slices, key=lambda each: (-each.memory_slices, -each.compute, each.name)):
        for gpu in gpus:
            fits = sum(each.name == profile.name for each in gpu) < profile.most
            if fits and pack([*gpu, profile]) is not None:
                gpu.append(profile)
                break
        else:
            gpus.append([profile])
    return [tuple(sorted(_counted(gpu).items())) for gpu in gpus]


def _counted(gpu: Sequence[MigProfile]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for profile in gpu:
        counts[profile.name] = counts.get(profile.name, 0) + 1
    return counts


def _name(device: Device, layouts: Sequence[Layout], taken: set[str]) -> str:
    """As penstock-a100-80gb-3gx40gb: what a label's value may be (no `+`)."""
    kinds = list(dict.fromkeys(profile for layout in layouts for profile, _ in layout))
    plain = re.sub(r"[^a-z0-9.-]+", "-", "-".join(["penstock", device.name, *kinds]).lower())[:58].strip("-.")
    name, number = plain, 2
    while name in taken:
        name, number = f"{plain}-{number}", number + 1
    return name


def _entries(layouts: Sequence[Layout]) -> list[dict[str, Any]]:
    """GPUs with the same layout are one entry."""
    same: dict[Layout, list[int]] = {}
    for index, layout in enumerate(layouts):
        same.setdefault(layout, []).append(index)
    return [
        {"devices": indices, "mig-enabled": True, "mig-devices": dict(layout)}
        for layout, indices in same.items()
    ]
