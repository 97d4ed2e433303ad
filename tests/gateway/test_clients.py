"""OpenAI's own client through the gateway, and what must never be in a log."""

from __future__ import annotations

import asyncio
import logging

import openai
import pytest

from tests.http.live import PATIENCE

from .conftest import BODY, KEY, SPEC, Gateway, Make
from .upstream import TOKENS, error_later, status

MESSAGES = [{"role": "user", "content": "Hi!"}]


def client(gateway: Gateway, key: str = KEY, retries: int = 0) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{gateway.live.url}/v1", api_key=key, max_retries=retries, timeout=PATIENCE
    )


def test_answers_streams_and_models(gateway: Gateway) -> None:
    with client(gateway) as ours:
        answer = ours.chat.completions.create(model="small", messages=MESSAGES)  # type: ignore[arg-type]
        assert answer.choices[0].message.content == "".join(TOKENS)
        assert answer.usage is not None
        assert answer.usage.completion_tokens == len(TOKENS)
        stream = ours.chat.completions.create(model="small", messages=MESSAGES, stream=True)  # type: ignore[call-overload]
        chunks = list(stream)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "".join(TOKENS)
        assert [each.id for each in ours.models.list()] == ["small", "classify-intent"]
    assert len(gateway.rows(2)) == 2


def test_errors_are_those_that_the_client_knows(make: Make) -> None:
    gateway = make(spec=SPEC.replace("dollars_per_day: 100", "dollars_per_day: 0"))
    with client(gateway, retries=2) as ours:
        with pytest.raises(openai.RateLimitError) as limited:
            ours.chat.completions.create(model="small", messages=MESSAGES)  # type: ignore[arg-type]
        assert limited.value.code == "insufficient_quota"
        assert "the limit is $0.00 per day" in limited.value.message
        with pytest.raises(openai.NotFoundError):
            ours.chat.completions.create(model="none", messages=MESSAGES)  # type: ignore[arg-type]
    # a budget is not asked again: x-should-retry is false
    page = gateway.get("/metrics", key="").body.decode()
    assert 'gateway_refusals_total{code="insufficient_quota"} 1.0' in page
    with client(gateway, key="sk-ps-wrong") as stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_a_broken_stream_is_an_error_to_the_client(make: Make) -> None:
    gateway = make(error_later)
    with client(gateway) as ours:
        stream = ours.chat.completions.create(model="small", messages=MESSAGES, stream=True)  # type: ignore[call-overload]
        read = [next(stream).choices[0].delta.content]
        gateway.upstream.go()
        with pytest.raises(openai.APIError, match="out of memory"):
            read += [chunk.choices[0].delta.content for chunk in stream]
    assert read[0] == TOKENS[0]


def test_logs_have_neither_prompts_nor_keys(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    secret = "my very private prompt"
    said = {"error": {"message": f"cannot handle: {secret}"}}
    gateway = make(status(500, body=said), status(500, body=said), retries=1)
    caplog.set_level(logging.DEBUG)
    response = gateway.post({**BODY, "messages": [{"role": "user", "content": secret}]})
    assert secret in response.error["message"]  # to whom it belongs
    assert "answered HTTP 500" in caplog.text
    assert secret not in caplog.text
    assert KEY not in caplog.text
    assert secret not in gateway.row().note


def test_a_rate_is_asked_again_after_its_time_and_a_budget_is_not(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr("openai._base_client.time.sleep", slept.append)
    for limit, cap, retries in (
        ("requests_per_minute: 1000", 1, 2),
        ("tokens_per_minute: 1000000", 10, 0),  # larger than all of it: that never passes
        ("dollars_per_day: 100", 0, 0),
    ):
        slept.clear()
        gateway = make(replace={limit: f"{limit.split(':')[0]}: {cap}"})
        with client(gateway, retries=2) as ours:
            if cap == 1:
                ours.chat.completions.create(model="small", messages=MESSAGES)  # type: ignore[arg-type]
            with pytest.raises(openai.RateLimitError):
                ours.chat.completions.create(model="small", messages=MESSAGES)  # type: ignore[arg-type]
        assert slept == [60.0] * retries  # what the gateway's Retry-After asks for
        assert len(gateway.upstream.asked) == (cap == 1)


def test_many_of_the_async_client_at_once(make: Make) -> None:
    gateway = make(replace={"concurrent_requests: 100": "concurrent_requests: 1000"})

    async def ask(ours: openai.AsyncOpenAI, streams: bool) -> str:
        if not streams:
            answer = await ours.chat.completions.create(model="small", messages=MESSAGES)  # type: ignore[arg-type]
            return answer.choices[0].message.content or ""
        stream = await ours.chat.completions.create(model="small", messages=MESSAGES, stream=True)  # type: ignore[call-overload]
        chunks = [chunk async for chunk in stream]
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])

    async def body() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{gateway.live.url}/v1", api_key=KEY, max_retries=0, timeout=PATIENCE
        ) as ours:
            return await asyncio.gather(*(ask(ours, number % 2 == 0) for number in range(60)))

    assert asyncio.run(body()) == ["".join(TOKENS)] * 60
    assert {(row.end, row.settlement) for row in gateway.rows(60)} == {("done", "settled")}
