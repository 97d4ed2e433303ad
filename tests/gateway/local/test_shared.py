"""One fleet for several workers: what they hear of it, and what becomes of those who leave."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from penstock.gateway.fleet import ModelStarting, Replica
from penstock.gateway.local.shared import Hall, SharedFleet

REPLICA = Replica(
    model="demo", index=0, url="http://127.0.0.1:9", state="asleep", since=1.5, device="cpu", devices=1
)


class Fake:
    """A fleet of one model, which starts when the test says so."""

    key = "k"

    def __init__(self) -> None:
        self.replica = REPLICA
        self.users = 0
        self.waiting: list[asyncio.Future[None]] = []
        self.asked: list[tuple[float, int | None]] = []
        self._watchers: list[Callable[[Replica], None]] = []

    def models(self) -> Sequence[str]:
        return ("demo", "empty")

    def replicas(self, model: str) -> Sequence[Replica]:
        return (self.replica,) if model == "demo" else ()

    async def ready(self, model: str, *, timeout: float, max_waiting: int | None = None) -> None:
        self.asked.append((timeout, max_waiting))
        if max_waiting is not None and len(self.waiting) >= max_waiting:
            raise ModelStarting("too many wait", advice="later", retry_after=7)
        future = asyncio.get_running_loop().create_future()
        self.waiting.append(future)
        try:
            await future
        finally:
            self.waiting.remove(future)

    @contextlib.contextmanager
    def _use(self) -> Iterator[None]:
        self.users += 1
        try:
            yield
        finally:
            self.users -= 1

    def use(self, model: str) -> contextlib.AbstractContextManager[None]:
        return self._use()

    def subscribe(self, callback: Callable[[Replica], None]) -> None:
        self._watchers.append(callback)

    def become(self, **what: Any) -> None:
        self.replica = replace(self.replica, **what)
        for watcher in self._watchers:
            watcher(self.replica)
        if self.replica.state == "ready":
            for future in self.waiting:
                future.set_result(None)


@contextlib.asynccontextmanager
async def shared(folder: Path, count: int) -> AsyncIterator[tuple[Fake, list[SharedFleet], asyncio.Server]]:
    fleet = Fake()
    path = str(folder / "s")
    server = await asyncio.start_unix_server(Hall(fleet).serve, path)
    workers = [await SharedFleet.connect(path, "k") for _ in range(count)]
    try:
        yield fleet, workers, server
    finally:
        for worker in workers:
            await worker.close()
        server.close()
        await server.wait_closed()


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 20))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_workers_know_the_replicas_and_hear_of_changes(tmp_path: Path) -> None:
    async def test() -> None:
        async with shared(tmp_path, 2) as (fleet, workers, _):
            heard: list[str] = []
            workers[0].subscribe(lambda replica: heard.append(replica.state))
            assert [list(worker.replicas("demo")) for worker in workers] == [[REPLICA]] * 2
            assert workers[0].models() == ("demo",)  # one without replicas is none
            assert workers[0].replicas("nobody") == ()
            fleet.become(state="starting", restarts=1, why='signal 9\n"quoted"')
            fleet.become(state="ready")
            await until(lambda: all(worker.replicas("demo")[0].state == "ready" for worker in workers))
            assert heard == ["starting", "ready"]
            assert workers[1].replicas("demo") == (fleet.replica,)
            await workers[0].ready("demo", timeout=1)  # at once, without asking
            assert not fleet.asked

    run(test)


def test_those_of_all_workers_wait_together(tmp_path: Path) -> None:
    async def test() -> None:
        async with shared(tmp_path, 2) as (fleet, workers, _):
            first = asyncio.create_task(workers[0].ready("demo", timeout=30, max_waiting=2))
            second = asyncio.create_task(workers[1].ready("demo", timeout=30, max_waiting=2))
            await until(lambda: len(fleet.waiting) == 2)
            with pytest.raises(ModelStarting, match="too many wait later") as caught:
                await workers[1].ready("demo", timeout=30, max_waiting=2)
            assert caught.value.retry_after == 7
            fleet.become(state="ready")
            await asyncio.gather(first, second)
            assert fleet.asked == [(30, 2)] * 3
            # whoever has waited finds it
            assert [worker.replicas("demo")[0].state for worker in workers] == ["ready", "ready"]

    run(test)


def test_who_gives_up_waits_no_more(tmp_path: Path) -> None:
    async def test() -> None:
        async with shared(tmp_path, 1) as (fleet, (worker,), _):
            waiting = asyncio.create_task(worker.ready("demo", timeout=30))
            await until(lambda: len(fleet.waiting) == 1)
            waiting.cancel()
            await until(lambda: not fleet.waiting)
            with pytest.raises(asyncio.CancelledError):
                await waiting

    run(test)


def test_a_model_is_in_use_while_a_worker_has_a_request(tmp_path: Path) -> None:
    async def test() -> None:
        async with shared(tmp_path, 2) as (fleet, workers, _):
            with workers[0].use("demo"):
                await until(lambda: fleet.users == 1)
                with workers[0].use("demo"), workers[1].use("demo"):
                    await until(lambda: fleet.users == 2)
                await until(lambda: fleet.users == 1)
            await until(lambda: fleet.users == 0)
            for _ in range(50):
                with workers[0].use("demo"):
                    pass
            fleet.become(state="ready")
            await until(lambda: workers[0].replicas("demo")[0].state == "ready")
            assert fleet.users == 0

    run(test)


def test_a_worker_that_dies_takes_its_requests_with_it(tmp_path: Path) -> None:
    async def test() -> None:
        async with shared(tmp_path, 2) as (fleet, workers, _):
            with workers[0].use("demo"), workers[1].use("demo"):
                waiting = asyncio.create_task(workers[0].ready("demo", timeout=30))
                await until(lambda: (fleet.users, len(fleet.waiting)) == (2, 1))
                workers[0]._writer.transport.abort()
                await until(lambda: (fleet.users, len(fleet.waiting)) == (1, 0))
                with pytest.raises(ModelStarting, match="Nobody can start"):
                    await waiting
                with pytest.raises(ModelStarting, match="Nobody can start demo"):
                    await workers[0].ready("demo", timeout=30)
            await until(lambda: fleet.users == 0)

    run(test)


def test_nonsense_ends_a_connection_and_nothing_else(tmp_path: Path) -> None:
    async def test() -> None:
        async with shared(tmp_path, 1) as (fleet, (worker,), _):
            reader, writer = await asyncio.open_unix_connection(str(tmp_path / "s"))
            writer.write(b'{"use": "demo"}\nno json\n')
            assert (await reader.read()).count(b"\n") == 2
            writer.close()
            await until(lambda: fleet.users == 0)
            with worker.use("demo"):
                await until(lambda: fleet.users == 1)

    run(test)
