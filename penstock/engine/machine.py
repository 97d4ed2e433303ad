"""What an engine may use of this machine: memory and cores, within the limits of its control group. Linux.

No torch: whoever plans for several engines asks, too.
"""

from __future__ import annotations

import math
import os
from pathlib import Path


def memory() -> tuple[int, int]:
    """(total, available) bytes of RAM, within the limits of the control group."""
    values = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        key, _, rest = line.partition(":")
        values[key] = int(rest.split()[0]) * 1024
    total, available = values["MemTotal"], values["MemAvailable"]
    for limit_file, used_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            limit, used = int(Path(limit_file).read_text()), int(Path(used_file).read_text())
        except (OSError, ValueError):  # absent, or "max"
            continue
        if limit < total:
            used -= _page_cache()
            total, available = limit, min(available, max(0, limit - used))
    return total, available


def _page_cache() -> int:
    """Bytes of the control group that the kernel gives back when asked: files that were read."""
    try:
        for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines():
            if line.startswith("inactive_file "):
                return int(line.split()[1])
    except OSError:
        pass
    return 0


def usable_cores() -> int:
    """Physical cores that this process may run on, within its control group's quota.

    Two threads of one core share its vector units and its cache: the second one makes products slower.
    """
    cores = len({_siblings(cpu) for cpu in os.sched_getaffinity(0)})
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no control group of version 2, or "max"
        return cores


def _siblings(cpu: int) -> str:
    """Names the core that a logical processor belongs to."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(cpu)
