"""What an exception of torch means: memory that ran out, a device that is gone, or one step that failed.

torch has classes for two of these on GPUs and none on CPUs, so words are looked at where there is no class.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from penstock.core.errors import DeviceLost, DeviceOutOfMemory, cause
from penstock.kernels.launches import OF_THE_KERNEL, TRITON_ERROR

A = TypeVar("A")
R = TypeVar("R")

_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "bad_alloc", "_ALLOC_FAILED")
#: All that oneDNN says when there is no memory for its code or scratchpad. (What it has no implementation for
#: fails one stage earlier, with "could not create a primitive descriptor …".)
_ONEDNN_OUT_OF_MEMORY = ("could not create a primitive", "could not create a memory object")

#: CUDA's errors that say no to one call and leave the device as it was (CUDA Runtime API, cudaError_t):
#: invalid value, invalid configuration, invalid device function, no kernel image, launch out of resources,
#: not supported; and from 900 on, what a stream that is being captured does not take.
_OF_ONE_CALL = frozenset({1, 9, 98, 209, 701, 801, *range(900, 909)})
#: The same where there is no code to look at.
_OF_ONE_CALL_WORDS = (
    *OF_THE_KERNEL,
    "invalid configuration",
    "operation not supported",
    "captur",
    "CUBLAS_STATUS_NOT_SUPPORTED",
    "CUBLAS_STATUS_INVALID_VALUE",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device's or the host's memory ran out. torch's CPU allocator, oneDNN and CUDA's libraries
    have no class of their own for it, so their words are looked at."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        text in _ONEDNN_OUT_OF_MEMORY or any(words in text for words in _OUT_OF_MEMORY)
    )


def is_lost(error: BaseException) -> bool:
    """Whether nothing can be computed on the device any more by this process: after an error in a kernel, or
    of the hardware, every later call of CUDA fails with the same error."""
    if isinstance(error, DeviceLost):
        return True
    if not isinstance(error, RuntimeError) or is_out_of_memory(error):
        return False
    text = str(error)
    if isinstance(error, torch.AcceleratorError):
        code = getattr(error, "error_code", None)
        if code is not None:
            return code not in _OF_ONE_CALL
    elif not any(begin in text for begin in ("CUDA error:", "HIP error:", TRITON_ERROR)):
        return False
    first = text.partition("\n")[0]  # torch's advice follows
    return not any(words in first for words in _OF_ONE_CALL_WORDS)


def lost(error: BaseException) -> DeviceLost:
    """The error as the engine's end; torch's advice on debugging is cut off, it is of no use to a server."""
    if isinstance(error, DeviceLost):
        return error
    what = cause(error).splitlines()[0].rstrip(". ")
    return DeviceLost(
        f"the device is lost: {what}.",
        advice="`nvidia-smi` and `dmesg | grep -i xid` say what happened to it.",
    )


def computed(compute: Callable[[A], R], argument: A) -> R:
    """compute(argument). Raises DeviceLost and DeviceOutOfMemory for what torch says of these, and everything
    else as it is."""
    try:
        return compute(argument)
    except (MemoryError, RuntimeError) as error:
        if is_lost(error):
            raise lost(error) from error
        if not is_out_of_memory(error):
            raise
        what = cause(error).splitlines()[0]
    # not in the handler: the traceback holds the failed step's tensors, which a retry needs the place of
    raise DeviceOutOfMemory(what)
