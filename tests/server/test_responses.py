"""POST /v1/responses and what may be done with a response later, with OpenAI's client and bare bodies."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.server.responses.store import Entry, ResponseNotFound, ResponseStore
from penstock.text.tokenizer import Tokenizer

from .conftest import LiveServer, running
from .tiny import MODEL, REPLY

RESPONSES = "/v1/responses"


def ask(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "input": "Hi", **fields}


def prompt(server: LiveServer, tokenizer: Tokenizer) -> str:
    """What the model has read last."""
    return tokenizer.decode(server.engine.adds[-1].prompt, skip_special_tokens=False)


def events(server: LiveServer, body: dict[str, Any]) -> list[dict[str, Any]]:
    answer = server.post(RESPONSES, {**body, "stream": True})
    assert answer.status == 200, answer.body
    found = []
    for each in answer.body.decode().removesuffix("\n\n").split("\n\n"):
        name, data = each.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


# ---- answers ----


def test_a_response(client: openai.OpenAI, server: LiveServer, tokenizer: Tokenizer) -> None:
    response = client.responses.create(
        model=MODEL, input="Hi", instructions="Be brief.", metadata={"a": "b"}, temperature=0.5
    )
    assert response.output_text == REPLY
    (item,) = response.output
    assert (item.type, item.role, item.status) == ("message", "assistant", "completed")
    assert (response.status, response.object, response.model) == ("completed", "response", MODEL)
    assert (response.metadata, response.temperature, response.instructions) == ({"a": "b"}, 0.5, "Be brief.")
    assert prompt(server, tokenizer) == (
        "<|start|>system\nBe brief.<|end|>\n<|start|>user\nHi<|end|>\n<|start|>assistant\n"
    )
    asked = server.engine.adds[-1]
    assert asked.params.temperature == 0.5
    usage = response.usage
    assert (usage.input_tokens, usage.input_tokens_details.cached_tokens) == (len(asked.prompt), 16)
    assert usage.output_tokens == len(tokenizer.encode(REPLY)) + 1
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert usage.device_seconds > 0


def test_a_stream_gives_the_same_response(client: openai.OpenAI) -> None:
    with client.responses.stream(model=MODEL, input="Hi") as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        streamed = stream.get_final_response()
    whole = client.responses.create(model=MODEL, input="Hi")
    assert "".join(deltas) == streamed.output_text == whole.output_text == REPLY
    assert len(deltas) > 3
    same = {"status", "model", "text", "store", "tools", "tool_choice", "truncation", "top_p"}
    assert streamed.model_dump(include=same) == whole.model_dump(include=same)
    assert streamed.usage.output_tokens == whole.usage.output_tokens


def test_events_in_their_order(server: LiveServer) -> None:
    found = events(server, ask(max_output_tokens=3))
    assert [each["type"] for each in found] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * 3,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert [each["sequence_number"] for each in found] == list(range(len(found)))
    assert found[0]["response"]["status"] == "in_progress"
    assert found[0]["response"]["output"] == []
    (id,) = {each["item_id"] for each in found if "item_id" in each}
    assert found[2]["item"]["id"] == found[-2]["item"]["id"] == id
    last = found[-1]["response"]
    assert last["output"] == [found[-2]["item"]]
    assert last["output"][0]["status"] == "incomplete"
    assert last["incomplete_details"] == {"reason": "max_output_tokens"}
    assert last["output"][0]["content"][0]["text"] == found[-4]["text"] == REPLY[:3]


def test_logprobs_where_they_are_included(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": MODEL, "input": "Hi", "top_logprobs": 2}
    included: Any = ["message.output_text.logprobs"]
    whole = client.responses.create(**fields, include=included).output[0].content[0].logprobs
    assert [each.token for each in whole][:4] == list(REPLY[:4])
    assert {len(each.top_logprobs) for each in whole} == {2}
    with client.responses.stream(**fields, include=included) as stream:
        streamed = [each for event in stream if event.type.endswith("text.delta") for each in event.logprobs]
        done = stream.get_final_response().output[0].content[0].logprobs
    assert [each.token for each in streamed][:4] == list(REPLY[:4])
    assert [each.logprob for each in done] == [each.logprob for each in whole]
    assert client.responses.create(**fields).output[0].content[0].logprobs == []


def test_sampling_fields_reach_the_engine(server: LiveServer) -> None:
    fields = {"top_p": 0.5, "top_k": 3, "min_p": 0.1, "seed": 7, "presence_penalty": 1.0, "ignore_eos": True}
    assert server.post(RESPONSES, ask(max_output_tokens=9, stop="zz", **fields)).status == 200
    asked = server.engine.adds[-1]
    params = asked.params
    assert (params.top_p, params.top_k, params.min_p, asked.seed) == (0.5, 3, 0.1, 7)
    assert (params.presence_penalty, params.ignore_eos, asked.max_tokens) == (1.0, True, 9)


# ---- what the model reads ----


def test_items_become_turns(server: LiveServer, tokenizer: Tokenizer) -> None:
    items = [
        {"role": "developer", "content": "Mind."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "h"}],
        },
        {"role": "assistant", "content": [{"type": "output_text", "text": "b", "annotations": []}]},
        {"type": "function_call", "call_id": "c1", "name": "add", "arguments": '{"x": 1}'},
        {"type": "function_call_output", "call_id": "c1", "output": "2"},
        {
            "role": "user",
            "content": [{"type": "input_text", "text": "c"}, {"type": "input_text", "text": "d"}],
        },
    ]
    answer = server.post(RESPONSES, ask(input=items))
    assert answer.status == 200, answer.body
    turns = prompt(server, tokenizer).split("<|start|>")[1:]
    assert [turn.removesuffix("<|end|>\n") for turn in turns] == [
        "developer\nMind.",
        "user\na",
        "assistant\nb",
        "tool\n2",
        "user\nc\nd",
        "assistant\n",
    ]


def test_a_turn_that_is_not_whole_is_gone_on_with(server: LiveServer, tokenizer: Tokenizer) -> None:
    unfinished = {"type": "message", "role": "assistant", "status": "incomplete", "content": "Well, he"}
    assert server.post(RESPONSES, ask(input=[{"role": "user", "content": "Hi"}, unfinished])).status == 200
    assert prompt(server, tokenizer).endswith("<|start|>assistant\nWell, he")


def test_a_conversation_goes_on(client: openai.OpenAI, server: LiveServer, tokenizer: Tokenizer) -> None:
    first = client.responses.create(model=MODEL, input="One", instructions="Be brief.")
    with client.responses.stream(model=MODEL, input="Two", previous_response_id=first.id) as stream:
        second = stream.get_final_response()
    client.responses.create(model=MODEL, input="Three", previous_response_id=second.id)
    turns = prompt(server, tokenizer).split("<|start|>")[1:]
    assert [turn.removesuffix("<|end|>\n") for turn in turns] == [
        "user\nOne",
        f"assistant\n{REPLY}",
        "user\nTwo",
        f"assistant\n{REPLY}",
        "user\nThree",
        "assistant\n",
    ]


def test_what_does_not_fit_is_cut_off_where_that_is_wanted(server: LiveServer) -> None:
    long = "x" * 300
    refused = server.post(RESPONSES, ask(input=long, max_output_tokens=8))
    assert (refused.status, refused.json["error"]["code"]) == (400, "context_length_exceeded")
    assert server.post(RESPONSES, ask(input=long, max_output_tokens=8, truncation="auto")).status == 200
    assert len(server.engine.adds[-1].prompt) == server.engine.info.max_model_len - 8


# ---- afterwards ----


def test_a_response_is_read_and_deleted(client: openai.OpenAI) -> None:
    made = client.responses.create(model=MODEL, input=[{"role": "user", "content": "Hi"}])
    assert client.responses.retrieve(made.id) == made
    (item,) = client.responses.input_items.list(made.id).data
    assert (item.type, item.role, item.content[0].type, item.content[0].text) == (
        "message",
        "user",
        "input_text",
        "Hi",
    )
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)
    unkept = client.responses.create(model=MODEL, input="Hi", store=False)
    assert unkept.store is False
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(unkept.id)
    with pytest.raises(openai.BadRequestError, match="Previous response"):
        client.responses.create(model=MODEL, input="Hi", previous_response_id=unkept.id)


def test_input_items_are_told_as_openai_does(client: openai.OpenAI) -> None:
    """Whatever was sent in short: texts are parts, and ids say what they are of."""
    items: list[Any] = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "5"},
    ]
    made = client.responses.create(model=MODEL, input=items)
    kept = client.responses.input_items.list(made.id, order="asc").data
    assert [str(item.id).split("_")[0] for item in kept] == ["msg", "msg", "fc", "fco"]
    told: list[Any] = [part for item in kept[:2] for part in item.content]  # type: ignore[union-attr]
    assert [(part.type, part.text) for part in told] == [("input_text", "Hi"), ("output_text", "Hello")]


def test_input_is_counted_as_it_would_be_read(client: openai.OpenAI, server: LiveServer) -> None:
    first = client.responses.create(model=MODEL, input="Hi", instructions="Be brief.")
    server.engine.adds.clear()
    asked: list[dict[str, Any]] = [
        {"input": "Hi", "instructions": "Be brief."},
        {"input": [{"role": "user", "content": "And?"}], "previous_response_id": first.id},
    ]
    counted = [client.responses.input_tokens.count(model=MODEL, **each) for each in asked]
    assert server.engine.adds == []
    assert counted[0].object == "response.input_tokens"
    used = [client.responses.create(model=MODEL, **each).usage for each in asked]
    assert [each.input_tokens for each in counted] == [each.input_tokens for each in used if each]
    for body, param in (({"input": ""}, "input"), ({"input": "x" * 600_000}, "input"), ({}, "input")):
        refused = server.post("/v1/responses/input_tokens", body)
        assert (refused.status, refused.json["error"]["param"]) == (400, param)


def test_input_items_come_in_pages(server: LiveServer) -> None:
    items = [{"role": "user", "content": str(i)} for i in range(5)]
    id = server.post(RESPONSES, ask(input=items)).json["id"]
    seen: list[str] = []
    after = ""
    for _ in range(5):
        page = server.get(f"{RESPONSES}/{id}/input_items?order=asc&limit=2{after}").json
        seen += [item["content"][0]["text"] for item in page["data"]]
        after = f"&after={page['last_id']}"
        if not page["has_more"]:
            break
    assert seen == ["0", "1", "2", "3", "4"]
    for query in ("limit=0", "limit=x", "order=up", "after=nobody"):
        assert server.get(f"{RESPONSES}/{id}/input_items?{query}").status == 400


def test_a_response_in_the_background(client: openai.OpenAI, server: LiveServer) -> None:
    server.engine.pause_at = 2
    made = client.responses.create(model=MODEL, input="Hi", background=True)
    assert (made.status, made.output) == ("queued", [])
    server.engine.wait_until(lambda engine: engine.load == 1)
    assert client.responses.retrieve(made.id).status in ("queued", "in_progress")
    with pytest.raises(openai.BadRequestError, match="nothing to go on with"):
        client.responses.create(model=MODEL, input="Hi", previous_response_id=made.id)
    server.engine.resume()
    server.engine.wait_until(lambda engine: engine.load == 0)
    done = client.responses.retrieve(made.id)
    while done.status in ("queued", "in_progress"):  # its last event is on the way
        done = client.responses.retrieve(made.id)
    assert (done.status, done.output_text) == ("completed", REPLY)
    assert client.responses.cancel(made.id).status == "completed"


@pytest.mark.parametrize("way", ["cancel", "delete"])
def test_a_response_in_the_background_ends_when_nobody_wants_it(
    client: openai.OpenAI, server: LiveServer, way: str
) -> None:
    server.engine.pause_at = 2
    made = client.responses.create(model=MODEL, input="Hi", background=True)
    server.engine.wait_until(lambda engine: engine.load == 1)
    if way == "cancel":
        assert client.responses.cancel(made.id).status == "cancelled"
    else:
        client.responses.delete(made.id)
    server.engine.wait_until(lambda engine: engine.load == 0)
    if way == "cancel":
        assert client.responses.retrieve(made.id).status == "cancelled"
        assert client.responses.cancel(made.id).status == "cancelled"
    else:
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(made.id)


def test_a_failure_in_the_background_is_told(client: openai.OpenAI, server: LiveServer) -> None:
    server.engine.fail_at = 2
    made = client.responses.create(model=MODEL, input="Hi", background=True)
    failed = client.responses.retrieve(made.id)
    while failed.status in ("queued", "in_progress"):
        failed = client.responses.retrieve(made.id)
    assert failed.status == "failed"
    assert failed.error is not None
    assert "device says no" in failed.error.message


def test_a_response_in_the_background_is_followed(client: openai.OpenAI, server: LiveServer) -> None:
    """Its events come as it is made; who leaves and comes back misses none, and so does who comes late."""
    server.engine.pause_at = 2
    stream = client.responses.create(model=MODEL, input="Hi", background=True, stream=True)
    seen = []
    for event in stream:
        seen.append(event)
        if event.type == "response.output_text.delta":
            break
    stream.close()
    assert [event.type for event in seen[:3]] == [
        "response.created",
        "response.queued",
        "response.in_progress",
    ]
    id = seen[0].response.id
    assert seen[0].response.status == "queued"
    server.engine.resume()
    after = seen[-1].sequence_number
    rest = list(client.responses.retrieve(id, stream=True, starting_after=after))
    seen += rest
    assert [event.sequence_number for event in seen] == list(range(len(seen)))
    assert "".join(e.delta for e in seen if e.type == "response.output_text.delta") == REPLY
    assert (seen[-1].type, seen[-1].response.output_text) == ("response.completed", REPLY)
    assert list(client.responses.retrieve(id, stream=True)) == seen
    assert list(client.responses.retrieve(id, stream=True, starting_after=len(seen) + 9)) == []
    assert client.responses.retrieve(id).output_text == REPLY
    with client.responses.stream(response_id=id, starting_after=after) as events:  # OpenAI's helper
        assert [event.type for event in events][-1] == "response.completed"


@pytest.mark.parametrize("way", ["cancel", "delete", "fail"])
def test_who_follows_is_told_of_the_end(client: openai.OpenAI, server: LiveServer, way: str) -> None:
    if way == "fail":
        server.engine.fail_at = 2
    else:
        server.engine.pause_at = 2
    stream = client.responses.create(model=MODEL, input="Hi", background=True, stream=True)
    id = next(iter(stream)).response.id
    if way != "fail":
        server.engine.wait_until(lambda engine: engine.load == 1)
        client.responses.cancel(id) if way == "cancel" else client.responses.delete(id)
    last = list(stream)[-1]
    server.engine.wait_until(lambda engine: engine.load == 0)
    if way == "fail":
        assert (last.type, last.response.status) == ("response.failed", "failed")
        assert "device says no" in last.response.error.message
        assert client.responses.retrieve(id).status == "failed"
    else:
        assert last.type == "response.output_text.delta"
    if way == "cancel":
        assert client.responses.retrieve(id).status == "cancelled"


def test_only_kept_events_are_followed(client: openai.OpenAI, server: LiveServer) -> None:
    made = client.responses.create(model=MODEL, input="Hi")
    with pytest.raises(openai.BadRequestError, match="not kept"):
        client.responses.retrieve(made.id, stream=True)
    refused = server.get(f"{RESPONSES}/{made.id}?stream=true&starting_after=x")
    assert (refused.status, refused.json["error"]["param"]) == (400, "starting_after")


def test_events_without_a_place_end_the_response(tokenizer: Tokenizer, says: Any) -> None:
    """What is kept of a stream is within the store's bounds: it fails, and the server goes on."""
    with (
        running(tokenizer, says(REPLY), max_stored_response_bytes=4000) as server,
        server.client() as client,
    ):
        *_, last = client.responses.create(model=MODEL, input="Hi", background=True, stream=True)
        assert last.type == "response.failed"
        assert "--max-stored-response-bytes" in last.response.error.message
        assert client.responses.retrieve(last.response.id).status == "failed"
        server.engine.wait_until(lambda engine: engine.load == 0)
        assert client.responses.create(model=MODEL, input="Hi").output_text == REPLY


