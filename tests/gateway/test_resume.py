"""Streams that break go on at another replica: our own server twice, and a connection that breaks anywhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.gateway import bills
from penstock.gateway.envelope import Envelope
from penstock.gateway.policy.health import Health
from penstock.gateway.records import Principal, Row
from penstock.gateway.transcript import can_go_on
from penstock.spec.load import loads
from tests.server.conftest import LiveServer, running
from tests.server.fake_engine import Asked, FakeEngine
from tests.server.tiny import REPLY, make_tokenizer

from .conftest import CHAT, KEY, Gateway
from .cutter import Cut, Cutter, How
from .test_bills import started
from .test_stream import BY_PATH

COMPLETIONS = "/v1/completions"
SPEC = """
pools: {{box: {{hardware: L4, price_per_hour: 3.60}}}}
upstreams:
  ours:
    url: {url}/v1
    urls: [{urls}]
    kind: penstock
    pool: box
    trusts_gateway: true
    api_key_env: CLOUD_KEY
    timeout_idle: 0.3
    models: {{tiny: {{context: 256}}}}
  other: {{url: "{fallback}", kind: penstock, models: {{tiny: {{context: 256}}}}}}
routes:
  small: {{targets: [{{model: tiny, upstream: ours}}], fallback: [{{model: tiny, upstream: other}}], retries: {retries}}}
"""
MESSAGES: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
PROMPT: dict[str, Any] = {"prompt": "Hi"}
TEXT = "Ünïcödé 🌊🌊 the end"


@dataclass
class Seen:
    """A stream, as a client reads it."""

    text: str = ""
    roles: list[str] = field(default_factory=list)
    heads: set[str] = field(default_factory=set)
    finish: list[str] = field(default_factory=list)
    usages: list[dict[str, Any]] = field(default_factory=list)
    continuous: list[int] = field(default_factory=list)
    error: dict[str, Any] | None = None
    done: bool = False

    @classmethod
    def of(cls, body: bytes) -> Seen:
        """Read strictly: whole events, nothing after the end, no comments."""
        seen = cls()
        assert body.endswith(b"\n\n")
        for event in body[:-2].split(b"\n\n"):
            assert not seen.done
            assert seen.error is None
            assert event.startswith(b"data: "), event
            assert b"\n" not in event
            if event == b"data: [DONE]":
                seen.done = True
                continue
            seen._take(json.loads(event[6:]))
        return seen

    def _take(self, chunk: dict[str, Any]) -> None:
        if "error" in chunk:
            self.error = chunk["error"]
            return
        names = ("id", "object", "created", "model", "system_fingerprint")
        self.heads.add(json.dumps([chunk[name] for name in names]))
        usage = chunk.get("usage")
        if not chunk["choices"]:
            self.usages.append(usage)
            return
        if usage is not None:
            self.continuous.append(usage["completion_tokens"])
        (choice,) = chunk["choices"]
        assert not self.finish, "after the end"
        delta = choice.get("delta", {"content": choice.get("text")})
        if "role" in delta:
            self.roles.append(delta["role"])
        self.text += delta["content"]
        if choice["finish_reason"] is not None:
            self.finish.append(choice["finish_reason"])


class World:
    """Two replicas, the first behind a connection that breaks, and one that is no replica."""

    def __init__(self, servers: list[LiveServer], cutter: Cutter, retries: int = 2, alone: bool = False) -> None:
        self.servers = servers
        self.cutter = cutter
        more = "" if alone else f"{servers[1].url}/v1"
        spec = SPEC.format(url=cutter.url, urls=more, fallback=servers[2].url, retries=retries)
        self.gateway = Gateway(loads(spec), [], {KEY: Principal(key_id="k1")})
        started(self.gateway)

    def ask(self, body: dict[str, Any], *cuts: Cut, path: str = "") -> tuple[Seen, Row]:
        """A stream whose first attempts are cut so, and its row."""
        gateway = self.gateway
        for station in gateway.stations.all():
            station.health = Health()
        self.cutter.plan, self.cutter.cuts = list(cuts), 0
        before = len(gateway.meter.rows)
        answer = gateway.post(self.body(body), path or (CHAT if "messages" in body else COMPLETIONS))
        assert answer.status == 200, answer.body
        return Seen.of(answer.body), gateway.rows(before + 1)[-1]

    def body(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"model": "small", "stream": True, "max_tokens": 100, **body}


def says(text: str) -> Callable[[Asked], list[int]]:
    """The rest of a text, behind what was generated."""
    ids = list(text.encode())
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
def cutter(servers: list[LiveServer]) -> Iterator[Cutter]:
    cutter = Cutter(servers[0].port)
    yield cutter
    cutter.stop()


@pytest.fixture(scope="module", autouse=True)
def _soon() -> Iterator[None]:
    """Bills are looked for more often."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bills, "_SOON", 0.01)
        yield


@pytest.fixture(scope="module")
def _world(servers: list[LiveServer], cutter: Cutter) -> Iterator[World]:
    world = World(servers, cutter)
    world.gateway.stations.all()[1].in_flight = 1  # so that the first one is asked first
    yield world
    world.gateway.live.stop()


@pytest.fixture
def world(_world: World) -> World:
    for server in _world.servers[:2]:
        server.engine.reset(says(TEXT))
    return _world


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
def test_wherever_it_breaks_the_client_sees_one_stream(_world: World, name: str, data: st.DataObject) -> None:
    """In the middle of a line, of a character, of what may be a stop string, after the last token."""
    world, body = _world, BODIES[name]
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
