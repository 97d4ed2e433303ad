"""POST /v1/messages and count_tokens, with Anthropic's client and with bare bodies."""

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
from .fake_engine import INFO, PATIENCE, FakeEngine
from .tiny import MODEL, REPLY

MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
HI: list[Any] = [{"role": "user", "content": "Hi"}]


def connect(server: LiveServer, key: str = "none") -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key=key, max_retries=0, timeout=PATIENCE)


@pytest.fixture
def claude(server: LiveServer) -> Iterator[anthropic.Anthropic]:
    with connect(server) as client:
        yield client


def ask(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "max_tokens": 50, "messages": HI, **fields}


def prompt(server: LiveServer, tokenizer: Tokenizer) -> str:
    """What the model has read last."""
    return tokenizer.decode(server.engine.adds[-1].prompt, skip_special_tokens=False)


def events(server: LiveServer, body: dict[str, Any]) -> list[tuple[str, Any]]:
    """(name, payload) of each event."""
    answer = server.post(MESSAGES, {**body, "stream": True})
    assert answer.status == 200, answer.body
    found = []
    for each in answer.body.decode().removesuffix("\n\n").split("\n\n"):
        name, data = each.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


# ---- answers ----


def test_a_message(claude: anthropic.Anthropic, server: LiveServer, tokenizer: Tokenizer) -> None:
    message = claude.messages.create(model=MODEL, max_tokens=50, messages=HI, system="Be brief.")
    (block,) = message.content
    assert (block.type, block.text) == ("text", REPLY)
    assert (message.role, message.model, message.type) == ("assistant", MODEL, "message")
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    assert message.id.startswith("msg_")
    said = prompt(server, tokenizer)
    assert said == ("<|start|>system\nBe brief.<|end|>\n<|start|>user\nHi<|end|>\n<|start|>assistant\n")
    usage = message.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == len(server.engine.adds[-1].prompt)
    assert (usage.cache_read_input_tokens, usage.cache_creation_input_tokens) == (16, 0)
    assert usage.output_tokens == len(tokenizer.encode(REPLY)) + 1
    assert usage.device_seconds > 0


def test_a_stream_gives_the_same_message(claude: anthropic.Anthropic) -> None:
    with claude.messages.stream(model=MODEL, max_tokens=50, messages=HI) as stream:
        texts = list(stream.text_stream)
        streamed = stream.get_final_message()
    whole = claude.messages.create(model=MODEL, max_tokens=50, messages=HI)
    assert "".join(texts) == REPLY
    assert len(texts) > 3
    same = {"content", "stop_reason", "stop_sequence", "usage", "role", "model", "type"}
    one, other = (each.model_dump(include=same) for each in (streamed, whole))
    for each in (one, other):
        each["usage"] = {name: value for name, value in each["usage"].items() if "_tokens" in name}
        each["content"] = [{"type": b["type"], "text": b["text"]} for b in each["content"]]
    assert one == other


