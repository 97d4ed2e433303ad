from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.evaluate.server import AnsweringServer, Reply


@pytest.fixture
def serve() -> Iterator[Callable[..., AnsweringServer]]:
    """Starts servers that end with the test."""
    with ExitStack() as stack:

        def start(answer: Callable[[str], Reply], **more: str) -> AnsweringServer:
            return stack.enter_context(AnsweringServer(answer, **more).running())

        yield start
