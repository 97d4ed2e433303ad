"""Tasks that run beside requests end."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from penstock.core.errors import Unavailable
from penstock.gateway import tasks


def test_one_that_takes_a_cancellation_for_something_else_is_cancelled_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tasks, "_PATIENCE", 0.01)

    async def deaf() -> None:
        for _ in range(2):
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
        await asyncio.Event().wait()

    async def broken() -> None:
        raise ValueError

    async def body() -> None:
        running = [asyncio.create_task(deaf()), asyncio.create_task(broken())]
        await asyncio.sleep(0)
        await asyncio.wait_for(tasks.ended(running), 20)
        assert all(task.done() for task in running)
        await tasks.ended([])

    asyncio.run(body())


def test_what_is_repeated_goes_on_whatever_becomes_of_it(caplog: pytest.LogCaptureFixture) -> None:
    """A ledger that does not answer is no news here; anything else is told, in its own words."""

    class Looks(tasks.Repeated):
        interval = 0.0
        failure = "looking failed"

        def __init__(self) -> None:
            super().__init__()
            self.left: list[Exception] = [Unavailable("away"), ValueError("broken")]
            self.done = asyncio.Event()

        async def look(self) -> None:
            if self.left:
                raise self.left.pop(0)
            self.done.set()

    async def body() -> None:
        looks = Looks()
        looks.start()
        await asyncio.wait_for(looks.done.wait(), 20)
        await looks.stop()

    asyncio.run(body())
    assert [record.getMessage() for record in caplog.records] == ["looking failed"]
