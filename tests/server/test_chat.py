"""POST /v1/chat/completions through the official client and over the wire."""

from __future__ import annotations

import dataclasses
from typing import Any

import openai
import pytest

from penstock.text.tokenizer import Tokenizer

from .conftest import LiveServer, running
from .fake_engine import FakeEngine
from .tiny import MODEL, REPLY

PATH = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
HI: list[Any] = [{"role": "user", "content": "Hi"}]
PROMPT = "<|start|>user\nHi<|end|>\n<|start|>assistant\n"


def test_a_whole_answer_has_openais_shape(server: LiveServer, tokenizer: Tokenizer) -> None:
    answer = server.post(PATH, {"model": MODEL, "messages": HI}).json
    id = answer.pop("id")
    assert id.startswith("chatcmpl-")
    assert answer.pop("created") > 1_700_000_000
    assert answer.pop("system_fingerprint").startswith("fp_")
    prompt = tokenizer.encode(PROMPT, add_special_tokens=False)
    output = len(tokenizer.encode(REPLY)) + 1  # and the end-of-sequence token
    assert answer == {
        "object": "chat.completion",
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": REPLY, "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
                "token_ids": None,
            }
        ],
        "prompt_logprobs": None,
        "prompt_token_ids": None,
        "usage": {
            "prompt_tokens": len(prompt),
            "completion_tokens": output,
            "total_tokens": len(prompt) + output,
            "prompt_tokens_details": {"cached_tokens": 16},
            "device_seconds": pytest.approx(0.001 * output),
            "queue_ms": 500.0,
            "prefill_ms": 250.0,
            "ttft_ms": 750.0,
            "decode_ms": 125.0 * (output - 1),
        },
    }
    assert list(server.engine.adds[0].prompt) == prompt


def test_the_official_client_reads_whole_answers(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HI)
    assert answer.choices[0].message.content == REPLY
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer._request_id is not None
    assert answer.id.endswith(answer._request_id)


