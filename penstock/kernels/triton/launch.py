"""Whether Triton is there, how kernels are started, and what a device has for them.

Importing this module needs neither Triton nor a GPU.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

#: What every kernel is compiled with. Fused products and sums round once instead of twice; Triton 3.10 would
#: do without them.
OPTIONS = {"enable_fp_fusion": True}

#: Programs per multiprocessor of kernels that work through a list of tasks.
_RESIDENT = 2
#: Of the interpreter: more than one, so that tests see tasks being shared out.
_INTERPRETED_PROGRAMS = 3


def installed() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton's kernels are interpreted in this process: what they need on a CPU."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "y", "yes")


@functools.cache
def programs(device: torch.device) -> int:
    """How many programs share out a list of tasks: as many as run at one time, whatever the list."""
    if device.type == "cpu":
        return _INTERPRETED_PROGRAMS
    return _RESIDENT * torch.cuda.get_device_properties(device).multi_processor_count


def capability(device: torch.device) -> tuple[int, int] | None:
    """CUDA's compute capability; None on a CPU and on AMD."""
    if device.type == "cpu" or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)


@functools.cache
def shared_bytes(device: torch.device) -> int:
    """Shared memory that one program may have."""
    if device.type == "cpu":
        return 0
    properties = torch.cuda.get_device_properties(device)
    for name in ("shared_memory_per_block_optin", "shared_memory_per_block"):
        if hasattr(properties, name):
            return int(getattr(properties, name))
    return 48 << 10
