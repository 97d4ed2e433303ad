"""What programs written for OpenAI do, with the official client against a real server: the SDK's own helpers,
what they send back of what they were given, and the mistakes that people make first."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from .server import Server, eventually, serving

QUESTION: list[Any] = [{"role": "user", "content": "What is a Pod?"}]
CHAT = "/chat/completions"


class Counted(BaseModel):
    name: str
    count: int


FLAG: Any = {
    "type": "object",
    "properties": {"sure": {"type": "boolean"}},
    "required": ["sure"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    flags = ("--dtype", "float32", "--kv-cache-memory-bytes", "64MiB", "--served-model-name", "demo")
    tools = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
    with serving(*flags, *tools, log=log) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=60) as made:
        yield made


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(model="demo", **{"messages": QUESTION, "temperature": 0, **fields})


@pytest.mark.parametrize("base", ["", "/v1/v1", "/v1/chat/completions"])
def test_a_base_url_that_is_nearly_right(server: Server, client: openai.OpenAI, base: str) -> None:
    with pytest.raises(openai.NotFoundError, match=r"Did you mean /v1/chat/completions\?"):
        ask(client.with_options(base_url=server.url + base))


def test_fields_of_chats_are_no_fields_of_responses(client: openai.OpenAI) -> None:
    """As OpenAI has it: an answer that is longer than was asked for would be noticed on the bill."""
    for name, value, to in (
        ("max_tokens", 5, "max_output_tokens"),
        ("response_format", {"type": "json_object"}, "text.format"),
    ):
        with pytest.raises(openai.BadRequestError, match=f"It is {to} here") as caught:
            client.responses.create(model="demo", input="Hi", extra_body={name: value})
        assert (caught.value.code, caught.value.param) == ("unsupported_parameter", name)


def test_the_streaming_helper_of_chats(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "demo", "messages": QUESTION, "temperature": 0}
    with client.chat.completions.stream(**asked, stream_options={"include_usage": True}) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert kinds == {"chunk", "content.delta", "content.done"}
    whole = ask(client)
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.usage is not None
    assert final.usage.completion_tokens == whole.usage.completion_tokens
    assert final.id != whole.id
    assert final.system_fingerprint == whole.system_fingerprint


def test_the_streaming_helper_parses(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "demo", "messages": QUESTION, "temperature": 0, "max_tokens": 300}
    with client.chat.completions.stream(**asked, response_format=Counted) as stream:
        parsed = stream.get_final_completion().choices[0].message.parsed
    assert isinstance(parsed, Counted)
    same = client.chat.completions.parse(**asked, response_format=Counted).choices[0].message
    assert (same.parsed, same.refusal) == (parsed, None)


def test_the_streaming_helper_reads_calls(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "demo", "messages": QUESTION, "temperature": 0, "max_tokens": 300}
    asked |= {"tools": [openai.pydantic_function_tool(Counted)], "tool_choice": "required"}
    with client.chat.completions.stream(**asked) as stream:
        kinds = {event.type for event in stream}
        choice = stream.get_final_completion().choices[0]
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls
    (call,) = choice.message.tool_calls
    assert isinstance(call.function.parsed_arguments, Counted)
    # what the SDK made of the answer goes back as it is
    talk = [*QUESTION, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "5"}]
    told = ask(client, messages=talk, tools=asked["tools"], max_tokens=5)
    assert told.usage.prompt_tokens > ask(client, max_tokens=1).usage.prompt_tokens


def test_the_streaming_helper_of_responses(client: openai.OpenAI) -> None:
    with client.responses.stream(model="demo", input="What is a Pod?", temperature=0) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == final.output_text
    assert final.output_text == ask(client).choices[0].message.content
    parsed = client.responses.parse(
        model="demo", input="Hi", text_format=Counted, temperature=0, max_output_tokens=300
    )
    assert isinstance(parsed.output_parsed, Counted)


def test_a_loop_of_responses_with_a_tool(client: openai.OpenAI) -> None:
    """What was put out is put in again, by hand or by the id of the response that had it."""
    tool: Any = {"type": "function", "name": "look", "parameters": FLAG, "strict": True}
    asked: dict[str, Any] = {"model": "demo", "tools": [tool], "temperature": 0, "max_output_tokens": 200}
    first = client.responses.create(**asked, input="Hi", tool_choice="required")
    (call,) = first.output
    assert call.type == "function_call"
    assert call.arguments in ('{"sure": true}', '{"sure": false}')
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "5"}
    by_hand: Any = [{"role": "user", "content": "Hi"}, *first.output, output]
    second = client.responses.create(**asked, input=by_hand)
    third = client.responses.create(**asked, input=[output], previous_response_id=first.id)  # type: ignore[list-item]
    assert second.output_text == third.output_text != ""
    assert second.usage is not None
    assert third.usage is not None
    assert second.usage.input_tokens == third.usage.input_tokens
    counted = client.responses.input_tokens.count(model="demo", tools=[tool], input=by_hand)
    assert counted.input_tokens == second.usage.input_tokens
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**asked, input="And?", previous_response_id="resp_0")
    assert caught.value.code == "previous_response_not_found"


def test_a_request_has_one_id_wherever_it_is_told(server: Server, client: openai.OpenAI) -> None:
    plain = ask(client, max_tokens=1)
    assert plain.id == f"chatcmpl-{plain._request_id}"
    own = ask(client, max_tokens=1, extra_headers={"X-Request-Id": "mine-1"})
    assert (own._request_id, own.id) == ("mine-1", "chatcmpl-mine-1")
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, max_tokens=0, extra_headers={"X-Request-Id": "mine-2"})
    assert caught.value.request_id == "mine-2"
    eventually(lambda: "mine-1" in server.log and "mine-2" in server.log)


def test_bookkeeping_is_taken_and_named(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="demo",
        messages=[
            {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
            {"role": "user", "name": "bob", "content": [{"type": "text", "text": "Hi"}]},
        ],
        max_tokens=1,
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        safety_identifier="s",
        prompt_cache_key="k",
        modalities=["text"],
        parallel_tool_calls=False,
        response_format={"type": "text"},
        stop=None,
    )
    assert raw.status_code == 200
    named = set(raw.headers["x-penstock-ignored"].split(", "))
    assert named == {"metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}


def test_twenty_at_once_and_one_that_gives_up(server: Server) -> None:
    """A client that stops waiting takes its request with it; nobody else notices."""

    async def all_of_them() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
            asked: dict[str, Any] = {"model": "demo", "messages": QUESTION, "temperature": 0, "max_tokens": 5}
            begin = client.chat.completions.create
            others = [asyncio.create_task(begin(**asked)) for _ in range(20)]
            with server.held(), pytest.raises(openai.APITimeoutError):
                await begin(**asked, timeout=0.3)
            return await asyncio.gather(*others)

    answers = asyncio.run(all_of_them())
    assert len({answer.choices[0].message.content for answer in answers}) == 1
    eventually(lambda: server.metric("vllm:request_success_total", finished_reason="abort") >= 1)
    eventually(lambda: server.metric("vllm:num_requests_running") == 0)


def test_many_conversations_in_one_request(server: Server, client: openai.OpenAI) -> None:
    """vLLM's batch of chats: greedy answers are those of the same chats one by one."""
    talks = [QUESTION, [{"role": "user", "content": "What is PagedAttention?"}], QUESTION]
    asked: dict[str, Any] = {"model": "demo", "temperature": 0, "max_tokens": 40}
    batch: Any = client.post(f"{CHAT}/batch", cast_to=object, body={**asked, "messages": talks})
    alone = [ask(client, messages=talk, max_tokens=40) for talk in talks]
    told = [choice["message"]["content"] for choice in batch["choices"]]
    assert told == [each.choices[0].message.content for each in alone]
    assert batch["usage"]["prompt_tokens"] == sum(each.usage.prompt_tokens for each in alone)
    assert batch["usage"]["completion_tokens"] == sum(each.usage.completion_tokens for each in alone)


def test_what_is_rendered_is_what_is_read(client: openai.OpenAI) -> None:
    """Token ids of a render, as the prompt of a completion, go on as the dialect's own endpoint does."""
    greedy: dict[str, Any] = {"model": "demo", "temperature": 0}
    asked = {
        "/messages/render": {**greedy, "max_tokens": 12, "messages": QUESTION},
        "/responses/render": {**greedy, "max_output_tokens": 12, "input": "What is a Pod?"},
    }
    said = ask(client, max_tokens=12).choices[0].message.content
    for path, body in asked.items():
        rendered: Any = client.post(path, cast_to=object, body=body)
        made = client.completions.create(**greedy, prompt=rendered["token_ids"], max_tokens=12)
        assert made.choices[0].text == said
        assert rendered["sampling_params"]["max_tokens"] == 12
