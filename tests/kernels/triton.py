"""Where Triton's kernels are tested: on a GPU, where there is one, else under the interpreter on a CPU.

The interpreter takes some milliseconds for every program, so shapes are tiny.
"""

from __future__ import annotations

import pytest
import torch

from penstock.kernels.create import why_no_triton
from penstock.kernels.operations import Operations
from penstock.kernels.torch_operations import torch_operations
from penstock.kernels.triton.operations import triton_operations

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

why = why_no_triton(DEVICE, torch.float16)
needs_triton = pytest.mark.skipif(why is not None, reason=f"Triton {why}")
#: The interpreter computes what lies behind the end of a row, too, and numpy says what it thinks of it.
quiet = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def table(dtype: torch.dtype) -> Operations:
    """The table "triton"."""
    if why := why_no_triton(DEVICE, dtype):
        pytest.skip(f"Triton {why}")
    made = triton_operations(torch_operations(DEVICE, dtype))
    assert made is not None
    return made