def test_the_official_client_reads_streams(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model=MODEL, messages=HI, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == REPLY
    assert [chunk.choices[0].finish_reason for chunk in chunks][-2:] == [None, "stop"]
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_order_of_a_stream(server: LiveServer) -> None:
    events = server.events(PATH, {"messages": HI, "stream_options": {"include_usage": True}})
    first, *middle, last, usage = events
    assert first["choices"] == [
        {
            "index": 0,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
    ]
    # one chunk for each token; a character comes with the last of its tokens, the others have empty texts
    texts = [text for char in REPLY for text in [""] * (len(char.encode()) - 1) + [char]]
    assert [event["choices"][0]["delta"] for event in middle] == [{"content": text} for text in texts]
    assert last["choices"][0]["delta"] == {"content": ""}
    assert last["choices"][0]["finish_reason"] == "stop"
    assert all(event["usage"] is None for event in events[:-1])
    assert usage["choices"] == []
    assert usage["usage"] == server.post(PATH, {"messages": HI}).json["usage"]
    assert {event["object"] for event in events} == {"chat.completion.chunk"}


@pytest.mark.parametrize(
    ("path", "body"), [(PATH, {"messages": HI}), (COMPLETIONS, {"prompt": "a", "max_tokens": 40})]
)
def test_tokens_whose_text_is_held_back_have_chunks_of_their_own(
    server: LiveServer, path: str, body: dict[str, Any]
) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *events, _ = server.events(path, {**body, "stop": ["wörm"], "stream_options": options})
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == list(range(counts[0], len(REPLY.encode()) + 2))
    texts = [(c.get("delta") or {}).get("content", c.get("text")) for e in events for c in e["choices"]]
    assert "".join(texts) == REPLY
    assert texts.count("") >= 3 + 2 + 3  # "wör" until "l" comes, half an "ö", and three quarters of a wave


def test_without_include_usage_chunks_have_none(server: LiveServer) -> None:
    assert all("usage" not in event for event in server.events(PATH, {"messages": HI}))


def test_continuous_usage_counts_up(server: LiveServer) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"messages": HI, "max_tokens": 3, "n": 2, "stream_options": options}
    *events, whole = server.events(PATH, body)
    for index in (0, 1):
        own = [event["usage"] for event in events if event["choices"][0]["index"] == index]
        assert [usage["completion_tokens"] for usage in own] == [0, 1, 2, 3]
        assert {usage["prompt_tokens"] for usage in own} == {whole["usage"]["prompt_tokens"]}
    assert whole["usage"]["completion_tokens"] == 6


def test_the_last_text_and_the_finish_reason_come_together(server: LiveServer) -> None:
    *_, last = server.events(PATH, {"messages": HI, "max_tokens": 3})
    assert last["choices"][0]["delta"] == {"content": "l"}
    assert last["choices"][0]["finish_reason"] == "length"


def test_several_tokens_in_one_event_make_one_chunk(server: LiveServer) -> None:
    server.engine.tokens_per_event = 5
    events = server.events(PATH, {"messages": HI})
    texts = [event["choices"][0]["delta"].get("content", "") for event in events]
    assert "".join(texts) == REPLY
    assert texts[1] == REPLY[:5]


def test_stream_interval_batches_tokens(server: LiveServer) -> None:
    events = server.events(PATH, {"messages": HI, "stream_interval": 4})
    texts = [event["choices"][0]["delta"].get("content", "") for event in events]
    assert texts[1:3] == ["H", "ello"]  # the first at once
    assert "".join(texts) == REPLY


@pytest.mark.parametrize("stream", [False, True])
def test_n_gives_interleaved_choices(server: LiveServer, stream: bool) -> None:
    body = {"messages": HI, "n": 3, "seed": 7, "max_tokens": 2}
    if stream:
        texts = {0: "", 1: "", 2: ""}
        order = []
        for event in server.events(PATH, body):
            choice = event["choices"][0]
            order.append(choice["index"])
            texts[choice["index"]] += choice["delta"].get("content", "")
        assert order != sorted(order)
    else:
        answer = server.post(PATH, body).json
        texts = {choice["index"]: choice["message"]["content"] for choice in answer["choices"]}
        prompt = len(server.engine.adds[0].prompt)
        assert answer["usage"]["prompt_tokens"] == prompt
        assert answer["usage"]["completion_tokens"] == 6
        assert answer["usage"]["device_seconds"] == pytest.approx(0.006)
        assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 16}
    assert texts == {0: "He", 1: "He", 2: "He"}
    leader, *siblings = server.engine.adds
    assert leader.leader is None
    assert [add.leader for add in siblings] == [leader.id, leader.id]
    assert [add.seed for add in server.engine.adds] == [7, 8, 9]
    assert {id(add.spec) for add in server.engine.adds} == {id(leader.spec)}


def test_seeds_wrap_around(server: LiveServer) -> None:
    assert server.post(PATH, {"messages": HI, "n": 2, "seed": 2**63 - 1}).status == 200
    assert [add.seed for add in server.engine.adds] == [2**63 - 1, -(2**63)]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("keep", "text"), [(False, "Hello"), (True, "Hello, w")])
def test_a_stop_string_ends_the_text_and_the_request(
    server: LiveServer, stream: bool, keep: bool, text: str
) -> None:
    body = {"messages": HI, "stop": [", w", "never"], "include_stop_str_in_output": keep}
    if stream:
        events = server.events(PATH, {**body, "stream_options": {"include_usage": True}})
        assert "".join(e["choices"][0]["delta"].get("content", "") for e in events[:-1]) == text
        choice, usage = events[-2]["choices"][0], events[-1]["usage"]
    else:
        answer = server.post(PATH, body).json
        choice, usage = answer["choices"][0], answer["usage"]
        assert choice["message"]["content"] == text
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] == ", w"
    assert server.engine.aborted == [server.engine.adds[0].id]
    assert usage["completion_tokens"] == 8
    assert usage["device_seconds"] >= 0.008  # the bill is the engine's, not the text's


