"""RemoteEngine: a real engine process, with everything that can happen to one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from penstock.core.errors import Draining, EngineDead, InvalidRequest, ModelLoadError, PenstockError
from penstock.core.plan import Event
from penstock.core.request_spec import FinishReason, RequestSpec
from penstock.core.stats import EngineStats
from penstock.engine.attached import AttachedEngine
from penstock.engine.config import EngineConfig
from penstock.engine.connection import EngineConnection
from penstock.engine.messages import LostSequence
from penstock.engine.remote import RemoteEngine
from penstock.server.generation import event_error
from tests.engine.build import checkpoint
from tests.engine.fake import spec

Scenario = Callable[[RemoteEngine], Awaitable[None]]


def config(model: Path | str | None = None, **fields: object) -> EngineConfig:
    values: dict[str, object] = {
        "model": str(model or checkpoint()),
        "dtype": "float32",
        "kv_cache_memory_bytes": 1 << 20,
        "max_num_batched_tokens": 64,
        "threads": 1,
        **fields,
    }
    return EngineConfig(**values)  # type: ignore[arg-type]


def play(scenario: Scenario, settings: EngineConfig | None = None) -> None:
    """Run a scenario on a started engine, and leave nothing behind."""

    async def body() -> None:
        engine = RemoteEngine.launch(settings or config(), log_level="error")
        try:
            await engine.start()
            await scenario(engine)
        finally:
            await engine.close()
        assert not engine._directory.exists()

    asyncio.run(asyncio.wait_for(body(), 90))


def ask(name: str, length: int = 5, max_tokens: int = 4, **fields: object) -> RequestSpec:
    return spec(name, range(1, length + 1), max_tokens, temperature=0.0, ignore_eos=True, **fields)  # type: ignore[arg-type]


async def finish(engine: EngineConnection, request: RequestSpec) -> list[Event]:
    return [event async for events in engine.generate(request) for event in events]


async def anext_forever(stream: AsyncIterator[list[Event]]) -> None:
    async for _ in stream:
        pass


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that another process brings about; the scenario's time limit bounds it."""
    while not condition():
        await asyncio.sleep(0.01)


def test_requests_run_beside_each_other_and_the_model_is_described() -> None:
    async def scenario(engine: RemoteEngine) -> None:
        assert engine.ready
        assert engine.info.architecture == "Qwen3ForCausalLM"
        assert engine.info.dtype == "float32"
        assert list(engine.info.startup_seconds)
        one, two = await asyncio.gather(finish(engine, ask("a")), finish(engine, ask("b", n=2)))
        assert [len(event.tokens) for event in one] == [1] * 4
        assert {event.request for event in two} == {"b:0", "b:1"}
        by_name = {
            name: [token for event in one + two if event.request == name for token in event.tokens]
            for name in ("a", "b:0", "b:1")
        }
        assert by_name["a"] == by_name["b:0"] == by_name["b:1"]
        assert engine.load == 0
        await until(lambda: engine.stats.running == 0)
        assert engine.stats.kv_usage == 0.0

    play(scenario)


def test_closing_the_stream_frees_the_blocks() -> None:
    async def scenario(engine: RemoteEngine) -> None:
        stream = engine.generate(ask("a", max_tokens=400))
        await anext(stream)
        await stream.aclose()
        await until(lambda: engine.load == 0)
        await until(lambda: engine.stats.running == 0 and engine.stats.kv_usage == 0.0)
        assert await finish(engine, ask("b"))

    play(scenario)


def test_the_bill_of_a_caller_who_left_still_comes() -> None:
    async def scenario(engine: RemoteEngine) -> None:
        orphans: list[Event] = []
        stream = engine.generate(ask("a", max_tokens=400, n=2), orphans.append)
        await anext(stream)
        await stream.aclose()
        await until(lambda: engine.load == 0)
        bills = {event.request: event for event in orphans}
        assert {event.finish for event in bills.values()} == {FinishReason.ABORT}
        assert bills["a:0"].device_seconds > 0
        assert set(bills) == {"a:0", "a:1"}
        assert not engine._orphans

    play(scenario)


