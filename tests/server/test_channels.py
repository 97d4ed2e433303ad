"""gpt-oss' channels over HTTP: special tokens reach the parser, and grammars begin behind headers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from msgspec.structs import replace

from penstock.text.chat_template import ChatTemplate

from .conftest import LiveServer, running
from .fake_engine import INFO, PATIENCE, FakeEngine
from .test_tools import CHAT, HI, NOW, TEMPLATE, body, tooled_tokenizer

CHANNELS = ("start", "channel", "message", "constrain", "end", "call", "return")
HARMONY = (
    "<|channel|>analysis<|message|>Two things.<|end|>"
    "<|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
    "<|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
    '{"city": "Paris"}'
)


@pytest.fixture(scope="module")
def channels() -> Iterator[LiveServer]:
    """A server of a model of gpt-oss' family, whose vocabulary has the format's tokens."""
    rust = tooled_tokenizer([f"<|{each}|>" for each in CHANNELS])
    reply = [*rust.encode(HARMONY, add_special_tokens=False)]
    engine = FakeEngine(lambda _: reply, info=replace(INFO, max_model_len=4096))
    template = ChatTemplate({"default": TEMPLATE})
    flags = {"enable_auto_tool_choice": True, "tool_call_parser": "openai"}
    with running(rust, lambda _: reply, engine=engine, template=template, **flags) as server:
        yield server


def test_channels_of_an_answer(channels: LiveServer) -> None:
    answer = channels.post(CHAT, body()).json
    (choice,) = answer["choices"]
    message = choice["message"]
    assert (message["reasoning"], message["content"]) == ("Two things.", "I look.")
    (call,) = message["tool_calls"]
    assert call["function"] == {"name": "get_weather", "arguments": '{"city": "Paris"}'}
    assert choice["finish_reason"] == "tool_calls"
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == len("Two things.")
    deltas = [event["choices"][0]["delta"] for event in channels.events(CHAT, body())]
    assert "".join(delta.get("reasoning") or "" for delta in deltas) == "Two things."
    assert "".join(delta.get("content") or "" for delta in deltas) == "I look."
    parts = [call["function"] for delta in deltas for call in delta.get("tool_calls") or []]
    assert [part["name"] for part in parts if "name" in part] == ["get_weather"]
    assert "".join(part["arguments"] for part in parts) == '{"city": "Paris"}'


def test_channels_without_tools(channels: LiveServer) -> None:
    (choice,) = channels.post(CHAT, {"messages": HI}).json["choices"]
    message = choice["message"]
    assert (message["reasoning"], choice["finish_reason"]) == ("Two things.", "stop")
    assert message["content"] == "I look.\n" + HARMONY.rpartition("<|end|>")[2]
    answer = channels.post(CHAT, {"messages": HI, "thinking_token_budget": 5})
    assert (answer.status, answer.error["param"]) == (400, "thinking_token_budget")


@pytest.mark.parametrize(
    ("fields", "before", "kind"),
    [
        (
            {"response_format": {"type": "json_object"}},
            "<|channel|>final <|constrain|>json<|message|>",
            "json",
        ),
        ({"structured_outputs": {"choice": ["a"]}}, "<|channel|>final<|message|>", "choice"),
        ({"tools": [NOW], "tool_choice": "required"}, None, "structural_tag"),
    ],
)
def test_a_grammar_begins_in_its_channel(
    channels: LiveServer, fields: dict[str, Any], before: str | None, kind: str
) -> None:
    pytest.importorskip("llguidance")
    assert channels.post(CHAT, {"messages": HI, **fields}).status == 200
    grammar = channels.engine.adds[-1].spec.grammar
    assert grammar is not None
    assert (grammar.kind, grammar.after) == (kind, "")
    thoughts, *header = json.loads(grammar.before)["elements"]
    assert thoughts["content"]["begin"] == "<|channel|>analysis<|message|>"
    assert [each["value"] for each in header] == ([] if before is None else [before])


def test_text_of_a_form_or_calls_have_their_channels(channels: LiveServer) -> None:
    pytest.importorskip("llguidance")
    assert channels.post(CHAT, body(response_format={"type": "json_object"})).status == 200
    grammar = channels.engine.adds[-1].spec.grammar
    assert grammar is not None
    calls, said = json.loads(grammar.text)["elements"]
    assert [tag["begin"].split()[1] for tag in calls["elements"][1]["tags"]] == [
        "to=functions.get_weather",
        "to=functions.now",
    ]
    assert said["begin"] == "<|channel|>final <|constrain|>json<|message|>"


MIXED = (
    "<|channel|>analysis<|message|>One.<|end|>"
    '<|start|>assistant<|channel|>commentary to=functions.now json<|message|>{"a": 1}<|end|>'
    "<|start|>assistant<|channel|>analysis<|message|>Two.<|end|>"
    "<|start|>assistant<|channel|>final<|message|>Done"
)


def test_thoughts_between_calls_in_every_dialect(channels: LiveServer) -> None:
    """A stream says what the whole answer does, in its order; and so do all dialects."""
    rust = tooled_tokenizer([f"<|{each}|>" for each in CHANNELS])
    reply = [*rust.encode(MIXED, add_special_tokens=False)]
    channels.engine.reset(lambda _: reply)
    (choice,) = channels.post(CHAT, body()).json["choices"]
    message = choice["message"]
    assert (message["reasoning"], message["content"]) == ("One.\nTwo.", "Done")
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["now"]
    functions = [{"type": "function", "name": "now"}]
    with channels.client() as client:
        asked: Any = {"model": "tiny", "input": "hi", "tools": functions}
        whole = client.responses.create(**asked)
        with client.responses.stream(**asked) as stream:
            for _ in stream:
                pass
            streamed = stream.get_final_response()
    for made in (whole, streamed):
        assert made.output_text == "Done"
        thoughts = [item.content[0].text for item in made.output if item.type == "reasoning"]
        assert "".join(thoughts) == "One.\nTwo."
        assert [item.arguments for item in made.output if item.type == "function_call"] == ['{"a": 1}']
    assert [item.type for item in whole.output] == [item.type for item in streamed.output]
    tools: Any = [{"name": "now", "input_schema": {"type": "object"}}]
    claude: Any = {"model": "tiny", "max_tokens": 999, "messages": HI, "tools": tools}
    with anthropic.Anthropic(base_url=channels.url, api_key="x", max_retries=0, timeout=PATIENCE) as other:
        answer = other.messages.create(**claude)
        with other.messages.stream(**claude) as told:
            final = told.get_final_message()
    for each in (answer, final):
        blocks = [block.model_dump(include={"thinking", "input", "text"}) for block in each.content]
        assert blocks == [{"thinking": "One."}, {"input": {"a": 1}}, {"thinking": "\nTwo."}, {"text": "Done"}]
