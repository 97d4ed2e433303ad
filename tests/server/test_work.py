"""Heavy work: its turns, its bound, and what becomes of it when nobody waits any more."""

from __future__ import annotations

import asyncio
import threading

import pytest

from penstock.server import work
from penstock.server.work import Work


class Gate:
    """Work that goes on until it is let go."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.running = 0
        self._lock = threading.Lock()
        self.entered: list[str] = []

    def enter(self, name: str) -> str:
        with self._lock:
            self.entered.append(name)
        assert self.open.wait(20)
        return name


async def until(condition: object) -> None:
    for _ in range(2000):
        if condition():  # type: ignore[operator]
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came")


def test_sizes_under_way_fit_the_capacity_and_turns_come_in_order() -> None:
    async def scene() -> None:
        work, gate = Work(10), Gate()
        callers = [
            asyncio.create_task(work.run(size, gate.enter, name))
            for name, size in (("a", 6), ("b", 4), ("c", 8), ("d", 1))
        ]
        await until(lambda: len(gate.entered) == 2)
        await asyncio.sleep(0)
        assert sorted(gate.entered) == ["a", "b"]  # d would fit no better than c: first come, first served
        gate.open.set()
        assert await asyncio.gather(*callers) == ["a", "b", "c", "d"]

    asyncio.run(scene())


def test_what_is_larger_than_the_capacity_runs_alone() -> None:
    async def scene() -> None:
        work, gate = Work(10), Gate()
        callers = [asyncio.create_task(work.run(1000, gate.enter, name)) for name in "ab"]
        await until(lambda: len(gate.entered) == 1)
        gate.open.set()
        assert await asyncio.gather(*callers) == ["a", "b"]

    asyncio.run(scene())


def test_who_leaves_keeps_the_place_until_the_thread_has_ended() -> None:
    async def scene() -> None:
        work, gate = Work(10), Gate()
        gone = asyncio.create_task(work.run(10, gate.enter, "gone"))
        await until(lambda: gate.entered)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        waiting = asyncio.create_task(work.run(10, gate.enter, "waiting"))
        left = asyncio.create_task(work.run(10, gate.enter, "left"))
        last = asyncio.create_task(work.run(10, gate.enter, "last"))
        await asyncio.sleep(0)
        left.cancel()
        await asyncio.sleep(0)
        assert gate.entered == ["gone"]
        gate.open.set()
        assert await asyncio.gather(waiting, last) == ["waiting", "last"]
        assert gate.entered == ["gone", "waiting", "last"]

    asyncio.run(scene())


def test_a_failure_is_the_callers_and_the_place_is_free_again() -> None:
    async def scene() -> None:
        work = Work(10)
        with pytest.raises(ZeroDivisionError):
            await work.run(10, lambda: 1 / 0)
        assert await work.run(10, lambda: 5) == 5

    asyncio.run(scene())


def test_memory_is_given_back_once_after_much_work(monkeypatch: pytest.MonkeyPatch) -> None:
    trims: list[str] = []
    monkeypatch.setattr(work, "_QUIET", 0.0)
    monkeypatch.setattr(work, "_trim_memory", lambda: trims.append(threading.current_thread().name))

    async def scene() -> None:
        mine = Work()
        mine.spent(work._WORTH_A_TRIM - 1)
        await asyncio.sleep(0.01)
        assert not trims
        mine.spent(1)
        mine.spent(10 * work._WORTH_A_TRIM)
        await until(lambda: trims)
        mine.spent(1)
        await asyncio.sleep(0.01)

    asyncio.run(scene())
    assert len(trims) == 1
    assert trims[0].startswith("work")


def test_trimming_is_harmless() -> None:
    work._trim_memory()
