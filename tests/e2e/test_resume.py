"""Streams that go on at another engine: real ones, with the demo model, that are cut, killed and stopped."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.gateway import bills
from penstock.gateway.policy.health import Health
from penstock.gateway.records import Row
from tests.gateway.cutter import Cut, Cutter, How
from tests.gateway.replicas import COMPLETIONS, Seen, World

from .server import Server, eventually, serving

FLAGS = (
    *("--kv-cache-memory-bytes", "16MiB", "--dtype", "float32"),
    *("--gateway-key", "sk-cloud", "--served-model-name", "tiny"),
)
USAGE: dict[str, Any] = {"stream_options": {"include_usage": True}}
ASKED: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 1.0, "seed": 7},
    "penalties": {"temperature": 0.7, "seed": 8, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
    "a stop string": {"temperature": 0, "stop": [" the", "controll zzz"], "min_tokens": 12},
    "chat": {"temperature": 0.8, "seed": 9, "messages": [{"role": "user", "content": "What is a Pod?"}]},
}


@pytest.fixture(scope="module", autouse=True)
def _soon() -> Iterator[None]:
    """Bills of the dead are not waited for for long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bills, "_SOON", 0.01)
        patch.setattr(bills, "PATIENCE", 1.0)
        yield


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    logs = tmp_path_factory.mktemp("logs")
    with serving(*FLAGS, log=logs / "one") as one, serving(*FLAGS, log=logs / "two") as two:
        yield [one, two]


@pytest.fixture(scope="module")
def world(engines: list[Server]) -> Iterator[World]:
    cutters = [Cutter(each.port) for each in engines]
    world = World([], cutters, engines[1].url, idle=10)
    yield world
    world.stop()
    for each in cutters:
        each.stop()


@pytest.mark.parametrize("name", ASKED)
@given(share=st.floats(0, 1), how=st.sampled_from(("close", "reset")))
@settings(max_examples=3, deadline=None)
def test_the_text_is_that_of_one_engine(world: World, name: str, share: float, how: How) -> None:
    """To the byte, wherever it breaks, greedy or seeded."""
    body = {**USAGE, "max_tokens": 24, "ignore_eos": True, **ASKED[name]}
    if "messages" not in body:
        body["prompt"] = "A Pod is"
    whole, paid = world.ask(body)
    assert (whole.done, whole.error, len(whole.finish)) == (True, None, 1)
    seen, row = world.ask(body, Cut(int(share * 240 * paid.output_tokens), how))
    assert (seen.text, seen.finish, seen.roles) == (whole.text, whole.finish, whole.roles)
    assert (seen.done, seen.error, len(seen.heads)) == (True, None, 1)
    assert [usage["completion_tokens"] for usage in seen.usages] == [paid.output_tokens]
    assert (row.input_tokens, row.output_tokens) == (paid.input_tokens, paid.output_tokens)
    assert (row.end, row.settlement) == ("done", "settled")


LONG: dict[str, Any] = {
    **USAGE,
    "prompt": "A Pod is",
    "max_tokens": 600,
    "temperature": 0,
    "ignore_eos": True,
}


def struck(world: World, strike: Callable[[], None]) -> tuple[Seen, Row]:
    """A long answer, after whose first tokens something happens."""
    for station in world.gateway.stations.all():
        station.health = Health()
    before = len(world.gateway.meter.rows)
    connection, response = world.gateway.open(world.body(LONG), path=COMPLETIONS)
    answer = response.readline()
    strike()
    seen = Seen.of(answer + response.read())
    connection.close()
    return seen, world.gateway.rows(before + 1)[-1]


def check(world: World, seen: Seen, row: Row, fault: str) -> None:
    whole, paid = world.ask(LONG)
    assert (seen.text, seen.finish, seen.done, seen.error) == (whole.text, ["length"], True, None)
    assert [usage["completion_tokens"] for usage in seen.usages] == [600]
    assert re.match(rf"ours/0: ({fault}); resumed at ours/1 after \d+ tokens$", row.note), row.note
    assert (row.end, row.status, row.attempts) == ("done", 200, 2)
    assert (row.input_tokens, row.output_tokens) == (paid.input_tokens, 600)
    assert row.device_seconds


def test_an_engine_that_hangs(world: World, engines: list[Server]) -> None:
    pid = engines[0].engine_pid()
    stations = world.gateway.stations.all()
    stations[0].timeout_idle = 1.0
    try:
        seen, row = struck(world, lambda: os.kill(pid, signal.SIGSTOP))
    finally:
        os.kill(pid, signal.SIGCONT)
        stations[0].timeout_idle = 10.0
    check(world, seen, row, "stalled")


def kill(server: Server) -> None:
    server.process.kill()


def end_now(server: Server) -> None:
    """Two signals: it stops what it does. Its engine stands still, or a fast one would have answered."""
    with server.held():
        server.process.send_signal(signal.SIGTERM)
        eventually(lambda: server.get("/readyz")[0] == 503)
        server.process.send_signal(signal.SIGTERM)


@pytest.mark.parametrize(("strike", "fault"), [(kill, "cut|reset"), (end_now, "error")])
def test_an_engine_that_is_lost(
    world: World, tmp_path: Path, strike: Callable[[Server], None], fault: str
) -> None:
    with serving(*FLAGS, log=tmp_path / "log") as lost:
        cutter = Cutter(lost.port)
        here = World([], [cutter, world.cutters[1]], world.cutters[1].url, idle=10)
        try:
            seen, row = struck(here, lambda: strike(lost))
        finally:
            here.stop()
            cutter.stop()
    check(world, seen, row, fault)
    if strike is kill:  # its bill is lost
        assert (row.settlement, row.device_seconds_estimated) == ("estimated", True)
