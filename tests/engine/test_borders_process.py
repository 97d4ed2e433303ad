"""The engine's process, run in this one: what it takes in between steps, and what it says when it ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import zmq

from penstock.core.errors import EngineDead, InvalidRequest, ModelLoadError
from penstock.core.plan import Event
from penstock.core.request_spec import FinishReason
from penstock.engine import process as module
from penstock.engine.clients import STARTER
from penstock.engine.config import EngineConfig
from penstock.engine.executor.faults import lost
from penstock.engine.heartbeat import Heartbeat
from penstock.engine.messages import Abort, Add, Drain, Failed, Output, decode_from_engine, encode
from penstock.engine.process import EngineProcess, Launch, main

from .fake import add, spec
from .test_loop import make_loop


class World:
    """An engine's process between two sockets of ours."""

    def __init__(self, path: Path) -> None:
        self.context = zmq.Context()
        self.inbox = self.context.socket(zmq.PUSH)
        self.outbox = self.context.socket(zmq.PULL)
        self.inbox.bind(f"ipc://{path}/requests")
        self.outbox.bind(f"ipc://{path}/events")
        folder = path / "beat"
        folder.mkdir()
        Heartbeat(folder / "heartbeat", create=True).close()
        self.reader, self.writer = os.pipe()
        self.launch = Launch(
            config=EngineConfig(),
            inbox=f"ipc://{path}/requests",
            outbox=f"ipc://{path}/events",
            heartbeat=str(folder / "heartbeat"),
            parent=self.reader,
        )

    def send(self, *messages: Any) -> None:
        for message in messages:
            self.inbox.send(encode(message))

    def said(self) -> list[Any]:
        found = []
        while self.outbox.poll(200):
            found.append(decode_from_engine(self.outbox.recv()))
        return found

    def close(self) -> None:
        self.context.destroy(linger=0)
        for end in (self.reader, self.writer):
            if end >= 0:
                os.close(end)


@pytest.fixture
def world() -> Iterator[World]:
    path = Path(tempfile.mkdtemp(dir="/tmp"))  # the address of a socket is short
    made = World(path)
    yield made
    made.close()
    shutil.rmtree(path)


@pytest.fixture
def process(world: World) -> Iterator[EngineProcess]:
    made = EngineProcess(world.launch)
    yield made
    made.close()


def received(process: EngineProcess, loop: Any, count: int, *, wait: bool = True) -> list[Event]:
    """Until so many sequences are unfinished, or so many events came; bounded."""
    events: list[Event] = []
    for _ in range(50):
        events += process._receive(loop, wait=wait)
        if len(loop.scheduler.unfinished) + len(events) >= count:
            break
    return events


def test_messages_are_taken_in_and_an_end_is_a_deadline(
    world: World, process: EngineProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = make_loop()
    world.send(add("a"), Add(spec("b", n=2)))
    assert received(process, loop, 3) == []
    assert sorted(loop.scheduler.unfinished) == ["a", "b:0", "b:1"]
    assert process._deadline is None
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: 1000.0))
    world.send(Abort(("a",)), Drain(5.0))
    [event] = received(process, loop, 3)
    assert (event.request, event.finish) == ("a", FinishReason.ABORT)
    for _ in range(50):
        if process._deadline is not None:
            break
        process._receive(loop, wait=True)
    assert process._deadline == 1005.0


