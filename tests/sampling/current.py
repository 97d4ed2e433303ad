"""The table of operations that the tests of a module run with at the moment; see conftest."""

from __future__ import annotations

from penstock.kernels.operations import Operations
from penstock.sampling import Sampler

operations: Operations | None = None


def table() -> Operations:
    assert operations is not None
    return operations


def sampler() -> Sampler:
    return Sampler(table())