def test_a_slow_reader_is_not_a_stuck_engine() -> None:
    """The engine has finished; that its last events have not been read yet is no reason to restart it."""

    async def scenario(engine: RemoteEngine) -> None:
        stream = engine.generate(ask("a", max_tokens=3))
        await anext(stream)
        await until(lambda: engine.load == 0)
        engine._waiting_since = -1e6
        assert engine.liveness().alive
        await engine.drain(10.0)
        assert engine.failure is None
        rest = [event async for events in stream for event in events]
        assert rest[-1].finish is FinishReason.LENGTH

    play(scenario)


def test_a_receiver_that_breaks_leaves_nobody_waiting() -> None:
    async def scenario(engine: RemoteEngine) -> None:
        def broken(stats: object) -> None:
            raise RuntimeError("planted")

        engine.on_stats(broken)
        with pytest.raises(EngineDead, match="planted"):
            await finish(engine, ask("a"))
        assert not engine.ready

    play(scenario)


def test_an_abort_brings_the_final_bill() -> None:
    async def scenario(engine: RemoteEngine) -> None:
        stream = engine.generate(ask("a", max_tokens=400))
        await anext(stream)
        engine.abort(["a"])
        events = [event async for batch in stream for event in batch]
        assert events[-1].finish is FinishReason.ABORT
        assert events[-1].device_seconds > 0

    play(scenario)


def test_draining_lets_running_requests_end_and_refuses_new_ones() -> None:
    async def scenario(engine: RemoteEngine) -> None:
        stream = engine.generate(ask("a", max_tokens=40))
        first = await anext(stream)
        draining = asyncio.create_task(engine.drain(30.0))
        await until(lambda: engine.draining)
        with pytest.raises(Draining):
            await finish(engine, ask("b"))
        events = first + [event async for batch in stream for event in batch]
        assert events[-1].finish is FinishReason.LENGTH
        await draining
        assert engine.failure is None
        assert engine._process.returncode == 0

    play(scenario)


def test_draining_aborts_what_takes_too_long() -> None:
    async def scenario(engine: RemoteEngine) -> None:
        stream = engine.generate(ask("a", max_tokens=480))
        await anext(stream)
        draining = asyncio.create_task(engine.drain(0.0))
        events = [event async for batch in stream for event in batch]
        assert events[-1].finish is FinishReason.ABORT
        await draining
        assert engine._process.returncode == 0

    play(scenario)


def test_a_killed_engine_fails_its_requests_with_the_cause() -> None:
    async def scenario(engine: RemoteEngine) -> None:
        stream = engine.generate(ask("a", max_tokens=480))
        await anext(stream)
        os.kill(engine.pid, signal.SIGKILL)
        with pytest.raises(EngineDead, match=r"SIGKILL.*ran out of memory"):
            await anext_forever(stream)
        assert isinstance(engine.failure, EngineDead)
        assert not engine.ready
        assert not engine.liveness().alive
        with pytest.raises(EngineDead):
            await finish(engine, ask("b"))

    play(scenario)


def test_a_request_that_comes_right_after_its_death_is_told() -> None:
    """There is nobody to send it to any more, and nobody has noticed yet."""

    async def scenario(engine: RemoteEngine) -> None:
        os.kill(engine.pid, signal.SIGKILL)
        await until(lambda: engine._process.poll() is not None)
        assert engine.failure is None
        with pytest.raises(EngineDead, match="SIGKILL"):
            await finish(engine, ask("late"))

    play(scenario)


def test_a_stopped_engine_is_noticed_and_may_recover() -> None:
    async def scenario(engine: RemoteEngine) -> None:
        assert engine.liveness().alive  # idle engines are alive, however long
        stream = engine.generate(ask("a", max_tokens=480))
        await anext(stream)
        assert engine.liveness().alive
        os.kill(engine.pid, signal.SIGSTOP)
        try:
            await until(lambda: not engine.liveness().alive)
            assert "1 requests wait" in engine.liveness().reason
        finally:
            os.kill(engine.pid, signal.SIGCONT)
        assert (await anext(stream))[0].tokens
        await until(lambda: engine.liveness().alive)
        await stream.aclose()

    play(scenario, config(liveness_grace=0.3))


