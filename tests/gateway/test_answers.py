"""What verifiers are shown of an answer in each dialect, and that nobody sees log-probabilities he did not
ask for."""

from __future__ import annotations

import json
from typing import Any

import pytest

from penstock.gateway.answers import DIALECTS, read, without_logprobs
from penstock.gateway.endpoints import ENDPOINTS
from penstock.gateway.envelope import Envelope
from penstock.gateway.policy.escalation import Answer, Choice

BY_PATH = {endpoint.path: endpoint for endpoint in ENDPOINTS}
CHAT, COMPLETIONS, RESPONSES, MESSAGES = DIALECTS


def sse(*events: dict[str, Any]) -> bytes:
    named = (f"event: {each['type']}\n" if "type" in each else "" for each in events)
    return "".join(
        f"{name}data: {json.dumps(each)}\n\n" for name, each in zip(named, events, strict=True)
    ).encode()


def entries(*logprobs: float) -> dict[str, Any]:
    return {"content": [{"token": "x", "logprob": each, "top_logprobs": []} for each in logprobs]}


def chunk(delta: dict[str, Any], index: int = 0, **more: Any) -> dict[str, Any]:
    return {"id": "c", "choices": [{"index": index, "delta": delta, "finish_reason": None, **more}]}


PART = {"type": "output_text", "text": "Hi there", "logprobs": entries(-0.1, -0.2)["content"]}
RESPONSE = {
    "id": "r",
    "status": "incomplete",
    "incomplete_details": {"reason": "max_output_tokens"},
    "output": [
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "content": [PART]},
    ],
}

CASES = [
    pytest.param(
        CHAT,
        {
            "choices": [
                {"index": 0, "message": {"content": "Hi"}, "finish_reason": "stop", "logprobs": entries(-1.0)}
            ]
        },
        [
            chunk({"role": "assistant", "content": ""}),
            chunk({"content": "H"}, logprobs=entries(-0.5)),
            chunk({"content": "i"}, logprobs=entries(-1.5)),
            chunk({}, finish_reason="stop"),
            {"choices": [], "usage": {}},
        ],
        [Choice("Hi", "stop", (-1.0,))],
        [Choice("Hi", "stop", (-0.5, -1.5))],
        id="chat",
    ),
    pytest.param(
        CHAT,
        {
            "choices": [
                {"index": 1, "message": {"content": "b"}, "finish_reason": "content_filter"},
                {"index": 0, "message": {"content": None, "tool_calls": [{}]}, "finish_reason": "tool_calls"},
            ]
        },
        [
            chunk({"content": "b"}, 1),
            chunk({"tool_calls": [{"index": 0}]}),
            chunk({}, 1, finish_reason="content_filter"),
            chunk({}, 0, finish_reason="tool_calls"),
        ],
        [Choice("", "tool_calls", None, True), Choice("b", "content_filter")],
        None,
        id="chat, two choices and a tool",
    ),
    pytest.param(
        COMPLETIONS,
        {
            "choices": [
                {
                    "index": 0,
                    "text": "ab",
                    "finish_reason": "length",
                    "logprobs": {"token_logprobs": [None, -2]},
                }
            ]
        },
        [
            {"choices": [{"index": 0, "text": "a", "logprobs": {"token_logprobs": [None]}}]},
            {"choices": [{"index": 0, "text": "b", "logprobs": {"token_logprobs": [-2]}}]},
            {"choices": [{"index": 0, "text": "", "finish_reason": "length"}]},
        ],
        [Choice("ab", "length", (-2.0,))],
        None,
        id="completions",
    ),
    pytest.param(
        RESPONSES,
        RESPONSE,
        [
            {"type": "response.created", "response": {"id": "r", "status": "in_progress", "output": []}},
            {"type": "response.output_text.delta", "delta": "Hi", "logprobs": [{"logprob": -0.1}]},
            {"type": "response.incomplete", "response": RESPONSE},
        ],
        [Choice("Hi there", "length", (-0.1, -0.2))],
        None,
        id="responses",
    ),
    pytest.param(
        MESSAGES,
        {
            "content": [{"type": "text", "text": "Hi"}, {"type": "tool_use", "name": "f"}],
            "stop_reason": "tool_use",
        },
        [
            {"type": "message_start", "message": {"content": []}},
            {"type": "content_block_start", "content_block": {"type": "text", "text": ""}},
            {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "Hi"}},
            {"type": "content_block_start", "content_block": {"type": "tool_use"}},
            {"type": "content_block_delta", "delta": {"type": "input_json_delta", "partial_json": "{}"}},
            {"type": "message_delta", "delta": {"stop_reason": "tool_use"}},
            {"type": "message_stop"},
        ],
        [Choice("Hi", "tool_calls", None, True)],
        None,
        id="messages",
    ),
]


