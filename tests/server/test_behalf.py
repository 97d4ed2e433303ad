"""What a gateway may say of a request, and where only a gateway may say it."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from penstock.core.errors import StartupError
from penstock.core.request_spec import ServiceClass
from penstock.server.config import ServerConfig
from penstock.text.tokenizer import Tokenizer

from .conftest import LiveServer, running
from .fake_engine import Asked
from .tiny import MODEL, REPLY

GATEWAY = {"Authorization": "Bearer gateway"}
CLIENT = {"Authorization": "Bearer client"}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(scope="module")
def ids(tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode(REPLY, add_special_tokens=False)


@pytest.fixture(scope="module")
def reply(ids: list[int]) -> Callable[[Asked], list[int]]:
    """The rest of REPLY, behind what was generated."""
    return lambda asked: ids[len(asked.spec.prompts[0].generated) :]


@pytest.fixture(scope="module")
def _served(tokenizer: Tokenizer, reply: Callable[[Asked], list[int]]) -> Iterator[LiveServer]:
    with running(tokenizer, reply, api_key="client", gateway_key="gateway") as server:
        yield server


@pytest.fixture
def served(_served: LiveServer, reply: Callable[[Asked], list[int]]) -> LiveServer:
    _served.engine.reset(reply)
    return _served


def test_a_gateway_says_whose_a_request_is_and_who_waits(served: LiveServer) -> None:
    headers = {**GATEWAY, "X-Penstock-Tenant": "search", "X-Penstock-Class": "background"}
    assert served.post("/v1/chat/completions", CHAT, headers).status == 200
    (asked,) = served.engine.adds
    assert (asked.spec.tenant, asked.spec.service_class) == ("search", ServiceClass.BACKGROUND)


@pytest.mark.parametrize("name", ["X-Penstock-Tenant", "X-Penstock-Class"])
def test_nobody_else_does(served: LiveServer, name: str) -> None:
    answer = served.post("/v1/chat/completions", CHAT, {**CLIENT, name: "realtime"})
    assert (answer.status, answer.error["reason"]) == (403, "permission_denied")
    assert "--gateway-key" in answer.error["message"]
    assert not served.engine.adds


@pytest.mark.parametrize(
    ("header", "value"), [("X-Penstock-Tenant", "x" * 257), ("X-Penstock-Class", "urgent")]
)
def test_what_says_nothing(served: LiveServer, header: str, value: str) -> None:
    answer = served.post("/v1/chat/completions", CHAT, {**GATEWAY, header: value})
    assert answer.status == 400
    assert header in answer.error["message"]


def test_bills_are_read_behind_a_cursor(served: LiveServer) -> None:
    cursor = served.request("GET", "/v1/bills", headers=GATEWAY).json["next"]
    headers = {**GATEWAY, "X-Penstock-Tenant": "search", "X-Request-Id": "row-1"}
    usage = served.post("/v1/chat/completions", CHAT, headers).json["usage"]
    page = served.request("GET", f"/v1/bills?after={cursor}", headers=GATEWAY).json
    (bill,) = page["data"]
    assert (bill["request_id"], bill["tenant"], bill["finish_reasons"]) == ("row-1", "search", ["stop"])
    assert bill["device_seconds"] == usage["device_seconds"] > 0
    assert bill["completion_tokens"] == usage["completion_tokens"]
    assert (page["lost"], page["next"] != cursor) == (0, True)
    again = served.request("GET", f"/v1/bills?after={page['next']}&limit=5", headers=GATEWAY).json
    assert (again["data"], again["next"]) == ([], page["next"])


def test_a_request_is_under_way_until_its_bill_is_there(served: LiveServer) -> None:
    """Its client leaves in the middle; one that is refused leaves nothing behind."""

    def look() -> tuple[list[str], list[str]]:
        page = served.request("GET", "/v1/bills?id=row-7&id=row-8", headers=GATEWAY).json
        return [bill["request_id"] for bill in page["data"]], page["under_way"]

    assert look() == ([], [])
    bad = served.post("/v1/chat/completions", {**CHAT, "top_p": 7}, {**GATEWAY, "X-Request-Id": "row-8"})
    assert bad.status == 400
    served.engine.pause_at = 2
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
    headers = {**GATEWAY, "X-Request-Id": "row-7", "Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(CHAT), headers)
    served.engine.wait_until(lambda engine: len(engine.adds) > 0)
    assert look() == ([], ["row-7"])
    connection.close()
    served.engine.wait_until(lambda engine: len(engine.gone) > 0)
    end = time.monotonic() + 20
    while look() != (["row-7"], []):
        assert time.monotonic() < end


def test_bills_are_for_gateways(served: LiveServer) -> None:
    assert served.request("GET", "/v1/bills", headers=CLIENT).status == 403
    assert served.request("GET", "/v1/bills").status == 401


@pytest.mark.parametrize("query", ["after=nonsense", "limit=0", "limit=x", "limit=" + "9" * 30])
def test_what_cannot_be_read(served: LiveServer, query: str) -> None:
    answer = served.request("GET", f"/v1/bills?{query}", headers=GATEWAY)
    assert (answer.status, answer.error["param"]) == (400, query.partition("=")[0])


def test_without_a_gateways_key_there_are_no_bills(server: LiveServer) -> None:
    assert server.get("/v1/bills").status == 403


def stream(served: LiveServer, body: dict[str, Any]) -> list[tuple[list[int], str]]:
    """(token ids of the comment, text) of each event with text, [DONE] checked."""
    headers = {**CLIENT, "X-Penstock-Stream-Tokens": "1"}
    answer = served.post("/v1/completions", {"model": MODEL, "prompt": "Hi", "stream": True, **body}, headers)
    prompt, whole = answer.body.decode().split("\n", 1)
    assert prompt == ": prompt 2 2"
    *events, done, nothing = whole.split("\n\n")
    assert (done, nothing) == ("data: [DONE]", "")
    told = []
    for event in events:
        comment, _, data = event.rpartition("data: ")
        ids = comment.removeprefix(": tokens ").strip()
        told.append(
            ([int(id) for id in ids.split(",")] if ids else [], json.loads(data)["choices"][0]["text"])
        )
    return told


@pytest.mark.parametrize("interval", [1, 3])
def test_a_stream_goes_on_wherever_it_was_cut(served: LiveServer, ids: list[int], interval: int) -> None:
    """Also within a character; the ids are those whose text has been sent, or is held back."""
    whole = stream(served, {"stream_interval": interval, "max_tokens": 100})
    assert [id for told, _ in whole for id in told][: len(ids)] == ids
    assert "".join(text for _, text in whole) == REPLY
    for cut in range(1, len(whole) - 1):
        told = [id for each, _ in whole[:cut] for id in each]
        rest = stream(served, {"generated_token_ids": told, "max_tokens": 100})
        assert "".join(text for _, text in [*whole[:cut], *rest]) == REPLY


def test_no_ids_without_being_asked(served: LiveServer) -> None:
    answer = served.post("/v1/completions", {"model": MODEL, "prompt": "Hi", "stream": True}, CLIENT)
    assert b": tokens" not in answer.body


def test_what_was_generated_elsewhere_is_not_billed_here(served: LiveServer, ids: list[int]) -> None:
    body = {"model": MODEL, "prompt": "Hi", "generated_token_ids": ids[:5], "max_tokens": 100}
    answer = served.post("/v1/completions", body, CLIENT).json
    assert answer["usage"]["completion_tokens"] == len(ids) - 5 + 1  # and the end of the sequence
    assert served.engine.adds[0].max_tokens == 100


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"n": 2}, "generated_token_ids"),
        ({"prompt": ["a", "b"]}, "generated_token_ids"),
        ({"echo": True}, "generated_token_ids"),
        ({"logprobs": 1}, "generated_token_ids"),
        ({"prompt_logprobs": 0}, "generated_token_ids"),
        ({"generated_token_ids": [99999]}, "generated_token_ids"),
        ({"generated_token_ids": [-1]}, "generated_token_ids"),
        ({"max_tokens": 3}, "max_tokens"),
        ({"stop": "Hel"}, "generated_token_ids"),
    ],
)
def test_what_cannot_go_on(served: LiveServer, ids: list[int], more: dict[str, Any], param: str) -> None:
    body = {"model": MODEL, "prompt": "Hi", "generated_token_ids": ids[:3], "max_tokens": 100, **more}
    answer = served.post("/v1/completions", body, CLIENT)
    assert (answer.status, answer.error["param"]) == (400, param)


@pytest.mark.parametrize("flags", [{"gateway_key": " "}, {"gateway_key": "g", "api_server_count": 2}])
def test_keys_of_gateways_that_cannot_work(flags: dict[str, Any]) -> None:
    with pytest.raises(StartupError) as caught:
        ServerConfig(**flags)
    assert caught.value.param == "--gateway-key"
