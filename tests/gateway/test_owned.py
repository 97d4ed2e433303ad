"""Ids of responses: their owner continues and reads them where they are, nobody else knows of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from penstock.gateway.owned import NotFound, Owned
from penstock.gateway.records import Principal
from penstock.gateway.stations import Station
from tests.http.live import exchange

from .conftest import KEY, Gateway, Make
from .upstream import Wire

OTHER = "sk-ps-other"
KEYS = {KEY: Principal(key_id="k1"), OTHER: Principal(key_id="k2")}
RESPONSES = "/v1/responses"
ASK = {"model": "small", "input": "Hi!", "max_output_tokens": 9}
USAGE = {"input_tokens": 3, "output_tokens": 2}


def body_of(wire: Wire) -> dict[str, Any]:
    asked = wire.asked.json if wire.asked.body else {}
    previous = asked.get("previous_response_id")
    text = 'he said "resp_1" to "id"'
    return {
        "id": "resp_1",
        "object": "response",
        "previous_response_id": previous,
        "output": text,
        "usage": USAGE,
    }


async def behave(wire: Wire) -> None:
    """Responses, whole or in events; it keeps them, and shows them."""
    if not wire.asked.streams:
        await wire.whole(200, body_of(wire))
        return
    await wire.stream()
    for kind, response in (("created", {"id": "resp_1"}), ("completed", body_of(wire))):
        data = json.dumps({"type": f"response.{kind}", "response": response}).encode()
        await wire.chunk(b"event: response." + kind.encode() + b"\ndata: " + data + b"\n\n")
    await wire.send(b"0\r\n\r\n")


@pytest.fixture
def gateway(make: Make) -> Gateway:
    return make(behave, behave, behave, keys=KEYS)


def call(gateway: Gateway, method: str, path: str, key: str = KEY) -> Any:
    return exchange(gateway.live.port, method, path, None, {"Authorization": f"Bearer {key}"})


def asked(gateway: Gateway) -> list[Any]:
    return [each for upstream in gateway.upstreams for each in upstream.asked]


def test_a_response_is_continued_and_read_where_it_is(gateway: Gateway) -> None:
    first = gateway.post(ASK, path=RESPONSES)
    name = first.json["id"]
    assert name.startswith("resp_1.")
    assert first.json["output"] == 'he said "resp_1" to "id"'  # text is nobody's id
    home = next(index for index, each in enumerate(gateway.upstreams) if each.asked)
    for number in range(4):
        more = gateway.post({**ASK, "previous_response_id": name}, path=RESPONSES)
        assert more.json["previous_response_id"] == name
        assert len(gateway.upstreams[home].asked) == number + 2
        assert gateway.upstreams[home].asked[-1].json["previous_response_id"] == "resp_1"
    for method, suffix in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items?limit=5")):
        answer = call(gateway, method, f"{RESPONSES}/{name}{suffix}")
        assert (answer.status, answer.json["id"]) == (200, name)
        last = gateway.upstreams[home].asked[-1]
        assert (last.method, last.path) == (method, f"{RESPONSES}/resp_1{suffix}")
    assert len(gateway.rows(5)) == 5
    assert gateway.rows(5)[0].output_tokens == 2


def test_the_ids_of_a_stream_are_those_of_its_owner(gateway: Gateway) -> None:
    answer = gateway.post({**ASK, "stream": True}, path=RESPONSES)
    ids = [
        json.loads(line[6:])["response"]["id"]
        for line in answer.body.decode().split("\n")
        if line.startswith("data: ")
    ]
    assert len(set(ids)) == 1
    assert call(gateway, "GET", f"{RESPONSES}/{ids[0]}").json["id"] == ids[0]
    assert gateway.row().end == "done"


def test_nobody_else_knows_of_it(gateway: Gateway) -> None:
    name = gateway.post(ASK, path=RESPONSES).json["id"]
    before = len(asked(gateway))
    forged = [name, "resp_1", f"{name}x", name[:-1], "resp_2." + name.partition(".")[2], ".", "é"]
    for number, each in enumerate(forged):
        key = KEY if number else OTHER
        path = each.encode().decode("ascii", "ignore") or "x"
        assert call(gateway, "GET", f"{RESPONSES}/{path}", key).status == 404
        answer = gateway.post({**ASK, "previous_response_id": each}, path=RESPONSES, key=key)
        assert (answer.status, answer.reason) == (404, "not_found")
    assert call(gateway, "GET", f"{RESPONSES}/{name}", "").status == 401
    for path in (f"{name}/../../admin", f"{name}%2F..%2Fadmin", f"{name}/other"):
        assert call(gateway, "GET", f"{RESPONSES}/{path}").status == 404
    for query in ("stream=true", "limit=1#x", "limit=1&x=2", "limit=%0d%0aX:1"):
        assert call(gateway, "GET", f"{RESPONSES}/{name}?{query}").status in (200, 400)
    assert all(each.path in (RESPONSES, f"{RESPONSES}/resp_1?limit=1") for each in asked(gateway)[before:])


def test_what_would_escape_the_meter_is_refused(gateway: Gateway) -> None:
    for more in ({"background": True}, {"conversation": "conv_1"}):
        answer = gateway.post({**ASK, **more}, path=RESPONSES)
        assert (answer.status, answer.reason) == (400, "unsupported_parameter")
    assert gateway.post({**ASK, "background": False, "conversation": None}, path=RESPONSES).status == 200


def test_gateways_with_one_secret_know_each_others_ids() -> None:
    stations = [Station(name, f"http://{name}", "openai", headers={}) for name in ("a", "b")]
    one, two, stranger = Owned(b"x" * 32), Owned(b"x" * 32), Owned(b"y" * 32)
    name = one.name("resp_1", stations[1], "k1")
    assert two.read(name, stations, "k1") == ("resp_1", stations[1])
    for owned, among, key in ((stranger, stations, "k1"), (two, stations[:1], "k1"), (two, stations, "k2")):
        with pytest.raises(NotFound):
            owned.read(name, among, key)
    with pytest.raises(ValueError):
        Owned(b"short")
