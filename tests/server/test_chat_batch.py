"""POST /v1/chat/completions/batch: many conversations, one request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from penstock.server import shapes
from penstock.text.tokenizer import Tokenizer

from .conftest import LiveServer, running
from .fake_engine import Asked
from .tiny import MODEL, REPLY

CHAT = "/v1/chat/completions"
PATH = f"{CHAT}/batch"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


TALKS = [[user("Hi")], [{"role": "system", "content": "Be brief."}, user("What is a pod?")], [user("Hi")]]


@pytest.fixture
def counting(tokenizer: Tokenizer) -> Callable[[Asked], list[int]]:
    """Says how many tokens it has read."""
    return lambda asked: tokenizer.encode(f"{len(asked.prompt)} tokens", add_special_tokens=False)


def test_a_choice_for_each_conversation(server: LiveServer, counting: Any) -> None:
    server.engine.reset(counting)
    body = {"model": MODEL, "messages": TALKS, "max_tokens": 20, "seed": 3, "return_token_ids": True}
    answer = server.post(PATH, body)
    told = msgspec.json.decode(answer.body, type=shapes.ChatCompletion)
    spec = server.engine.adds[0].spec
    assert {id(add.spec) for add in server.engine.adds} == {id(spec)}
    alone = [server.post(CHAT, {**body, "messages": talk}).json for talk in TALKS]
    assert [list(prompt.token_ids) for prompt in spec.prompts] == [each["prompt_token_ids"] for each in alone]
    assert [choice.index for choice in told.choices] == [0, 1, 2]
    assert [choice.message.content for choice in told.choices] == [
        each["choices"][0]["message"]["content"] for each in alone
    ]
    assert [choice.token_ids for choice in told.choices] == [
        each["choices"][0]["token_ids"] for each in alone
    ]
    for name in ("prompt_tokens", "completion_tokens", "total_tokens", "device_seconds"):
        assert answer.json["usage"][name] == pytest.approx(sum(each["usage"][name] for each in alone))
    assert answer.json["id"].startswith("chatcmpl-")


def test_one_conversation_is_a_list_of_one(server: LiveServer) -> None:
    (choice,) = server.post(PATH, {"messages": TALKS[:1]}).json["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (REPLY, "stop")


def test_thoughts_are_told_from_answers(tokenizer: Tokenizer, says: Any) -> None:
    with running(tokenizer, says("hm</think>yes"), reasoning_parser="deepseek_r1") as server:
        choices = server.post(PATH, {"messages": TALKS}).json["choices"]
    assert [(each["message"]["reasoning"], each["message"]["content"]) for each in choices] == [
        ("hm", "yes")
    ] * 3


def test_answers_that_begin_within_a_thought_are_not_mixed_with_others(
    tokenizer: Tokenizer, says: Any
) -> None:
    with running(tokenizer, says("yes"), reasoning_parser="deepseek_r1") as server:
        talks = [
            [user("Hi"), {"role": "assistant", "content": said}] for said in ("<think>a", "<think>a</think>b")
        ]
        goes_on = {"continue_final_message": True, "add_generation_prompt": False}
        assert [server.post(PATH, {"messages": [talk], **goes_on}).status for talk in talks] == [200, 200]
        refused = server.post(PATH, {"messages": talks, **goes_on})
        assert (refused.status, refused.json["error"]["param"]) == (400, "messages")
        assert "within a thought" in refused.json["error"]["message"]


def test_each_echoes_its_own_beginning(server: LiveServer) -> None:
    talks = [[user("Hi"), {"role": "assistant", "content": said}] for said in ("One ", "Two ")]
    goes_on = {"echo": True, "continue_final_message": True, "logprobs": True}
    choices = server.post(PATH, {"messages": talks, **goes_on}).json["choices"]
    assert [each["message"]["content"] for each in choices] == [f"One {REPLY}", f"Two {REPLY}"]
    assert all(each["logprobs"]["content"] for each in choices)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [[]]}, "messages[0]"),
        ({"messages": [TALKS[0], []]}, "messages[1]"),
        ({"messages": [TALKS[0], [{"role": "user"}]]}, "messages[1][0].content"),
        ({"messages": TALKS[0]}, "messages[0]"),
        ({"messages": [[user("a")]] * 5000}, "messages"),
        ({"messages": [[user("a")] * 3] * 3000}, "messages"),
        ({"messages": [[user("a")], [user("a" * 3000)]]}, "messages"),
        ({"stream": True}, "stream"),
        ({"n": 2}, "n"),
        ({"best_of": 2}, "best_of"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"return_prompt_text": True}, "return_prompt_text"),
        ({"generated_token_ids": [1]}, "generated_token_ids"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"temperature": -1}, "temperature"),
        ({"model": "other"}, "model"),
    ],
)
def test_what_is_refused(server: LiveServer, fields: dict[str, Any], param: str) -> None:
    answer = server.post(PATH, {"messages": TALKS, **fields})
    assert answer.status == (404 if "model" in fields else 400), answer.body
    assert answer.json["error"]["param"] == param
    assert not server.engine.adds


def test_values_that_ask_for_nothing_are_taken(server: LiveServer) -> None:
    nothing = {"stream": False, "n": 1, "tools": [], "tool_choice": "none", "best_of": 1, "user": "x"}
    answer = server.post(PATH, {"messages": TALKS, **nothing, "prompt_logprobs": None})
    assert answer.status == 200
    assert answer.headers["x-penstock-ignored"] == "user"


def test_one_that_fails_fails_the_request(server: LiveServer) -> None:
    server.engine.fail_at = 1
    assert server.post(PATH, {"messages": TALKS}).status == 500
    server.engine.fail_at, server.engine.queue_limit = None, 2
    assert server.post(PATH, {"messages": TALKS}).status == 503