def test_a_stop_token_is_the_stop_reason(server: LiveServer) -> None:
    token = server.post("/tokenize", {"prompt": "o"}).json["tokens"][0]
    choice = server.post(PATH, {"messages": HI, "stop_token_ids": [token]}).json["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", token)
    assert choice["message"]["content"] == "Hell"


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_the_length_limit(server: LiveServer, field: str) -> None:
    choice = server.post(PATH, {"messages": HI, field: 4}).json["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (REPLY[:4], "length")


def test_max_completion_tokens_wins(server: LiveServer) -> None:
    server.post(PATH, {"messages": HI, "max_tokens": 4, "max_completion_tokens": 2})
    assert server.engine.adds[0].max_tokens == 2


def test_by_default_the_answer_may_fill_the_context(server: LiveServer) -> None:
    server.post(PATH, {"messages": HI})
    add = server.engine.adds[0]
    assert add.max_tokens + len(add.prompt) == server.engine.info.max_model_len


TEXT_ONLY = {"stop", "include_stop_str_in_output", "skip_special_tokens", "spaces_between_special_tokens"}


def test_sampling_fields_reach_the_engine(server: LiveServer) -> None:
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 12,
        "min_p": 0.1,
        "presence_penalty": 0.25,
        "frequency_penalty": -0.25,
        "repetition_penalty": 1.25,
        "seed": 11,
        "min_tokens": 2,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
        "max_tokens": 8,
    }
    extra = {"logit_bias": {"65": -5}, "allowed_token_ids": [1, 2], "stop": "x", "stop_token_ids": [9]}
    assert server.post(PATH, {"messages": HI, **fields, **extra}).status == 200
    params = server.engine.adds[0].params
    of_the_engine = {entry.name for entry in dataclasses.fields(params)}
    travelling = {name: value for name, value in fields.items() if name not in TEXT_ONLY}
    assert server.engine.adds[0].max_tokens == travelling.pop("max_tokens")
    assert {name: getattr(params, name) for name in travelling} == travelling
    assert not of_the_engine & TEXT_ONLY  # they do not travel
    assert params.logit_bias == {65: -5.0}
    assert params.allowed_token_ids == (1, 2)
    assert params.stop_token_ids == (9,)


def test_defaults_of_the_model_apply_where_the_client_gave_nothing(tokenizer: Tokenizer, says: Any) -> None:
    defaults = {"temperature": 0.25, "top_k": 5, "max_tokens": 3}
    with running(tokenizer, says(REPLY), default_sampling=defaults) as server:
        answer = server.post(PATH, {"messages": HI, "temperature": None}).json
        assert answer["usage"]["completion_tokens"] == 3
        server.post(PATH, {"messages": HI, "temperature": 1, "top_k": 0, "max_tokens": 4})
        first, second = server.engine.adds
        assert (first.params.temperature, first.params.top_k) == (0.25, 5)
        assert (second.params.temperature, second.params.top_k, second.max_tokens) == (1.0, 0, 4)


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(server: LiveServer, tokenizer: Tokenizer, stream: bool) -> None:
    body = {"messages": HI, "logprobs": True, "top_logprobs": 2, "max_tokens": 9}
    if stream:
        events = server.events(PATH, body)
        pieces = [e["choices"][0]["logprobs"] for e in events]
        entries = [entry for piece in pieces if piece for entry in piece["content"]]
    else:
        entries = server.post(PATH, body).json["choices"][0]["logprobs"]["content"]
    ids = tokenizer.encode(REPLY)[:9]
    texts = [tokenizer.decode(ids[: n + 1]).rstrip("\ufffd") for n in range(len(ids))]
    assert [entry["token"] for entry in entries] == [
        text.removeprefix(before) for before, text in zip(["", *texts], texts, strict=False)
    ]
    assert {entry["logprob"] for entry in entries} == {-0.5}
    assert [bytes(entry["bytes"]).decode() for entry in entries] == [entry["token"] for entry in entries]
    first = entries[0]["top_logprobs"]
    assert [alternative["logprob"] for alternative in first] == [-0.25, -0.5]
    assert first[1]["token"] == "H"
    assert set(first[0]) == {"token", "logprob", "bytes"}


def test_logprobs_without_alternatives(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HI, logprobs=True, max_tokens=1)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert logprobs.content[0].token == "H"
    assert logprobs.content[0].top_logprobs == []


