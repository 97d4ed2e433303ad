"""Tools, thoughts and forms in the dialects of Messages and Responses, with the clients of their makers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from msgspec.structs import replace

from penstock.text.chat_template import ChatTemplate
from penstock.text.tokenizer import Tokenizer

from .conftest import LiveServer, running
from .fake_engine import INFO, PATIENCE, Asked, FakeEngine
from .test_tools import CALLS, CITY, FLAGS, TEMPLATE, tooled_tokenizer
from .tiny import MODEL

HI: list[Any] = [{"role": "user", "content": "hi"}]
TOOLS: list[Any] = [
    {"name": "get_weather", "description": "d", "input_schema": CITY},
    {"name": "now", "input_schema": {"type": "object", "properties": {}}},
]
FUNCTIONS: list[Any] = [
    {"type": "function", "name": "get_weather", "description": "d", "parameters": CITY, "strict": False},
    {"type": "function", "name": "now", "parameters": {"type": "object", "properties": {}}, "strict": False},
]
CITIES = {"city": "Paris é"}


@pytest.fixture(scope="module")
def _server(tokenizer: Tokenizer, says: Any) -> Iterator[LiveServer]:
    engine = FakeEngine(says(CALLS), info=replace(INFO, max_model_len=4096))
    template = ChatTemplate({"default": TEMPLATE})
    with running(tokenizer, says(CALLS), engine=engine, template=template, **FLAGS) as server:
        yield server


@pytest.fixture
def server(_server: LiveServer, says: Any) -> LiveServer:
    _server.engine.reset(says(CALLS))
    return _server


@pytest.fixture
def claude(server: LiveServer) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=PATIENCE) as client:
        yield client


def prompt(server: LiveServer, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(server.engine.adds[-1].prompt, skip_special_tokens=False)


def then(says: Any, server: LiveServer, *texts: str) -> None:
    """The engine says one text after the other."""
    left = [says(text) for text in texts]

    def reply(asked: Asked) -> list[int]:
        return list((left.pop(0) if len(left) > 1 else left[0])(asked))

    server.engine.reset(reply)


# ---- Messages ----


def test_a_message_with_a_thought_a_text_and_calls(claude: anthropic.Anthropic) -> None:
    message = claude.messages.create(model=MODEL, max_tokens=500, messages=HI, tools=TOOLS)
    thought, text, first, second = message.content
    assert (thought.type, thought.thinking) == ("thinking", "Two things.")
    assert thought.signature
    assert (text.type, text.text) == ("text", "I look.")
    assert (first.type, first.name, first.input) == ("tool_use", "get_weather", CITIES)
    assert (second.name, second.input) == ("now", {})
    assert first.id != second.id
    assert first.id.startswith("toolu_")
    assert second.id.startswith("toolu_")
    assert message.stop_reason == "tool_use"


def test_its_stream_says_the_same(claude: anthropic.Anthropic) -> None:
    whole = claude.messages.create(model=MODEL, max_tokens=500, messages=HI, tools=TOOLS)
    with claude.messages.stream(model=MODEL, max_tokens=500, messages=HI, tools=TOOLS) as stream:
        kinds = [event.type for event in stream if event.type.startswith("content_block_s")]
        streamed = stream.get_final_message()
    assert kinds == ["content_block_start", "content_block_stop"] * 4

    def told(message: Any) -> list[Any]:
        blocks = [block.model_dump() for block in message.content]
        return [
            {k: v for k, v in b.items() if k in ("type", "text", "thinking", "name", "input")} for b in blocks
        ]

    assert told(streamed) == told(whole)
    assert streamed.stop_reason == "tool_use"
    assert streamed.content[0].signature


def test_thoughts_may_be_left_out(claude: anthropic.Anthropic) -> None:
    thinking: Any = {"type": "enabled", "budget_tokens": 1024, "display": "omitted"}
    message = claude.messages.create(
        model=MODEL, max_tokens=2000, messages=HI, tools=TOOLS, thinking=thinking
    )
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert message.content[0].thinking == ""


def test_a_thought_has_a_budget(server: LiveServer, says: Any) -> None:
    """Where the model's thoughts can be ended; else it is named."""
    thinking = {"type": "enabled", "budget_tokens": 1024}
    asked = {"model": MODEL, "max_tokens": 2000, "messages": HI, "thinking": thinking}
    engine = FakeEngine(says("x"), info=replace(INFO, max_model_len=4096))
    template = ChatTemplate({"default": TEMPLATE})
    rust = tooled_tokenizer(["<think>", "</think>"])
    with running(rust, says("x"), engine=engine, template=template, reasoning_parser="qwen3") as able:
        answer = able.post("/v1/messages", asked)
        assert (answer.status, "x-penstock-ignored" in answer.headers) == (200, False)
        limit = engine.adds[-1].spec.sampling.thought
        assert (limit.tokens, limit.end) == (1024, rust.token_id("</think>"))
    answer = server.post("/v1/messages", asked)
    assert (answer.status, answer.headers["x-penstock-ignored"]) == (200, "thinking.budget_tokens")


