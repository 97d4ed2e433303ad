"""One of several API processes, against an engine whose part the test plays: message by message."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import zmq
import zmq.asyncio

from penstock.core.errors import Draining, EngineDead, ModelLoadError
from penstock.core.plan import Event
from penstock.core.request_spec import FinishReason
from penstock.core.stats import EngineStats
from penstock.engine.attached import AttachedEngine
from penstock.engine.config import EngineConfig
from penstock.engine.connection import addresses
from penstock.engine.heartbeat import Heartbeat
from penstock.engine.messages import (
    Abort,
    Add,
    ModelInfo,
    Output,
    Ready,
    Settled,
    ToEngine,
    decode_to_engine,
    encode,
)
from tests.engine.fake import spec

INFO = ModelInfo("m", "LlamaForCausalLM", "float32", "cpu", 256, 64, (2,), 4, 16, 8, 1000)
LONG = 3600.0


class Played:
    """The engine's end of the two sockets."""

    def __init__(self, directory: Path, client: int) -> None:
        self._context = zmq.asyncio.Context()
        requests, events = addresses(directory, client)
        self._inbox = self._context.socket(zmq.PULL)
        self._outbox = self._context.socket(zmq.PUSH)
        self._inbox.connect(requests)
        self._outbox.connect(events)
        self.heartbeat = Heartbeat(directory / "heartbeat")

    async def hear(self) -> ToEngine:
        message: ToEngine = decode_to_engine(await asyncio.wait_for(self._inbox.recv(), 20))
        return message

    async def hears_nothing_more(self) -> bool:
        """Whether everything has been heard; ask when the sender has closed its sockets, which then have sent
        what they had."""
        try:
            await asyncio.wait_for(self._inbox.recv(), 0.2)
        except TimeoutError:
            return True
        return False

    async def say(self, message: Ready | Output) -> None:
        await self._outbox.send(encode(message))

    def close(self) -> None:
        self._context.destroy(linger=0)
        self.heartbeat.close()


@asynccontextmanager
async def pair(directory: Path, grace: float = LONG) -> AsyncIterator[tuple[AttachedEngine, Played]]:
    """An API process that has started, and its engine."""
    Heartbeat(directory / "heartbeat", create=True).close()
    ours = AttachedEngine(directory, EngineConfig(liveness_grace=grace), 3, 3)
    theirs = Played(directory, 3)
    try:
        starting = asyncio.create_task(ours.start())
        await theirs.say(Ready(INFO))
        await starting
        yield ours, theirs
    finally:
        await ours.close()
        theirs.close()


def play(tmp_path: Path, scenario: Callable[[AttachedEngine, Played], Awaitable[None]]) -> None:
    async def body() -> None:
        async with pair(tmp_path) as (ours, theirs):
            await scenario(ours, theirs)

    asyncio.run(asyncio.wait_for(body(), 60))


def last(name: str, reason: FinishReason = FinishReason.ABORT) -> Output:
    return Output([Event(name, finish=reason)])


async def ask(ours: AttachedEngine, theirs: Played, name: str) -> asyncio.Task[list[Event]]:
    """A request that the engine has got."""

    async def events() -> list[Event]:
        return [event async for batch in ours.generate(spec(name)) for event in batch]

    task = asyncio.create_task(events())
    added = await theirs.hear()
    assert isinstance(added, Add)
    assert added.spec.id == name
    return task


def test_what_one_turn_has_counted_is_one_message(tmp_path: Path) -> None:
    async def scenario(ours: AttachedEngine, theirs: Played) -> None:
        ours.settled("a")
        ours.settled("b")
        assert await theirs.hear() == Settled(("a", "b"))
        ours.settled("c")
        await asyncio.sleep(0)
        ours.settled("d")
        assert await theirs.hear() == Settled(("c",))
        assert await theirs.hear() == Settled(("d",))
        ours.settled("e")
        await ours.close()  # in the same turn: it is sent with the last words
        assert await theirs.hear() == Settled(("e",))
        assert await theirs.hears_nothing_more(), "and no message about nothing"
        ours.settled("f")
        await asyncio.sleep(0)

    play(tmp_path, scenario)


def test_a_dead_engine_is_told_nothing(tmp_path: Path) -> None:
    async def scenario(ours: AttachedEngine, theirs: Played) -> None:
        task = await ask(ours, theirs, "a")
        await ours.died(EngineDead("it was killed"))
        with pytest.raises(EngineDead, match="it was killed"):
            await task
        ours.settled("a")
        ours.abort(["a"])
        await asyncio.sleep(0)
        assert ours._settled == []
        await ours.close()
        assert await theirs.hears_nothing_more()

    play(tmp_path, scenario)


