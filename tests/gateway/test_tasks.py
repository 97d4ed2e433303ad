"""Tasks that run beside requests end."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

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
