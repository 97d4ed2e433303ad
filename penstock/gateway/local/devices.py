"""Accelerators of this machine, as its driver's tool names them. No torch, no library."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence

import msgspec

from penstock.core.errors import StartupError

_SECONDS = 20.0
_ADVICE = "`penstock up` runs models on this machine; name one that is elsewhere under upstreams."


class Device(msgspec.Struct, frozen=True):
    """One accelerator."""

    number: int
    """As CUDA_VISIBLE_DEVICES counts."""
    name: str
    free: int
    """Bytes."""
    total: int
    """Bytes."""


def accelerators(environment: Mapping[str, str] = os.environ) -> list[Device]:
    """NVIDIA's, in their order; only those that CUDA_VISIBLE_DEVICES lets us see. Raises StartupError."""
    tool = shutil.which("nvidia-smi", path=environment.get("PATH"))
    if tool is None:
        raise StartupError("no accelerator is found here: there is no nvidia-smi.", advice=_ADVICE)
    query = [tool, "--query-gpu=index,name,memory.free,memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=_SECONDS, check=True).stdout
        found = [_device(line) for line in said.splitlines() if line.strip()]
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise StartupError(f"nvidia-smi does not say which accelerators are here: {error}.") from None
    if (seen := environment.get("CUDA_VISIBLE_DEVICES")) is None:
        return found
    numbers = {str(device.number): device for device in found}
    return [numbers[each.strip()] for each in seen.split(",") if each.strip() in numbers]


def _device(line: str) -> Device:
    number, name, free, total = (field.strip() for field in line.split(","))
    return Device(int(number), name, int(free) << 20, int(total) << 20)


def assign(wanted: Sequence[tuple[str, int]], devices: Sequence[Device]) -> dict[str, list[Device]]:
    """Devices of each of several pools, `(name, count)`, in their order; nobody shares one.

    Raises StartupError where there are fewer.
    """
    total = sum(count for _, count in wanted)
    if total > len(devices):
        pools = ", ".join(f"{name} ({count})" for name, count in wanted)
        raise StartupError(
            f"the pools {pools} have {total} accelerators; this machine has {len(devices)}.", advice=_ADVICE
        )
    rest = list(devices)
    given = {}
    for name, count in wanted:
        given[name], rest = rest[:count], rest[count:]
    return given
