"""Tools and reasoning of a chat: what is refused, what the template reads, what answers and streams say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from msgspec.structs import replace
from tokenizers import AddedToken

from penstock.core.errors import StartupError
from penstock.server.config import ServerConfig
from penstock.text.chat_template import ChatTemplate
from penstock.text.tokenizer import Tokenizer

from .conftest import LiveServer, running
from .fake_engine import INFO, FakeEngine
from .tiny import make_tokenizer

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "d", "parameters": CITY}}
NOW = {"type": "function", "function": {"name": "now"}}
NAMED = {"type": "function", "function": {"name": "get_weather"}}
CALLS = (
    "<think>Two things.</think>I look.\n"
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris é"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)
THOUGHT = len("<think>Two things.</think")
"""Tokens, of a byte each; the one that ends it is the answer's."""
FLAGS: dict[str, Any] = {
    "enable_auto_tool_choice": True,
    "tool_call_parser": "hermes",
    "reasoning_parser": "qwen3",
}
TEMPLATE = (
    "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}"
    "{% for m in messages %}{{ m.role }}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}={% for k, v in c.function.arguments.items() %}"
    "{{ k }}:{{ v }};{% endfor %}{% endfor %}|{% endfor %}"
    "{{ '<think></think>' if enable_thinking is false }}"
)


@pytest.fixture(scope="module")
def _tooled(tokenizer: Tokenizer, says: Any) -> Iterator[LiveServer]:
    template = ChatTemplate({"default": TEMPLATE})
    engine = FakeEngine(says(CALLS), info=replace(INFO, max_model_len=4096))
    with running(tokenizer, says(CALLS), engine=engine, template=template, **FLAGS) as server:
        yield server


@pytest.fixture
def tooled(_tooled: LiveServer, says: Any) -> LiveServer:
    """A server of a model of Qwen's family that thinks, looks up the weather and asks for the time."""
    _tooled.engine.reset(says(CALLS))
    return _tooled


def body(**fields: Any) -> dict[str, Any]:
    return {"messages": HI, "tools": [WEATHER, NOW], **fields}


def prompt(server: LiveServer, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(server.engine.adds[-1].prompt, skip_special_tokens=False)


def test_a_whole_answer(tooled: LiveServer) -> None:
    answer = tooled.post(CHAT, body()).json
    (choice,) = answer["choices"]
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls"
    assert message["reasoning"] == message["reasoning_content"] == "Two things."
    assert message["content"] == "I look."
    first, second = message["tool_calls"]
    assert first == {
        "id": first["id"],
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "Paris é"}'},
    }
    assert second["function"] == {"name": "now", "arguments": "{}"}
    assert first["id"] != second["id"]
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": THOUGHT}


def test_a_stream_says_the_same(tooled: LiveServer) -> None:
    events = tooled.events(CHAT, body(stream_options={"include_usage": True}))
    deltas = [event["choices"][0]["delta"] for event in events if event["choices"]]
    ends = [event["choices"][0]["finish_reason"] for event in events if event["choices"]]
    assert [end for end in ends if end] == ["tool_calls"]
    assert ends[-1] == "tool_calls"
    assert "".join(delta.get("reasoning") or "" for delta in deltas) == "Two things."
    assert "".join(delta.get("reasoning_content") or "" for delta in deltas) == "Two things."
    assert "".join(delta.get("content") or "" for delta in deltas) == "I look."
    calls = [call for delta in deltas for call in delta.get("tool_calls") or []]
    begun = [call for call in calls if call.get("id")]
    assert [(call["index"], call["type"], call["function"]["name"]) for call in begun] == [
        (0, "function", "get_weather"),
        (1, "function", "now"),
    ]
    for index, arguments in ((0, '{"city": "Paris é"}'), (1, "{}")):
        assert "".join(c["function"]["arguments"] for c in calls if c["index"] == index) == arguments
    assert not any("name" in call["function"] for call in calls if not call.get("id"))
    assert events[-1]["usage"]["completion_tokens_details"]["reasoning_tokens"] == THOUGHT


