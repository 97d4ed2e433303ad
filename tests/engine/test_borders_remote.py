"""The engine as the API process sees it, without a process: messages, liveness, last events, last words."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from penstock.core.errors import Draining, EngineDead, InvalidRequest, ModelLoadError, StartupError
from penstock.core.plan import Event
from penstock.core.request_spec import FinishReason
from penstock.core.stats import EngineStats
from penstock.engine import connection, remote
from penstock.engine.client import Liveness
from penstock.engine.config import EngineConfig
from penstock.engine.heartbeat import Heartbeat
from penstock.engine.messages import Abort, Add, Drain, Failed, ModelInfo, Output, decode_to_engine
from penstock.engine.process import Launch
from penstock.engine.remote import RemoteEngine

from .fake import spec

INFO = ModelInfo("/m", "A", "float32", "cpu", 100, 64, (2,), 16, 8, 4, 0)


class Process:
    """A process that runs until it is killed."""

    pid = 4711

    def __init__(self) -> None:
        self.status: int | None = None
        self.kills = 0
        self.waits: list[float | None] = []

    def poll(self) -> int | None:
        return self.status

    def kill(self) -> None:
        self.kills += 1
        self.status = -signal.SIGKILL

    def wait(self, timeout: float | None = None) -> int:
        self.waits.append(timeout)
        assert self.status is not None
        return self.status


class Outbox:
    """Keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def send(self, data: bytes) -> Any:
        self.sent.append(decode_to_engine(data))
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done


