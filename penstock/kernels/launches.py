"""What a driver says that does not start one of Triton's kernels.

Triton raises a RuntimeError, `Triton Error [CUDA]: …` or `Triton Error [HIP]: …`, with the driver's words
(cuGetErrorString), for whatever a launch answers: what is wrong with this kernel, with an earlier one, or
with the device.
"""

from __future__ import annotations

TRITON_ERROR = "Triton Error ["
"""How it begins."""
OF_THE_KERNEL = (
    "invalid argument",
    "invalid device function",
    "kernel image",
    "named symbol not found",
    "PTX",
    "too many resources requested",
)
"""Words of those that are this kernel's: others run, and torch's operators do its work."""