def test_a_loop_of_tools(
    claude: anthropic.Anthropic, server: LiveServer, tokenizer: Tokenizer, says: Any
) -> None:
    then(says, server, CALLS, "<think></think>It rains.")
    messages = list(HI)
    for _ in range(3):
        answer = claude.messages.create(model=MODEL, max_tokens=500, messages=messages, tools=TOOLS)
        messages.append({"role": "assistant", "content": answer.content})
        if answer.stop_reason != "tool_use":
            break
        results = [
            {"type": "tool_result", "tool_use_id": block.id, "content": f"{block.name}!"}
            for block in answer.content
            if block.type == "tool_use"
        ]
        messages.append({"role": "user", "content": results})
    assert answer.stop_reason == "end_turn"
    assert answer.content[-1].text == "It rains."
    assert prompt(server, tokenizer) == (
        "[get_weather][now]user:hi|assistant:I look.get_weather=city:Paris é;now=|"
        "tool:get_weather!|tool:now!|"
    )


def test_tool_choices_are_the_chats(claude: anthropic.Anthropic, server: LiveServer, says: Any) -> None:
    server.engine.reset(says('[{"name": "now", "parameters": {}}]'))
    for choice, grammar in (
        ({"type": "any"}, True),
        ({"type": "tool", "name": "now"}, True),
        ({"type": "auto"}, False),
    ):
        body = {"model": MODEL, "max_tokens": 99, "messages": HI, "tools": TOOLS, "tool_choice": choice}
        assert server.post("/v1/messages", body).status == 200
        assert (server.engine.adds[-1].spec.grammar is not None) == grammar, choice
    refused = server.post("/v1/messages", {**body, "tool_choice": {"type": "tool", "name": "nobody"}})
    assert (refused.status, refused.json["error"]["type"]) == (400, "invalid_request_error")


def test_tools_are_counted(claude: anthropic.Anthropic, server: LiveServer) -> None:
    counted = claude.messages.count_tokens(model=MODEL, messages=HI, tools=TOOLS)
    claude.messages.create(model=MODEL, max_tokens=9, messages=HI, tools=TOOLS)
    assert counted.input_tokens == len(server.engine.adds[-1].prompt)
    assert counted.input_tokens > claude.messages.count_tokens(model=MODEL, messages=HI).input_tokens


def test_a_call_that_is_cut_off(claude: anthropic.Anthropic) -> None:
    message = claude.messages.create(model=MODEL, max_tokens=CALLS.index("Paris"), messages=HI, tools=TOOLS)
    assert message.stop_reason == "max_tokens"
    calls = [block for block in message.content if block.type == "tool_use"]
    assert [call.input for call in calls] in ([{}], [])


# ---- Responses ----