def test_items_are_referred_to(client: openai.OpenAI, server: LiveServer, tokenizer: Tokenizer) -> None:
    """By the ids that they were told or kept under, as the client of an agent sends them."""
    first = client.responses.create(model=MODEL, input=[{"role": "user", "content": "One", "id": "msg_own"}])
    said = first.output[0].id
    ask_again: Any = [
        {"type": "item_reference", "id": "msg_own"},
        {"type": "item_reference", "id": said},
        {"role": "user", "content": "Two"},
    ]
    again = client.responses.create(model=MODEL, input=ask_again)
    turns = prompt(server, tokenizer).split("<|start|>")[1:-1]
    assert [turn.removesuffix("<|end|>\n") for turn in turns] == [
        "user\nOne",
        f"assistant\n{REPLY}",
        "user\nTwo",
    ]
    kept = client.responses.input_items.list(again.id, order="asc").data
    assert [item.type for item in kept] == ["message"] * 3
    for id, status in ((f"{said}x", 404), (first.id, 404)):
        refused = server.post(RESPONSES, ask(input=[{"type": "item_reference", "id": id}]))
        assert (refused.status, refused.json["error"]["param"]) == (status, "input")
    twice = server.post(RESPONSES, ask(input=[{"type": "item_reference", "id": said}] * 2))
    assert (twice.status, twice.json["error"]["param"]) == (400, "input[1].id")
    client.responses.delete(first.id)  # the second one has them, too
    assert client.responses.create(model=MODEL, input=ask_again).output_text == REPLY


