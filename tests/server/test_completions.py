"""POST /v1/completions through the official client and over the wire."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from penstock.text.tokenizer import Tokenizer

from .conftest import LiveServer
from .tiny import MODEL, REPLY

PATH = "/v1/completions"


def test_a_whole_answer_has_openais_shape(server: LiveServer) -> None:
    answer = server.post(PATH, {"model": MODEL, "prompt": "Say", "max_tokens": 5}).json
    assert answer.pop("id").startswith("cmpl-")
    assert answer.pop("created") > 1_700_000_000
    assert answer.pop("system_fingerprint").startswith("fp_")
    usage = answer.pop("usage")
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (3, 5, 8)
    assert usage["prompt_tokens_details"] == {"cached_tokens": 3}
    assert answer == {
        "object": "text_completion",
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "text": "Hello",
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
                "prompt_logprobs": None,
                "token_ids": None,
                "prompt_token_ids": None,
            }
        ],
    }


def test_the_default_limit_is_sixteen(server: LiveServer) -> None:
    server.post(PATH, {"prompt": "Say"})
    server.post(PATH, {"prompt": "Say", "max_tokens": None})
    server.post(PATH, {"prompt": [1] * 250})
    assert [add.max_tokens for add in server.engine.adds] == [16, 16, 6]


def test_the_official_client(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="Say", max_tokens=100)
    assert answer.choices[0].text == REPLY
    assert answer.choices[0].finish_reason == "stop"
    chunks = list(client.completions.create(model=MODEL, prompt="Say", max_tokens=100, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == REPLY
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_the_order_of_a_stream(server: LiveServer) -> None:
    body = {"prompt": "Say", "max_tokens": 3, "stream_options": {"include_usage": True}}
    *events, usage = server.events(PATH, body)
    assert [event["choices"] for event in events] == [
        [{"index": 0, "text": "H", "logprobs": None, "finish_reason": None}],
        [{"index": 0, "text": "e", "logprobs": None, "finish_reason": None}],
        [{"index": 0, "text": "l", "logprobs": None, "finish_reason": "length", "stop_reason": None}],
    ]
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 3
    assert {event["object"] for event in events} == {"text_completion"}


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("ab", [[64, 65]]),
        (["ab", "c"], [[64, 65], [66]]),
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
        (["ab", [7]], [[64, 65], [7]]),
    ],
)
def test_prompts_as_text_and_as_ids(server: LiveServer, prompt: Any, prompts: list[list[int]]) -> None:
    answer = server.post(PATH, {"prompt": prompt, "max_tokens": 2}).json
    assert [list(add.prompt) for add in server.engine.adds] == prompts
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(prompts)))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, prompts))
    assert answer["usage"]["completion_tokens"] == 2 * len(prompts)


@pytest.mark.parametrize("stream", [False, True])
def test_n_of_several_prompts(server: LiveServer, stream: bool) -> None:
    body = {"prompt": ["a", "bc"], "n": 2, "best_of": 2, "echo": True, "max_tokens": 1}
    if stream:
        texts = {0: "", 1: "", 2: "", 3: ""}
        for event in server.events(PATH, body):
            texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    else:
        answer = server.post(PATH, body).json
        texts = {choice["index"]: choice["text"] for choice in answer["choices"]}
        assert answer["usage"]["prompt_tokens"] == 3
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 3
    assert texts == {0: "aH", 1: "aH", 2: "bcH", 3: "bcH"}
    ids = [add.id for add in server.engine.adds]
    assert [add.leader for add in server.engine.adds] == [None, ids[0], None, ids[2]]


@pytest.mark.parametrize("stream", [False, True])
def test_echo_of_token_ids(server: LiveServer, tokenizer: Tokenizer, stream: bool) -> None:
    body = {"prompt": tokenizer.encode("wörd "), "echo": True, "max_tokens": 2}
    if stream:
        text = "".join(event["choices"][0]["text"] for event in server.events(PATH, body))
    else:
        text = server.post(PATH, body).json["choices"][0]["text"]
    assert text == "wörd He"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("logprobs", [None, 1])
def test_echo_of_the_prompt_alone(server: LiveServer, stream: bool, logprobs: int | None) -> None:
    body: dict[str, Any] = {"prompt": "abc", "echo": True, "max_tokens": 0, "logprobs": logprobs}
    if stream:
        events = server.events(PATH, {**body, "stream_options": {"include_usage": True}})
        assert len(events) == 2
        choice, usage = events[0]["choices"][0], events[1]["usage"]
    else:
        answer = server.post(PATH, body).json
        choice, usage = answer["choices"][0], answer["usage"]
    assert (choice["text"], choice["finish_reason"]) == ("abc", "length")
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (3, 0)
    assert server.engine.adds[0].max_tokens == 1
    if logprobs is not None:
        assert choice["logprobs"] == {
            "tokens": ["a", "b", "c"],
            "token_logprobs": [None, -0.5, -0.5],
            "top_logprobs": [None, {"b": -0.5, "c": -0.25}, {"c": -0.5, "d": -0.25}],
            "text_offset": [0, 1, 2],
        }


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("echo", [False, True])
def test_logprobs(server: LiveServer, stream: bool, echo: bool) -> None:
    body = {"prompt": "ab", "logprobs": 1, "max_tokens": 3, "echo": echo}
    merged: dict[str, list[Any]] = {}
    if stream:
        for event in server.events(PATH, body):
            for name, values in event["choices"][0]["logprobs"].items():
                merged.setdefault(name, []).extend(values)
    else:
        merged = server.post(PATH, body).json["choices"][0]["logprobs"]
    before: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": []}
    if echo:
        before = {
            "tokens": ["a", "b"],
            "token_logprobs": [None, -0.5],
            "top_logprobs": [None, {"b": -0.5, "c": -0.25}],
        }
    assert merged == {
        "tokens": [*before["tokens"], "H", "e", "l"],
        "token_logprobs": [*before["token_logprobs"], -0.5, -0.5, -0.5],
        "top_logprobs": [
            *before["top_logprobs"],
            {"H": -0.5, "I": -0.25},
            {"e": -0.5, "f": -0.25},
            {"l": -0.5, "m": -0.25},
        ],
        "text_offset": list(range(3 + len(before["tokens"]))),
    }


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize("text", ["Das heißt: für 50 € 🚀 go", "<|start|>user\nhé<|end|>\n", "<|eos|>"])
def test_logprobs_of_characters_in_several_tokens_and_of_special_ones(
    server: LiveServer, tokenizer: Tokenizer, stream: bool, as_ids: bool, text: str
) -> None:
    prompt = tokenizer.encode(text) if as_ids else text
    body = {"prompt": prompt, "echo": True, "logprobs": 0, "max_tokens": 40}
    shown, tokens, offsets = "", list[str](), list[int]()
    answers = server.events(PATH, body) if stream else [server.post(PATH, body).json]
    for choice in (answer["choices"][0] for answer in answers):
        shown += choice["text"]
        tokens += choice["logprobs"]["tokens"]
        offsets += choice["logprobs"]["text_offset"]
    assert shown == text + REPLY
    assert len(tokens) == len(tokenizer.encode(text + REPLY)) + 1
    assert tokens.pop() == "<|eos|>"  # which the text leaves out
    assert "".join(tokens) == shown
    assert offsets == [len("".join(tokens[:n])) for n in range(len(tokens) + 1)]


def test_logprobs_of_zero_give_the_token_itself(server: LiveServer) -> None:
    choice = server.post(PATH, {"prompt": "a", "logprobs": 0, "max_tokens": 1}).json["choices"][0]
    assert choice["logprobs"]["top_logprobs"] == [{"H": -0.5}]


def test_prompt_logprobs_and_token_ids(server: LiveServer, tokenizer: Tokenizer) -> None:
    body = {"prompt": ["ab", "cd"], "n": 2, "prompt_logprobs": 0, "return_token_ids": True, "max_tokens": 1}
    choices = server.post(PATH, body).json["choices"]
    entry = {"logprob": -0.5, "rank": 2}
    b, d = tokenizer.encode("bd")
    assert [choice["prompt_logprobs"] for choice in choices] == [
        *[[None, {str(b): {**entry, "decoded_token": "b"}}]] * 2,
        *[[None, {str(d): {**entry, "decoded_token": "d"}}]] * 2,
    ]
    assert choices[3]["prompt_token_ids"] == tokenizer.encode("cd")
    assert choices[3]["token_ids"] == tokenizer.encode("H")


def test_streamed_token_ids(server: LiveServer, tokenizer: Tokenizer) -> None:
    events = server.events(PATH, {"prompt": "ab", "return_token_ids": True, "max_tokens": 3})
    assert events[0]["choices"][0]["prompt_token_ids"] == tokenizer.encode("ab")
    assert [id for event in events for id in event["choices"][0]["token_ids"]] == tokenizer.encode("Hel")


def test_a_lot_of_text_is_converted_all_the_same(server: LiveServer, tokenizer: Tokenizer) -> None:
    prompts: list[Any] = ["xy" * 100, [1, 2], *["z" * 200] * 99]
    answer = server.post(PATH, {"prompt": prompts, "max_tokens": 1})
    assert answer.json["usage"]["prompt_tokens"] == 200 * 100 + 2
    assert [list(add.prompt) for add in server.engine.adds[:2]] == [tokenizer.encode("xy" * 100), [1, 2]]
    text = "wörd" * 5000
    assert server.post("/detokenize", {"tokens": tokenizer.encode(text)}).json == {"prompt": text}


def test_special_tokens_of_the_prompt(server: LiveServer) -> None:
    server.post(PATH, {"prompt": "<|start|>a", "add_special_tokens": False})
    assert list(server.engine.adds[0].prompt) == [256, 64]


def test_neutral_values_are_accepted(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL,
        prompt="a",
        best_of=1,
        n=1,
        suffix=None,
        user="me",
        extra_body={"suffix": "", "bad_words": [], "response_format": {"type": "text"}},
    )
    assert answer.choices[0].text