def test_a_response_with_a_thought_a_text_and_calls(server: LiveServer) -> None:
    with server.client() as client:
        response = client.responses.create(model=MODEL, input="hi", tools=FUNCTIONS)
        thought, text, first, second = response.output
        assert (thought.type, thought.content[0].text) == ("reasoning", "Two things.")
        assert (text.type, response.output_text) == ("message", "I look.")
        assert (first.type, first.name, json.loads(first.arguments)) == (
            "function_call",
            "get_weather",
            CITIES,
        )
        assert (second.name, json.loads(second.arguments)) == ("now", {})
        assert first.call_id != second.call_id
        assert response.status == "completed"
        assert response.usage is not None
        assert response.usage.output_tokens_details.reasoning_tokens > 0
        with client.responses.stream(model=MODEL, input="hi", tools=FUNCTIONS) as stream:
            events = list(stream)
            streamed = stream.get_final_response()
    assert [item.type for item in streamed.output] == [item.type for item in response.output]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    for each, whole in zip(streamed.output[2:], response.output[2:], strict=True):
        assert (each.name, each.arguments) == (whole.name, whole.arguments)
        deltas = [e.delta for e in events if e.type.endswith("arguments.delta") and e.item_id == each.id]
        assert "".join(deltas) == each.arguments
    thoughts = [e.delta for e in events if e.type == "response.reasoning_text.delta"]
    assert "".join(thoughts) == "Two things."


def test_reasoning_may_be_left_out(server: LiveServer) -> None:
    body = {"model": MODEL, "input": "hi", "include_reasoning": False}
    assert server.post("/v1/responses", body).json["output"][0]["type"] == "message"


@pytest.mark.parametrize("kept", [True, False])
def test_a_loop_of_functions(server: LiveServer, tokenizer: Tokenizer, says: Any, kept: bool) -> None:
    then(says, server, CALLS, "<think></think>It rains.")
    with server.client() as client:
        answer = client.responses.create(model=MODEL, input="hi", tools=FUNCTIONS, store=kept)
        outputs: list[Any] = [
            {"type": "function_call_output", "call_id": item.call_id, "output": f"{item.name}!"}
            for item in answer.output
            if item.type == "function_call"
        ]
        more: Any = (
            {"previous_response_id": answer.id, "input": outputs}
            if kept
            else {"input": [{"role": "user", "content": "hi"}, *answer.output, *outputs]}
        )
        last = client.responses.create(model=MODEL, tools=FUNCTIONS, **more)
    assert last.output_text == "It rains."
    assert prompt(server, tokenizer) == (
        "[get_weather][now]user:hi|assistant:I look.get_weather=city:Paris é;now=|"
        "tool:get_weather!|tool:now!|"
    )


def test_a_form_reaches_the_engine(server: LiveServer, says: Any) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    server.engine.reset(says('{"a": 1}'))
    form = {"type": "json_schema", "name": "x", "schema": schema, "strict": True}
    with server.client() as client:
        made = client.responses.create(
            model=MODEL, input="hi", text={"format": form}, reasoning={"effort": "none"}
        )
    assert json.loads(made.output_text) == {"a": 1}
    assert server.engine.adds[-1].spec.grammar is not None
    body = {
        "model": MODEL,
        "max_tokens": 99,
        "messages": HI,
        "thinking": {"type": "disabled"},
        "output_config": {"format": {"type": "json_schema", "schema": schema}},
    }
    made_too = server.post("/v1/messages", body)
    assert made_too.status == 200, made_too.body
    assert json.loads(made_too.json["content"][-1]["text"]) == {"a": 1}
    assert server.engine.adds[-1].spec.grammar is not None


