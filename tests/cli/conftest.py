"""Commands run within the tests' process, and must not change how it logs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.own_logging import kept_logging


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    with kept_logging():
        yield
