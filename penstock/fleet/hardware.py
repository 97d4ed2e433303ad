"""Devices: what they hold, how fast they read and multiply, how they can be cut, and what an hour costs.

Sizes are bytes (GB are decimal, GiB are named), rates are per second, money is nanodollars. Memory is what
the driver reports, not what the name says. FLOP/s are dense, as data sheets give them without sparsity.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

GIB = 1 << 30
GB = 10**9


def gb(size: float) -> str:
    """Bytes, decimal: `141.1 GB`."""
    return f"{size / GB:,.1f} GB"


COMPUTE_SLICES, MEMORY_SLICES = 7, 8
"""Of a GPU that can be cut into Multi-Instance GPUs."""


@dataclass(frozen=True, slots=True)
class Price:
    """Of one device and hour, on a date. A price without a date and a source is no price."""

    per_hour: int
    """Nanodollars."""
    as_of: datetime.date
    source: str
    what: str
    """The offer."""
    purchase: Literal["on-demand", "spot", "owned"] = "on-demand"
    node: int = 1
    """Devices that are sold together."""


@dataclass(frozen=True, slots=True)
class MigProfile:
    """One kind of slice. `3g.40gb` is three of seven compute slices and half of the memory."""

    name: str
    compute: int
    memory_slices: int
    memory: int
    """Bytes."""
    share: float
    """Of the device's multiprocessors."""
    most: int
    """Instances on one device."""
    placements: tuple[int, ...]
    """Memory slices at which it may begin."""
    estimated: bool = False
    """Whether its size is reckoned from the device's, and not read from a driver."""

    @property
    def resource(self) -> str:
        """What a pod asks for, with the device plugin's mixed strategy."""
        return f"nvidia.com/mig-{self.name}"


@dataclass(frozen=True, slots=True)
class Device:
    """A kind of accelerator, or a CPU."""

    name: str
    vendor: Literal["nvidia", "amd", "tpu", "cpu"]
    memory: int
    bandwidth: float
    """Bytes/s of its memory."""
    flops: Mapping[str, float]
    """Type of numbers → FLOP/s (or integer operations)."""
    interconnect: float
    """Bytes/s between the devices of a node, both ways together; 0 for PCIe alone."""
    capability: float
    """CUDA compute capability; 0 where there is none."""
    node: int
    """Most devices in one machine."""
    source: str
    checked: str = ""
    """What its figures were compared with."""
    mig: tuple[MigProfile, ...] = ()
    prices: tuple[Price, ...] = ()

    @property
    def rate(self) -> float:
        """FLOP/s at 16 bits."""
        return max(self.flops.get("bf16", 0.0), self.flops.get("fp16", 0.0))

    @property
    def price(self) -> Price | None:
        """The newest offer on demand; the cheapest of those of a day."""
        offers = [price for price in self.prices if price.purchase == "on-demand"]
        return min(offers, key=lambda price: (-price.as_of.toordinal(), price.per_hour), default=None)

    def profile(self, name: str) -> MigProfile | None:
        """The slice of that name."""
        return next((each for each in self.mig if each.name == name), None)

    def sliced(self, profile: MigProfile) -> Device:
        """The slice as a device: its memory, its share of the bandwidth and of the multiprocessors."""
        share = profile.memory_slices / MEMORY_SLICES
        return Device(
            name=f"{self.name} {profile.name}",
            vendor=self.vendor,
            memory=profile.memory,
            bandwidth=self.bandwidth * share,
            flops={kind: rate * profile.share for kind, rate in self.flops.items()},
            interconnect=0.0,
            capability=self.capability,
            node=1,
            source=self.source,
        )


def pack(profiles: Sequence[MigProfile]) -> tuple[int, ...] | None:
    """Where slices can lie together on one device: each one's first memory slice; None if they cannot.

    Two rules: compute slices add up to seven at most, and memory slices do not overlap, each slice beginning
    where its profile may.
    """
    if sum(profile.compute for profile in profiles) > COMPUTE_SLICES:
        return None
    order = sorted(range(len(profiles)), key=lambda index: -profiles[index].memory_slices)
    starts = [0] * len(profiles)

    def place(rank: int, taken: int) -> bool:
        if rank == len(order):
            return True
        profile = profiles[order[rank]]
        for start in profile.placements:
            mask = ((1 << profile.memory_slices) - 1) << start
            if not taken & mask and start + profile.memory_slices <= MEMORY_SLICES:
                starts[order[rank]] = start
                if place(rank + 1, taken | mask):
                    return True
        return False

    return tuple(starts) if place(0, 0) else None