def test_responses_belong_to_their_key(tokenizer: Tokenizer, says: Any) -> None:
    with running(tokenizer, says(REPLY), api_key=("k1", "k2"), gateway_key=("g",)) as server:

        def headers(key: str, tenant: str = "") -> dict[str, str]:
            more = {"X-Penstock-Tenant": tenant} if tenant else {}
            return {"Authorization": f"Bearer {key}", **more}

        def seen(id: str, who: dict[str, str]) -> int:
            return int(server.request("GET", f"{RESPONSES}/{id}", headers=who).status)

        owners = [headers("k1"), headers("k2"), headers("g", "a"), headers("g", "b")]
        for owner in owners:
            id = server.post(RESPONSES, ask(), owner).json["id"]
            assert [seen(id, who) == 200 for who in owners] == [who is owner for who in owners]
            stranger = next(who for who in owners if who is not owner)
            more = server.post(RESPONSES, ask(previous_response_id=id), stranger)
            assert (more.status, more.json["error"]["param"]) == (400, "previous_response_id")
            for method, suffix in (("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")):
                path = f"{RESPONSES}/{id}{suffix}"
                assert server.request(method, path, headers=stranger).status == 404
            assert seen(id, owner) == 200


@pytest.mark.parametrize("options", [{"max_stored_responses": 0}, {"api_server_count": 2}])
def test_a_server_that_keeps_no_responses(tokenizer: Tokenizer, says: Any, options: dict[str, int]) -> None:
    with running(tokenizer, says(REPLY), **options) as server:
        made = server.post(RESPONSES, ask())
        assert (made.status, made.json["store"]) == (200, False)
        assert server.post(RESPONSES, ask(store=True)).headers["x-penstock-ignored"] == "store"
        assert server.get(f"{RESPONSES}/{made.json['id']}").status == 404
        for fields in ({"background": True}, {"previous_response_id": made.json["id"]}):
            refused = server.post(RESPONSES, ask(**fields))
            assert refused.status == 400
            assert "--max-stored-responses" in refused.json["error"]["message"]


