"""Streams that break go on at another replica: our server, twice, behind connections that break anywhere."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.gateway import bills
from penstock.gateway.envelope import Envelope
from penstock.gateway.ledger.writer import unsettled
from penstock.gateway.policy.amounts import NANO
from penstock.gateway.policy.health import Health
from penstock.gateway.records import Row
from penstock.gateway.transcript import can_go_on
from tests.server.conftest import LiveServer, running
from tests.server.fake_engine import Asked, FakeEngine
from tests.server.tiny import make_tokenizer

from .conftest import CHAT
from .cutter import Cut, Cutter, How
from .replicas import COMPLETIONS, Seen, World
from .test_settler import WALL, look
from .test_stream import BY_PATH

MESSAGES: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
PROMPT: dict[str, Any] = {"prompt": "Hi"}
TEXT = "Ünïcödé 🌊🌊 the end"


def says(text: str) -> Callable[[Asked], list[int]]:
    """The rest of a text, behind what was generated."""
    ids = make_tokenizer().encode(text, add_special_tokens=False)
    return lambda asked: ids[len(asked.spec.prompts[0].generated) :]


@pytest.fixture(scope="module")
def servers() -> Iterator[list[LiveServer]]:
    tokenizer = make_tokenizer()
    options: dict[str, Any] = {"gateway_key": "sk-cloud", "served_model_name": ("tiny",)}
    with (
        running(tokenizer, says(TEXT), **options) as one,
        running(tokenizer, says(TEXT), **options) as two,
        running(tokenizer, says("another model"), served_model_name=("tiny",)) as other,
    ):
        yield [one, two, other]


@pytest.fixture(scope="module")
def cutters(servers: list[LiveServer]) -> Iterator[list[Cutter]]:
    cutters = [Cutter(each.port) for each in servers[:2]]
    yield cutters
    for each in cutters:
        each.stop()


@pytest.fixture(scope="module", autouse=True)
def _soon() -> Iterator[None]:
    """Bills are looked for more often, and not for long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bills, "_SOON", 0.01)
        patch.setattr(bills, "PATIENCE", 1.0)
        yield


@contextlib.contextmanager
def world_of(servers: list[LiveServer], cutters: list[Cutter], retries: int = 2) -> Iterator[World]:
    world = World(servers, cutters, servers[2].url, retries=retries)
    try:
        yield world
    finally:
        world.stop()


@pytest.fixture(scope="module")
def shared(servers: list[LiveServer], cutters: list[Cutter]) -> Iterator[World]:
    with world_of(servers, cutters) as world:
        yield world


@pytest.fixture
def world(shared: World) -> World:
    for server in shared.servers[:2]:
        server.engine.reset(says(TEXT))
    return shared


@pytest.fixture
def alone(servers: list[LiveServer], cutters: list[Cutter]) -> Iterator[World]:
    """With one replica."""
    with world_of(servers, cutters[:1]) as world:
        yield world


def size(world: World, body: dict[str, Any]) -> int:
    """Bytes of an answer's body with its comments, as an engine sends it."""
    server = world.servers[0]
    headers = {"Authorization": "Bearer sk-cloud", "X-Penstock-Stream-Tokens": "1"}
    options = {"stream_options": {"include_usage": True}}
    path = CHAT if "messages" in body else COMPLETIONS
    body = {**world.body(body), **options, "model": "tiny"}
    return len(server.request("POST", path, body, headers).body)


