"""Every test of sampling runs with each table of operations."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.kernels.tables import TABLES, table

from . import current


@pytest.fixture(params=TABLES, scope="module", autouse=True)
def operations(request: pytest.FixtureRequest) -> Iterator[str]:
    """A whole module with this table."""
    current.operations = table(request.param, torch.float32)
    yield request.param
    current.operations = None
