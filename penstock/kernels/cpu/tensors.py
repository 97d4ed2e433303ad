"""What the kernels take: tensors in memory, of one of two dtypes, with a dense last dimension."""

from __future__ import annotations

import torch

#: The dtypes that kernels compute in, and how they are told which.
IS_BF16 = {torch.float32: 0, torch.bfloat16: 1}


def dense(x: torch.Tensor) -> torch.Tensor:
    """The tensor, copied unless its last dimension is dense."""
    return x if x.stride(-1) == 1 else x.contiguous()