def test_the_official_client_puts_streams_together(tooled: LiveServer) -> None:
    with tooled.client() as client:
        options: Any = {"model": "tiny", "messages": HI, "tools": [WEATHER, NOW], "n": 2}
        with client.chat.completions.stream(**options) as stream:
            for _ in stream:
                pass
            streamed = stream.get_final_completion()
        whole = client.chat.completions.create(**options)
    for completion in (streamed, whole):
        assert len(completion.choices) == 2
        for choice in completion.choices:
            assert choice.finish_reason == "tool_calls"
            assert choice.message.content == "I look."
            calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls]
            assert calls == [("get_weather", '{"city": "Paris é"}'), ("now", "{}")]


def test_logprobs_of_every_token_come_with_the_chunks(tooled: LiveServer) -> None:
    events = tooled.events(CHAT, body(logprobs=True, return_token_ids=True))
    ids = [id for event in events for id in event["choices"][0].get("token_ids") or []]
    entries = [
        entry
        for event in events
        for entry in (event["choices"][0]["logprobs"] or {"content": []})["content"] or []
    ]
    assert len(ids) == len(entries) == len(CALLS.encode()) + 1


def test_thoughts_may_be_left_out(tooled: LiveServer) -> None:
    fields = body(include_reasoning=False, logprobs=True, return_token_ids=True)
    (choice,) = tooled.post(CHAT, fields).json["choices"]
    assert "reasoning" not in choice["message"]
    assert (choice["message"]["content"], choice["logprobs"], choice["token_ids"]) == ("I look.", None, None)
    text = json.dumps(tooled.events(CHAT, fields))
    assert "Two" not in text
    assert text.count("token_ids") == 1  # those of the prompt
    assert "I look." in "".join(
        event["choices"][0]["delta"].get("content") or "" for event in tooled.events(CHAT, fields)
    )


def test_thinking_is_turned_off_by_the_template(tooled: LiveServer, says: Any) -> None:
    tooled.engine.reset(says("no <think> here"))
    answer = tooled.post(CHAT, {"messages": HI, "chat_template_kwargs": {"enable_thinking": False}}).json
    assert answer["choices"][0]["message"]["content"] == "no <think> here"
    assert "reasoning" not in answer["choices"][0]["message"]
    answer = tooled.post(CHAT, {"messages": HI}).json
    message = answer["choices"][0]["message"]
    assert (message["content"], message["reasoning"]) == (None, "no  here")


def test_one_call_ends_the_answer_where_no_second_is_wanted(tooled: LiveServer) -> None:
    answer = tooled.post(CHAT, body(parallel_tool_calls=False)).json
    (choice,) = answer["choices"]
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["get_weather"]
    assert choice["finish_reason"] == "tool_calls"
    assert answer["usage"]["completion_tokens"] < len(CALLS.encode())
    assert tooled.engine.aborted  # the rest is not generated
    events = tooled.events(CHAT, body(parallel_tool_calls=False))
    assert [c["index"] for e in events for c in e["choices"][0]["delta"].get("tool_calls") or []] == [0, 0]


