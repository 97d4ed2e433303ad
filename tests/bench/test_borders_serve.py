"""A whole measurement against a small server: what is sent, how it is held back, what the result says."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from penstock.bench import serve
from penstock.bench.client import RequestRecord, Target
from penstock.bench.errors import BenchError
from penstock.bench.prompts import WORDS, RandomPrompts
from penstock.bench.serve import ServeBench, bench_serve

from .fake_server import FakeServer, Reply


def measured(bench: ServeBench) -> tuple[dict[str, Any], list[RequestRecord]]:
    done: list[RequestRecord] = []
    return asyncio.run(asyncio.wait_for(bench_serve(bench, done.append), 60)), done


def small(server: FakeServer, **fields: Any) -> ServeBench:
    known = {"num_prompts": 4, "random_input_len": 5, "output_len": 3, "request_timeout": 20.0}
    return ServeBench(server.url, **known | fields)


def test_without_a_word_it_is_vllms_measurement() -> None:
    bench = ServeBench("http://h")
    assert bench == ServeBench(
        base_url="http://h",
        endpoint="/v1/completions",
        model=None,
        dataset_path=None,
        num_prompts=1000,
        num_warmups=0,
        random_input_len=1024,
        output_len=128,
        random_range_ratio=0.0,
        random_prefix_len=0,
        prompt_format="auto",
        vocab_size=1000,
        request_rate=math.inf,
        burstiness=1.0,
        max_concurrency=None,
        max_duration=None,
        request_timeout=600.0,
        seed=0,
        body={},
        headers={},
        percentiles=(50, 90, 99),
        goodput_ms={},
    )


def test_a_closed_loop_keeps_its_number_in_flight(server: FakeServer) -> None:
    server.script = [Reply(usage={"completion_tokens": 3})]
    result, done = measured(small(server, max_concurrency=2, num_warmups=2, goodput_ms={"ttft": 1e9}))
    assert len(server.requests) == 6
    assert len(done) == 4, "what warms up is not counted"
    assert result["max_concurrent_requests"] <= 2
    assert {key: result[key] for key in ("load", "request_rate", "burstiness", "max_concurrency")} == {
        "load": "closed loop",
        "request_rate": "inf",
        "burstiness": 1.0,
        "max_concurrency": 2,
    }
    assert (result["ended_by"], result["server_version"]) == ("all requests done", "9.9")
    assert (result["backend"], result["model_id"], result["num_prompts"]) == ("openai", "fake-model", 4)
    assert (result["completed"], result["not_sent"], result["goodput_share"]) == (4, 0, 1.0)
    assert {"date", "machine", "configuration", "p99_ttft_ms"} <= set(result)
    assert result["configuration"]["max_concurrency"] == 2
    for request in server.requests:
        assert len(request["prompt"]) == 5
        assert all(isinstance(token, int) for token in request["prompt"])
        assert request["max_tokens"] == 3


def test_one_at_a_time_is_one_at_a_time(server: FakeServer) -> None:
    result, done = measured(small(server, max_concurrency=1))
    assert (result["max_concurrent_requests"], result["load"]) == (1, "closed loop")
    due = [record.intended for record in done]
    assert len(set(due)) == len(due), "each is due when the one before it is done"


def test_three_at_a_time_are_three(server: FakeServer) -> None:
    """They are held until all three are there."""
    server.script = [Reply(hold_at=0)]
    held: list[int] = []

    def on_hold() -> None:
        held.append(1)
        if len(held) == 3:
            server.release()

    server.on_hold = on_hold
    result, _ = measured(small(server, num_prompts=3, max_concurrency=3))
    assert result["max_concurrent_requests"] == 3


def test_an_open_loop_sends_by_the_clock(server: FakeServer) -> None:
    result, _ = measured(small(server, request_rate=400.0, burstiness=math.inf, max_concurrency=1))
    assert (result["load"], result["request_rate"], result["burstiness"]) == ("open loop", 400.0, "inf")
    assert result["max_concurrent_requests"] == 1
    assert [row["intended_time"] for row in result["requests"]] == pytest.approx(
        [0.0025, 0.005, 0.0075, 0.01], abs=1e-9
    )
    assert all(row["start_time"] >= row["intended_time"] for row in result["requests"])


def test_an_open_loop_without_a_limit_sends_everything_at_once(server: FakeServer) -> None:
    server.script = [Reply(hold_at=0)]
    held: list[int] = []

    def on_hold() -> None:
        held.append(1)
        if len(held) == 4:
            server.release()

    server.on_hold = on_hold
    result, _ = measured(small(server))
    assert (result["load"], result["max_concurrency"]) == ("open loop", None)
    assert result["max_concurrent_requests"] == 4


def test_chat_takes_words_as_long_as_the_tokenizer_makes_them(server: FakeServer) -> None:
    server.tokens_per_word = 2.0
    chat = small(server, endpoint="/v1/chat/completions", model="fake-model", random_input_len=10)
    result, _ = measured(chat)
    assert result["backend"] == "openai-chat"
    [message] = server.requests[0]["messages"]
    assert message["role"] == "user"
    assert len(message["content"].split()) == 5
    assert set(message["content"].split()) <= set(WORDS)
    assert server.requests[0]["max_completion_tokens"] == 3
    server.tokens_per_word = None  # it does not say
    server.requests.clear()
    measured(chat)
    assert len(server.requests[0]["messages"][0]["content"].split()) == 10
    with pytest.raises(BenchError, match="--prompt-format token-ids needs --endpoint /v1/completions"):
        measured(replace(chat, prompt_format="token-ids"))
    server.requests.clear()
    measured(small(server, prompt_format="text"))
    assert isinstance(server.requests[0]["prompt"], str)


def test_everything_that_is_set_is_sent(server: FakeServer, tmp_path: Path) -> None:
    server.key = "k"
    server.models = ["one", "two"]
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "x"}\n{"prompt": "y", "max_tokens": 9}\n')
    bench = small(
        server, model="two", dataset_path=file, headers={"Authorization": "Bearer k"}, body={"top_k": 5}
    )
    result, _ = measured(replace(bench, num_prompts=3, max_concurrency=1, percentiles=(12.5,)))
    assert [(each["prompt"], each["max_tokens"]) for each in server.requests] == [
        ("x", 3),
        ("y", 9),
        ("x", 3),
    ]
    assert {each["model"] for each in server.requests} == {"two"}
    assert {each["top_k"] for each in server.requests} == {5}
    assert "p12.5_ttft_ms" in result
    assert "p99_ttft_ms" not in result
    assert "Bearer" not in str(result)


def test_the_same_seed_sends_the_same(server: FakeServer) -> None:
    def prompts(seed: int) -> list[Any]:
        server.requests.clear()
        varied = {"random_range_ratio": 0.5, "random_prefix_len": 2, "vocab_size": 300}
        measured(small(server, seed=seed, max_concurrency=1, random_input_len=20, **varied))
        return [(each["prompt"], each["max_tokens"]) for each in server.requests]

    first = prompts(1)
    assert first == prompts(1)
    assert first != prompts(2)
    assert len({tuple(prompt[:2]) for prompt, _ in first}) == 1
    assert all(12 <= len(prompt) <= 32 for prompt, _ in first)
    assert all(100 <= token < 300 for prompt, _ in first for token in prompt)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"max_concurrency": 0}, "--max-concurrency is 0; it must be at least 1"),
        ({"num_prompts": 0}, "--num-prompts is 0"),
        ({"model": "nobody", "num_warmups": 2}, "warm-up request 1 failed: HTTP 404: The model `nobody`"),
        ({"vocab_size": 1}, "--vocab-size is 1"),
    ],
)
def test_what_cannot_be_measured_is_said(server: FakeServer, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(BenchError) as caught:
        measured(small(server, **fields))
    assert said in str(caught.value)


def test_a_server_that_names_no_version_has_none(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from aiohttp import web

    async def text(self: FakeServer, request: web.Request) -> web.Response:
        return web.Response(text="1.0")

    monkeypatch.setattr(FakeServer, "_version", text)
    with FakeServer().running() as other:
        assert measured(small(other))[0]["server_version"] is None

    async def missing(self: FakeServer, request: web.Request) -> web.Response:
        return web.json_response({"version": "of an error page"}, status=404)

    monkeypatch.setattr(FakeServer, "_version", missing)
    with FakeServer().running() as other:
        assert measured(small(other))[0]["server_version"] is None


def test_it_ends_by_the_clock_or_by_ctrl_c_with_what_there_is(server: FakeServer) -> None:
    server.script = [Reply(), Reply(hold_at=1)]
    result, done = measured(small(server, max_concurrency=1, max_duration=0.3))
    assert result["ended_by"] == "max-duration"
    assert [result[key] for key in ("completed", "failed", "unfinished", "not_sent")] == [1, 0, 1, 2]
    assert len(done) == 1
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals reach the main thread only")
    before = signal.getsignal(signal.SIGINT)
    server.script = [Reply(hold_at=1)]
    server.on_hold = lambda: os.kill(os.getpid(), signal.SIGINT)
    result, _ = measured(small(server, max_concurrency=1))
    assert (result["ended_by"], result["unfinished"]) == ("interrupt", 1)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("status", "answer", "each"),
    [
        (200, {"count": 3 * len(WORDS)}, 3.0),
        (200, {"count": 1}, 1 / len(WORDS)),
        (200, {"count": 0}, 1.0),
        (200, {"count": "3"}, 1.0),
        (200, [], 1.0),
        (404, {"count": 3 * len(WORDS)}, 1.0),
    ],
)
def test_how_long_a_word_is_is_the_servers_to_say(
    status: int, answer: Any, each: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    async def post(session: Any, url: str, headers: Any, body: Any) -> tuple[int, Any]:
        asked.append((session, url, headers, body))
        return status, answer

    monkeypatch.setattr(serve, "post_json", post)
    target = Target("http://h", "/v1/chat/completions", "m", {"a": "b"})
    assert asyncio.run(serve.tokens_per_word("session", target)) == each  # type: ignore[arg-type]
    body = {"model": "m", "prompt": " ".join(WORDS), "add_special_tokens": False}
    assert asked == [("session", "http://h/tokenize", {"a": "b"}, body)]


@pytest.mark.parametrize("form", ["text", "token-ids"])
def test_lengths_vary_by_the_ratio_and_words_are_asked_about_for_text(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[dict[str, Any]] = []

    class Prompts(RandomPrompts):
        def __init__(self, **fields: Any) -> None:
            made.append(fields)
            super().__init__(**fields)

    async def each(session: Any, target: Any) -> float:
        return 2.0

    monkeypatch.setattr(serve, "RandomPrompts", Prompts)
    monkeypatch.setattr(serve, "tokens_per_word", each)
    bench = ServeBench(
        "http://h", num_prompts=3, random_input_len=9, random_range_ratio=0.25, prompt_format=form
    )  # type: ignore[arg-type]
    target = Target("http://h", "/v1/completions", "m")
    assert len(asyncio.run(serve._prompts(None, target, bench))) == 3  # type: ignore[arg-type]
    assert (made[0]["range_ratio"], made[0]["input_len"], made[0]["format"]) == (0.25, 9, form)
    assert made[0]["tokens_per_word"] == (2.0 if form == "text" else 1.0)