def test_tokens_as_ids(server: LiveServer, tokenizer: Tokenizer) -> None:
    body = {"messages": HI, "logprobs": True, "max_tokens": 1, "return_tokens_as_token_ids": True}
    entry = server.post(PATH, body).json["choices"][0]["logprobs"]["content"][0]
    assert entry["token"] == f"token_id:{tokenizer.encode('H')[0]}"
    assert entry["bytes"] == [ord("H")]


def test_prompt_logprobs(server: LiveServer, tokenizer: Tokenizer) -> None:
    answer = server.post(PATH, {"messages": HI, "prompt_logprobs": 1, "max_tokens": 1, "n": 2}).json
    first, second, *_ = answer["prompt_logprobs"]
    ids = tokenizer.encode(PROMPT)
    assert first is None
    assert len(answer["prompt_logprobs"]) == len(ids)
    assert second[str(ids[1])] == {"logprob": -0.5, "rank": 2, "decoded_token": "u"}
    assert set(second) == {str(ids[1]), str(ids[1] + 1)}
    assert server.engine.adds[1].prompt_logprobs is None  # computed once


@pytest.mark.parametrize("stream", [False, True])
def test_token_ids_on_request(server: LiveServer, tokenizer: Tokenizer, stream: bool) -> None:
    body = {"messages": HI, "return_token_ids": True, "return_prompt_text": True}
    if stream:
        events = server.events(PATH, body)
        head = events[0]
        ids = [id for event in events for id in event["choices"][0].get("token_ids", [])]
        assert all("prompt_token_ids" not in event for event in events[1:])
    else:
        head = server.post(PATH, body).json
        ids = head["choices"][0]["token_ids"]
    assert ids == [*tokenizer.encode(REPLY), 258]
    assert head["prompt_token_ids"] == tokenizer.encode(PROMPT)
    assert head["prompt_text"] == PROMPT


def test_content_parts_are_joined(server: LiveServer, tokenizer: Tokenizer) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    server.post(PATH, {"messages": [{"role": "user", "content": parts}]})
    assert tokenizer.decode(server.engine.adds[0].prompt, False).startswith("<|start|>user\na\nb<|end|>")


def test_continue_final_message_and_echo(server: LiveServer, tokenizer: Tokenizer) -> None:
    messages = [*HI, {"role": "assistant", "content": "Well, "}]
    body = {"messages": messages, "continue_final_message": True, "echo": True}
    whole = server.post(PATH, body).json["choices"][0]["message"]["content"]
    assert whole == "Well, " + REPLY
    assert tokenizer.decode(server.engine.adds[0].prompt, False).endswith("assistant\nWell, ")
    events = server.events(PATH, body)
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in events) == whole


def test_template_variables(server: LiveServer, tokenizer: Tokenizer) -> None:
    server.post(PATH, {"messages": HI, "chat_template_kwargs": {"mood": "merrily: "}})
    assert tokenizer.decode(server.engine.adds[0].prompt, False).endswith("assistant\nmerrily: ")


def test_template_variables_of_the_server(tokenizer: Tokenizer, says: Any) -> None:
    defaults = {"mood": "gloomily: ", "add_generation_prompt": False}
    with running(tokenizer, says(REPLY), default_chat_template_kwargs=defaults) as server:
        server.post(PATH, {"messages": HI})
        server.post(PATH, {"messages": HI, "chat_template_kwargs": {"mood": "merrily: "}})
        prompts = [tokenizer.decode(add.prompt, False) for add in server.engine.adds]
    assert prompts[0].endswith("assistant\ngloomily: ")
    assert prompts[1].endswith("assistant\nmerrily: ")


def test_a_template_of_the_request_must_be_allowed(
    server: LiveServer, tokenizer: Tokenizer, says: Any
) -> None:
    body = {"messages": HI, "chat_template": "{{ messages[0].content }}!"}
    refused = server.post(PATH, body)
    assert refused.status == 400
    assert refused.error["param"] == "chat_template"
    assert "--trust-request-chat-template" in refused.error["message"]
    with running(tokenizer, says(REPLY), trust_request_chat_template=True) as trusting:
        assert trusting.post(PATH, body).status == 200
        assert tokenizer.decode(trusting.engine.adds[0].prompt) == "Hi!"