def test_tool_choice_none_leaves_calls_in_the_text(tooled: LiveServer, tokenizer: Tokenizer) -> None:
    (choice,) = tooled.post(CHAT, body(tool_choice="none")).json["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["content"] == CALLS.partition("</think>")[2]
    assert prompt(tooled, tokenizer).startswith("[get_weather][now]user:hi|")


def test_the_template_reads_tools_and_calls_of_the_history(tooled: LiveServer, tokenizer: Tokenizer) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": [2]}'}}
    bare = {"id": "c2", "type": "function", "function": {"name": "now", "arguments": ""}}
    messages = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [call, bare]},
        {"role": "tool", "tool_call_id": "c1", "content": "3"},
        {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "noon"}]},
    ]
    answer = tooled.post(CHAT, body(messages=messages))
    assert answer.status == 200
    assert "x-penstock-ignored" not in answer.headers
    assert prompt(tooled, tokenizer) == (
        "[get_weather][now]user:hi|assistant:add=a:1;b:[2];now=|tool:3|tool:noon|"
    )
    count = tooled.post("/tokenize", {"messages": messages, "tools": [WEATHER, NOW]}).json["count"]
    assert count == len(tooled.engine.adds[-1].prompt)


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def allowed(mode: str, *names: str) -> dict[str, Any]:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [named(n) for n in names]}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": "x"}, "tools"),
        ({"tools": [1]}, "tools[0]"),
        ({"tools": [WEATHER, {"type": "web_search"}]}, "tools[1].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [named("")]}, "tools[0].function.name"),
        ({"tools": [named("a b")]}, "tools[0].function.name"),
        ({"tools": [named("é")]}, "tools[0].function.name"),
        ({"tools": [named("x" * 65)]}, "tools[0].function.name"),
        ({"tools": [named("a\n")]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": 1}}]}, "tools[0].function.name"),
        ({"tools": [NOW, WEATHER, NOW]}, "tools[2].function.name"),
        ({"tools": [{"function": {"name": "f", "parameters": []}}]}, "tools[0].function.parameters"),
        (
            {"tools": [{"function": {"name": "f", "parameters": {"type": "string"}}}]},
            "tools[0].function.parameters",
        ),
        ({"tools": [{"function": {"name": "f", "strict": "yes"}}]}, "tools[0].function.strict"),
        ({"tools": [{"function": {"name": "f", "description": 1}}]}, "tools[0].function.description"),
        ({"tools": [{"function": {"name": "f", "paramters": {}}}]}, "tools[].function.paramters"),
        ({"tool_choice": named("absent")}, "tool_choice"),
        ({"tool_choice": "maybe"}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tool_choice": ["auto"]}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools"),
        ({"tool_choice": allowed("none", "now")}, "tool_choice.allowed_tools.mode"),
        ({"tool_choice": allowed("auto")}, "tool_choice.allowed_tools.tools"),
        ({"tool_choice": allowed("auto", "now", "absent")}, "tool_choice.allowed_tools.tools[1]"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [], "tool_choice": named("now")}, "tool_choice"),
        ({"parallel_tool_calls": "many"}, "parallel_tool_calls"),
        (
            {
                "messages": [
                    *HI,
                    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
                ]
            },
            "messages[1].tool_calls[0].function.arguments",
        ),
        (
            {
                "messages": [
                    *HI,
                    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]},
                ]
            },
            "messages[1].tool_calls[0].function.arguments",
        ),
        (
            {"messages": [*HI, {"role": "assistant", "tool_calls": [{}]}]},
            "messages[1].tool_calls[0].function",
        ),
        (
            {"messages": [*HI, {"role": "tool", "tool_call_id": 1, "content": "x"}]},
            "messages[1].tool_call_id",
        ),
        ({"messages": [*HI, {"role": "tool"}]}, "messages[1].content"),
    ],
)
def test_bad_input_is_refused_with_the_field(tooled: LiveServer, fields: dict[str, Any], param: str) -> None:
    answer = tooled.post(CHAT, body(**fields))
    assert (answer.status, answer.error["param"]) == (400, param)
    assert not tooled.engine.adds


@pytest.mark.parametrize("fields", [{}, {"tool_choice": "required"}, {"tool_choice": NAMED}])
def test_a_server_without_a_parser_says_which_flag_is_missing(
    server: LiveServer, fields: dict[str, Any]
) -> None:
    answer = server.post(CHAT, body(**fields))
    assert (answer.status, answer.error["param"]) == (400, "tool_choice")
    assert "--tool-call-parser" in answer.error["message"]


def test_a_server_without_a_parser_takes_tools_that_are_not_to_be_called(server: LiveServer) -> None:
    assert server.post(CHAT, body(tool_choice="none")).status == 200


@pytest.mark.parametrize(
    ("flags", "flag"),
    [
        ({"enable_auto_tool_choice": True}, "--enable-auto-tool-choice"),
        ({"tool_call_parser": "hermess"}, "--tool-call-parser"),
        ({"reasoning_parser": "none"}, "--reasoning-parser"),
        ({"tool_call_parser": "hermes", "tool_strict_level": "all"}, "--tool-strict-level"),
        ({"tool_call_parser": "openai", "reasoning_parser": "qwen3"}, "--reasoning-parser"),
        ({"tool_call_parser": "hermes", "reasoning_parser": "openai_gptoss"}, "--reasoning-parser"),
    ],
)
def test_flags_that_cannot_be(flags: dict[str, Any], flag: str) -> None:
    with pytest.raises(StartupError) as caught:
        ServerConfig(**flags)
    assert caught.value.param == flag


