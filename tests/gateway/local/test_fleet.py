"""Engines as processes, scripted: started, watched, restarted, put to sleep and ended."""

from __future__ import annotations

import asyncio
import os
import random
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from penstock.gateway.fleet import ModelStarting, Replica
from penstock.gateway.local import restart
from penstock.gateway.local.command import Command
from penstock.gateway.local.fleet import LocalFleet, Part
from penstock.gateway.local.supervisor import Timing
from penstock.spec.model import Model

from .processes import alive, kill

FAST = Timing(start=20, grace=10, poll=0.02, watch=0.02, answer=5)
SCRIPT = Path(__file__).with_name("engine.py")


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))


def command(folder: Path, port: int) -> Command:
    return Command(
        arguments=(sys.executable, "-I", "-S", str(SCRIPT), str(folder), "--port", str(port)),
        environment={"PENSTOCK_API_KEY": "sk-engine"},
        probe="/readyz",
        alive="/livez",
    )


class World:
    """A fleet over one folder for each replica, and everything that happened."""

    def __init__(self, fleet: LocalFleet, root: Path) -> None:
        self.fleet = fleet
        self.root = root
        self.log: list[str] = []
        self.history: list[Replica] = []

    def folder(self, name: str = "demo/0") -> Path:
        return self.root / name

    def state(self, name: str = "demo/0") -> Replica:
        model, index = name.split("/")
        return self.fleet.replicas(model)[int(index)]

    def starts(self, name: str = "demo/0") -> list[int]:
        """Process ids of all its starts."""
        file = self.folder(name) / "starts"
        return [int(line) for line in file.read_text().split()] if file.exists() else []

    def states(self, name: str = "demo/0") -> list[str]:
        return [each.state for each in self.history if each.name == name]

    async def until(self, condition: Callable[[], bool]) -> None:
        """A change of the fleet, or one that it cannot know of."""
        async with asyncio.timeout(30):
            while not condition():
                await asyncio.sleep(0.005)

    async def post(self, path: str, name: str = "demo/0") -> None:
        async with aiohttp.ClientSession() as session:
            try:
                async with session.post(self.state(name).url + path):
                    pass
            except aiohttp.ClientError:
                pass  # it died of it


