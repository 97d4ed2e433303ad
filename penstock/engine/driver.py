"""What NVIDIA's driver says of itself, asked without torch: where torch sees no GPU, this is why."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

_VERSION_FILE = Path("/proc/driver/nvidia/version")
_DEVICE_FILE = Path("/dev/nvidiactl")
_VERSION = re.compile(r"\b(\d{3,4}\.\d+(?:\.\d+)?)\b")


def is_there(device_file: Path = _DEVICE_FILE) -> bool:
    """Whether the machine has a driver for a GPU of NVIDIA's."""
    return device_file.exists()


def newest_cuda(load: Callable[[str], Any] = ctypes.CDLL) -> tuple[int, int] | None:
    """The newest CUDA that the driver knows, as (12, 4); None where there is none, or it says nothing."""
    try:
        library = load("libcuda.so.1")
        version = ctypes.c_int(0)
        if library.cuDriverGetVersion(ctypes.byref(version)) != 0 or version.value <= 0:
            return None
    except (OSError, AttributeError):
        return None
    return version.value // 1000, version.value % 1000 // 10


def version(file: Path = _VERSION_FILE) -> str:
    """The driver's own version, as 535.104.05; empty where it says none."""
    try:
        found = _VERSION.search(file.read_text())
    except OSError:
        return ""
    return found[1] if found else ""