@pytest.mark.parametrize("exclude", [False, True])
def test_tools_may_be_left_out_of_prompts(tokenizer: Tokenizer, says: Any, exclude: bool) -> None:
    flags = {"exclude_tools_when_tool_choice_none": exclude, "tool_call_parser": "mistral"}
    with running(tokenizer, says("x"), template=ChatTemplate({"default": TEMPLATE}), **flags) as server:
        assert server.post(CHAT, body(tool_choice="none")).status == 200
        assert prompt(server, tokenizer).startswith("[get_weather]") is not exclude


def test_special_tokens_that_mark_calls_are_seen_and_others_are_not(tooled: LiveServer, says: Any) -> None:
    rust = tooled_tokenizer(["[TOOL_CALLS]", "[ARGS]"])
    reply = rust.encode("One[TOOL_CALLS]now[ARGS]{}<|start|>", add_special_tokens=False)
    engine = FakeEngine(lambda _: reply, info=replace(INFO, max_model_len=4096))
    template = ChatTemplate({"default": TEMPLATE})
    flags = {"enable_auto_tool_choice": True, "tool_call_parser": "mistral"}
    with running(rust, lambda _: reply, engine=engine, template=template, **flags) as server:
        (choice,) = server.post(CHAT, body()).json["choices"]
        (call,) = choice["message"]["tool_calls"]
        assert (choice["message"]["content"], call["function"]["name"]) == ("One", "now")
        assert len(call["id"]) == 9
        (choice,) = server.post(CHAT, {"messages": HI}).json["choices"]
        assert choice["message"]["content"] == "Onenow{}"