def test_events_in_their_order(server: LiveServer) -> None:
    found = events(server, ask(max_tokens=3))
    assert [name for name, _ in found] == [
        "message_start",
        "content_block_start",
        *["content_block_delta"] * 3,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert all(payload["type"] == name for name, payload in found)
    start = found[0][1]["message"]
    assert (start["content"], start["stop_reason"], start["usage"]["output_tokens"]) == ([], None, 0)
    assert found[1][1] == {
        "type": "content_block_start",
        "index": 0,
        "content_block": {"type": "text", "text": ""},
    }
    assert {payload["index"] for name, payload in found if "index" in payload} == {0}
    last = found[-2][1]
    assert last["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert last["usage"]["output_tokens"] == 3


def test_an_answer_without_text_has_no_block(server: LiveServer, says: Any) -> None:
    server.engine.reset(says(""))
    assert server.post(MESSAGES, ask()).json["content"] == []
    assert [name for name, _ in events(server, ask())] == ["message_start", "message_delta", "message_stop"]


def test_stop_sequences(claude: anthropic.Anthropic) -> None:
    message = claude.messages.create(model=MODEL, max_tokens=50, messages=HI, stop_sequences=["wör", "zz"])
    assert message.content[0].text == "Hello, "
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "wör")


def test_sampling_fields_reach_the_engine(claude: anthropic.Anthropic, server: LiveServer) -> None:
    sampling = {"temperature": 0.5, "top_p": 0.25, "top_k": 3}
    claude.messages.create(model=MODEL, max_tokens=7, messages=HI, extra_body=sampling)
    asked = server.engine.adds[-1]
    assert (asked.max_tokens, asked.params.temperature, asked.params.top_p, asked.params.top_k) == (
        7,
        0.5,
        0.25,
        3,
    )


# ---- what the model reads ----


def test_blocks_become_messages(server: LiveServer, tokenizer: Tokenizer) -> None:
    body = ask(
        system=[
            {"type": "text", "text": "One.", "cache_control": {"type": "ephemeral"}},
            {"type": "text", "text": "x-anthropic-billing-header: 1f2e"},
            {"type": "text", "text": "Two."},
        ],
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "s"},
                    {"type": "redacted_thinking", "data": "xx"},
                    {"type": "text", "text": "c"},
                    {"type": "tool_use", "id": "t1", "name": "add", "input": {"a": 1}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "3"}]},
                    {"type": "tool_result", "tool_use_id": "t1", "content": "no", "is_error": True},
                    {"type": "text", "text": "d"},
                ],
            },
            {"role": "system", "content": "Mind."},
        ],
    )
    answer = server.post(MESSAGES, body)
    assert answer.status == 200, answer.body
    turns = prompt(server, tokenizer).split("<|start|>")[1:]
    assert [turn.removesuffix("<|end|>\n") for turn in turns] == [
        "system\nOne.Two.",
        "user\na\nb",
        "assistant\nc",
        "tool\n3",
        "tool\nError: no",
        "user\nd",
        "system\nMind.",
        "assistant\n",
    ]
    ignored = answer.headers["x-penstock-ignored"].split(", ")
    assert ignored == ["x-anthropic-billing-header", "messages[].content[].redacted_thinking"]


def test_the_last_message_of_the_assistant_is_gone_on_with(server: LiveServer, tokenizer: Tokenizer) -> None:
    body = ask(messages=[*HI, {"role": "assistant", "content": "Well, he"}])
    assert server.post(MESSAGES, body).status == 200
    assert prompt(server, tokenizer).endswith("<|start|>assistant\nWell, he")


def test_tokens_are_counted_as_they_are_read(claude: anthropic.Anthropic, server: LiveServer) -> None:
    counted = claude.messages.count_tokens(model=MODEL, messages=HI, system="Be brief.")
    claude.messages.create(model=MODEL, max_tokens=5, messages=HI, system="Be brief.")
    assert counted.input_tokens == len(server.engine.adds[-1].prompt)


def test_thinking_is_the_templates_business(tokenizer: Tokenizer, says: Any) -> None:
    template = ChatTemplate({"default": "{{ enable_thinking }} {{ reasoning_effort | default('-') }}"}, {})
    long = FakeEngine(says(REPLY), info=replace(INFO, max_model_len=4096))
    with running(tokenizer, says(REPLY), template=template, engine=long) as server:
        seen = []
        for thinking in ({"type": "enabled", "budget_tokens": 1024}, {"type": "disabled"}):
            answer = server.post(MESSAGES, ask(max_tokens=2000, thinking=thinking))
            seen.append((answer.status, prompt(server, tokenizer) if server.engine.adds else answer.json))
        body = ask(output_config={"effort": "max"})
        seen.append((server.post(MESSAGES, body).status, prompt(server, tokenizer)))
    assert seen == [(200, "True -"), (200, "False none"), (200, "True max")]