def test_truncation_keeps_the_end(server: LiveServer, tokenizer: Tokenizer) -> None:
    body = {"messages": HI, "truncate_prompt_tokens": 5}
    server.post(PATH, body)
    server.post(PATH, {**body, "truncation_side": "right"})
    ids = tokenizer.encode(PROMPT)
    assert [list(add.prompt) for add in server.engine.adds] == [ids[-5:], ids[:5]]


def test_truncation_to_what_fits(server: LiveServer) -> None:
    long = [{"role": "user", "content": "x" * 1000}]
    body = {"messages": long, "truncate_prompt_tokens": -1, "max_tokens": 6}
    assert server.post(PATH, body).status == 200
    assert len(server.engine.adds[0].prompt) == 250


def test_ids_of_requests(server: LiveServer) -> None:
    plain = server.post(PATH, {"messages": HI, "request_id": "mine"})
    assert plain.json["id"] == "chatcmpl-mine"
    assert plain.headers["x-request-id"] == "mine"
    headed = server.post(PATH, {"messages": HI, "request_id": "mine"}, {"X-Request-Id": "theirs"})
    assert headed.json["id"] == "chatcmpl-theirs"
    assert headed.headers["x-request-id"] == "theirs"
    again = server.post(PATH, {"messages": HI, "request_id": "mine"})
    assert again.json["id"] == plain.json["id"]
    assert len({add.id for add in server.engine.adds}) == 3  # unique in the engine all the same


def test_priority_needs_the_policy(server: LiveServer, tokenizer: Tokenizer, says: Any) -> None:
    refused = server.post(PATH, {"messages": HI, "priority": 3})
    assert refused.status == 400
    assert refused.error["param"] == "priority"
    with running(tokenizer, says(REPLY), scheduling_policy="priority") as other:
        assert other.post(PATH, {"messages": HI, "priority": -3}).status == 200
        assert other.engine.adds[0].spec.priority == -3


def test_cache_salt_reaches_the_engine(server: LiveServer) -> None:
    answer = server.post(PATH, {"messages": HI, "cache_salt": "cold"})
    assert server.engine.adds[0].spec.cache_salt == "cold"
    assert answer.json["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}


def test_bookkeeping_fields_are_accepted(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=HI,
        user="me",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        safety_identifier="x",
        prompt_cache_key="y",
        parallel_tool_calls=True,
        tools=[],
        response_format={"type": "text"},
        modalities=["text"],
        tool_choice="none",
        extra_body={"session_id": "s", "best_of": None, "use_beam_search": False, "length_penalty": 1},
    )
    assert answer.choices[0].message.content == REPLY


def test_every_alias_is_served_under_the_first_name(server: LiveServer) -> None:
    assert server.post(PATH, {"model": "alias/of-tiny", "messages": HI}).json["model"] == MODEL


def test_a_long_prompt_is_encoded_all_the_same(tokenizer: Tokenizer, says: Any, engine: FakeEngine) -> None:
    from msgspec.structs import replace

    roomy = FakeEngine(says(REPLY), info=replace(engine.info, max_model_len=40_000))
    with running(tokenizer, says(REPLY), engine=roomy) as server:
        answer = server.post(PATH, {"messages": [{"role": "user", "content": "y" * 20_000}]})
        assert answer.status == 200
        assert answer.json["usage"]["prompt_tokens"] > 20_000


def test_a_template_that_wants_parts_gets_parts(tokenizer: Tokenizer, says: Any) -> None:
    from penstock.text.chat_template import ChatTemplate

    text = "{% for m in messages %}{% for part in m['content'] %}[{{ part.text }}]{% endfor %}{% endfor %}"
    template = ChatTemplate({"default": text})
    with running(tokenizer, says(REPLY), template=template) as server:
        server.post(PATH, {"messages": HI})
        assert tokenizer.decode(server.engine.adds[0].prompt) == "[Hi]"
