"""Batches: what is reserved, what is charged in the end, and that it happens once, whatever dies."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest

from penstock.gateway.files.lines import BATCHED
from penstock.gateway.files.objects import Objects
from penstock.gateway.files.settling import Settling
from penstock.gateway.ledger.store import StoreDown
from penstock.gateway.policy.price import Used, by_tokens, of_batches
from penstock.gateway.records import Row
from penstock.server.batches.lines import URLS
from penstock.spec.model import Price
from tests.gateway.upstream import Wire, half_body, hang_up, no_json, reset, status

from .conftest import CHAT, SPEC, Gateway, LiveLedger, Make, line, lines

USAGE = {"input_tokens": 1000, "output_tokens": 100, "total_tokens": 1100}
FEW = {"prompt_tokens": 10, "completion_tokens": 5}
FAILED: dict[str, Any] = {"response": None, "error": {"code": "x"}}
HALF = 1000 * 500 + 100 * 1000
"""Nanodollars of that, at one and two dollars for a million tokens, and half of it for batches."""


def sent(gateway: Gateway, count: int = 3, **more: Any) -> Any:
    """A batch that was taken."""
    file = gateway.upload(lines(*(line(number, max_tokens=20) for number in range(count)))).json["id"]
    answer = gateway.batch(file, **more)
    assert answer.status == 200, answer.body
    return answer


def answer_line(usage: Any = None, code: int = 200) -> dict[str, Any]:
    body = {"id": "chatcmpl-1", "model": "tiny-1", "choices": [], **({"usage": usage} if usage else {})}
    return {"id": "b", "custom_id": "r", "response": {"status_code": code, "body": body}, "error": None}


def test_openais_client_runs_a_batch(gateway: Gateway) -> None:
    cloud = gateway.cloud
    with gateway.client() as ours:
        file = ours.files.create(file=("in.jsonl", lines(line(1), line(2))), purpose="batch")
        batch = ours.batches.create(
            input_file_id=file.id,
            endpoint="/v1/chat/completions",
            completion_window="24h",
            metadata={"mine": "x"},
        )
        assert batch.input_file_id == file.id
        assert batch.metadata == {"mine": "x"}
        assert batch.id.startswith("batch_0001.")
        assert cloud.batches["batch_0001"]["input_file_id"] == "file-0001"
        assert ours.batches.retrieve(batch.id).status == "validating"
        cloud.end("batch_0001", lines=[answer_line(), answer_line()], usage=USAGE)
        done = ours.batches.retrieve(batch.id)
        assert done.status == "completed"
        assert done.output_file_id is not None
        written = ours.files.content(done.output_file_id).read()
        assert len(written.splitlines()) == 2
        assert [each.id for each in ours.batches.list()] == [batch.id]
        gateway.wait_for(lambda: len(list(ours.files.list())) == 2)  # what it has written is its owner's
        assert {each.purpose for each in ours.files.list()} == {"batch", "batch_output"}
    gateway.look()
    row = gateway.row()
    assert (row["settlement"], row["dollars"]) == ("settled", HALF)
    assert (row["input_tokens"], row["output_tokens"]) == (1000, 100)
    assert (row["endpoint"], row["route"], row["model"]) == ("/v1/batches", "small", "tiny-1")
    assert row["note"] == "2 requests; batch completed: 2 of 2"
    assert gateway.used() == HALF


def test_the_worst_of_all_lines_is_reserved_and_stays_until_the_end(gateway: Gateway) -> None:
    given = [line(number, max_tokens=20) for number in range(3)]
    answer = sent(gateway)
    size = sum(len(json.dumps(each["body"]).encode()) for each in given)
    price = gateway.spec.upstreams["cloud"].models["tiny"].price
    assert price is not None
    worst = by_tokens(of_batches(price), Used(size + 3 * 256, 60))
    row = gateway.row()
    assert (row["settlement"], row["reserved_tokens"]) == ("unsettled", size + 3 * 256 + 60)
    assert row["dollars"] == row["reserved_dollars"] == worst == gateway.used()
    assert answer.headers["x-penstock-upstream"] == "cloud"
    assert answer.headers["x-ratelimit-limit-dollars"] == "1"
    page = gateway.call("GET", "/metrics").body.decode()
    assert "gateway_dollars_total{" not in page  # counted when it is known
    gateway.cloud.end("batch_0001", usage=USAGE)
    gateway.look()
    assert gateway.used() == HALF
    page = gateway.call("GET", "/metrics").body.decode()
    assert 'gateway_dollars_total{route="small",upstream="cloud"} 0.0006' in page


def test_a_batch_over_the_budget_never_reaches_the_upstream(make: Make) -> None:
    gateway = make(replace={"dollars_per_day: 1": "dollars_per_day: 0.001"})
    file = gateway.upload(lines(*(line(number) for number in range(3)))).json["id"]
    taken = [gateway.batch(file) for _ in range(3)]
    worst = gateway.rows()[0]["reserved_dollars"]
    fit = 1_000_000 // worst
    assert [each.status for each in taken] == [200] * min(3, fit) + [429] * (3 - min(3, fit))
    assert fit < 3
    assert len(gateway.cloud.batches) == fit
    assert taken[-1].error["code"] == "insufficient_quota"
    assert taken[-1].headers["x-should-retry"] == "false"
    assert gateway.used() == fit * worst <= 1_000_000
    gateway.cloud.end("batch_0001", "failed")
    gateway.look()
    assert gateway.used() == (fit - 1) * worst
    # what it did not use is free again, once the refusal is no longer believed (0.1 s)
    gateway.wait_for(lambda: gateway.batch(file).status == 200)


@pytest.mark.parametrize(
    ("end", "more", "dollars", "settlement"),
    [
        ("completed", {"usage": USAGE}, HALF, "settled"),
        ("cancelled", {"usage": USAGE}, HALF, "settled"),
        ("expired", {"lines": [answer_line(FEW)] * 2}, 20_000, "settled"),
        ("completed", {"lines": [answer_line({"input_tokens": 10, "output_tokens": 5})]}, 10_000, "settled"),
        ("completed", {"lines": [answer_line(FEW), answer_line()]}, 10_000, "estimated"),
        ("completed", {"lines": [answer_line(code=400), FAILED]}, 0, "settled"),
        ("completed", {"lines": [answer_line(FEW)], "usage": dict.fromkeys(USAGE, 0)}, 10_000, "settled"),
        ("failed", {"errors": {"data": []}}, 0, "settled"),
        ("expired", {}, 0, "settled"),
        ("cancelled", {}, 0, "settled"),
        ("completed", {"usage": {"input_tokens": -5, "output_tokens": "x"}}, 0, "settled"),
    ],
)  # fmt: skip
def test_what_a_batch_is_charged_in_the_end(
    gateway: Gateway, end: str, more: Any, dollars: int, settlement: str
) -> None:
    sent(gateway)
    gateway.look()
    assert gateway.row()["settlement"] == "unsettled"
    gateway.cloud.end("batch_0001", end, **more)
    gateway.look()
    row = gateway.row()
    assert (row["dollars"], row["settlement"]) == (dollars, settlement)
    assert gateway.used() == dollars
    gateway.look()
    assert gateway.cloud.paths("GET").count("/v1/batches/batch_0001") == 2  # nobody asks any more


def test_a_batch_of_which_nobody_says_what_it_used_stays_at_its_reservation(
    gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    sent(gateway)
    gateway.cloud.end("batch_0001", request_counts={"completed": 3, "total": 3})
    gateway.look()
    row = gateway.row()
    assert (row["settlement"], row["dollars"]) == ("unsettled", row["reserved_dollars"])
    assert "nobody says what it used" in caplog.text


def test_only_one_settles(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client, and two looks at the same time, all at a batch that has ended."""
    name = sent(gateway).json["id"]
    gateway.flush()
    door = gateway.live.door
    billed: list[Row] = []
    monkeypatch.setattr(door.metrics, "billed", billed.append)
    gateway.cloud.end("batch_0001", usage=USAGE)
    assert door.files is not None
    settling = door.files.settling

    async def twice() -> None:
        shared = settling._shared
        stations = shared.stations()
        kept = shared.objects.find("cloud", "batch_0001")
        assert kept is not None
        batch = gateway.cloud.batches["batch_0001"]
        await asyncio.gather(
            *(settling.told(kept, batch, stations["cloud"]) for _ in range(4)), settling.look()
        )

    gateway.do(twice())
    assert gateway.call("GET", f"/v1/batches/{name}").json["status"] == "completed"
    gateway.look()
    assert gateway.used() == HALF
    assert len(billed) == 1