def test_logprobs_are_those_of_texts(server: LiveServer, says: Any) -> None:
    """Not of thoughts, marks and calls; and a token without text ends no call that is being written."""
    then(says, server, CALLS + "\n<b> It is.")
    fields: dict[str, Any] = {"model": MODEL, "input": "hi", "tools": FUNCTIONS}
    included: Any = ["message.output_text.logprobs"]
    with server.client() as client:
        whole = client.responses.create(**fields, include=included)
        with client.responses.stream(**fields, include=included) as stream:
            deltas = [event for event in stream if event.type == "response.output_text.delta"]
            streamed = stream.get_final_response()
    for made in (whole, streamed):
        kinds = ["reasoning", "message", "function_call", "function_call", "message"]
        assert [item.type for item in made.output] == kinds
        texts: list[Any] = [item.content[0] for item in made.output if item.type == "message"]
        assert [text.text for text in texts] == ["I look.", "\n<b> It is."]
        assert all("".join(each.token for each in text.logprobs) == text.text for text in texts)
    assert all("".join(each.token for each in delta.logprobs) == delta.delta for delta in deltas)


def test_bad_tools_are_refused_in_the_dialects_shape(server: LiveServer) -> None:
    twice = {"model": MODEL, "max_tokens": 9, "messages": HI, "tools": [TOOLS[0], TOOLS[0]]}
    refused = server.post("/v1/messages", twice)
    assert (refused.status, refused.json["type"]) == (400, "error")
    assert refused.json["error"]["message"].startswith("tools[1].name ")
    body = {"model": MODEL, "input": "hi", "tools": [{**FUNCTIONS[0], "name": "no spaces"}]}
    refused = server.post("/v1/responses", body)
    assert (refused.status, refused.json["error"]["param"]) == (400, "tools[0].name")


UNIQUE = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}


def test_what_cannot_be_enforced_has_the_dialects_name(server: LiveServer) -> None:
    """Refused where it is strict, and named where it is not."""
    form = {"type": "json_schema", "name": "x", "schema": UNIQUE, "strict": True}
    body: dict[str, Any] = {"model": MODEL, "input": "hi", "text": {"format": form}}
    refused = server.post("/v1/responses", body).json["error"]
    assert refused["param"] == "text.format.schema.properties.a.uniqueItems"
    form["strict"] = False
    named = server.post("/v1/responses", body).headers["x-penstock-ignored"]
    assert named == "text.format.schema.properties.a.uniqueItems"
    tool = {"type": "function", "name": "f", "parameters": UNIQUE}
    body = {"model": MODEL, "input": "hi", "tools": [tool], "tool_choice": "required"}
    named = server.post("/v1/responses", body).headers["x-penstock-ignored"]
    assert named == "tools[0].parameters.properties.a.uniqueItems"
    told = {"model": MODEL, "max_tokens": 99, "messages": HI}
    tool = {"name": "f", "input_schema": UNIQUE}
    body = {**told, "tools": [TOOLS[0], tool], "tool_choice": {"type": "tool", "name": "f"}}
    named = server.post("/v1/messages", body).headers["x-penstock-ignored"]
    assert named == "tools[1].input_schema.properties.a.uniqueItems"
    for field in ("output_format", "output_config"):
        form = {"type": "json_schema", "schema": UNIQUE}
        asked = {field: form if field == "output_format" else {"format": form}}
        refused = server.post("/v1/messages", {**told, **asked}).json["error"]
        assert refused["message"].startswith("output_config.format.schema.properties.a.uniqueItems ")


def test_a_schema_that_is_none_is_said_of_the_tools(server: LiveServer) -> None:
    wrong = {"type": "object", "properties": {"a": {"type": "bad"}}}
    body = {"model": MODEL, "input": "hi", "tools": [{"type": "function", "name": "f", "parameters": wrong}]}
    refused = server.post("/v1/responses", {**body, "tool_choice": "required"}).json["error"]
    assert refused["param"] == "tools"
    assert refused["message"].startswith("a grammar for calls of the tools cannot be compiled: ")