class World:
    """An engine without a process; its clock is set by hand."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch, **fields: Any) -> None:
        directory = path / "engine"
        directory.mkdir()
        self.beat = Heartbeat(directory / "heartbeat", create=True)
        reader, self.writer = os.pipe()
        os.close(reader)
        self.process = Process()
        self.engine = RemoteEngine(self.process, directory, EngineConfig(**fields), self.writer)  # type: ignore[arg-type]
        self.outbox = Outbox()
        self.engine._outbox = self.outbox  # type: ignore[assignment]
        self.engine._info = INFO
        self.now = 1000.0
        monkeypatch.setattr(connection, "time", SimpleNamespace(monotonic=lambda: self.now))
        self.directory = directory

    def deliver(self, *events: Event, stats: EngineStats | None = None) -> None:
        self.engine._deliver(Output(list(events), stats))


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    made = World(tmp_path, monkeypatch)
    yield made
    made.engine.kill()
    made.beat.close()


def last(request: str, **fields: Any) -> Event:
    return Event(request, finish=FinishReason.LENGTH, **fields)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def run(scene: Any) -> None:
    asyncio.run(asyncio.wait_for(scene, 20))


# ---- requests ----


def test_events_go_to_whoever_asked_and_the_last_one_ends_it(world: World) -> None:
    async def scene() -> None:
        got: dict[str, list[list[str]]] = {"a": [], "b": []}

        async def ask(name: str, n: int) -> None:
            async for events in world.engine.generate(spec(name, n=n)):
                got[name].append([event.request for event in events])

        tasks = [asyncio.create_task(ask("a", 2)), asyncio.create_task(ask("b", 1))]
        await settle()
        assert [type(message) for message in world.outbox.sent] == [Add, Add]
        assert world.engine.load == 3
        world.deliver(Event("a:0", tokens=(1,)), Event("b", tokens=(1,)), Event("a:1", tokens=(2,)))
        await settle()
        assert got == {"a": [["a:0", "a:1"]], "b": [["b"]]}
        world.deliver(last("a:0"), Event("nobody"))
        await settle()
        assert world.engine.load == 2
        assert not tasks[0].done()
        world.deliver(last("a:1"), last("b"))
        await asyncio.gather(*tasks)
        assert world.engine.load == 0
        assert (world.engine._calls, world.engine._unread._calls) == ({}, {})
        assert len(world.outbox.sent) == 2, "who has ended is not aborted"

    run(scene())


def test_an_id_is_in_use_until_its_last_event(world: World) -> None:
    async def scene() -> None:
        first = world.engine.generate(spec("a"))
        reading = asyncio.create_task(anext(first))
        await settle()
        with pytest.raises(InvalidRequest, match="request id 'a' is already in use") as caught:
            await anext(world.engine.generate(spec("a")))
        assert caught.value.param == "request_id"
        world.deliver(last("a"))
        await reading
        await first.aclose()
        again = asyncio.create_task(anext(world.engine.generate(spec("a"))))
        await settle()
        world.deliver(last("a"))
        await again

    run(scene())


def test_who_leaves_gets_the_last_events_when_they_come(world: World) -> None:
    async def scene() -> None:
        late: list[str] = []
        stream = world.engine.generate(spec("a", n=3), lambda event: late.append(event.request))
        reading = asyncio.create_task(anext(stream))
        await settle()
        world.deliver(Event("a:0", tokens=(1,)))
        await reading
        world.deliver(last("a:1"))  # is here already when the caller goes
        await stream.aclose()
        assert late == ["a:1"]
        assert world.outbox.sent[1:] == [Abort(("a:0", "a:2"))]
        assert world.engine.load == 2
        world.deliver(last("a:2"))
        assert late == ["a:1", "a:2"]
        assert world.engine.load == 1
        world.engine._fail(EngineDead("gone"))
        assert late == ["a:1", "a:2", "a:0"]
        assert world.engine.load == 0

    run(scene())


def test_after_its_death_nobody_waits_and_everybody_is_told(world: World) -> None:
    async def scene() -> None:
        stream = world.engine.generate(spec("a", n=2))
        reading = asyncio.create_task(anext(stream))
        await settle()
        ends: list[Event] = []
        other = world.engine.generate(spec("b"), ends.append)
        waiting = asyncio.create_task(anext(other))
        await settle()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        world.engine._fail(EngineDead("killed"))
        with pytest.raises(EngineDead, match="killed"):
            await reading
        [end] = ends
        assert (end.request, end.finish) == ("b", FinishReason.ERROR)
        assert end.failure is not None
        assert (end.failure.cause, end.failure.type) == ("killed", "EngineDead")
        with pytest.raises(EngineDead, match="killed"):
            await anext(world.engine.generate(spec("c")))
        before = len(world.outbox.sent)
        world.engine.abort(["a:0"])
        assert len(world.outbox.sent) == before
        assert not world.engine.ready
        assert world.engine.liveness().reason == "killed"

    run(scene())


def test_statistics_reach_all_who_asked(world: World) -> None:
    seen: list[tuple[str, EngineStats]] = []
    for name in "ab":
        world.engine.on_stats(lambda stats, name=name: seen.append((name, stats)))  # type: ignore[misc]
    world.deliver()
    assert seen == []
    stats = EngineStats(running=3)
    world.deliver(stats=stats)
    assert seen == [("a", stats), ("b", stats)]
    assert world.engine.stats is stats


# ---- liveness ----


def test_an_engine_is_stuck_when_work_waits_beyond_the_bound(world: World) -> None:
    """The grace, ten seconds by default, and ten times what the step was predicted to take."""

    async def scene() -> None:
        live = world.engine.liveness
        assert live() == Liveness(True, "")
        reading = asyncio.create_task(anext(world.engine.generate(spec("a", n=2))))
        await settle()
        world.now = 1010.0
        assert live().alive
        world.now = 1010.5
        assert live() == Liveness(
            False, "2 requests wait, but no step began (predicted 0.000 s, bound 10.0 s)."
        )
        world.beat.begin(1011.0, 0.5)
        world.now = 1026.0
        assert live().alive
        world.now = 1026.1
        assert live().reason == (
            "2 requests wait, but step 0 began 15.1 s ago (predicted 0.500 s, bound 15.0 s)."
        )
        world.beat.end(1026.0)
        assert live().alive
        world.engine._info = None
        world.now = 5000.0
        assert live().alive, "it loads"
        world.engine._info = INFO
        assert not live().alive
        world.deliver(last("a:0"), last("a:1"))
        assert live().alive
        await reading
        # what began long before the first of those who wait says nothing of them
        more = asyncio.create_task(anext(world.engine.generate(spec("b"))))
        await settle()
        world.now = 5010.0
        assert live().alive
        world.now = 5011.0
        assert not live().alive
        more.cancel()
        await asyncio.wait({more})

    run(scene())


# ---- the end ----


@pytest.mark.parametrize(
    ("words", "status", "kind", "text"),
    [
        (
            Failed("ModelLoadError", "bad file", advice="Try.", param="--model"),
            2,
            ModelLoadError,
            "bad file Try.",
        ),
        (Failed("EngineDead", "boom"), 1, EngineDead, "the engine died: boom"),
        (Failed("QueueFull", "boom"), 1, EngineDead, "the engine died: boom"),
        (Failed("NoSuchError", "boom"), 1, EngineDead, "the engine died: boom"),
        (
            None,
            -9,
            EngineDead,
            "the engine process was ended by SIGKILL. Often this means that the machine ran out of memory.",
        ),
        (None, -11, EngineDead, "the engine process was ended by SIGSEGV."),
        (None, 3, EngineDead, "the engine process ended with status 3."),
        (None, 0, EngineDead, "the engine process ended with status 0."),
    ],
)
def test_why_it_ended(world: World, words: Failed | None, status: int, kind: type, text: str) -> None:
    world.engine._last_words = words
    error = world.engine._diagnose(status)
    assert type(error) is kind
    assert str(error).strip() == text
    assert error.param == (words.param if words is not None and kind is ModelLoadError else None)


def test_a_death_is_logged_with_its_trace_and_a_start_raises_it(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene() -> None:
        world.engine._last_words = Failed("EngineDead", "boom", trace="Traceback: somewhere")
        await world.engine._on_exit(1)
        assert world.engine._started.is_set()
        assert world.engine._ended.is_set()
        assert str(world.engine.failure) == "the engine died: boom"

    run(scene())
    [record] = caplog.records
    assert record.getMessage() == "engine process 4711 ended: the engine died: boom"
    assert record.trace == "Traceback: somewhere"  # type: ignore[attr-defined]


def test_an_end_that_was_asked_for_is_no_failure(world: World, caplog: pytest.LogCaptureFixture) -> None:
    async def scene() -> None:
        world.engine._draining = True
        await world.engine._on_exit(0)
        assert world.engine.failure is None
        assert world.engine._ended.is_set()
        # but one that still owes somebody an answer is
        world.engine._owed.add("a:0")
        world.engine._last_words = Failed("EngineDead", "boom")
        await world.engine._on_exit(0)
        assert world.engine.failure is not None

    run(scene())
    assert "ended: the engine died: boom" in caplog.text


def test_one_that_fails_while_it_loads_is_told_by_its_start(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene() -> None:
        world.engine._info = None
        world.engine._draining = True
        world.engine._last_words = Failed("ModelLoadError", "bad file")
        await world.engine._on_exit(2)
        assert isinstance(world.engine.failure, ModelLoadError)
        with pytest.raises(StartupError, match="still loading"):
            _ = world.engine.info
        assert caplog.messages == []
        # a trace has no other place than the log; what it says is still the start's
        world.engine._last_words = Failed("EngineDead", "boom", trace="Traceback: somewhere")
        await world.engine._on_exit(1)

    run(scene())
    [record] = caplog.records
    assert record.getMessage() == "engine process 4711 ended"
    assert record.trace == "Traceback: somewhere"  # type: ignore[attr-defined]


def test_a_receiver_that_breaks_is_a_death_and_one_that_is_cancelled_is_not(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene() -> None:
        async def breaks() -> None:
            raise ValueError("what is this")

        task = asyncio.create_task(asyncio.sleep(60))
        task.cancel()
        await asyncio.wait({task})
        world.engine._on_receiver_end(task)  # type: ignore[arg-type]
        assert world.engine.failure is None
        task = asyncio.create_task(breaks())
        await asyncio.wait({task})
        world.engine._on_receiver_end(task)  # type: ignore[arg-type]
        assert str(world.engine.failure) == "the engine's messages cannot be read: ValueError: what is this"
        assert "cannot be read any more" in caplog.text

    run(scene())


def test_a_drain_refuses_and_waits_until_the_process_has_ended(world: World) -> None:
    async def scene() -> None:
        assert world.engine.ready
        draining = asyncio.create_task(world.engine.drain(5.0))
        await settle()
        assert (world.engine.draining, world.engine.ready) == (True, False)
        assert world.outbox.sent == [Drain(5.0)]
        with pytest.raises(Draining, match="shutting down") as caught:
            await anext(world.engine.generate(spec("a")))
        assert caught.value.advice == "Send the request to another server."
        assert not draining.done()
        world.process.status = 0
        world.engine._ended.set()
        await draining
        assert world.process.kills == 0
        assert not world.directory.exists()
        world.engine.abort(["a:0"])
        assert len(world.outbox.sent) == 1, "nobody is there to be told"
        await world.engine.close()

    run(scene())


def test_a_process_that_is_gone_is_not_waited_for_and_one_that_stays_is_killed(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene() -> None:
        world.process.status = 1
        await world.engine.drain(1000.0)
        assert (world.outbox.sent, world.process.kills) == ([], 0)
        folder = tmp_path / "second"
        folder.mkdir()
        other = World(folder, monkeypatch)
        await other.engine.close()
        assert (other.process.kills, other.process.waits) == (1, [10])
        assert not other.directory.exists()
        await other.engine.close()
        assert other.process.kills == 1
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(other.writer)
        other.beat.close()

    run(scene())


# ---- the beginning ----


@pytest.fixture
def short() -> Iterator[Path]:
    """pytest's own folders are long, which is what some of this is about."""
    path = Path(tempfile.mkdtemp(dir="/tmp"))
    yield path
    shutil.rmtree(path)


