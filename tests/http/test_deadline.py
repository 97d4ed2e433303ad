"""Deadlines that move."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from penstock.http.deadline import Deadline

NEVER = 3600.0


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await work()

    asyncio.run(main())


@pytest.mark.parametrize("moves", [(), (None,), (60.0, None), (None, 60.0)])
def test_one_that_does_not_come_changes_nothing(moves: tuple[float | None, ...]) -> None:
    async def work() -> None:
        loop = asyncio.get_running_loop()
        async with Deadline(NEVER) as deadline:
            for move in moves:
                deadline.reschedule(None if move is None else loop.time() + move)
            await asyncio.sleep(0)
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0

    run(work)


@pytest.mark.parametrize("moves", [(), (NEVER, 0.0), (None, 0.0), (NEVER, None, 0.001), (0.001, 0.002)])
def test_one_that_comes_is_a_timeout(moves: tuple[float | None, ...]) -> None:
    async def work() -> None:
        loop = asyncio.get_running_loop()

        async def waits() -> None:
            async with Deadline(NEVER if moves else 0.001) as deadline:
                for move in moves:
                    deadline.reschedule(None if move is None else loop.time() + move)
                await loop.create_future()

        with pytest.raises(TimeoutError):
            await waits()
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0
        await asyncio.sleep(0)

    run(work)


def test_one_that_has_moved_away_does_not_come_when_it_was_due_first() -> None:
    async def work() -> None:
        loop = asyncio.get_running_loop()
        async with Deadline(0.001) as deadline:
            deadline.reschedule(loop.time() + NEVER)
            passed = loop.create_future()
            loop.call_later(0.01, passed.set_result, None)
            await passed

    run(work)


def test_whoever_cancels_besides_is_heard() -> None:
    async def work() -> None:
        async def waits() -> None:
            async with Deadline(NEVER) as deadline:
                deadline.reschedule(0.0)
                begun.set_result(None)
                await asyncio.get_running_loop().create_future()

        begun = asyncio.get_running_loop().create_future()
        task = asyncio.ensure_future(waits())
        await begun
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()

    run(work)


def test_other_errors_pass() -> None:
    async def work() -> None:
        with pytest.raises(KeyError):
            async with Deadline(NEVER):
                raise KeyError("x")

    run(work)