@pytest.mark.parametrize(
    ("path", "fields", "name"),
    [
        ("/v1/responses", {"tools": [{**FUNCTIONS[0], "paramters": {}}]}, "tools[].paramters"),
        ("/v1/responses", {"text": {"format": {"type": "text", "stict": 1}}}, "text.format.stict"),
        ("/v1/messages", {"thinking": {"type": "disabled", "budget_token": 1}}, "thinking.budget_token"),
        ("/v1/messages", {"tools": TOOLS, "tool_choice": {"type": "auto", "nane": 1}}, "tool_choice.nane"),
    ],
)
def test_typing_errors_within_are_found(
    server: LiveServer, path: str, fields: dict[str, Any], name: str
) -> None:
    asked = {"input": "hi"} if path.endswith("responses") else {"messages": HI, "max_tokens": 9}
    refused = server.post(path, {"model": MODEL, **asked, **fields})
    assert (refused.status, name in refused.json["error"]["message"]) == (400, True), refused.body


def test_calls_of_the_past_have_arguments_that_are_json(server: LiveServer) -> None:
    for arguments, why in (("{", "is not valid JSON"), ("[1]", "must be a JSON object")):
        items = [{"type": "function_call", "call_id": "c", "name": "now", "arguments": arguments}]
        refused = server.post("/v1/responses", {"model": MODEL, "input": items})
        assert (refused.status, refused.json["error"]["param"]) == (400, "input[0].arguments")
        assert why in refused.json["error"]["message"]
    items[0]["arguments"] = ""
    assert server.post("/v1/responses", {"model": MODEL, "input": items}).status == 200


def allowed(mode: Any, *tools: Any) -> dict[str, Any]:
    return {"type": "allowed_tools", "mode": mode, "tools": list(tools)}


ONLY_NOW: Any = {"type": "function", "name": "now"}


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_a_response_may_call_only_what_is_allowed(
    server: LiveServer, tokenizer: Tokenizer, mode: Any
) -> None:
    """The model is told of all tools, so that its prompt stays the same, and a grammar leaves it these."""
    choice: Any = allowed(mode, ONLY_NOW)
    with server.client() as client:
        made = client.responses.create(model=MODEL, input="hi", tools=FUNCTIONS, tool_choice=choice)
    assert made.tool_choice.model_dump() == choice
    assert prompt(server, tokenizer).startswith("[get_weather][now]user:hi|")
    grammar = server.engine.adds[-1].spec.grammar
    assert grammar is not None
    tag = json.loads(grammar.text)
    assert [each["begin"].split('"')[3] for each in tag["tags"]] == ["now"]
    assert tag["type"] == ("tags_with_separator" if mode == "required" else "triggered_tags")
    assert not tag["stop_after_first"]


@pytest.mark.parametrize(
    ("choice", "param"),
    [
        (allowed(None, ONLY_NOW), "tool_choice.mode"),
        (allowed("none", ONLY_NOW), "tool_choice.mode"),
        (allowed("auto"), "tool_choice.tools"),
        ({"type": "allowed_tools", "mode": "auto"}, "tool_choice.tools"),
        ({"type": "allowed_tools", "mode": "auto", "tools": "now"}, "tool_choice.tools"),
        (allowed("auto", ONLY_NOW, "now"), "tool_choice.tools[1]"),
        (allowed("auto", {"type": "mcp", "server_label": "x"}), "tool_choice.tools[0].type"),
        (allowed("auto", {"type": "function"}), "tool_choice.tools[0].name"),
        (allowed("auto", ONLY_NOW, {"type": "function", "name": "absent"}), "tool_choice.tools[1].name"),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "auto"}}, "tool_choice.mode"),  # a chat's form
    ],
)
def test_what_is_allowed_is_checked_under_its_own_names(server: LiveServer, choice: Any, param: str) -> None:
    body = {"model": MODEL, "input": "hi", "tools": FUNCTIONS, "tool_choice": choice}
    refused = server.post("/v1/responses", body)
    assert (refused.status, refused.json["error"]["param"]) == (400, param)
    assert not server.engine.adds


def test_nothing_is_allowed_where_there_are_no_tools(server: LiveServer) -> None:
    body = {"model": MODEL, "input": "hi", "tool_choice": allowed("auto", ONLY_NOW)}
    refused = server.post("/v1/responses", body)
    assert (refused.status, refused.json["error"]["param"]) == (400, "tool_choice")