@asynccontextmanager
async def world(
    root: Path, *, timing: Timing = FAST, files: dict[str, str] | None = None, **models: dict[str, Any]
) -> AsyncIterator[World]:
    """files: name of a file in each folder → its text."""
    parts = {}
    made = World.__new__(World)
    for name, given in (models or {"demo": {}}).items():
        model = Model(weights="demo", pool="here", **given)
        folders = [root / name / str(index) for index in range(model.replicas)]
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            for file, text in (files or {}).items():
                (folder / file).write_text(text)
        commands = [lambda port, folder=folder: command(folder, port) for folder in folders]
        parts[name] = Part(model=model, hardware="cpu", commands=commands)
    log: list[str] = []
    fleet = LocalFleet(parts, key="sk-engine", show=log.append, environment=os.environ, timing=timing)
    made.__init__(fleet, root)  # type: ignore[misc]
    made.log = log
    fleet.subscribe(made.history.append)
    try:
        yield made
    finally:
        await fleet.close()
        assert not list(root.glob("*/*/overlap")), "two processes of one replica at a time"
        left = [
            pid
            for folder in root.glob("*/*/starts")
            for pid in map(int, folder.read_text().split())
            if alive(pid)
        ]
        assert not left


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restarts without much of a delay; what the delays are is tested below, without processes."""
    monkeypatch.setattr(restart.Backoff.__init__, "__defaults__", (0.02, 0.05, 60.0, 0))


async def raises(awaitable: Awaitable[None]) -> ModelStarting:
    with pytest.raises(ModelStarting) as caught:
        await awaitable
    return caught.value


def test_an_eager_model_starts_is_ready_and_ends(tmp_path: Path) -> None:
    async def go() -> None:
        async with world(tmp_path, demo={"replicas": 2}) as here:
            here.fleet.start()
            await here.until(lambda: all(each.state == "ready" for each in here.fleet.replicas("demo")))
            await here.fleet.ready("demo", timeout=0)
            assert here.state("demo/0").url != here.state("demo/1").url
            async with aiohttp.ClientSession() as session:
                for replica in here.fleet.replicas("demo"):
                    async with session.get(f"{replica.url}/readyz") as answer:
                        assert answer.status == 200
            assert (here.folder() / "key").read_text() == "sk-engine"
            await here.fleet.close()
            assert here.states() == ["starting", "ready", "stopping", "asleep"]
            assert any(line.startswith("[demo/0] listening on ") for line in here.log)
            assert "[demo/1] drained" in here.log

    run(go)


def test_one_that_dies_is_started_again_at_the_same_place(tmp_path: Path) -> None:
    async def go() -> None:
        async with world(tmp_path) as here:
            here.fleet.start()
            await here.fleet.ready("demo", timeout=20)
            url = here.state().url
            kill(here.starts()[0])
            await here.until(lambda: here.state().state == "ready" and len(here.starts()) == 2)
            assert here.state().url == url
            assert here.state().restarts == 1
            (waiting,) = (each for each in here.history if each.state == "waiting")
            assert waiting.why.startswith("signal 9, after saying: listening on ")
            await here.post("/3")
            await here.until(lambda: here.state().state == "ready" and len(here.starts()) == 3)
            assert here.history[-3].why.startswith("status 3")

    run(go)


def test_one_that_keeps_dying_keeps_being_started(tmp_path: Path) -> None:
    async def go() -> None:
        async with world(tmp_path, files={"crash": ""}) as here:
            here.fleet.start()
            await here.until(lambda: here.state().restarts >= 3)
            assert here.fleet.refusal is None
            (here.folder() / "crash").unlink()
            await here.fleet.ready("demo", timeout=20)

    run(go)


def test_an_engine_that_refuses_its_configuration_says_why(tmp_path: Path) -> None:
    async def go() -> None:
        async with world(tmp_path, files={"refuse": "penstock serve: --threads 9 is too many."}) as here:
            here.fleet.start()
            await here.until(lambda: here.fleet.refusal is not None)
            assert str(here.fleet.refusal) == (
                "demo/0 cannot be served: status 2, after saying: penstock serve: --threads 9 is too many."
            )
            error = await raises(here.fleet.ready("demo", timeout=20))
            assert error.status == 503
            assert "--threads" not in str(error)  # what engines say is not for clients

    run(go)


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    async def go() -> None:
        absent = Command(arguments=("/nonexistent/vllm", "serve"), probe="/health", alive="/health")
        part = Part(model=Model(weights="x", pool="here"), hardware="cpu", commands=[lambda port: absent])
        fleet = LocalFleet({"x": part}, key="", show=lambda line: None, environment=os.environ, timing=FAST)
        fleet.start()
        async with asyncio.timeout(20):
            while fleet.refusal is None:
                await asyncio.sleep(0.01)
        assert "/nonexistent/vllm cannot be started: No such file or directory" in str(fleet.refusal)
        await fleet.close()

    run(go)


def test_one_that_is_stuck_is_ended_and_started_again(tmp_path: Path) -> None:
    async def go() -> None:
        async with world(tmp_path) as here:
            here.fleet.start()
            await here.fleet.ready("demo", timeout=20)
            (here.folder() / "stuck").write_text("")
            await here.until(lambda: here.state().state == "waiting" or len(here.starts()) == 2)
            (here.folder() / "stuck").unlink()
            await here.until(lambda: here.state().state == "ready" and len(here.starts()) >= 2)
            (waiting, *_) = (each for each in here.history if each.state == "waiting")
            assert waiting.why == "/livez: status 503, 3 times in a row"

    run(go)


@pytest.mark.parametrize("file", ["mute", "unready"])
def test_one_that_never_gets_ready_is_ended_after_its_time(tmp_path: Path, file: str) -> None:
    async def go() -> None:
        async with world(tmp_path, files={file: ""}, timing=Timing(start=0.5, poll=0.02, watch=0.02)) as here:
            here.fleet.start()
            await here.until(lambda: "waiting" in here.states())
            (waiting, *_) = (each for each in here.history if each.state == "waiting")
            assert waiting.why == "it has not answered /readyz within 0.5 s"
            (here.folder() / file).unlink()

    run(go)


def test_a_lazy_model_starts_with_its_first_request(tmp_path: Path) -> None:
    async def go() -> None:
        async with world(tmp_path, demo={"start": "lazy"}, other={}) as here:
            here.fleet.start()
            await here.fleet.ready("other", timeout=20)
            assert here.state().state == "asleep"
            assert not here.starts()
            with here.fleet.use("demo"):
                await asyncio.gather(*(here.fleet.ready("demo", timeout=20) for _ in range(5)))
            assert len(here.starts()) == 1

    run(go)


def test_waiting_for_a_model_is_bounded_in_time_and_in_number(tmp_path: Path) -> None:
    async def go() -> None:
        async with world(tmp_path, files={"unready": ""}, demo={"start": "lazy"}) as here:
            first = asyncio.ensure_future(here.fleet.ready("demo", timeout=20, max_waiting=1))
            await asyncio.sleep(0)
            error = await raises(here.fleet.ready("demo", timeout=20, max_waiting=1))
            assert error.status == 503
            assert error.code == "model_starting"
            assert "1 requests wait for it already" in str(error)
            assert (error.retry_after or 0) >= 1
            late = await raises(here.fleet.ready("demo", timeout=0.05))
            assert "still starting, after 0.05 s" in str(late)
            (here.folder() / "unready").unlink()
            await first

    run(go)


def test_a_model_leaves_memory_when_nobody_wants_it_and_comes_back(tmp_path: Path) -> None:
    async def go() -> None:
        async with world(tmp_path, demo={"start": "lazy", "keep_alive": 0.3}) as here:
            with here.fleet.use("demo"):
                await here.fleet.ready("demo", timeout=20)
                await asyncio.sleep(0.5)
                assert here.state().state == "ready"  # in use for longer than that
            await here.until(lambda: here.state().state == "asleep")
            assert not alive(here.starts()[0])
            with here.fleet.use("demo"):
                await here.fleet.ready("demo", timeout=20)
            assert len(here.starts()) == 2

    run(go)


def test_a_model_that_nobody_used_after_its_start_leaves_too(tmp_path: Path) -> None:
    """Its client has gone before it was there."""

    async def go() -> None:
        async with world(tmp_path, demo={"start": "lazy", "keep_alive": 0.05}) as here:
            with here.fleet.use("demo"):
                waiting = asyncio.ensure_future(here.fleet.ready("demo", timeout=20))
                await asyncio.sleep(0)
                waiting.cancel()
            await here.until(lambda: here.states()[-1:] == ["asleep"])
            assert "ready" in here.states()

    run(go)


def test_a_model_that_dies_comes_back_only_if_somebody_wants_it(tmp_path: Path) -> None:
    async def go() -> None:
        async with world(tmp_path, demo={"start": "lazy", "keep_alive": 1000}) as here:
            with here.fleet.use("demo"):
                await here.fleet.ready("demo", timeout=20)
                kill(here.starts()[0])
                await here.until(lambda: len(here.starts()) == 2)
                await here.fleet.ready("demo", timeout=20)
            kill(here.starts()[1])
            await here.until(lambda: here.state().state == "asleep")
            assert len(here.starts()) == 2
            with here.fleet.use("demo"):
                await here.fleet.ready("demo", timeout=20)
            assert len(here.starts()) == 3

    run(go)


def test_a_command_that_cannot_even_be_written_down(tmp_path: Path) -> None:
    async def go() -> None:
        wrong = Command(arguments=("a\0b",), probe="/", alive="/")
        part = Part(model=Model(weights="x", pool="here"), hardware="cpu", commands=[lambda port: wrong])
        fleet = LocalFleet({"x": part}, key="", show=lambda line: None, environment=os.environ, timing=FAST)
        whys: set[str] = set()
        fleet.subscribe(lambda replica: whys.add(replica.why))
        fleet.start()
        async with asyncio.timeout(20):
            while fleet.replicas("x")[0].restarts < 2:
                await asyncio.sleep(0.005)
        assert "its process cannot be started: ValueError: embedded null byte" in whys
        await fleet.close()

    run(go)


def test_a_request_that_comes_while_a_model_goes_wakes_it_again(tmp_path: Path) -> None:
    async def go() -> None:
        async with world(tmp_path, demo={"start": "lazy", "keep_alive": 0.05}) as here:
            with here.fleet.use("demo"):
                await here.fleet.ready("demo", timeout=20)
            await here.until(lambda: here.state().state == "stopping")
            with here.fleet.use("demo"):
                await here.fleet.ready("demo", timeout=20)
                assert here.state().state == "ready"
                assert len(here.starts()) == 2
                assert not alive(here.starts()[0])  # never two of them in memory

    run(go)


def test_what_ignores_sigterm_is_killed_and_takes_its_children_along(tmp_path: Path) -> None:
    async def go() -> None:
        timing = Timing(grace=0.2, poll=0.02, watch=0.02)
        async with world(tmp_path, files={"deaf": "", "orphan": ""}, timing=timing) as here:
            here.fleet.start()
            await here.fleet.ready("demo", timeout=20)
            orphan = int((here.folder() / "orphan").read_text())
            await here.fleet.close()
            assert not alive(here.starts()[0])
            assert not alive(orphan)

    run(go)


def test_who_is_in_a_hurry_need_not_wait_for_a_drain(tmp_path: Path) -> None:
    async def go() -> None:
        timing = Timing(grace=1000, poll=0.02, watch=0.02)
        async with world(tmp_path, files={"deaf": ""}, timing=timing) as here:
            here.fleet.start()
            await here.fleet.ready("demo", timeout=20)
            draining = asyncio.ensure_future(here.fleet.close())
            await here.until(lambda: here.state().state == "stopping")
            assert not draining.done()
            await here.fleet.close(patient=False)
            await draining
            assert not alive(here.starts()[0])

    run(go)


@pytest.mark.parametrize("seed", range(3))
def test_whatever_happens_there_is_one_process_at_most_and_whoever_waits_gets_it(
    tmp_path: Path, seed: int
) -> None:
    """Requests come and go, engines die and get stuck, and a keep_alive is shorter than all that."""

    async def go() -> None:
        chance = random.Random(seed)
        given = {"start": "lazy", "keep_alive": 0.02, "replicas": 2}
        async with world(tmp_path, demo=given) as here:

            async def request() -> None:
                await asyncio.sleep(chance.random() * 2)
                with here.fleet.use("demo"):
                    await here.fleet.ready("demo", timeout=30)
                    await asyncio.sleep(chance.random() * 0.1)

            async def misfortune() -> None:
                for _ in range(8):
                    await asyncio.sleep(chance.random() * 0.4)
                    name = f"demo/{chance.randrange(2)}"
                    if chance.random() < 0.3:
                        (here.folder(name) / "stuck").write_text("")
                        await asyncio.sleep(0.1)
                        (here.folder(name) / "stuck").unlink()
                    elif (pids := here.starts(name)) and alive(pids[-1]):
                        kill(pids[-1])

            await asyncio.gather(misfortune(), *(request() for _ in range(30)))
            await here.until(lambda: {each.state for each in here.fleet.replicas("demo")} == {"asleep"})

    run(go)


def test_requests_that_wait_are_answered_when_all_ends(tmp_path: Path) -> None:
    async def go() -> None:
        async with world(tmp_path, files={"unready": ""}, demo={"start": "lazy"}) as here:
            waiting = asyncio.ensure_future(here.fleet.ready("demo", timeout=20))
            await here.until(lambda: here.state().state == "starting")
            await here.fleet.close()
            assert "cannot be started" in str(await raises(waiting))
            assert "cannot be started" in str(await raises(here.fleet.ready("demo", timeout=20)))

    run(go)


def test_the_log_of_an_engine_is_bounded_and_plain(tmp_path: Path) -> None:
    async def go() -> None:
        text = "\x1b[31mred\x07 10%\r20%\r" + "é" * 100_000
        async with world(tmp_path, files={"refuse": text}) as here:
            here.fleet.start()
            await here.until(lambda: here.fleet.refusal is not None)
            assert max(map(len, here.log)) < 5000
            assert all(line.isprintable() for line in here.log)
            assert len(str(here.fleet.refusal)) < 1000

    run(go)


def test_restarts_come_ever_later_up_to_a_bound_and_begin_anew_after_a_good_time() -> None:
    backoff = restart.Backoff(first=0.5, most=60, steady=60, failures=0)
    delays = [backoff.died(100.0, None) for _ in range(10)]
    assert delays == [0.5, 1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert backoff.died(100.0, 50.0) == 60  # ready for 50 s
    assert backoff.died(100.0, 40.0) == 0.5  # for 60 s
    assert backoff.died(100.0, None) == 1