def test_a_process_is_told_everything_in_one_argument(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[list[str], dict[str, Any]]] = []

    def popen(command: list[str], **options: Any) -> Process:
        for descriptor in options["pass_fds"]:
            os.fstat(descriptor)
        started.append((command, options))
        process = Process()
        process.status = 0
        return process

    closed: list[int] = []
    close = os.close

    def noted(descriptor: int) -> None:
        closed.append(descriptor)
        close(descriptor)

    monkeypatch.setattr(os, "close", noted)
    monkeypatch.setattr(remote.subprocess, "Popen", popen)
    monkeypatch.setattr(remote.tempfile, "tempdir", str(short))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    engine = RemoteEngine.launch(EngineConfig(threads=3), log_level="error", log_format="json")
    [(command, options)] = started
    assert command[:3] == [sys.executable, "-m", "penstock.engine.process"]
    launch = msgspec.json.decode(command[3], type=Launch)
    directory = engine._directory
    assert directory.parent == short
    assert directory.name.startswith("penstock-")
    assert launch == Launch(
        config=EngineConfig(threads=3),
        inbox=f"ipc://{directory}/requests",
        outbox=f"ipc://{directory}/events",
        heartbeat=f"{directory}/heartbeat",
        parent=options["pass_fds"][0],
        log_level="error",
        log_format="json",
    )
    assert options["env"]["OMP_NUM_THREADS"] == "3"
    assert options["env"]["THP_MEM_ALLOC_ENABLE"] == os.environ.get("THP_MEM_ALLOC_ENABLE", "1")
    assert launch.parent in closed, "that end is the engine's"
    assert (directory / "heartbeat").exists()
    assert engine.pid == Process.pid
    engine.kill()
    assert not directory.exists()


@pytest.mark.parametrize("length", [remote._LONGEST_PATH, remote._LONGEST_PATH + 1])
def test_a_long_path_is_no_place_for_a_socket(
    length: int, short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = short / ("x" * (length - len(str(short)) - 1 - len("/penstock-12345678")))
    folder.mkdir()
    process = Process()
    process.status = 0
    monkeypatch.setattr(remote.subprocess, "Popen", lambda *_, **__: process)
    monkeypatch.setattr(remote.tempfile, "tempdir", str(folder))
    engine = RemoteEngine.launch(EngineConfig())
    try:
        fits = length == remote._LONGEST_PATH
        assert engine._directory.parent == (folder if fits else Path("/tmp"))
        assert len(list(folder.iterdir())) == int(fits)
    finally:
        engine.kill()