@pytest.mark.parametrize(("path", "whole", "events", "expected", "streamed"), CASES)
def test_all_dialects_say_the_same(
    path: str, whole: Any, events: Any, expected: list[Choice], streamed: list[Choice] | None
) -> None:
    body = json.dumps(whole).encode()
    assert read(BY_PATH[path], body, streamed=False, tokens=3) == Answer(tuple(expected), 3)
    stream = sse(*events) + b"data: [DONE]\n\n"
    assert read(BY_PATH[path], stream, streamed=True, tokens=3) == Answer(tuple(streamed or expected), 3)


@pytest.mark.parametrize("path", DIALECTS)
def test_what_is_no_answer_has_no_text(path: str) -> None:
    for body in (b"", b"[1]", b"{}", b'{"choices": 3, "output": "x", "content": {"a": 1}}', b"\xff"):
        for streamed in (False, True):
            answer = read(
                BY_PATH[path],
                b"data: " + body + b"\n\n" if streamed else body,
                streamed=streamed,
                tokens=None,
            )
            assert "".join(each.text for each in answer.choices) == ""


@pytest.mark.parametrize(("path", "whole", "events", "expected", "streamed"), CASES)
def test_log_probabilities_are_taken_out_and_nothing_else(
    path: str, whole: Any, events: Any, expected: Any, streamed: Any
) -> None:
    def logprobs(value: Any) -> list[Any]:
        if isinstance(value, list):
            return [each for entry in value for each in logprobs(entry)]
        if not isinstance(value, dict):
            return []
        own = [value["logprobs"]] if value.get("logprobs") else []
        return own + [each for entry in value.values() for each in logprobs(entry)]

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(each) for each in value]
        if isinstance(value, dict):
            return {name: plain(each) for name, each in value.items() if name != "logprobs"}
        return value

    bare = json.loads(without_logprobs(json.dumps(whole).encode(), streamed=False))
    assert not logprobs(bare)
    assert plain(bare) == plain(whole)
    stream = without_logprobs(sse(*events) + b": a comment\n\ndata: [DONE]\n\n", streamed=True)
    assert stream.endswith(b": a comment\n\ndata: [DONE]\n\n")
    found = [json.loads(line[6:]) for line in stream.decode().split("\n") if line.startswith("data: {")]
    assert not logprobs(found)
    assert plain(found) == plain(events)


ASKS = [
    (CHAT, {"messages": []}, {"logprobs": True}, True),
    (CHAT, {"messages": [], "logprobs": False}, {"logprobs": True}, True),
    (
        CHAT,
        {"messages": [], "logprobs": True, "top_logprobs": 2},
        {"logprobs": True, "top_logprobs": 2},
        False,
    ),
    (COMPLETIONS, {"prompt": "x"}, {"logprobs": 0}, True),
    (COMPLETIONS, {"prompt": "x", "logprobs": 0}, {"logprobs": 0}, False),
    (RESPONSES, {"input": "x", "include": ["a"]}, {"include": ["a", "message.output_text.logprobs"]}, True),
    (MESSAGES, {"messages": []}, {}, False),
]


@pytest.mark.parametrize(("path", "given", "sent", "hides"), ASKS)
def test_how_they_are_asked_for(path: str, given: dict[str, Any], sent: dict[str, Any], hides: bool) -> None:
    envelope = Envelope(json.dumps({"model": "m", **given}).encode(), BY_PATH[path])
    before = dict(envelope._fields)
    twin = envelope.copy()
    assert DIALECTS[path].ask(twin) is hides
    assert {name: json.loads(bytes(twin._fields[name])) for name in sent} == sent
    assert envelope._fields == before