def test_workers_take_a_batch_each(gateway: Gateway) -> None:
    for _ in range(5):
        sent(gateway)
    assert gateway.live.door.files is not None
    objects = gateway.live.door.files.settling._shared.objects
    now = gateway.live.door.wall()
    first = objects.due(now, now + 1, ["cloud"], 3)
    second = objects.due(now, now + 1, ["cloud"], 3)
    assert len(first) == 3
    assert {each.id for each in first + second} == set(gateway.cloud.batches)
    assert objects.due(now, now + 1, ["cloud"], 3) == []
    assert len(objects.due(0, now, ["cloud"], 9)) == 5  # said to be asked in the future: the clock was set
    assert objects.due(now, now + 1, ["elsewhere"], 3) == []


def test_a_batch_survives_the_gateway(gateway: Gateway) -> None:
    name = sent(gateway).json["id"]
    gateway.again()
    assert gateway.call("GET", f"/v1/batches/{name}").json["id"] == name
    gateway.cloud.end("batch_0001", usage=USAGE)
    gateway.again()
    gateway.look()
    assert (gateway.row()["settlement"], gateway.used()) == ("settled", HALF)


def test_the_gateway_asks_by_itself(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    sent(gateway)
    gateway.flush()
    gateway.cloud.end("batch_0001", usage=USAGE)

    async def start() -> None:
        gateway.live.door.start()

    monkeypatch.setattr("penstock.gateway.files.settling.Settling.interval", 0.01)
    gateway.do(start())
    gateway.wait_for(lambda: gateway.row()["settlement"] == "settled")


def test_what_does_not_answer_is_asked_again(gateway: Gateway, caplog: pytest.LogCaptureFixture) -> None:
    sent(gateway)
    path = "/v1/batches/batch_0001"
    for bad in (
        reset,
        no_json,
        status(500),
        status(404),
        status(400),
        status(200, body={"id": "batch_0002"}),
    ):
        gateway.cloud.script["GET", path] = bad
        gateway.look()
        assert gateway.row()["settlement"] == "unsettled"
    gateway.cloud.script.clear()
    gateway.cloud.end("batch_0001", lines=[answer_line(FEW)])
    content = f"/v1/files/{gateway.cloud.batches['batch_0001']['output_file_id']}/content"
    for bad in (half_body, status(503)):
        gateway.cloud.script["GET", content] = bad
        gateway.look()
        assert gateway.row()["settlement"] == "unsettled"
    gateway.cloud.script.clear()
    gateway.look()
    assert gateway.used() == 10_000
    assert "batch batch_0001 of cloud cannot be asked about: the upstream answered HTTP 500" in caplog.text


def test_one_batch_is_not_in_the_way_of_others(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An output file that trickles for ever, and one that breaks what reads it."""
    for _ in range(3):
        sent(gateway)

    async def trickle(wire: Wire) -> None:
        await wire.head(200, content_type="application/octet-stream")
        while not wire.gone.is_set():
            await wire.send(b"x")
            await asyncio.sleep(0.01)

    monkeypatch.setattr("penstock.gateway.files.settling._LONGEST", 2.0)
    gateway.cloud.end("batch_0001", lines=[answer_line(FEW)])
    output = gateway.cloud.batches["batch_0001"]["output_file_id"]
    gateway.cloud.script["GET", f"/v1/files/{output}/content"] = trickle
    Objects(gateway.store).change("cloud", "batch_0002", about=b"nonsense")
    gateway.cloud.end("batch_0002", usage=USAGE)
    gateway.cloud.end("batch_0003", usage=USAGE)
    gateway.look()
    assert [row["settlement"] for row in gateway.rows()] == ["unsettled", "unsettled", "settled"]
    assert "batch_0001 of cloud took more than 2 s" in caplog.text
    assert "looking after a batch failed" in caplog.text


def test_nobody_asks_for_ever(gateway: Gateway, caplog: pytest.LogCaptureFixture) -> None:
    sent(gateway)
    sent(gateway)
    del gateway.cloud.batches["batch_0002"]
    gateway.look()
    assert "batch batch_0002 of cloud is not known there" in caplog.text
    wall = gateway.live.door.wall()
    gateway.live.door.wall = lambda: wall + 9 * 86_400 * 10**9
    gateway.look()
    assert "batch batch_0001 of cloud has not ended; its row stays at its reservation" in caplog.text
    assert "batch batch_0002 of cloud is not known there; its row stays" in caplog.text
    asked = len(gateway.cloud.asked)
    gateway.look()
    assert len(gateway.cloud.asked) == asked


@pytest.mark.parametrize(
    ("behaviour", "code", "reason"),
    [
        (status(500), 502, "upstream_status"),
        (status(429, "Retry-After: 7"), 503, "upstream_status"),
        (status(401), 502, "upstream_status"),
        (status(400, body={"error": {"message": "file-0001 has an error"}}), 400, "400"),
        (status(404), 404, "not_found"),
    ],
)
def test_a_batch_that_is_not_taken_costs_nothing(
    gateway: Gateway, behaviour: Any, code: int, reason: str
) -> None:
    gateway.cloud.script["POST", "/v1/batches"] = behaviour
    file = gateway.upload(lines(line())).json["id"]
    answer = gateway.batch(file)
    assert (answer.status, answer.reason) == (code, reason)
    if code == 400:
        assert f"{file} has an error" in answer.error["message"]
    row = gateway.row()
    assert (row["settlement"], row["dollars"], row["status"]) == ("settled", None, code)
    assert gateway.used() == 0
    assert gateway.call("GET", "/v1/batches").json["data"] == []
    gateway.look()
    assert "/v1/batches?limit=100" not in gateway.cloud.paths("GET")


def test_an_upstream_that_cannot_be_reached_costs_nothing(gateway: Gateway) -> None:
    file = gateway.upload(lines(line())).json["id"]
    gateway.cloud.upstream.stop()
    answer = gateway.batch(file)
    assert (answer.status, answer.reason) == (502, "upstream_connect")
    assert (gateway.row()["settlement"], gateway.used()) == ("settled", 0)


def test_a_batch_whose_answer_was_lost_is_found_again(gateway: Gateway) -> None:
    """It was taken: it runs, is its owner's, and is settled."""
    sent(gateway)
    gateway.cloud.lose.add("/v1/batches")
    file = gateway.upload(lines(line())).json["id"]
    lost = gateway.batch(file)
    assert (lost.status, lost.reason) == (502, "upstream_reset")
    gateway.cloud.lose.clear()
    for _ in range(3):
        sent(gateway)  # so that it is on another page of the upstream's list
    row = gateway.rows()[1]
    assert (row["settlement"], row["dollars"]) == ("unsettled", row["reserved_dollars"])
    assert len(gateway.call("GET", "/v1/batches").json["data"]) == 4
    gateway.look()
    assert len(gateway.call("GET", "/v1/batches").json["data"]) == 5
    gateway.cloud.end("batch_0002", usage=USAGE)
    gateway.look()
    row = gateway.rows()[1]
    assert (row["settlement"], row["dollars"]) == ("settled", HALF)
    gateway.used()


@pytest.mark.parametrize("behaviour", [reset, hang_up, half_body, no_json, status(200, body={"id": "a/b"})])
def test_a_batch_that_never_came_to_be_is_released(gateway: Gateway, behaviour: Any) -> None:
    gateway.cloud.script["POST", "/v1/batches"] = behaviour
    assert gateway.batch(gateway.upload(lines(line())).json["id"]).status == 502
    row = gateway.row()
    assert (row["settlement"], row["dollars"]) == ("unsettled", row["reserved_dollars"])
    gateway.look()
    row = gateway.row()
    assert (row["settlement"], row["dollars"], gateway.used()) == ("settled", 0, 0)
    assert row["note"].endswith("no batch came of it")


def test_a_list_is_read_as_far_as_it_can_matter(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """To what is older than the batch; and what lies beyond the pages that are read may be there."""
    for _ in range(6):
        sent(gateway)
    gateway.cloud.script["POST", "/v1/batches"] = hang_up
    gateway.batch(gateway.upload(lines(line())).json["id"])
    monkeypatch.setattr("penstock.gateway.files.settling._PAGES", 2)
    gateway.look()
    assert [row["settlement"] for row in gateway.rows()] == ["unsettled"] * 7
    for batch in gateway.cloud.batches.values():
        batch["created_at"] -= 7200
    gateway.look()
    assert gateway.rows()[-1]["settlement"] == "settled"


def test_a_gateway_that_dies_while_it_asks_finds_its_batch(gateway: Gateway) -> None:
    """As after kill -9: a row in the journal without an end, and a batch at the upstream."""

    async def never(wire: Wire) -> None:
        gateway.cloud.answer(wire.asked, "/v1/batches")
        await wire.gone.wait()

    gateway.cloud.script["POST", "/v1/batches"] = never
    file = gateway.upload(lines(line())).json["id"]
    with pytest.raises(openai.InternalServerError), gateway.client() as ours:
        asyncio.run(killed(gateway, ours, file))
    gateway.cloud.script.clear()
    gateway.again()
    row = gateway.row()
    assert (row["settlement"], row["end"]) == ("unsettled", "killed")
    gateway.look()
    gateway.cloud.end("batch_0001", usage=USAGE)
    gateway.look()
    assert (gateway.row()["settlement"], gateway.used()) == ("settled", HALF)


async def killed(gateway: Gateway, ours: openai.OpenAI, file: str) -> None:
    """Ask for a batch; its task is ended in the middle."""
    asking = asyncio.create_task(
        asyncio.to_thread(
            ours.batches.create, input_file_id=file, endpoint="/v1/chat/completions", completion_window="24h"
        )
    )
    while not gateway.cloud.batches:
        await asyncio.sleep(0.005)
    for task in list(gateway.live.door._running):
        gateway.live.loop.call_soon_threadsafe(task.cancel)
    await asking


def test_other_keys_know_nothing_of_a_batch(gateway: Gateway) -> None:
    name = sent(gateway).json["id"]
    sent(gateway)
    other = gateway.stranger
    before = len(gateway.cloud.asked)
    for path, method in ((name, "GET"), (f"{name}/cancel", "POST")):
        assert gateway.call(method, f"/v1/batches/{path}", key=other).status == 404
    forged = "batch_0002." + name.partition(".")[2]
    for path in ("batch_0001", forged, f"{name}x", "..%2f..%2fadmin", f"{name}/x"):
        assert gateway.call("GET", f"/v1/batches/{path}").status == 404
    file = gateway.call("GET", "/v1/files").json["data"][0]["id"]
    for id in (file, "file-0001"):
        answer = gateway.batch(id, key=other)
        assert (answer.status, answer.reason) == (404, "not_found")
    assert gateway.call("GET", "/v1/batches", key=other).json["data"] == []
    assert len(gateway.cloud.asked) == before
    assert gateway.call("POST", f"/v1/batches/{name}/cancel").json["status"] == "cancelling"


def test_lists_of_batches_have_pages_and_are_fresh(gateway: Gateway) -> None:
    names = [sent(gateway).json["id"] for _ in range(3)]
    gateway.cloud.end("batch_0003", "failed")
    page = gateway.call("GET", "/v1/batches?limit=2").json
    assert [each["id"] for each in page["data"]] == [names[2], names[1]]
    assert [each["status"] for each in page["data"]] == ["failed", "validating"]
    assert (page["has_more"], page["last_id"]) == (True, names[1])
    page = gateway.call("GET", f"/v1/batches?limit=2&after={names[1]}").json
    assert ([each["id"] for each in page["data"]], page["has_more"]) == ([names[0]], False)
    with gateway.client() as ours:
        assert [each.id for each in ours.batches.list(limit=1)] == names[::-1]
    gateway.cloud.upstream.stop()  # then it is what was said last
    assert len(gateway.call("GET", "/v1/batches").json["data"]) == 3
    assert gateway.call("GET", "/v1/batches?limit=101").status == 400


@pytest.mark.parametrize(
    ("more", "code", "param"),
    [
        ({"endpoint": "/v1/embeddings"}, 400, "endpoint"),
        ({"endpoint": 5}, 400, "endpoint"),
        ({"input_file_id": None}, 400, "input_file_id"),
        ({"completion_window": None}, 400, "completion_window"),
        ({"metadata": {str(number): "x" for number in range(16)}}, 400, "metadata"),
        ({"metadata": {"penstock_request": "x"}}, 400, "metadata"),
        ({"priority": 5}, 400, "'priority'"),
    ],
)
def test_batches_that_are_none(gateway: Gateway, more: Any, code: int, param: str) -> None:
    file = gateway.upload(lines(line())).json["id"]
    answer = gateway.batch(file, **more)
    assert answer.status == code
    assert param.strip("'") in answer.error["param"]
    assert gateway.cloud.batches == {}
    assert gateway.rows() == []


def test_only_the_input_of_a_batch_is_one(gateway: Gateway) -> None:
    """A file for something else has not been read, and nobody knows what it may use."""
    other = gateway.upload(lines(line()), "user_data").json["id"]
    answer = gateway.batch(other)
    assert (answer.status, answer.error["param"]) == (400, "input_file_id")
    assert gateway.cloud.batches == {}


def test_a_key_that_lost_its_route_cannot_send_what_it_uploaded(make: Make, tmp_path: Any) -> None:
    gateway = make()
    file = gateway.upload(lines(line())).json["id"]
    changed = SPEC.format(url=gateway.cloud.url, urls="").replace(
        "{model: tiny, upstream: cloud}", "{model: more, upstream: cloud}"
    )
    changed = changed.replace("      tiny:", "      more: {}\n      tiny:", 1)
    gateway.live.stop()
    new = Gateway(changed, tmp_path, gateway.clouds)
    new.key, gateway.live = gateway.key, new.live
    new.start()
    answer = new.batch(file)
    assert (answer.status, answer.error["param"]) == (400, "input_file_id")
    assert "Upload the file again" in answer.error["message"]
    new.store.close()


def test_device_time_of_our_own_devices(make: Make) -> None:
    """By what the upstream says, else by the pace of the model, and marked."""
    gateway = make(
        replace={
            "price: {input: 1, output: 2, batch: 0.5, as_of: 2026-01-01, source: a test}": "",
            "kind: openai": "kind: penstock\n    pool: box\n    devices: 2",
            "teams:": "pools: {box: {hardware: L4, price_per_hour: 3.60, count: 2}}\nteams:",
        }
    )
    sent(gateway)
    row = gateway.row()
    assert row["device_seconds"] == row["reserved_device_seconds"] == row["reserved_tokens"] * 50_000_000
    gateway.cloud.end("batch_0001", usage={**USAGE, "device_seconds": 1.5})
    gateway.look()
    row = gateway.row()
    assert (row["settlement"], row["device"], row["device_seconds_estimated"]) == ("settled", "L4", False)
    assert (row["device_seconds"], row["dollars"]) == (3_000_000_000, 3_000_000)
    sent(gateway)
    gateway.live.door.stations.paces["cloud\0tiny-1"].seen(1, 1_000_000)
    gateway.cloud.end("batch_0002", usage=USAGE)
    gateway.look()
    row = gateway.rows()[1]
    assert (row["settlement"], row["device_seconds_estimated"]) == ("estimated", True)
    assert row["device_seconds"] == 1_100_000_000
    gateway.used()


def test_the_price_of_batches_is_exact() -> None:
    about = {"as_of": "2026-01-01", "source": "x"}
    price = Price.model_validate(
        {"input": 1, "output": 3, "cached_input": 0.1, "batch": 0.3, "per": 1000, **about}
    )
    halved = of_batches(price)
    assert by_tokens(halved, Used(1000, 1000, 500)) == (500_000_000 + 50_000_000 + 3_000_000_000) * 3 // 10
    assert of_batches(halved) is halved
    plain = price.model_copy(update={"batch": None})
    assert of_batches(plain) is plain


def test_settling_is_not_in_the_way_of_the_end(gateway: Gateway) -> None:
    """A door that closes while the upstream hangs ends at once."""

    async def hang(wire: Wire) -> None:
        await wire.gone.wait()

    sent(gateway)
    gateway.flush()
    gateway.cloud.script["GET", "/v1/batches/batch_0001"] = hang

    async def start() -> None:
        gateway.live.door.start()

    gateway.do(start())
    gateway.wait_for(lambda: "/v1/batches/batch_0001" in gateway.cloud.paths("GET"))
    assert isinstance(gateway.live.door.files.settling, Settling)  # type: ignore[union-attr]
    gateway.live.stop()
    assert not gateway.live._thread.is_alive()


def test_endpoints_other_than_chat(gateway: Gateway) -> None:
    for path, body in (
        ("/v1/embeddings", {"model": "small", "input": "x"}),
        ("/v1/completions", {"model": "small", "prompt": "x"}),
        ("/v1/responses", {"model": "small", "input": "x"}),
        ("/v1/messages", {"model": "small", "max_tokens": 5, "messages": [{"role": "user", "content": "x"}]}),
        ("/v1/score", {"model": "small", "text_1": "x", "text_2": ["y", "z"]}),
        ("/rerank", {"model": "small", "query": "x", "documents": ["y"]}),
        ("/v2/rerank", {"model": "small", "query": "x", "documents": ["y"]}),
    ):
        file = gateway.upload(lines({**line(), "url": path, "body": body})).json["id"]
        assert gateway.batch(file, endpoint=path).status == 200
        assert gateway.batch(file, endpoint=CHAT).status == 400


def test_gateways_and_engines_take_batches_of_the_same_endpoints() -> None:
    assert set(BATCHED) == set(URLS)


def test_a_batch_of_scores_is_reserved_for_every_pair_and_charged_what_it_used(gateway: Gateway) -> None:
    body = {"model": "small", "text_1": "a query of some words", "text_2": ["x"] * 50}
    file = gateway.upload(lines({**line(), "url": "/v1/score", "body": body})).json["id"]
    assert gateway.batch(file, endpoint="/v1/score").status == 200
    reserved = gateway.row()["reserved_tokens"]
    assert reserved >= 50 * len("a query of some words")  # it is read again with each text
    used = {"prompt_tokens": 450, "completion_tokens": 0, "total_tokens": 450}
    answer = {"id": "score-1", "data": [], "usage": used}
    told = {"id": "b", "custom_id": "r", "response": {"status_code": 200, "body": answer}, "error": None}
    gateway.cloud.end("batch_0001", lines=[told])
    gateway.look()
    row = gateway.row()
    assert (row["settlement"], row["input_tokens"], row["output_tokens"]) == ("settled", 450, 0)


def down(*_: Any, **__: Any) -> None:
    raise StoreDown("The ledger's database does not answer: it is a test.", retry_after=1)


def test_a_database_that_is_down_takes_no_batches(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    file = gateway.upload(lines(line())).json["id"]
    with monkeypatch.context() as patched:
        patched.setattr(Objects, "add", down)
        assert gateway.batch(file).reason == "ledger_unavailable"
        assert gateway.upload(lines(line())).reason == "ledger_unavailable"
    assert gateway.cloud.batches == {}
    assert (gateway.row()["settlement"], gateway.used()) == ("settled", 0)
    gateway.wait_for(lambda: len(gateway.cloud.files) == 1)  # what nobody could find again is deleted


def test_a_database_that_goes_down_while_the_upstream_takes_it(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch runs, and is found again; what the upstream refused is told, whatever the database does."""
    file = gateway.upload(lines(line())).json["id"]
    with monkeypatch.context() as patched:
        patched.setattr(Objects, "change", down)
        assert gateway.batch(file).reason == "ledger_unavailable"
    assert gateway.row()["settlement"] == "unsettled"
    gateway.look()
    gateway.cloud.end("batch_0001", usage=USAGE)
    gateway.look()
    assert (gateway.row()["settlement"], gateway.used()) == ("settled", HALF)
    gateway.cloud.script["POST", "/v1/batches"] = status(400)
    with monkeypatch.context() as patched:
        patched.setattr(Objects, "remove", down)
        assert gateway.batch(file).status == 400
    gateway.cloud.script.clear()
    gateway.look()
    assert gateway.used() == HALF
    objects = Objects(gateway.store)
    assert objects.due(0, 0, ["cloud"], 9) == []


def test_a_replica_that_gets_company_still_settles(gateway: Gateway) -> None:
    """The station `cloud` is `cloud/0` from then on."""
    sent(gateway)
    gateway.live.stop()
    upstream = gateway.spec.upstreams["cloud"].model_copy(update={"urls": ("http://127.0.0.1:9",)})
    spec = gateway.spec.model_copy(update={"upstreams": {"cloud": upstream}})
    gateway.live = LiveLedger(spec)
    gateway.start()
    (batch,) = gateway.call("GET", "/v1/batches").json["data"]
    assert gateway.call("GET", f"/v1/batches/{batch['id']}").status == 200
    gateway.cloud.end("batch_0001", usage=USAGE)
    gateway.look()
    assert (gateway.row()["settlement"], gateway.used()) == ("settled", HALF)


@pytest.mark.parametrize(
    ("behaviour", "code", "reason"),
    [
        (reset, 502, "upstream_reset"),
        (no_json, 502, "upstream_invalid"),
        (status(503), 503, "upstream_status"),
        (status(404), 404, "not_found"),
        (status(409, body={"error": {"message": "batch_0001 has ended"}}), 409, "409"),
    ],
)
def test_an_upstream_that_does_not_cancel(gateway: Gateway, behaviour: Any, code: int, reason: str) -> None:
    name = sent(gateway).json["id"]
    gateway.cloud.script["POST", "/v1/batches/batch_0001/cancel"] = behaviour
    answer = gateway.call("POST", f"/v1/batches/{name}/cancel")
    assert (answer.status, answer.reason) == (code, reason)
    if code == 409:
        assert f"{name} has ended" in answer.error["message"]
    gateway.cloud.script.clear()
    again = gateway.call("POST", f"/v1/batches/{name}/cancel")
    assert again.json.get("status") == "cancelling", again.json
