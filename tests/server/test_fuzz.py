"""Whatever comes in: never a 500, never a hang, never an error of another shape. In process, plain ASGI."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.server.app import create_app
from penstock.server.config import ServerConfig
from penstock.server.protocol import ChatRequest, CompletionRequest
from penstock.text.chat_template import ChatTemplate

from .fake_engine import FakeEngine
from .tiny import REPLY, make_tokenizer

_tokenizer = make_tokenizer()


def post(path: str, body: bytes) -> tuple[int, bytes]:
    """Status and body of one exchange with a fresh application."""
    engine = FakeEngine(lambda _: _tokenizer.encode(REPLY))
    app = create_app(engine, _tokenizer, ChatTemplate.from_tokenizer(_tokenizer), ServerConfig())
    sent: list[dict[str, Any]] = []

    async def call() -> None:
        asked = False
        left = asyncio.Event()

        async def receive() -> dict[str, Any]:
            nonlocal asked
            if not asked:
                asked = True
                return {"type": "http.request", "body": body, "more_body": False}
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b""}
        await app(scope, receive, send)
        assert engine.load == 0

    asyncio.run(call())
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
SMALL = st.none() | st.booleans() | st.integers(-3, 130) | st.floats(-3, 3) | st.just("left") | JSON
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool"])},
        optional={"content": st.text() | JSON, "tool_calls": JSON, "name": JSON, "refusal": JSON},
    ),
    max_size=3,
)
PROMPTS = st.text() | st.lists(st.text(), max_size=3) | st.lists(st.integers(-2, 330)) | JSON


def fields(shape: Any, without: str) -> st.SearchStrategy[dict[str, Any]]:
    names = [name for name in shape.__struct_fields__ if name != without]
    return st.dictionaries(st.sampled_from(names), SMALL, max_size=4)


@pytest.mark.parametrize(
    ("path", "content", "shape", "name"),
    [
        ("/v1/chat/completions", MESSAGES, ChatRequest, "messages"),
        ("/v1/completions", PROMPTS, CompletionRequest, "prompt"),
    ],
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_fields(path: str, content: Any, shape: Any, name: str, data: st.DataObject) -> None:
    request = {**data.draw(fields(shape, name)), name: data.draw(content)}
    request.pop("model", None)
    status, body = post(path, json.dumps(request).encode())
    assert status in (200, 400), body
    if status == 400:
        error = json.loads(body)["error"]
        assert error["type"] == "invalid_request_error"
        assert error["message"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"])
@settings(max_examples=80, deadline=None)
@given(body=st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_body(path: str, body: bytes) -> None:
    status, answer = post(path, body)
    assert status == 400, answer
    assert set(json.loads(answer)["error"]) == {"message", "type", "param", "code"}
