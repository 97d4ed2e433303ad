"""The tables of operations that every differential test runs, and what they are compared with."""

from __future__ import annotations

import pytest
import torch

from penstock.kernels.cpu.library import available
from penstock.kernels.cpu.operations import cpu_operations
from penstock.kernels.operations import Operations
from penstock.kernels.reference import reference_operations
from penstock.kernels.torch_operations import torch_operations

from . import triton

CPU = torch.device("cpu")
TABLES = ["torch", "cpu"]
DTYPES = [torch.float32, torch.bfloat16]


def table(name: str, dtype: torch.dtype) -> Operations:
    """One of TABLES, or "triton"; the test is skipped where it is not there."""
    if name == "triton":  # slow under its interpreter: it has tests of its own, of small shapes
        return triton.table(dtype)
    plain = torch_operations(CPU, dtype)
    if name == "torch":
        return plain
    library = available(wait_seconds=120)
    if library is None:
        pytest.skip("no C++ compiler, or PENSTOCK_CPU_KERNELS=0")
    return cpu_operations(library, plain)


def specification(dtype: torch.dtype) -> Operations:
    """What they must agree with."""
    return reference_operations(CPU, dtype)