# ---- errors ----


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"messages": []}, "messages must not be empty"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": ["Hi"]}, "messages[0]"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role must be one of user, assistant"),
        ({"messages": [{"role": "user"}]}, "messages[0].content must be a string or a list"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content must not be empty"),
        ({"messages": [{"role": "user", "content": [1]}]}, "messages[0].content[0] must be an object"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
            "messages[0].content[0].text must be a string",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            "messages[0].content[0].type 'image' is not supported",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "1", "name": "x"}]}]},
            "messages[0].content[0].type must be one of text, tool_result here",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": "x"}]}]},
            "messages[0].content[0].tool_use_id",
        ),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "content": [{"type": "tool_use", "id": "1", "name": "x", "input": 1}],
                    }
                ]
            },
            "messages[0].content[0].input must be an object",
        ),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "content": [{"type": "tool_use", "id": "1", "name": "x", "input": {}}],
                    }
                ]
            },
            "tool_result blocks are missing",
        ),
        ({"system": 5}, "system"),
        ({"system": [{"type": "image"}]}, "system[0].type"),
        ({"stop_sequences": [""]}, "stop_sequences must not hold empty strings"),
        ({"temperature": 1000}, "temperature"),
        *(
            ({"messages": [{"role": role, "content": [block]}]}, f"messages[0].content[0].{name}")
            for role, block, name in (
                ("assistant", {"type": "tool_use", "name": "x", "input": {}}, "id"),
                (
                    "assistant",
                    {"type": "tool_use", "id": "", "name": "x", "input": {}},
                    "id must not be empty",
                ),
                (
                    "assistant",
                    {"type": "tool_use", "id": "1", "name": "", "input": {}},
                    "name must not be empty",
                ),
                ("assistant", {"type": "tool_use", "id": "1", "name": "x"}, "input"),
                ("assistant", {"type": "redacted_thinking"}, "data"),
                ("user", {"type": "tool_result", "tool_use_id": ""}, "tool_use_id must not be empty"),
            )
        ),
        ({"thinking": {"type": "enabled", "budget_tokens": 100}}, "thinking.budget_tokens must be at least"),
        ({"thinking": {"type": "enabled"}}, "Missing required parameter: thinking.budget_tokens"),
        (
            {"thinking": {"type": "often"}},
            "thinking.type must be one of enabled, disabled, adaptive, between_tools",
        ),
        ({"output_config": {"effort": "huge"}}, "output_config.effort must be one of"),
        (
            {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
            "tools[0].type 'web_search_2025",
        ),
        ({"tools": [{"name": "add"}]}, "tools[0].input_schema"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "some"}}, "tool_choice.type must be one of auto, any, none, tool"),
        ({"system": [{"type": "text", "text": "a", "cache_control": {"type": "x"}}]}, "cache_control.type"),
        ({"mcp_servers": [{"type": "url"}]}, "mcp_servers is not supported"),
        ({"max_token": 5}, "max_token"),
    ],
)
def test_bad_input_is_a_400_in_the_dialects_shape(
    server: LiveServer, fields: dict[str, Any], said: str
) -> None:
    answer = server.post(MESSAGES, ask(**fields))
    assert answer.status == 400, answer.body
    error = answer.json
    assert set(error) == {"type", "error"}
    assert (error["type"], error["error"]["type"]) == ("error", "invalid_request_error")
    assert said in error["error"]["message"]
    assert server.engine.adds == []


def test_errors_before_and_beside_the_request_speak_the_dialect(tokenizer: Tokenizer, says: Any) -> None:
    with running(tokenizer, says(REPLY), api_key=("k1",)) as server:
        with connect(server, "wrong") as client, pytest.raises(anthropic.AuthenticationError) as wrong:
            client.messages.create(model=MODEL, max_tokens=5, messages=HI)
        assert wrong.value.body["error"]["type"] == "authentication_error"
        with connect(server, "k1") as client:
            assert client.messages.create(model=MODEL, max_tokens=50, messages=HI).content[0].text == REPLY
            with pytest.raises(anthropic.NotFoundError) as missing:
                client.messages.create(model="other", max_tokens=5, messages=HI)
            assert missing.value.body["error"]["type"] == "not_found_error"
        key = {"x-api-key": "k1"}
        for path, status in ((MESSAGES, 400), (COUNT, 400), ("/v1/completions", 400)):
            answer = server.post(path, b"{", key)
            assert (answer.status, answer.json.get("type") == "error") == (status, path != "/v1/completions")
        assert server.request("GET", MESSAGES, headers=key).json["type"] == "error"
        version = {**key, "anthropic-version": "2023-01-01"}
        assert "2023-06-01" in server.post(MESSAGES, ask(), version).json["error"]["message"]


def test_an_engine_that_is_full_or_fails(server: LiveServer, claude: anthropic.Anthropic) -> None:
    server.engine.queue_limit = 0
    full = server.post(MESSAGES, ask())
    assert (full.status, full.json["error"]["type"]) == (503, "overloaded_error")
    server.engine.queue_limit = None
    server.engine.fail_at = 2
    found = events(server, ask())
    assert found[-1][0] == "error"
    assert found[-1][1]["error"] == {"type": "api_error", "message": "device says no"}
    stream = claude.messages.create(model=MODEL, max_tokens=50, messages=HI, stream=True)
    with stream, pytest.raises(anthropic.APIStatusError, match="device says no"):
        list(stream)