def test_an_engine_that_does_not_start(tmp_path: Path) -> None:
    async def body() -> None:
        Heartbeat(tmp_path / "heartbeat", create=True).close()
        ours = AttachedEngine(tmp_path, EngineConfig(), 3, 3)
        starting = asyncio.create_task(ours.start())
        await asyncio.sleep(0)
        await ours.died(ModelLoadError("no such model"))
        with pytest.raises(ModelLoadError, match="no such model"):
            await starting
        await ours.close()

    asyncio.run(asyncio.wait_for(body(), 60))


def test_draining_waits_for_those_who_end_in_time(tmp_path: Path) -> None:
    async def scenario(ours: AttachedEngine, theirs: Played) -> None:
        task = await ask(ours, theirs, "a")
        draining = asyncio.create_task(ours.drain(LONG))
        await asyncio.sleep(0)
        assert ours.draining
        assert not ours.ready
        with pytest.raises(Draining):
            await anext(ours.generate(spec("b")))
        assert not draining.done()
        await theirs.say(last("a", FinishReason.STOP))
        await draining
        assert (await task)[-1].finish is FinishReason.STOP
        assert await theirs.hears_nothing_more(), "nobody was aborted"

    play(tmp_path, scenario)


def test_the_rest_is_aborted_and_gets_the_grace_to_say_its_figures(tmp_path: Path) -> None:
    async def scenario(ours: AttachedEngine, theirs: Played) -> None:
        tasks = [await ask(ours, theirs, name) for name in ("b", "a")]
        draining = asyncio.create_task(ours.drain(0.0))
        assert await theirs.hear() == Abort(("a", "b"))
        await theirs.say(last("a"))
        await tasks[1]
        assert not draining.done(), "the grace is long"
        await theirs.say(last("b"))
        assert (await tasks[0])[-1].finish is FinishReason.ABORT
        await draining
        assert await theirs.hears_nothing_more(), "nobody is aborted twice"

    play(tmp_path, scenario)


@pytest.mark.parametrize("dead", [False, True])
def test_what_has_not_been_sent_is_waited_for_unless_nobody_is_there(
    dead: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lingered: list[int] = []
    disconnect = AttachedEngine._disconnect

    def noted(self: AttachedEngine, linger: int = 0) -> None:
        lingered.append(linger)
        disconnect(self, linger)

    monkeypatch.setattr(AttachedEngine, "_disconnect", noted)

    async def scenario(ours: AttachedEngine, theirs: Played) -> None:
        if dead:
            await ours.died(EngineDead("it was killed"))
        await ours.close()

    play(tmp_path, scenario)
    assert (lingered[0] == 0) is dead


def test_it_is_ready_once_the_engine_has_said_so(tmp_path: Path) -> None:
    async def body() -> None:
        Heartbeat(tmp_path / "heartbeat", create=True).close()
        ours, theirs = AttachedEngine(tmp_path, EngineConfig(), 3, 3), Played(tmp_path, 3)
        starting = asyncio.create_task(ours.start())
        await asyncio.sleep(0)
        assert not ours.ready
        await theirs.say(Ready(INFO))
        await starting
        assert ours.ready
        await ours.close()
        theirs.close()

    asyncio.run(asyncio.wait_for(body(), 60))


def test_an_engine_that_dies_ends_the_draining(tmp_path: Path) -> None:
    async def scenario(ours: AttachedEngine, theirs: Played) -> None:
        task = await ask(ours, theirs, "a")
        draining = asyncio.create_task(ours.drain(LONG))
        await asyncio.sleep(0)
        await ours.died(EngineDead("gone"))
        await draining
        with pytest.raises(EngineDead):
            await task

    play(tmp_path, scenario)


def test_who_leaves_has_his_requests_aborted(tmp_path: Path) -> None:
    async def scenario(ours: AttachedEngine, theirs: Played) -> None:
        task = await ask(ours, theirs, "a")
        assert theirs.heartbeat.owed()[0] == 1
        leaving = asyncio.create_task(ours.close())
        assert await theirs.hear() == Abort(("a",))
        await theirs.say(last("a"))
        assert (await task)[-1].finish is FinishReason.ABORT
        await leaving
        assert theirs.heartbeat.owed()[0] == 0
        assert ours.load == 0
        await ours.close()

    play(tmp_path, scenario)


def test_the_statistics_of_each_step_are_for_the_one_that_has_started_the_engine(tmp_path: Path) -> None:
    async def scenario(ours: AttachedEngine, theirs: Played) -> None:
        seen: list[EngineStats] = []
        ours.on_stats(seen.append)
        task = await ask(ours, theirs, "a")
        await theirs.say(Output([Event("a", finish=FinishReason.STOP)], EngineStats()))
        await task
        assert seen == []

    play(tmp_path, scenario)