# ---- the store ----


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["put", "begin", "delete", "grow"]),
            st.integers(0, 9),
            st.integers(0, 400),
            st.integers(0, 1),
        ),
        max_size=40,
    )
)
@settings(max_examples=100, deadline=None)
def test_the_store_stays_within_its_bounds(steps: list[tuple[str, int, int, int]]) -> None:
    store = ResponseStore(4, 1000)
    running: set[str] = set()
    for action, number, size, owner in steps:
        id, mine = f"r{number}", f"o{owner}"
        if action == "delete":
            try:
                store.delete(id, mine)
                running.discard(id)
            except ResponseNotFound:
                pass
        elif action == "grow":
            before = store.bytes
            assert store.grow(id, size) or store.bytes <= before
        else:
            begins = action == "begin"
            told = {"text": "x" * size, "output": [{"id": f"i{number}"}, {"id": None}]}
            entry = Entry(mine, told, items=[{"id": "i"}], cancel=(lambda: None) if begins else None)
            kept = store.put(id, entry)
            running.discard(id)
            if kept and begins:
                running.add(id)
            if kept:
                assert store.get(id, mine) is entry
                with pytest.raises(ResponseNotFound):
                    store.get(id, "somebody")
        assert len(store) <= 4
        assert store.bytes == sum(each.size for each in store._entries.values()) <= 1000
        assert running <= store._entries.keys()
        for (whose, item), name in store._items.items():
            assert store._entries[name].owner == whose
            assert store.item(item, whose)["id"] == item
            with pytest.raises(ResponseNotFound):
                store.item(item, "somebody")