def test_an_exception_in_the_engine_is_its_last_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The scheduler's own check is made to fail: the one thing that must end an engine."""
    (tmp_path / "sitecustomize.py").write_text(
        "import penstock.core.scheduler as s\n"
        "def broken(self): raise AssertionError('planted')\n"
        "s.Scheduler.check = broken\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("TMPDIR", str(tmp_path))

    async def scenario(engine: RemoteEngine) -> None:
        await finish(engine, ask("a"))  # its invariants are checked when it has been idle for a while
        await until(lambda: engine.failure is not None)
        assert "AssertionError: planted" in str(engine.failure)
        assert list(tmp_path.glob("penstock-crash-*.jsonl"))

    play(scenario)


@pytest.mark.parametrize("break_it", ["no config", "no weights", "truncated"])
def test_a_broken_model_directory_is_refused_with_the_file(tmp_path: Path, break_it: str) -> None:
    import shutil

    directory = tmp_path / "model"
    shutil.copytree(checkpoint(), directory)
    if break_it == "no config":
        (directory / "config.json").unlink()
        expected = "config.json"
    elif break_it == "no weights":
        (directory / "model.safetensors").unlink()
        expected = "safetensors"
    else:
        data = (directory / "model.safetensors").read_bytes()
        (directory / "model.safetensors").write_bytes(data[: len(data) // 2])
        expected = "model.safetensors"

    async def body() -> None:
        engine = RemoteEngine.launch(config(directory), log_level="error")
        try:
            with pytest.raises(ModelLoadError, match=expected):
                await engine.start()
        finally:
            await engine.close()

    asyncio.run(asyncio.wait_for(body(), 90))


def test_the_engine_ends_when_its_parent_is_gone() -> None:
    async def scenario(engine: RemoteEngine) -> None:
        assert engine._parent_pipe is not None
        os.close(engine._parent_pipe)
        engine._parent_pipe = None
        engine._draining = True  # an exit is expected
        await until(lambda: engine._process.poll() is not None)
        assert engine._process.returncode == 0

    play(scenario)


def test_errors_are_exceptions_that_travel() -> None:
    """Every error type that an event can name is one of ours."""
    from penstock.core.errors import BY_NAME

    assert all(issubclass(kind, PenstockError) and kind.__name__ == name for name, kind in BY_NAME.items())


def test_an_engine_that_is_killed_leaves_nobody_without_a_last_event() -> None:
    """Not even those whose caller has gone: whoever counts them learns that there is no more to come."""

    async def scenario(engine: RemoteEngine) -> None:
        last: dict[str, Event] = {}
        gone = engine.generate(
            spec("gone", max_tokens=400, n=2), lambda event: last.update({event.request: event})
        )
        await anext(gone)
        stays = engine.generate(
            spec("stays", max_tokens=400), lambda event: last.update({event.request: event})
        )
        await anext(stays)
        os.kill(engine.pid, signal.SIGSTOP)
        await gone.aclose()
        assert not last
        os.kill(engine.pid, signal.SIGKILL)
        with pytest.raises(EngineDead):
            async for _ in stays:
                pass
        assert last.keys() == {"gone:0", "gone:1", "stays"}
        for event in last.values():
            assert event.finish is FinishReason.ERROR
            assert event.failure is not None
            assert event.failure.type == "EngineDead"

    play(scenario)


def test_any_client_notices_that_the_requests_of_another_are_stuck() -> None:
    async def scenario(engine: RemoteEngine) -> None:
        idle, waits = await attached(engine, 1), await attached(engine, 2)
        stream = waits.generate(ask("a", max_tokens=480))
        await anext(stream)
        assert idle.liveness().alive
        os.kill(engine.pid, signal.SIGSTOP)
        try:
            await until(lambda: not idle.liveness().alive)
            assert "1 requests wait" in idle.liveness().reason
        finally:
            os.kill(engine.pid, signal.SIGCONT)
        await until(lambda: idle.liveness().alive)
        await stream.aclose()
        for client in (idle, waits):
            await client.close()

    play(scenario, config(liveness_grace=0.3))


async def attached(engine: RemoteEngine, client: int) -> AttachedEngine:
    """Another API process's view of the engine."""
    engine.join(client)
    other = AttachedEngine(engine.directory, engine._config, client, client)
    await other.start()
    return other


def test_several_clients_of_one_engine() -> None:
    async def scenario(engine: RemoteEngine) -> None:
        one, two = await attached(engine, 1), await attached(engine, 2)
        assert one.ready
        assert two.info == engine.info
        lost: list[LostSequence] = []
        engine.on_lost(lost.append)
        steps: list[EngineStats] = []
        engine.on_stats(steps.append)
        mine, theirs = await asyncio.gather(
            *(
                asyncio.gather(*(finish(client, ask(f"{name}{i}")) for i in range(8)))
                for client, name in ((one, "a"), (two, "b"))
            )
        )
        for name, answers in (("a", mine), ("b", theirs)):
            for number, events in enumerate(answers):
                assert {event.request for event in events} == {f"{name}{number}"}
                assert sum(len(event.tokens) for event in events) == 4
                (one if name == "a" else two).settled(f"{name}{number}")
        stream = two.generate(ask("long", max_tokens=400))
        await anext(stream)
        assert (one.load, two.load, engine.load) == (1, 1, 1), "the engine's, whoever asks"
        one.abort(["long"])  # it is not its own
        assert await finish(one, ask("c"))
        assert (await anext(stream))[0].finish is None
        (refused,) = await finish(one, ask("long"))
        assert isinstance(event_error(refused), InvalidRequest)
        assert "'long' is already in use" in str(event_error(refused))
        await one.drain(5.0)
        assert (await anext(stream))[0].finish is None, "the engine goes on"
        two._context.destroy(linger=0)  # as SIGKILL leaves it
        engine.leave(2, slot=2)
        await until(lambda: len(lost) == 1)
        (sequence,) = lost
        assert sequence.last.request == "long"
        assert sequence.last.finish is FinishReason.ABORT
        assert (sequence.prompt_tokens, sequence.max_tokens) == (5, 400)
        assert sequence.generation_tokens >= 3
        assert engine.load == 0
        bills = [events[-1].device_seconds for events in (*mine, *theirs)]
        assert sequence.last.device_seconds > 0
        await until(lambda: steps[-1].running == 0)
        assert sum(bills) + sequence.last.device_seconds < steps[-1].busy  # "c" is not among them
        two._owed.clear()
        two._closed = True
        with contextlib.suppress(Exception):
            await stream.aclose()
        await two._stop_receiving()
        two._heartbeat.close()

    play(scenario)


def test_an_engine_that_dies_fails_the_requests_of_all() -> None:
    async def scenario(engine: RemoteEngine) -> None:
        one = await attached(engine, 1)
        stream = one.generate(ask("a", max_tokens=480))
        await anext(stream)
        os.kill(engine.pid, signal.SIGKILL)
        await engine.ended()
        assert engine.failure is not None
        await one.died(engine.failure)
        with pytest.raises(EngineDead, match="SIGKILL"):
            await anext_forever(stream)
        assert not one.ready
        await one.close()

    play(scenario)


def test_who_drains_has_the_rest_aborted_and_leaves_the_others_alone() -> None:
    async def scenario(engine: RemoteEngine) -> None:
        one, two = await attached(engine, 1), await attached(engine, 2)
        aborted, runs = one.generate(ask("a", max_tokens=400)), two.generate(ask("b", max_tokens=400))
        await anext(aborted)
        await anext(runs)
        draining = asyncio.create_task(one.drain(0.0))
        rest = [event async for events in aborted for event in events]
        assert rest[-1].finish is FinishReason.ABORT
        await draining
        with pytest.raises(Draining):
            await finish(one, ask("c"))
        assert (await anext(runs))[0].finish is None
        await runs.aclose()
        await two.close()

    play(scenario)
