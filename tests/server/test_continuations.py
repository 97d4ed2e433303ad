"""Other ways to go on with a prompt: the best of many, a search, a filled gap; and what would be asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import openai
import pytest
from tokenizers import AddedToken

from penstock.core.plan import Event
from penstock.server import shapes
from penstock.text.infill import Infill
from penstock.text.tokenizer import Tokenizer

from .conftest import LiveServer, running
from .fake_engine import Asked
from .tiny import MODEL, REPLY, make_tokenizer

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "Hi"}]


# ---- the best of many ----


def test_the_best_of_many_are_told(
    client: openai.OpenAI, server: LiveServer, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["worst", "best", "middle", "good"]

    def reply(asked: Asked) -> list[int]:
        return tokenizer.encode(texts[int(asked.id.rpartition(":")[2]) % 4], add_special_tokens=False)

    means = dict(zip((tokenizer.encode(text)[0] for text in texts), (-3.0, -0.5, -2.0, -1.0), strict=True))
    first = dict[str, int]()

    def step(running: Any) -> Event:
        event: Event = plain(running)
        begins = first.setdefault(event.request, event.tokens[0])
        told = [entry._replace(logprob=means[begins]) for entry in event.logprobs]
        return event._replace(logprobs=tuple(told))

    server.engine.reset(reply)
    plain = server.engine._step
    monkeypatch.setattr(server.engine, "_step", step)
    answer = client.completions.create(model=MODEL, prompt=["a", "b"], n=2, best_of=4, max_tokens=20)
    told = [(choice.index, choice.text) for choice in answer.choices]
    assert told == [(0, "best"), (1, "good"), (2, "best"), (3, "good")]
    assert len(server.engine.adds) == 8
    assert all(add.params.logprobs == 0 for add in server.engine.adds)
    assert all(choice.logprobs is None for choice in answer.choices)
    assert answer.usage.completion_tokens == 2 * sum(len(tokenizer.encode(text)) + 1 for text in texts)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"best_of": 129}, "best_of"),
        ({"best_of": 3, "n": 2, "use_beam_search": True}, "best_of"),
        ({"best_of": "x"}, "best_of"),
    ],
)
def test_what_cannot_be_the_best_of(server: LiveServer, fields: dict[str, Any], param: str) -> None:
    refused = server.post(TEXT, {"prompt": "a", **fields})
    assert (refused.status, refused.json["error"]["param"]) == (400, param)


# ---- search ----


def test_a_search_tells_the_most_probable(server: LiveServer, tokenizer: Tokenizer) -> None:
    """The fake engine finds the token behind its own the most probable (-0.25), then its own (-0.5)."""
    server.engine.reset(lambda asked: tokenizer.encode("a"))  # a
    body = {"prompt": ["x", "y"], "n": 2, "use_beam_search": True, "max_tokens": 2, "return_token_ids": True}
    answer = server.post(TEXT, body)
    assert answer.status == 200, answer.body
    choices = answer.json["choices"]
    assert [(choice["index"], choice["text"]) for choice in choices] == [
        (0, "bb"),
        (1, "ba"),
        (2, "bb"),
        (3, "ba"),
    ]
    assert {choice["finish_reason"] for choice in choices} == {"length"}
    assert choices[0]["token_ids"] == tokenizer.encode("bb")
    usage = answer.json["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (2, 8)
    assert usage["device_seconds"] == pytest.approx(0.001 * len(server.engine.adds))
    assert len(server.engine.adds) == 2 + 4  # the second step has two beams of each prompt
    assert {add.max_tokens for add in server.engine.adds} == {1}


def test_a_search_ends_with_the_end_of_sequence(server: LiveServer, tokenizer: Tokenizer) -> None:
    (eos,) = server.engine.info.eos_ids
    server.engine.reset(lambda asked: [eos - 1])  # so that eos is the most probable
    body = {"messages": HI, "use_beam_search": True, "max_tokens": 4, "temperature": 0.5}
    answer = server.post(CHAT, body)
    assert answer.headers["x-penstock-ignored"] == "temperature"
    (choice,) = answer.json["choices"]
    assert (choice["message"]["content"], choice["finish_reason"], choice["stop_reason"]) == ("", "stop", eos)
    included = server.post(CHAT, {**body, "include_stop_str_in_output": True, "skip_special_tokens": False})
    assert included.json["choices"][0]["message"]["content"] == "<|eos|>"
    assert server.post(CHAT, {**body, "ignore_eos": True}).json["choices"][0]["finish_reason"] == "length"


def test_a_search_may_be_streamed(server: LiveServer, tokenizer: Tokenizer) -> None:
    server.engine.reset(lambda asked: tokenizer.encode("a"))
    body = {"messages": HI, "n": 2, "use_beam_search": True, "max_tokens": 3}
    whole = [choice["message"]["content"] for choice in server.post(CHAT, body).json["choices"]]
    texts = ["", ""]
    for event in server.events(CHAT, body):
        for choice in event["choices"]:
            texts[choice["index"]] += choice["delta"].get("content") or ""
    assert texts == whole == ["bbb", "bba"]


@pytest.mark.parametrize(
    "fields",
    [
        {"top_p": 0.5},
        {"stop": "x"},
        {"logprobs": 1},
        {"echo": True},
        {"min_tokens": 1},
        {"logit_bias": {"1": 1}},
    ],
)
def test_what_a_search_does_not_know_is_refused(server: LiveServer, fields: dict[str, Any]) -> None:
    refused = server.post(TEXT, {"prompt": "a", "use_beam_search": True, **fields})
    assert (refused.status, refused.json["error"]["code"]) == (400, "unsupported_parameter")
    assert refused.json["error"]["param"] == next(iter(fields))
    neutral = {"top_p": 1, "stop": [], "echo": False, "min_tokens": 0, "logit_bias": {}}
    assert (
        server.post(TEXT, {"prompt": "a", "use_beam_search": True, "max_tokens": 2, **neutral}).status == 200
    )


def test_a_search_that_fails_is_told_and_billed(server: LiveServer, tokenizer: Tokenizer) -> None:
    server.engine.fail_at = 0
    failed = server.post(TEXT, {"prompt": "a", "n": 2, "use_beam_search": True})
    assert (failed.status, failed.json["error"]["message"]) == (500, "device says no")
    server.engine.reset(lambda asked: tokenizer.encode("a"))
    server.engine.queue_limit = 0
    assert server.post(TEXT, {"prompt": "a", "n": 2, "use_beam_search": True}).status == 503
    server.engine.queue_limit = None
    assert server.engine.load == 0


# ---- a gap ----

FAMILIES = {
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"): "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>",
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"): "<｜fim▁begin｜>a<｜fim▁hole｜>b<｜fim▁end｜>",
    ("[SUFFIX]", "[PREFIX]"): "[SUFFIX]b[PREFIX]a",
}


def with_marks(marks: tuple[str, ...]) -> Tokenizer:
    tokenizer = make_tokenizer()
    tokenizer._rust.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    return tokenizer


@pytest.mark.parametrize("marks", FAMILIES)
def test_a_gap_is_filled(says: Callable[[str], Any], marks: tuple[str, ...]) -> None:
    tokenizer = with_marks(marks)
    with running(tokenizer, says(REPLY)) as server:
        answer = server.post(TEXT, {"prompt": ["a", "c"], "suffix": "b", "max_tokens": 50})
        assert [choice["text"] for choice in answer.json["choices"]] == [REPLY, REPLY]
        asked = server.engine.adds[0]
        assert tokenizer.decode(asked.prompt, skip_special_tokens=False) == FAMILIES[marks]
        infill = Infill.of(tokenizer.token_id)
        assert infill is not None
        assert set(infill.ends) <= set(asked.params.stop_token_ids)
        for fields, param in (
            ({"echo": True}, "echo"),
            ({"truncate_prompt_tokens": 3}, "truncate_prompt_tokens"),
            ({"prompt": [1, 2]}, "prompt"),
            ({"suffix": "x" * 300}, "prompt"),
        ):
            refused = server.post(TEXT, {"prompt": "a", "suffix": "b", **fields})
            assert (refused.status, refused.json["error"]["param"]) == (400, param)


def test_a_model_that_fills_no_gaps_says_so(server: LiveServer) -> None:
    refused = server.post(TEXT, {"prompt": "a", "suffix": "b"})
    assert (refused.status, refused.json["error"]["param"]) == (400, "suffix")
    assert "Qwen2.5-Coder" in refused.json["error"]["message"]
    assert server.post(TEXT, {"prompt": "a", "suffix": ""}).status == 200


# ---- what would be asked ----


def test_a_chat_is_rendered(server: LiveServer, tokenizer: Tokenizer) -> None:
    body = {"messages": HI, "max_tokens": 7, "temperature": 0.5, "stop": "x"}
    rendered = server.post(f"{CHAT}/render", body).json
    assert server.engine.adds == []
    assert server.post(CHAT, body).status == 200
    asked = server.engine.adds[0]
    assert rendered["token_ids"] == list(asked.prompt)
    params = rendered["sampling_params"]
    assert (params["max_tokens"], params["temperature"], params["stop"]) == (7, 0.5, ["x"])
    several = server.post(f"{TEXT}/render", {"prompt": ["a", [1, 2]]}).json
    assert [each["token_ids"] for each in several] == [tokenizer.encode("a"), [1, 2]]
    assert server.post(f"{CHAT}/render", {"messages": []}).status == 400
    searched = server.post(f"{CHAT}/render", {**body, "use_beam_search": True, "n": 2, "stop": []})
    assert searched.json["error"]["param"] == "use_beam_search"


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/v1/messages", {"system": "Be brief.", "messages": HI, "stop_sequences": ["x"]}, {"top_k": 3}),
        ("/v1/responses", {"instructions": "Be brief.", "input": "Hi"}, {"seed": 5, "stop": ["x"]}),
    ],
)
def test_dialects_are_rendered(server: LiveServer, path: str, body: Any, said: dict[str, Any]) -> None:
    most = {"/v1/messages": "max_tokens", "/v1/responses": "max_output_tokens"}[path]
    asking = {"model": MODEL, **body, **said, most: 7, "temperature": 0.5, "cache_salt": "s"}
    answer = server.post(f"{path}/render", asking)
    rendered = msgspec.json.decode(answer.body, type=shapes.Rendered)
    assert server.engine.adds == []
    assert server.post(path, asking).status == 200
    (asked,) = server.engine.adds
    assert rendered.token_ids == list(asked.prompt)
    assert (rendered.model, rendered.cache_salt, rendered.stream) == (MODEL, "s", False)
    params = rendered.sampling_params
    assert (params["max_tokens"], params["temperature"], params["stop"]) == (7, 0.5, ["x"])
    for name in said.keys() - {"stop"}:
        assert params[name] == said[name]


def test_what_a_response_goes_on_with_is_rendered(server: LiveServer) -> None:
    first = server.post("/v1/responses", {"input": "Hi"}).json["id"]
    asking = {"input": "And?", "previous_response_id": first}
    rendered = server.post("/v1/responses/render", asking).json
    server.post("/v1/responses", asking)
    assert rendered["token_ids"] == list(server.engine.adds[-1].prompt)
    assert len(rendered["token_ids"]) > len(server.engine.adds[0].prompt)
    gone = server.post("/v1/responses/render", {**asking, "previous_response_id": "resp_0"})
    assert gone.json["error"]["code"] == "previous_response_not_found"


@pytest.mark.parametrize("path", ["/v1/messages/render", "/v1/responses/render"])
def test_errors_of_what_is_rendered_have_the_dialects_shape(server: LiveServer, path: str) -> None:
    body = {"model": MODEL, "messages": HI, "input": "Hi", "max_tokens": 7, "temperature": -1}
    body.pop("input" if "messages" in path else "messages")
    body.pop("max_tokens" if "responses" in path else "", None)
    refused = server.post(path, body)
    unknown = server.post(path, {**body, "model": "other"})
    assert (refused.status, unknown.status) == (400, 404)
    assert "temperature" in refused.json["error"]["message"]
    if "messages" in path:
        assert (refused.json["type"], refused.json["error"]["type"]) == ("error", "invalid_request_error")
        assert unknown.json["error"]["type"] == "not_found_error"
    else:
        assert refused.json["error"]["param"] == "temperature"
        assert unknown.json["error"]["code"] == "model_not_found"
