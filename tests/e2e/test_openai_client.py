"""The official OpenAI client against the real server: every parameter, streaming and not."""

from __future__ import annotations

import concurrent.futures
import json
import math
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from .server import Server, eventually, serving

QUESTION = [{"role": "user", "content": "What is a Pod?"}]
VAGUE = [{"role": "user", "content": "zq#! 77 xylophone"}]
"""The demo model is certain of what it has learnt; of this it has not."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    flags = ("--dtype", "float32", "--kv-cache-memory-bytes", "64MiB", "--served-model-name", "demo", "alias")
    with serving(*flags, "--max-logprobs", "50", log=log) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=60) as made:
        yield made


def chat(client: openai.OpenAI, **fields: Any) -> Any:
    """A chat answer; with stream=True the chunks are joined into the same shape."""
    return client.chat.completions.create(model="demo", **{"messages": QUESTION, "temperature": 0, **fields})


@pytest.fixture(scope="module")
def whole(client: openai.OpenAI) -> Any:
    """The answer to QUESTION, of some sixty tokens, with their ids; greedy, and so always the same."""
    return chat(client, extra_body={"return_token_ids": True})


def texts(client: openai.OpenAI, stream: bool, **fields: Any) -> list[str]:
    """The text of every choice, streamed or not."""
    if not stream:
        return [choice.message.content for choice in chat(client, **fields).choices]
    made: dict[int, str] = {}
    for chunk in chat(client, stream=True, **fields):
        for choice in chunk.choices:
            made[choice.index] = made.get(choice.index, "") + (choice.delta.content or "")
    return [made[index] for index in sorted(made)]


both = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo", "alias"]
    assert client.models.retrieve("alias").id == "alias"
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4", messages=QUESTION)  # type: ignore[arg-type]
    assert caught.value.code == "model_not_found"


def test_the_demo_has_learnt_its_faq(client: openai.OpenAI) -> None:
    for question, word in (
        ("What is a Pod?", "container"),
        ("What is PagedAttention?", "block"),
        ("hello", ""),
    ):
        answer = chat(client, messages=[{"role": "user", "content": question}])
        assert word in answer.choices[0].message.content.lower()
        assert answer.choices[0].finish_reason == "stop"


def test_multi_turn(client: openai.OpenAI, whole: Any) -> None:
    messages = [*QUESTION, {"role": "assistant", "content": whole.choices[0].message.content}]
    answer = chat(client, messages=[*messages, {"role": "user", "content": "What is a Deployment?"}])
    assert "Pod" in answer.choices[0].message.content


def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI, whole: Any) -> None:
    assert texts(client, True) == [whole.choices[0].message.content]


def test_stream_shape_and_usage(client: openai.OpenAI, whole: Any) -> None:
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    *parts, last = chunks
    assert [chunk.choices[0].finish_reason for chunk in parts][-1] == "stop"
    assert all(chunk.usage is None for chunk in parts)
    assert last.choices == []
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert last.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens


def test_continuous_usage(client: openai.OpenAI) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    counts = [
        chunk.usage.completion_tokens
        for chunk in chat(client, stream=True, max_tokens=5, stream_options=options)
        if chunk.choices
    ]
    assert counts == sorted(counts)
    assert counts[-1] == 5


def test_usage_is_a_bill(client: openai.OpenAI) -> None:
    usage = chat(client).usage
    assert usage.device_seconds > 0
    for name in ("queue_ms", "prefill_ms", "ttft_ms", "decode_ms"):
        assert getattr(usage, name) >= 0, name
    assert usage.ttft_ms == pytest.approx(usage.queue_ms + usage.prefill_ms, abs=0.01)
    long = [{"role": "system", "content": "You answer questions about Kubernetes. " * 10}, *QUESTION]
    chat(client, messages=long)
    assert chat(client, messages=long).usage.prompt_tokens_details.cached_tokens >= 16


@both
@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_max_tokens(client: openai.OpenAI, whole: Any, field: str, stream: bool) -> None:
    text = whole.choices[0].message.content
    (cut,) = texts(client, stream, **{field: 4})
    assert text.startswith(cut)
    assert len(cut) < len(text)
    answer = chat(client, **{field: 4})
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 4)


@both
def test_stop_strings(client: openai.OpenAI, whole: Any, stream: bool) -> None:
    text = whole.choices[0].message.content
    stop = text[7:12]
    assert texts(client, stream, stop=stop) == [text[: text.index(stop)]]
    assert texts(client, stream, stop=["never there", stop]) == [text[: text.index(stop)]]
    kept = texts(client, stream, stop=stop, extra_body={"include_stop_str_in_output": True})
    assert kept == [text[: text.index(stop) + len(stop)]]
    choice = chat(client, stop=stop).choices[0]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)


@both
def test_n_and_seed(client: openai.OpenAI, stream: bool) -> None:
    options: dict[str, Any] = {"n": 3, "seed": 7, "temperature": 2.0, "max_tokens": 12, "messages": VAGUE}
    first = texts(client, stream, **options)
    assert len(first) == 3
    assert len(set(first)) > 1
    assert texts(client, stream, **options) == first
    assert texts(client, stream, **{**options, "seed": 8}) != first


def test_a_seed_does_not_depend_on_company(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"seed": 11, "temperature": 2.0, "max_tokens": 24, "messages": VAGUE}
    alone = texts(client, False, **options)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        crowd = [
            pool.submit(texts, client, True, seed=seed, temperature=2, max_tokens=40) for seed in range(7)
        ]
        beside = pool.submit(texts, client, False, **options).result()
        assert all(one.result() for one in crowd)
    assert beside == alone


@both
def test_temperature_top_p_top_k_min_p(client: openai.OpenAI, stream: bool) -> None:
    greedy = texts(client, stream, max_tokens=16)
    hot = {"temperature": 2.0, "max_tokens": 16, "seed": 1}
    assert texts(client, stream, **hot) != greedy
    assert texts(client, stream, **hot, top_p=1e-6) == greedy
    assert texts(client, stream, **hot, extra_body={"top_k": 1}) == greedy
    assert texts(client, stream, **hot, extra_body={"min_p": 1.0}) == greedy


@both
def test_penalties_and_bias(client: openai.OpenAI, stream: bool) -> None:
    def complete(**body: Any) -> str:
        made = client.completions.create(
            model="demo", prompt="q q q q", max_tokens=60, temperature=0, stream=stream, extra_body=body
        )
        return "".join(part.choices[0].text for part in made) if stream else made.choices[0].text

    plain = complete(ignore_eos=True)
    assert complete(ignore_eos=True, frequency_penalty=2.0) != plain
    assert complete(ignore_eos=True, presence_penalty=2.0) != plain
    assert complete(ignore_eos=True, repetition_penalty=2.0) != plain
    forced = chat(client, max_tokens=3, logit_bias={"65": 100}, extra_body={"return_token_ids": True})
    assert forced.choices[0].token_ids == [65, 65, 65]
    only = chat(client, max_tokens=3, extra_body={"allowed_token_ids": [70], "return_token_ids": True})
    assert only.choices[0].token_ids == [70, 70, 70]


@both
def test_token_stops_and_minimum(client: openai.OpenAI, whole: Any, stream: bool) -> None:
    ids = whole.choices[0].token_ids
    stopped = chat(client, extra_body={"stop_token_ids": [ids[3]], "return_token_ids": True}).choices[0]
    assert (stopped.token_ids, stopped.stop_reason) == (ids[: ids.index(ids[3]) + 1], ids[3])
    longer = {"min_tokens": len(ids) + 5, "max_tokens": len(ids) + 9}
    assert chat(client, extra_body=longer).usage.completion_tokens >= len(ids) + 5
    endless = {"ignore_eos": True, "max_tokens": len(ids) + 20}
    assert chat(client, extra_body=endless).usage.completion_tokens == len(ids) + 20
    assert len(texts(client, stream, extra_body=endless)[0]) > len(whole.choices[0].message.content)


@both
def test_chat_logprobs(client: openai.OpenAI, stream: bool) -> None:
    options: dict[str, Any] = {"logprobs": True, "top_logprobs": 3, "max_tokens": 6}
    if stream:
        content = [
            entry
            for chunk in chat(client, stream=True, **options)
            for choice in chunk.choices
            if choice.logprobs
            for entry in choice.logprobs.content
        ]
    else:
        content = chat(client, **options).choices[0].logprobs.content
    assert len(content) == 6
    assert "".join(entry.token for entry in content) == texts(client, False, max_tokens=6)[0]
    for entry in content:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].token == entry.token  # greedy
        assert entry.logprob <= 0.0
        assert bytes(entry.bytes).decode() == entry.token
        assert sum(math.exp(top.logprob) for top in entry.top_logprobs) <= 1.0 + 1e-4


def test_logprobs_of_named_tokens(client: openai.OpenAI) -> None:
    """They are the values that a list of the most probable ones has for them."""
    named = {"return_tokens_as_token_ids": True}
    (entry,) = (
        chat(client, logprobs=True, top_logprobs=20, max_tokens=1, extra_body=named)
        .choices[0]
        .logprobs.content
    )
    best = [(int(top.token.removeprefix("token_id:")), top.logprob) for top in entry.top_logprobs]
    wanted = best[19:4:-3]
    body = {**named, "logprob_token_ids": [token for token, _ in wanted]}
    (other,) = chat(client, logprobs=True, max_tokens=1, extra_body=body).choices[0].logprobs.content
    assert (other.token, other.logprob) == (entry.token, entry.logprob)
    told = [(int(top.token.removeprefix("token_id:")), top.logprob) for top in other.top_logprobs]
    assert [token for token, _ in told] == [best[0][0], *(token for token, _ in wanted)]
    assert [value for _, value in told] == pytest.approx([best[0][1], *(v for _, v in wanted)], abs=1e-4)


@both
def test_completions(client: openai.OpenAI, stream: bool) -> None:
    options: dict[str, Any] = {"model": "demo", "max_tokens": 6, "temperature": 0}
    prompts: list[Any] = ["A Pod is", "vLLM is"]
    ids = [json.loads(_tokenize(client, prompt))["tokens"] for prompt in prompts]
    outputs = []
    for prompt in (prompts, ids):
        made = client.completions.create(prompt=prompt, stream=stream, **options)
        parts = made if stream else [made]
        text: dict[int, str] = {}
        for part in parts:
            for choice in part.choices:
                text[choice.index] = text.get(choice.index, "") + choice.text
        outputs.append([text[0], text[1]])
    assert outputs[0] == outputs[1]
    single = client.completions.create(prompt=ids[0], **options).choices[0].text
    assert single == outputs[0][0]


def _tokenize(client: openai.OpenAI, prompt: str) -> str:
    root = str(client.base_url).removesuffix("/v1/")
    return client.with_options(base_url=root).post(
        "/tokenize", cast_to=str, body={"model": "demo", "prompt": prompt}
    )


def test_completion_logprobs_and_echo(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "demo", "prompt": "A Pod is", "max_tokens": 4, "temperature": 0}
    plain = client.completions.create(**options, logprobs=2).choices[0]
    assert len(plain.logprobs.tokens) == len(plain.logprobs.token_logprobs) == 4
    assert all(len(top) >= 2 for top in plain.logprobs.top_logprobs)
    assert plain.logprobs.text_offset[0] == 0
    echoed = client.completions.create(**options, logprobs=2, echo=True).choices[0]
    assert echoed.text == "A Pod is" + plain.text
    assert echoed.logprobs.token_logprobs[0] is None
    assert echoed.logprobs.token_logprobs[-4:] == pytest.approx(plain.logprobs.token_logprobs, abs=1e-3)
    assert "".join(echoed.logprobs.tokens) == echoed.text
    prompt = (
        client.completions.create(**options, extra_body={"prompt_logprobs": 1}).choices[0].prompt_logprobs
    )
    assert prompt[0] is None
    inner = [next(iter(entry.values()))["logprob"] for entry in prompt[1:]]
    assert inner == pytest.approx(echoed.logprobs.token_logprobs[1 : len(prompt)], abs=1e-3)


def test_n_shares_the_prompt(client: openai.OpenAI, server: Server) -> None:
    before = server.metric("vllm:prompt_tokens_by_source_total", source="local_compute")
    prompt = "share this prompt among four " * 20
    made = client.completions.create(model="demo", prompt=prompt, n=4, max_tokens=2, temperature=1)
    assert len(made.choices) == 4
    computed = server.metric("vllm:prompt_tokens_by_source_total", source="local_compute") - before
    assert computed < made.usage.prompt_tokens + 4 * 17


def test_every_device_second_is_in_a_bill(client: openai.OpenAI, server: Server) -> None:
    """Σ usage.device_seconds of all requests == the device's busy time, and busy + idle is the wall clock."""

    def look() -> tuple[float, float, float, float]:
        """(busy, idle, just before, just after) of an idle engine."""
        eventually(lambda: server.metric("vllm:num_requests_running") == 0)
        before, page, after = time.monotonic(), server.metrics(), time.monotonic()
        busy, idle = (page.total("penstock:device_seconds_total", state=state) for state in ("busy", "idle"))
        return busy, idle, before, after

    chat(client, max_tokens=1)
    busy, idle, before, after = look()
    jobs: list[dict[str, Any]] = [
        {"max_tokens": 20 + i, "n": 1 + i % 2, "stop": "the" if i % 3 == 0 else None, "temperature": 1.0}
        for i in range(12)
    ]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        bills = list(pool.map(lambda job: chat(client, **job).usage.device_seconds, jobs))
    busy_then, idle_then, before_then, after_then = look()
    assert sum(bills) == pytest.approx(busy_then - busy, rel=1e-3)
    wall = busy_then + idle_then - busy - idle
    assert (before_then - after) * 0.999 <= wall <= (after_then - before) * 1.001


def test_wrong_input_is_answered_in_openais_way(client: openai.OpenAI) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"n": 0}, "n"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"extra_body": {"temprature": 1}}, "temprature"),
        ({"extra_body": {"priority": 1}}, "priority"),
    ]
    for fields, param in cases:
        with pytest.raises(openai.BadRequestError) as caught:
            chat(client, **fields)
        assert caught.value.type == "invalid_request_error", fields
        assert caught.value.param is not None, fields
        assert param in caught.value.param, fields
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, messages=[{"role": "user", "content": "word " * 5000}])
    assert caught.value.code == "context_length_exceeded"
    assert "2048" in caught.value.message
    raw = client.chat.completions.with_raw_response.create(
        model="demo",
        messages=QUESTION,
        verbosity="low",
        extra_body={"no_such_field": 1},  # type: ignore[arg-type]
    )
    assert sorted(raw.headers["x-penstock-ignored"].split(", ")) == ["no_such_field", "verbosity"]
    assert texts(client, False)[0]