BODIES: dict[str, dict[str, Any]] = {
    "chat": MESSAGES,
    "completion": PROMPT,
    "usage": {**MESSAGES, "stream_options": {"include_usage": True}},
    "continuous": {**PROMPT, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    "intervals": {**MESSAGES, "stream_interval": 3, "stream_options": {"include_usage": True}},
    "a prefix of a stop string": {**MESSAGES, "stop": ["🌊🌊 theme", "dé!"]},
    "a stop string": {**PROMPT, "stop": ["the e"], "stream_options": {"include_usage": True}},
    "a stop string that is shown": {**PROMPT, "stop": ["the e"], "include_stop_str_in_output": True},
    "length": {**MESSAGES, "max_tokens": 13, "stream_options": {"include_usage": True}},
    "text format": {**MESSAGES, "response_format": {"type": "text"}, "tools": []},
}


@pytest.mark.parametrize("name", BODIES)
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_wherever_it_breaks_the_client_sees_one_stream(shared: World, name: str, data: st.DataObject) -> None:
    """In the middle of a line, of a character, of what may be a stop string, after the last token."""
    world, body = shared, BODIES[name]
    whole, paid = world.ask(body)
    assert (whole.done, len(whole.finish), whole.error) == (True, 1, None)
    cut = data.draw(st.integers(0, size(world, body) + 1000), label="cut")
    how: How = data.draw(st.sampled_from(("close", "reset")), label="how")
    seen, row = world.ask(body, Cut(cut, how))
    assert (seen.text, seen.finish, seen.roles) == (whole.text, whole.finish, whole.roles)
    assert (seen.done, len(seen.heads), seen.error) == (True, 1, None)
    assert seen.continuous == sorted(set(seen.continuous))
    assert len(seen.usages) == len(whole.usages)
    for told, expected in zip(seen.usages, whole.usages, strict=True):
        for field_ in ("prompt_tokens", "completion_tokens", "total_tokens", "prompt_tokens_details"):
            assert told[field_] == expected[field_]
    attempts = 1 if not world.cutter.cuts or "end was missing" in row.note else 2
    assert (row.end, row.status, row.attempts) == ("done", 200, attempts)
    assert (row.input_tokens, row.output_tokens) == (paid.input_tokens, paid.output_tokens)
    assert row.settlement == "settled"
    assert row.device_seconds
    assert paid.device_seconds
    assert row.device_seconds >= paid.device_seconds


def halfway(world: World, body: dict[str, Any]) -> int:
    return size(world, body) // 2


def paid(world: World, row: Row) -> int:
    """Nanoseconds that the engines say for a row."""
    total = 0.0
    for server in world.servers[:2]:
        page = server.request("GET", "/v1/bills", headers={"Authorization": "Bearer sk-cloud"}).json
        total += sum(bill["device_seconds"] for bill in page["data"] if bill["request_id"].startswith(row.id))
    return round(total * NANO)


@pytest.mark.parametrize("cuts", [1, 2])
def test_the_row_has_each_token_once_and_the_time_of_all(world: World, cuts: int) -> None:
    world.servers[0].engine.reset(says(TEXT))
    at = halfway(world, MESSAGES)
    seen, row = world.ask(MESSAGES, *[Cut(at), Cut(at // 3)][:cuts])
    assert (seen.text, seen.done) == (TEXT, True)
    assert (row.end, row.status, row.attempts, row.settlement) == ("done", 200, cuts + 1, "settled")
    assert row.output_tokens == len(TEXT.encode()) + 1  # and the end of the sequence
    assert row.device_seconds == paid(world, row)
    assert not row.device_seconds_estimated
    assert row.device_seconds >= row.output_tokens * 1_000_000
    notes = row.note.split("; ")
    assert notes[0] == "ours/0: cut"
    assert re.fullmatch(r"resumed at ours/1 after \d+ tokens", notes[1])
    if cuts == 2:  # and now the first one again
        assert notes[2] == "ours/1: cut"
        assert re.fullmatch(r"resumed at ours/0 after \d+ tokens", notes[3])


@pytest.mark.parametrize("cuts", [1, 2])
def test_a_worker_that_is_killed_meanwhile_leaves_what_settles_the_same_row(world: World, cuts: int) -> None:
    """From what its journal has of the attempts, and the bills of all engines that the answer came from."""
    at = halfway(world, MESSAGES)
    _, row = world.ask(MESSAGES, *[Cut(at), Cut(at // 3)][:cuts])
    attempts = world.gateway.meter.attempts[-1 - cuts :]
    assert [each.behind > 0 for each in attempts] == [False, *[True] * cuts]
    reserved = Row(id=row.id, at=WALL, key_id="k1", reserved_dollars=7, reserved_device_seconds=7)
    killed = unsettled(reserved, attempts)
    assert (killed.settlement, killed.dollars, killed.attempts) == ("unsettled", 7, row.attempts)
    memory = look(world.gateway, killed)
    for name in ("input_tokens", "output_tokens", "cached_tokens", "device_seconds", "dollars", "settlement"):
        assert getattr(killed, name) == getattr(row, name), name
    assert (killed.upstream, killed.replica, killed.model) == (row.upstream, row.replica, row.model)
    assert killed.owed == ()
    assert [used.device_seconds for used in memory.used] == [row.device_seconds]
    assert look(world.gateway, killed).used == []


def test_the_next_replica_goes_on_behind_what_the_client_has(world: World) -> None:
    seen, _ = world.ask({**MESSAGES, "seed": 7}, Cut(halfway(world, MESSAGES)))
    first, second = (server.engine.adds[-1].spec for server in world.servers[:2])
    generated = second.prompts[0].generated
    ids = make_tokenizer().encode(TEXT, add_special_tokens=False)
    assert 0 < len(generated) < len(ids)
    assert list(generated) == ids[: len(generated)]
    assert second.prompts[0].token_ids == first.prompts[0].token_ids
    assert (second.sampling, second.cache_salt, second.tenant) == (
        first.sampling,
        first.cache_salt,
        first.tenant,
    )
    assert seen.text == TEXT


@pytest.mark.parametrize("retries", [0, 1])
def test_as_often_as_the_route_has_it(servers: list[LiveServer], cutters: list[Cutter], retries: int) -> None:
    with world_of(servers, cutters, retries) as world:
        at = halfway(world, PROMPT)
        seen, row = world.ask(PROMPT, *[Cut(at, "reset"), Cut(at // 3)][: retries + 1])
        assert (seen.done, seen.finish) == (False, [])
        assert seen.error is not None
        assert seen.error["reason"] == "upstream_cut"
        assert TEXT.startswith(seen.text)
        assert (row.end, row.status, row.attempts) == ("upstream_failed", 200, 1 + retries)
        assert row.settlement == "settled"
        assert 0 < row.output_tokens <= (len(TEXT.encode()) if retries else len(TEXT.encode()) + 1)
        assert row.device_seconds == paid(world, row)


def test_who_hangs_is_left_for_another_replica(world: World) -> None:
    seen, row = world.ask(PROMPT, Cut(halfway(world, PROMPT), "stall"))
    assert (seen.text, seen.done) == (TEXT, True)
    assert row.note.startswith("ours/0: stalled; resumed at ours/1 after ")


def test_the_only_replica_is_asked_again(alone: World) -> None:
    seen, row = alone.ask(PROMPT, Cut(halfway(alone, PROMPT)))
    assert (seen.text, seen.done) == (TEXT, True)
    assert row.note.startswith("ours: cut; resumed at ours after ")


def test_a_fallback_is_another_model(alone: World) -> None:
    """And who hangs is not asked again."""
    asked = len(alone.servers[2].engine.adds)
    seen, row = alone.ask(PROMPT, Cut(halfway(alone, PROMPT), "stall"))
    assert seen.error is not None
    assert (seen.error["reason"], seen.done) == ("upstream_stalled", False)
    assert (row.end, row.attempts) == ("upstream_failed", 1)
    assert len(alone.servers[2].engine.adds) == asked


def fails(engine: FakeEngine) -> None:
    engine.fail_at = 9
    engine.resume()


def dies(engine: FakeEngine) -> None:
    engine.die("out of memory")


def gives_up(engine: FakeEngine) -> None:
    """As at the end of a drain."""
    engine.abort([engine.adds[-1].id])


@pytest.mark.parametrize("how", [fails, dies, gives_up])
def test_an_engine_that_says_that_it_failed(world: World, how: Callable[[FakeEngine], None]) -> None:
    world.ask(MESSAGES)  # so that both are well
    engine = world.servers[0].engine
    engine.pause_at = 9
    before = len(world.gateway.meter.rows)
    connection, response = world.gateway.open(
        world.body({**MESSAGES, "stream_options": {"include_usage": True}})
    )
    body = response.readline()
    world.wait_for(engine, 9)
    how(engine)
    seen = Seen.of(body + response.read())
    connection.close()
    row = world.gateway.rows(before + 1)[-1]
    assert (seen.text, seen.done, seen.finish) == (TEXT, True, ["stop"])
    assert [usage["completion_tokens"] for usage in seen.usages] == [len(TEXT.encode()) + 1]
    assert "device_seconds" not in seen.usages[0]  # nobody knows both yet
    assert re.match(r"ours/0: error; resumed at ours/1 after \d tokens", row.note)
    assert row.output_tokens == len(TEXT.encode()) + 1


def test_a_client_that_leaves_the_second_engine_pays_both(world: World) -> None:
    at = halfway(world, MESSAGES)
    world.ask(MESSAGES)  # so that both are well
    world.cutter.plan = [Cut(at)]
    second = world.servers[1].engine
    second.pause_at = 3
    before = len(world.gateway.meter.rows)
    connection, response = world.gateway.open(world.body(MESSAGES))
    world.wait_for(second, 3)
    response.close()
    connection.close()
    row = world.gateway.rows(before + 1)[-1]
    assert (row.end, row.status, row.attempts) == ("client_gone", 499, 2)
    assert row.settlement == "settled"
    assert row.device_seconds == paid(world, row)


@pytest.mark.parametrize(
    "more",
    [
        {"n": 2},
        {"logprobs": True},
        {"logprobs": True, "top_logprobs": 2},
        {"return_token_ids": True},
        {"seed": 1, "generated_token_ids": [65]},
    ],
    ids=str,
)
def test_what_cannot_go_on_ends_with_an_error(world: World, more: dict[str, Any]) -> None:
    body = {**MESSAGES, **more}
    answer = world.servers[0].request(
        "POST", CHAT, {**world.body(body), "model": "tiny"}, {"Authorization": "Bearer sk-cloud"}
    )
    for station in world.gateway.stations.all():
        station.health = Health()
    world.cutter.plan = [Cut(len(answer.body) // 2)]
    asked = len(world.servers[1].engine.adds)
    before = len(world.gateway.meter.rows)
    events = world.gateway.post(world.body(body)).body.split(b"\n\n")
    assert json.loads(events[-2][6:])["error"]["reason"] == "upstream_cut"
    assert b": tokens" not in b"".join(events)
    assert world.gateway.rows(before + 1)[-1].attempts == 1
    assert len(world.servers[1].engine.adds) == asked


@pytest.mark.parametrize(
    ("more", "possible"),
    [
        ({}, True),
        ({"tools": [], "functions": None, "logprobs": False, "echo": False, "n": 1}, True),
        ({"response_format": {"type": "text"}, "temperature": 1.0, "stop": ["x"]}, True),
        ({"stream": False}, False),
        ({"tools": [{"type": "function"}]}, False),
        ({"functions": [{"name": "f"}]}, False),
        ({"response_format": {"type": "json_object"}}, False),
        ({"structured_outputs": {"regex": "a"}}, False),
        ({"guided_json": {"type": "object"}}, False),
        ({"logprobs": 0}, False),
        ({"prompt_logprobs": 0}, False),
        ({"echo": True}, False),
        ({"n": 2}, False),
    ],
    ids=str,
)
def test_what_can_go_on(more: dict[str, Any], possible: bool) -> None:
    body = {"model": "m", "messages": [], "stream": True, **more}
    assert can_go_on(Envelope(json.dumps(body).encode(), BY_PATH[CHAT])) is possible
    assert not can_go_on(Envelope(json.dumps(body).encode(), BY_PATH["/v1/messages"]))