def test_between_two_steps_a_bounded_number_is_taken_in(
    world: World, process: EngineProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MOST_BETWEEN_STEPS", 4)
    loop = make_loop()
    world.send(*(Add(spec(name, n=2)) for name in "abcd"))
    received(process, loop, 8)
    taken = len(loop.scheduler.unfinished)
    assert taken in (4, 8)
    process._clients._ends[STARTER][0].poll(2000)
    before = len(loop.scheduler.unfinished)
    process._receive(loop, wait=False)
    assert len(loop.scheduler.unfinished) - before <= 4


def test_chores_are_done_one_by_one_when_nobody_is_there(
    world: World, process: EngineProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever comes waits for one piece at most; what is left is done when it is quiet again."""
    monkeypatch.setattr(module, "_QUIET_MS", 1)
    loop = make_loop()
    done: list[int] = []

    def chore() -> bool:
        done.append(len(done))
        if len(done) == 2:  # somebody comes meanwhile
            world.send(add("a"))
            assert process._clients._ends[STARTER][0].poll(2000)
        if len(done) == 5:
            world.send(add("b"))
            assert process._clients._ends[STARTER][0].poll(2000)
        return len(done) < 5

    process._chore = chore
    assert received(process, loop, 1) == []
    assert (loop.scheduler.unfinished, done) == (("a",), [0, 1])
    assert received(process, loop, 1, wait=False) == []  # there is work: no chores
    assert done == [0, 1]
    process._checked = True
    assert received(process, loop, 2) == []
    assert (loop.scheduler.unfinished, len(done)) == (("a", "b"), 5)
    assert process._chore is None


def test_a_quiet_engine_checks_itself_once(
    world: World, process: EngineProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_QUIET_MS", 1)
    loop = make_loop()
    checks: list[bool] = []
    monkeypatch.setattr(loop.scheduler, "check", lambda: checks.append(True))
    polls: list[int | None] = []
    poll = process._poller.poll

    def noted(timeout: int | None = None) -> Any:
        polls.append(timeout)
        if timeout is None:
            world.send(Abort(("nobody",)))
        return poll(timeout)

    monkeypatch.setattr(process._poller, "poll", noted)
    process._receive(loop, wait=True)
    assert (checks, polls) == ([True], [1, None])
    process._receive(loop, wait=True)
    assert (checks, polls[2:]) == ([True], [0, None])
    polls.clear()
    process._receive(loop, wait=False)
    assert polls == [0]


def test_without_its_parent_an_engine_ends(world: World, process: EngineProcess) -> None:
    os.close(world.writer)
    world.writer = -1
    with pytest.raises(SystemExit, match="the API process is gone"):
        process._receive(make_loop(), wait=True)


def test_the_last_bills_are_sent_and_the_last_steps_kept(
    world: World,
    process: EngineProcess,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    loop = make_loop(log=tmp_path / "steps.jsonl")
    loop.handle(add("a", max_tokens=9))
    loop.step()
    process._give_up(loop, ValueError("boom"))
    [output] = world.said()
    assert isinstance(output, Output)
    [event] = output.events
    assert (event.request, event.finish) == ("a", FinishReason.ERROR)
    assert event.failure is not None
    assert event.failure.cause == "the engine died: ValueError: boom"
    assert event.device_seconds == loop.meter.busy > 0
    assert output.stats is not None

    class Engine:
        log = loop._log

    process._dump(Engine())  # type: ignore[arg-type]
    [kept] = tmp_path.glob("penstock-crash-*.jsonl")
    assert "config" in json.loads(kept.read_text().splitlines()[0])
    assert f"the last steps are in {kept}" in caplog.text

    assert loop._log is not None
    loop._log.close()

    class Broken:
        def __getattr__(self, name: str) -> Any:
            raise OSError("no room")

    process._dump(Broken())  # type: ignore[arg-type]
    assert "could not write the last steps: no room" in caplog.text
    process._give_up(Broken(), ValueError("boom"))  # type: ignore[arg-type]
    assert "the last bills are lost: no room" in caplog.text


@pytest.mark.parametrize(
    ("error", "status", "failed"),
    [
        (None, 0, None),
        (SystemExit("the API process is gone"), 0, None),
        (
            ModelLoadError("bad.", advice="Try.", param="--model"),
            2,
            Failed("ModelLoadError", "bad.", advice="Try.", param="--model"),
        ),
        (EngineDead("broken"), 1, Failed("EngineDead", "EngineDead: broken")),
        (
            lost(RuntimeError("CUDA error: unspecified launch failure\nmore")),
            1,
            Failed("DeviceLost", "the device is lost: RuntimeError: CUDA error: unspecified launch failure."),
        ),
        (InvalidRequest("odd"), 1, Failed("InvalidRequest", "InvalidRequest: odd")),
        (ValueError("boom"), 1, Failed("EngineDead", "ValueError: boom")),
        (KeyboardInterrupt(), 1, Failed("EngineDead", "KeyboardInterrupt")),
    ],
)
def test_its_last_words(
    error: BaseException | None,
    status: int,
    failed: Failed | None,
    world: World,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    handlers: dict[int, Any] = {}
    monkeypatch.setattr(module.signal, "signal", handlers.__setitem__)
    levels: list[Any] = []
    monkeypatch.setattr(module.logs, "configure", lambda process, **fields: levels.append(fields))

    def run(self: EngineProcess) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(EngineProcess, "run", run)
    assert main(msgspec.json.encode(world.launch).decode()) == status
    assert handlers == {signal.SIGINT: signal.SIG_IGN, signal.SIGTERM: signal.SIG_IGN}
    assert levels == [{"level": "info", "format": "text"}]
    said = world.said()
    if failed is None:
        assert said == []
    else:
        [words] = said
        shown = failed.message in words.message or words.message in failed.message
        assert (words.error_type, shown) == (failed.error_type, True)
        assert (words.advice, words.param) == (failed.advice, failed.param)
        assert bool(words.trace) == (status == 1)
    there = Path(world.launch.heartbeat).parent.exists()
    assert there != isinstance(error, SystemExit), "nobody else is left to remove it"
