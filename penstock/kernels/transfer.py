"""Numbers of the host on their way to a device, while the host goes on."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor


def on_device(numbers: npt.NDArray[Any] | Tensor, device: torch.device) -> Tensor:
    """The numbers on the device, in order with what is queued on its current stream.

    A copy from memory that can be paged out makes the host wait, for the copy at least and, asked for the
    usual way, for all that is queued before it (CUDA Runtime API, "API synchronization behavior"). So they go
    by way of pinned memory, which torch gives to nobody else before the copy is done. On a CPU nothing is
    copied: an array and its tensor are one memory.
    """
    tensor = numbers if isinstance(numbers, Tensor) else torch.from_numpy(numbers)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