# ---- bad input ----


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": ["Hi"]}, "input[0]"),
        ({"input": [{}]}, "input[0].type"),
        ({"input": [{"type": "web_search_call"}]}, "input[0].type"),
        ({"input": [{"role": "nobody", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_text", "text": 1}]}]},
            "input[0].content[0].text",
        ),
        ({"input": [{"type": "function_call", "name": "x"}]}, "input[0].arguments"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
        ({"input": [{"type": "reasoning", "summary": "x"}]}, "input[0].summary"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 10_000}, "max_output_tokens"),
        ({"include": ["everything"]}, "include[]"),
        ({"metadata": {"a": "b" * 513}}, "metadata"),
        ({"background": True, "store": False}, "background"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": {"type": "mcp"}}, "tool_choice.type"),
        ({"text": {"format": {"type": "yaml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"truncation": "middle"}, "truncation"),
        ({"temperature": -1}, "temperature"),
        ({"top_logprobs": 99, "include": ["message.output_text.logprobs"]}, "top_logprobs"),
        ({"max_output_token": 5}, "max_output_token"),
    ],
)
def test_bad_input_is_a_400_that_names_it(server: LiveServer, fields: dict[str, Any], param: str) -> None:
    answer = server.post(RESPONSES, ask(**fields))
    assert (answer.status, answer.json["error"]["param"]) == (400, param), answer.body
    assert server.engine.adds == []


def test_what_does_nothing_here_is_named(server: LiveServer) -> None:
    body = ask(
        include=["reasoning.encrypted_content"],
        reasoning={"summary": "auto"},
        text={"verbosity": "low"},
        max_tool_calls=3,
        top_logprobs=1,
    )
    ignored = server.post(RESPONSES, body).headers["x-penstock-ignored"].split(", ")
    assert set(ignored) == {
        "include.reasoning.encrypted_content",
        "reasoning.summary",
        "text.verbosity",
        "max_tool_calls",
        "top_logprobs",
    }


def test_an_engine_that_fails_in_mid_stream(server: LiveServer, client: openai.OpenAI) -> None:
    server.engine.fail_at = 2
    found = events(server, ask())
    assert (found[-1]["type"], found[-1]["message"]) == ("error", "device says no")
    assert found[-1]["sequence_number"] == len(found) - 1
    last = list(client.responses.create(model=MODEL, input="Hi", stream=True))[-1]
    assert (last.type, last.message) == ("error", "device says no")
