"""What Linux says of a machine, or of the container that this runs in. Nothing here judges.

Files are read below a root, so that another machine's can be looked at; what cannot be had is None.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import resource
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_NVIDIA, _AMD = "0x10de", "0x1002"


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """Where weights are or shall be."""

    path: str
    free: int
    """Bytes."""
    total: int
    kind: str = ""
    """Of its file system."""
    read_only: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """One look."""

    cores: float | None = None
    """That may be used: the container's, where it has a limit."""
    memory: int | None = None
    """Bytes that may be used."""
    available: int | None = None
    """Of these, not taken now."""
    limited: bool = False
    """Whether the memory is a container's limit."""
    shm: int | None = None
    hugepages: int = 0
    """Bytes that are set aside for them."""
    transparent_hugepages: str = ""
    overcommit: int | None = None
    files: int | None = None
    """RLIMIT_NOFILE; -1 is no limit."""
    locked: int | None = None
    """RLIMIT_MEMLOCK, bytes."""
    sysctl: Mapping[str, int] = field(default_factory=dict)
    nvidia_devices: int = 0
    """On the PCI bus, whether there is a driver or not."""
    amd_devices: int = 0
    device_files: tuple[str, ...] = ()
    """/dev/nvidia0, … that this user may open."""
    disk: Disk | None = None
    clock_synchronised: bool | None = None
    clock_error: float | None = None
    """Seconds that the clock may be off, as the kernel reckons."""
    ports: Mapping[int, str] = field(default_factory=dict)
    """Port → why it cannot be had; empty where it is free."""
    kernel: str = ""
    container: bool = False


PARAMETERS = (
    "net.core.somaxconn",
    "vm.max_map_count",
    "vm.swappiness",
    "kernel.numa_balancing",
    "fs.file-max",
)


def look(
    *, root: Path = Path("/"), weights: Path | None = None, ports: Sequence[int] = (), live: bool = True
) -> Host:
    """Everything.

    Args:
        root: of the files that are read.
        weights: where weights are kept; a folder that is not there yet counts as its parent.
        ports: that shall be free on all of this machine's addresses.
        live: whether to ask this process' own system, too: limits, clock, ports.
    """
    memory, available = _memory(root)
    limit, used = _whole(root / "sys/fs/cgroup/memory.max"), _whole(root / "sys/fs/cgroup/memory.current")
    limited = limit is not None and (memory is None or limit < memory)
    if limited and limit is not None:
        memory, available = limit, min(available or limit, limit - (used or 0))
    synchronised, error = _clock() if live else (None, None)
    return Host(
        cores=_cores(root, live),
        memory=memory,
        available=available,
        limited=limited,
        shm=_size(root / "dev/shm"),
        hugepages=_hugepages(root),
        transparent_hugepages=_chosen(root / "sys/kernel/mm/transparent_hugepage/enabled"),
        overcommit=_whole(root / "proc/sys/vm/overcommit_memory"),
        files=resource.getrlimit(resource.RLIMIT_NOFILE)[0] if live else None,
        locked=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] if live else None,
        sysctl={
            name: value
            for name in PARAMETERS
            if (value := _whole(root / "proc/sys" / name.replace(".", "/"))) is not None
        },
        nvidia_devices=_pci(root, _NVIDIA),
        amd_devices=_pci(root, _AMD),
        device_files=tuple(
            path.name
            for path in sorted((root / "dev").glob("nvidia[0-9]*"))
            if os.access(path, os.R_OK | os.W_OK)
        ),
        disk=None if weights is None else _disk(root, weights),
        clock_synchronised=synchronised,
        clock_error=error,
        ports={port: _port(port) for port in ports} if live else {},
        kernel=_text(root / "proc/sys/kernel/osrelease"),
        container=(root / ".dockerenv").exists() or "kubepods" in _text(root / "proc/1/cgroup"),
    )


def _memory(root: Path) -> tuple[int | None, int | None]:
    found = dict(re.findall(r"^(\w+):\s+(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE))
    return tuple(int(found[name]) * 1024 if name in found else None for name in ("MemTotal", "MemAvailable"))  # type: ignore[return-value]


def _hugepages(root: Path) -> int:
    found = dict(re.findall(r"^(\w+):\s+(\d+)", _text(root / "proc/meminfo"), re.MULTILINE))
    return int(found.get("HugePages_Total", 0)) * int(found.get("Hugepagesize", 0)) * 1024


def _cores(root: Path, live: bool) -> float | None:
    quota, _, period = _text(root / "sys/fs/cgroup/cpu.max").partition(" ")
    cores = float(len(os.sched_getaffinity(0))) if live else None
    if quota.isdigit() and period.isdigit() and int(period):
        limit = int(quota) / int(period)
        return limit if cores is None else min(cores, limit)
    return cores


def _pci(root: Path, vendor: str) -> int:
    """Devices of a vendor that compute or display (class 0x03…)."""
    found = 0
    for path in (root / "sys/bus/pci/devices").glob("*"):
        if _text(path / "vendor") == vendor and _text(path / "class").startswith("0x03"):
            found += 1
    return found


def _disk(root: Path, path: Path) -> Disk | None:
    real = path
    while not real.exists() and real != real.parent:
        real = real.parent
    try:
        found = os.statvfs(real)
    except OSError:
        return None
    kind, longest = "", -1
    for line in _text(root / "proc/mounts").splitlines():
        words = line.split()
        if len(words) > 2 and len(words[1]) > longest and real.resolve().is_relative_to(words[1]):
            kind, longest = words[2], len(words[1])
    return Disk(
        path=str(path),
        free=found.f_bavail * found.f_frsize,
        total=found.f_blocks * found.f_frsize,
        kind=kind,
        read_only=bool(found.f_flag & os.ST_RDONLY) or not os.access(real, os.W_OK),
    )


def _port(port: int) -> str:
    """Why a port cannot be had; empty where it can."""
    try:
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("0.0.0.0", port))
            sock.listen(1)
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return ""


def _clock() -> tuple[bool | None, float | None]:
    """Whether the kernel has its time from somewhere, and how far it may be off: adjtimex(2), which only
    reads with `modes` 0."""

    class Timex(ctypes.Structure):
        _fields_ = (
            ("modes", ctypes.c_uint),
            ("offset", ctypes.c_long),
            ("freq", ctypes.c_long),
            ("maxerror", ctypes.c_long),
            ("esterror", ctypes.c_long),
            ("status", ctypes.c_int),
            ("rest", ctypes.c_byte * 256),
        )

    timex = Timex()
    with contextlib.suppress(OSError, AttributeError):
        state = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(timex))
        if state >= 0:
            return not timex.status & 0x0040, timex.maxerror / 1e6  # STA_UNSYNC
    return None, None


def _size(path: Path) -> int | None:
    try:
        found = os.statvfs(path)
    except OSError:
        return None
    return found.f_frsize * found.f_blocks


def _chosen(path: Path) -> str:
    match = re.search(r"\[(\w+)\]", _text(path))
    return match[1] if match else ""


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return ""


def _whole(path: Path) -> int | None:
    text = _text(path).split()
    return int(text[0]) if text and re.fullmatch(r"-?\d+", text[0]) else None
