"""What the official clients offer beside plain calls: without waiting, parsed, raw, and piece by piece."""

from __future__ import annotations

import asyncio
from typing import Any

import anthropic
import openai
import pytest
from pydantic import BaseModel

from .conftest import LiveServer
from .fake_engine import PATIENCE
from .tiny import MODEL, REPLY

HI: list[Any] = [{"role": "user", "content": "Hi"}]


class City(BaseModel):
    city: str


def test_clients_that_do_not_wait(server: LiveServer) -> None:
    """Many requests of one client at a time, whole and streamed, in all dialects."""

    async def run() -> list[str]:
        options: dict[str, Any] = {"api_key": "none", "max_retries": 0, "timeout": PATIENCE}
        async with (
            openai.AsyncOpenAI(base_url=f"{server.url}/v1", **options) as theirs,
            anthropic.AsyncAnthropic(base_url=server.url, **options) as claude,
        ):

            async def chat() -> str:
                answer = await theirs.chat.completions.create(model=MODEL, messages=HI)
                return str(answer.choices[0].message.content)

            async def chat_streamed() -> str:
                async with theirs.chat.completions.stream(model=MODEL, messages=HI) as events:
                    return str((await events.get_final_completion()).choices[0].message.content)

            async def response() -> str:
                return (await theirs.responses.create(model=MODEL, input="Hi")).output_text

            async def response_streamed() -> str:
                async with theirs.responses.stream(model=MODEL, input="Hi") as events:
                    return (await events.get_final_response()).output_text

            async def message() -> str:
                answer = await claude.messages.create(model=MODEL, max_tokens=50, messages=HI)
                return "".join(block.text for block in answer.content if block.type == "text")

            async def message_streamed() -> str:
                async with claude.messages.stream(model=MODEL, max_tokens=50, messages=HI) as events:
                    return await events.get_final_text()

            ways = (chat, chat_streamed, response, response_streamed, message, message_streamed)
            return list(await asyncio.gather(*(way() for way in ways * 2)))

    assert asyncio.run(run()) == [REPLY] * 12


def test_answers_are_parsed(server: LiveServer, client: openai.OpenAI, says: Any) -> None:
    pytest.importorskip("llguidance")
    server.engine.reset(says('{"city": "Oslo"}'))
    chat = client.chat.completions.parse(model=MODEL, messages=HI, response_format=City)
    response = client.responses.parse(model=MODEL, input="Hi", text_format=City)
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=PATIENCE) as claude:
        message = claude.messages.parse(model=MODEL, max_tokens=50, messages=HI, output_format=City)
    parsed = (chat.choices[0].message.parsed, response.output_parsed, message.parsed_output)
    assert parsed == (City(city="Oslo"),) * 3
    assert all(add.spec.grammar is not None for add in server.engine.adds)


def test_raw_answers_and_pieces(server: LiveServer, client: openai.OpenAI) -> None:
    raw = client.responses.with_raw_response.create(model=MODEL, input="Hi", user="me")
    assert (raw.parse().output_text, raw.headers["x-penstock-ignored"]) == (REPLY, "user")
    with client.completions.with_streaming_response.create(
        model=MODEL, prompt="Hi", max_tokens=50, stream=True
    ) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=PATIENCE) as claude:
        message = claude.messages.with_raw_response.create(model=MODEL, max_tokens=50, messages=HI)
        assert message.headers["content-type"] == "application/json"
        assert MODEL in [model.id for model in claude.models.list()]
        assert claude.models.retrieve(MODEL).id == MODEL
