"""One server: what is kept, tried again, refused, or given up; without real waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from penstock.core.errors import StartupError
from penstock.evaluate.answer import Answer, Refusal, read_answer
from penstock.evaluate.asking import Asker, Patience, ServerDown, describe
from penstock.evaluate.cache import Cache
from tests.evaluate.server import AnsweringServer

SAID: list[str] = []
"""What the asker of the last test said."""


def with_asker(
    server: AnsweringServer,
    tmp_path: Path,
    work: Callable[[Asker], Any],
    *,
    retries: int = 3,
    timeout: float = 30.0,
) -> tuple[Any, list[float]]:
    """(what the work returns, the pauses that it would have made)"""
    pauses: list[float] = []
    SAID.clear()

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    async def run() -> Any:
        cache = Cache(tmp_path, {"url": server.url})
        patience = Patience(concurrency=4, retries=retries, timeout=timeout, sleep=sleep)
        try:
            async with aiohttp.ClientSession() as session:
                root = f"{server.url}/v1"
                asker = Asker(session, "The baseline", root, "m", {}, cache, patience, SAID.append)
                return await work(asker)
        finally:
            cache.close()

    return asyncio.run(run()), pauses


def chat(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]}


async def ask(asker: Asker, text: str = "q") -> Answer | Refusal:
    return await asker.ask("/chat/completions", chat(text))


def test_an_answer_and_what_it_took(serve: Callable[..., AnsweringServer], tmp_path: Path) -> None:
    server = serve(str.upper)
    answer, _ = with_asker(server, tmp_path, ask)
    assert (answer.text, answer.prompt_tokens, answer.completion_tokens) == ("Q", 10, 5)
    assert (answer.device_time, answer.fingerprint, answer.concurrency) == (250_000_000, "fp_1", 4)
    assert answer.latency > 0
    assert server.bodies == [{**chat("q"), "model": "m", "stream": False}]
    again, _ = with_asker(server, tmp_path, ask)
    assert again == answer
    assert len(server.bodies) == 1


def test_the_same_request_is_under_way_once(serve: Callable[..., AnsweringServer], tmp_path: Path) -> None:
    server = serve(str.upper)

    async def work(asker: Asker) -> Any:
        answers = await asyncio.gather(*(ask(asker) for _ in range(10)))
        return answers, asker.asked

    (answers, asked), _ = with_asker(server, tmp_path, work)
    assert asked == len(server.bodies) == 1
    assert len({id(each) for each in answers}) == 1


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504, 408])
def test_what_passes_is_tried_again_with_longer_pauses(
    serve: Callable[..., AnsweringServer], tmp_path: Path, status: int
) -> None:
    replies: list[Any] = [(status, {"error": "wait"}), (status, {"error": "wait"}), None, "good"]
    server = serve(lambda _: replies.pop(0))
    answer, pauses = with_asker(server, tmp_path, ask)
    assert answer.text == "good"
    assert len(server.bodies) == 4
    assert len(pauses) == 3
    assert all(0.25 * 2**n <= pause <= 0.5 * 2**n for n, pause in enumerate(pauses))
    assert len(SAID) == 1  # not with each try
    assert SAID[0].startswith("The baseline does not answer (")


def test_a_server_may_say_how_long(serve: Callable[..., AnsweringServer], tmp_path: Path) -> None:
    replies: list[Any] = [
        (429, {"headers": {"Retry-After": "7"}}),
        (429, {"headers": {"Retry-After": "99999"}}),
        (429, {"headers": {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}}),
        "good",
    ]
    server = serve(lambda _: replies.pop(0))
    _, pauses = with_asker(server, tmp_path, ask)
    assert pauses[0] == 7.0
    assert pauses[1] == 60.0
    assert pauses[2] <= 2.0


def test_down_is_down_after_all_tries(serve: Callable[..., AnsweringServer], tmp_path: Path) -> None:
    server = serve(lambda _: None)
    with pytest.raises(ServerDown, match="asked 4 times"):
        with_asker(server, tmp_path, ask)
    server = serve(lambda _: (503, {"error": {"message": "no engine"}}))
    with pytest.raises(ServerDown, match="HTTP 503: no engine"):
        with_asker(server, tmp_path, ask, retries=0)


def test_one_request_that_always_fails_is_refused_and_the_others_go_on(
    serve: Callable[..., AnsweringServer], tmp_path: Path
) -> None:
    server = serve(lambda text: (500, {"error": "broken"}) if text == "2" else text)

    async def work(asker: Asker) -> Any:
        return [await ask(asker, str(n)) for n in range(4)]

    answers, _ = with_asker(server, tmp_path, work)
    assert [getattr(each, "text", None) for each in answers] == ["0", "1", None, "3"]
    assert answers[2] == Refusal(status=500, message="broken")
    assert len(server.bodies) == 3 + 4


def test_several_in_a_row_mean_that_it_is_down(serve: Callable[..., AnsweringServer], tmp_path: Path) -> None:
    server = serve(lambda _: (500, {"error": "broken"}))

    async def work(asker: Asker) -> None:
        for n in range(5):
            await ask(asker, str(n))

    with pytest.raises(ServerDown, match="5 requests in a row failed, the last with HTTP 500: broken"):
        with_asker(server, tmp_path, work, retries=0)
    assert len(server.bodies) == 5


def test_a_server_that_refuses_everything_is_asked_five_times(
    serve: Callable[..., AnsweringServer], tmp_path: Path
) -> None:
    server = serve(lambda _: (400, {"error": {"message": "temperature is not supported"}}))

    async def work(asker: Asker) -> None:
        for n in range(100):
            await ask(asker, str(n))

    with pytest.raises(StartupError, match="temperature is not supported"):
        with_asker(server, tmp_path, work)
    assert len(server.bodies) == 5


def test_refusals_after_answers_are_just_that(serve: Callable[..., AnsweringServer], tmp_path: Path) -> None:
    server = serve(lambda text: text if text == "0" else (400, {"error": "too long"}))

    async def work(asker: Asker) -> Any:
        return [await ask(asker, str(n)) for n in range(12)]

    answers, pauses = with_asker(server, tmp_path, work)
    assert sum(isinstance(each, Refusal) for each in answers) == 11
    assert pauses == []


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_path_ends_it_at_once(
    serve: Callable[..., AnsweringServer], tmp_path: Path, status: int
) -> None:
    server = serve(lambda _: (status, {"error": "no"}))
    with pytest.raises(StartupError, match=f"HTTP {status} from .*: no"):
        with_asker(server, tmp_path, ask)
    assert len(server.bodies) == 1


def test_an_answer_that_is_none(serve: Callable[..., AnsweringServer], tmp_path: Path) -> None:
    server = serve(lambda _: (200, {"choices": []}))
    answer, _ = with_asker(server, tmp_path, ask, retries=1)
    assert "no choices" in answer.message
    assert len(server.bodies) == 2


def test_an_answer_that_does_not_come(serve: Callable[..., AnsweringServer], tmp_path: Path) -> None:
    import threading

    server = serve(str.upper)
    server.gate = threading.Event()
    answer, _ = with_asker(server, tmp_path, ask, retries=0, timeout=0.05)
    server.gate.set()
    assert answer == Refusal(status=0, message="no answer within 0.05 s (--timeout)")


def test_what_tells_a_server_from_others(serve: Callable[..., AnsweringServer]) -> None:
    server = serve(str.upper, model="big")

    async def work(model: str | None) -> Any:
        async with aiohttp.ClientSession() as session:
            return await describe(session, "The judge", f"{server.url}/v1", model, {}, "--judge-model")

    root = f"{server.url}/v1"
    assert asyncio.run(work(None)) == (
        "big",
        {"url": root, "model": "big", "version": "1.0", "owned_by": "tests"},
    )
    assert asyncio.run(work("x")) == ("x", {"url": root, "model": "x", "version": "1.0"})
    server.down = True
    with pytest.raises(ServerDown, match="no answer from"):
        asyncio.run(work(None))


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"choices": [{"text": "a"}]}, "a"),
        ({"choices": [{"message": {"content": "b"}}]}, "b"),
        ({"choices": [{"message": {"content": None, "refusal": "no"}}]}, "no"),
        (
            {
                "choices": [
                    {
                        "message": {
                            "content": None,
                            "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}],
                        }
                    }
                ]
            },
            '[{"name":"f","arguments":{}}]',
        ),
        (
            {"choices": [{"message": {"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}}]},
            '[{"name":"f","arguments":"{"}]',
        ),
    ],
)
def test_texts_of_answers(body: dict[str, Any], text: str) -> None:
    assert read_answer(body, latency=1, asked_at=0.0, concurrency=1).text == text


@pytest.mark.parametrize(
    "body", [None, [], {}, {"choices": {}}, {"choices": [1]}, {"choices": [{}]}, {"choices": [{"text": 1}]}]
)
def test_answers_that_are_none(body: Any) -> None:
    with pytest.raises(ValueError):
        read_answer(body, latency=1, asked_at=0.0, concurrency=1)


def test_usage_that_is_nonsense_is_no_usage() -> None:
    usage = {"prompt_tokens": -1, "completion_tokens": "5", "prompt_tokens_details": 3, "device_seconds": "x"}
    answer = read_answer(
        {"choices": [{"text": "a", "finish_reason": 4}], "usage": usage, "system_fingerprint": 1},
        latency=1,
        asked_at=0.0,
        concurrency=1,
    )
    assert (answer.prompt_tokens, answer.completion_tokens, answer.cached_tokens, answer.device_time) == (
        None,
    ) * 4
    assert (answer.finish_reason, answer.fingerprint) == (None, None)