@pytest.mark.parametrize(("stop", "reason"), [("aris", "stop"), ("now", "tool_calls")])
def test_a_call_that_a_stop_string_cuts_off_is_not_to_be_run(
    tooled: LiveServer, stop: str, reason: str
) -> None:
    """Of calls under a grammar, which are told as they are written."""
    pytest.importorskip("llguidance")
    asked = body(tool_choice="required", stop=[stop])
    (choice,) = tooled.post(CHAT, asked).json["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == (reason, stop)
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["arguments"].endswith('"P' if reason == "stop" else "}")
    assert tooled.events(CHAT, asked)[-1]["choices"][0]["finish_reason"] == reason


def tooled_tokenizer(marks: list[str]) -> Tokenizer:
    tokenizer = make_tokenizer()
    tokenizer._rust.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    return Tokenizer(tokenizer._rust, special_tokens={"eos_token": "<|eos|>"})


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_what_must_be_called_is_a_grammar(tooled: LiveServer, choice: Any) -> None:
    pytest.importorskip("llguidance")
    answer = tooled.post(CHAT, body(tool_choice=choice)).json
    grammar = tooled.engine.adds[-1].spec.grammar
    assert grammar is not None
    assert grammar.after == "</think>"
    tag = json.loads(grammar.text)
    names = [each["begin"].split('"')[3] for each in tag["tags"]]
    assert names == (["get_weather", "now"] if choice == "required" else ["get_weather"])
    assert tag["stop_after_first"] is (choice != "required")
    (told,) = answer["choices"]
    # as in OpenAI's API, a function that was named is no reason
    assert told["finish_reason"] == ("tool_calls" if choice == "required" else "stop")
    assert len(told["message"]["tool_calls"]) == (2 if choice == "required" else 1)


def test_strict_tools_are_held_to_their_schemas(tooled: LiveServer) -> None:
    pytest.importorskip("llguidance")
    strict = {"type": "function", "function": {"name": "f", "parameters": CITY, "strict": True}}
    assert tooled.post(CHAT, body(tools=[strict, NOW])).status == 200
    grammar = tooled.engine.adds[-1].spec.grammar
    assert grammar is not None
    tag = json.loads(grammar.text)
    assert tag["type"] == "triggered_tags"
    schemas = [each["content"]["json_schema"] for each in tag["tags"]]
    assert schemas == [{**CITY, "additionalProperties": False}, {"type": "object"}]
    schema = {
        "type": "object",
        "properties": {"a": {"type": "string", "contentEncoding": "base64", "nope": 1}},
    }
    refused = {"type": "function", "function": {"name": "f", "parameters": schema, "strict": True}}
    answer = tooled.post(CHAT, body(tools=[refused]))
    assert answer.status == 400
    assert answer.error["param"].startswith("tools[0].function.parameters")


def test_a_text_that_has_to_be_json_may_be_a_call_instead(tooled: LiveServer) -> None:
    pytest.importorskip("llguidance")
    assert tooled.post(CHAT, body(response_format={"type": "json_object"})).status == 200
    grammar = tooled.engine.adds[-1].spec.grammar
    assert grammar is not None
    tag = json.loads(grammar.text)
    assert [each["type"] for each in tag["elements"]] == ["tags_with_separator", "json_schema"]


def test_a_thought_has_a_budget(tooled: LiveServer, says: Any) -> None:
    rust = tooled_tokenizer(["<think>", "</think>"])
    end = rust.token_id("</think>")
    assert end is not None
    flags = {"reasoning_parser": "qwen3", "reasoning_config": {"reasoning_end_str": " So.</think>"}}
    with running(rust, says("x"), template=ChatTemplate({"default": TEMPLATE}), **flags) as server:

        def limit(path: str = CHAT, **fields: Any) -> Any:
            given = {"messages": HI} if path == CHAT else {"prompt": "a"}
            answer = server.post(path, {**given, **fields})
            assert answer.status == 200, answer.body
            return server.engine.adds[-1].spec.sampling.thought

        asked = limit(thinking_token_budget=5)
        assert (asked.tokens, asked.end, asked.start) == (5, end, rust.token_id("<think>"))
        assert asked.begun
        assert rust.decode(asked.forced, skip_special_tokens=False) == " So.</think>"
        assert limit() is None
        assert limit(thinking_token_budget=-1) is None
        off = {"enable_thinking": False}
        assert not limit(thinking_token_budget=0, chat_template_kwargs=off).begun
        assert not limit("/v1/completions", thinking_token_budget=0).begun
        for wrong in (-2, 0.5, "x"):
            answer = server.post(CHAT, {"messages": HI, "thinking_token_budget": wrong})
            assert (answer.status, answer.error["param"]) == (400, "thinking_token_budget")


def test_a_budget_needs_a_parser_and_a_token(server: LiveServer, tooled: LiveServer) -> None:
    for asked, why in (
        (server, "requires --reasoning-parser"),
        (tooled, "</think> is no token of the model"),
    ):
        answer = asked.post(CHAT, {"messages": HI, "thinking_token_budget": 5})
        assert (answer.status, answer.error["param"]) == (400, "thinking_token_budget")
        assert why in answer.error["message"]


@pytest.mark.parametrize(
    ("given", "where"),
    [
        ({"reasoning_end_str": "done"}, "reasoning_end_str"),
        ({"reasoning_start_str": "<thought>"}, "reasoning_start_str"),
        ({"reasoning_parser": "deepseek_r1"}, "reasoning_parser"),
        ({"budget": 5}, "budget"),
    ],
)
def test_reasoning_configurations_that_cannot_be(given: dict[str, Any], where: str) -> None:
    with pytest.raises(StartupError) as caught:
        ServerConfig(reasoning_parser="qwen3", reasoning_config=given)
    assert caught.value.param == f"--reasoning-config.{where}"
    right = {"reasoning_start_str": "<think>", "reasoning_end_str": "</think>", "reasoning_parser": "qwen3"}
    assert ServerConfig(reasoning_parser="qwen3", reasoning_config=right).reasoning_config == right


def test_only_some_tools_may_be_called(tooled: LiveServer, tokenizer: Tokenizer) -> None:
    """All of them are in the prompt, so that its cached prefix serves; a grammar knows only those allowed."""
    pytest.importorskip("llguidance")
    for mode in ("auto", "required"):
        answer = tooled.post(CHAT, body(tool_choice=allowed(mode, "now"))).json
        assert answer["choices"][0]["finish_reason"] == "tool_calls"
        assert prompt(tooled, tokenizer).startswith("[get_weather][now]")
        grammar = tooled.engine.adds[-1].spec.grammar
        assert grammar is not None
        assert "now" in grammar.text
        assert "get_weather" not in grammar.text
        assert ("triggered_tags" in grammar.text) is (mode == "auto")
