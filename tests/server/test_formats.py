"""A new API family is a Struct, a Format and a Writer: one that wants vectors, with errors of its own."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar

import msgspec
import pytest
from msgspec.structs import replace

from penstock.core.errors import PenstockError
from penstock.core.pooling import Pooling, PoolingInfo
from penstock.server import app
from penstock.server.fields import Rule
from penstock.server.generation import Generation
from penstock.server.ignored import Ignored
from penstock.server.pipeline import Ask, generate
from penstock.server.protocol import Request
from penstock.server.state import State
from penstock.text.tokenizer import Tokenizer

from .conftest import running
from .fake_engine import INFO, FakeEngine

PATH = "/v9/vectors"


class VectorRequest(Request, frozen=True, kw_only=True):
    neutral: ClassVar[dict[str, Rule]] = {"encoding_format": lambda value, request: value == "float"}

    input: list[str]


class VectorWriter:
    stream = None

    def whole(self, generation: Generation) -> Iterator[bytes]:
        yield msgspec.json.encode(
            {
                "vectors": [choice.vectors.row for choice in generation.choices if choice.vectors],
                "usage": generation.usage(),
            }
        )


class VectorFormat:
    shape = VectorRequest
    prefix = "vec"
    prompt = "input"
    marks = ()
    pools = True
    empty = "input must not be empty."

    async def ask(self, state: State, request: VectorRequest, ignored: Ignored) -> Ask:
        return Ask(inputs=list(request.input), params=Pooling())

    def error(self, error: PenstockError) -> bytes:
        return msgspec.json.encode({"fault": str(error)})

    def writer(self, state: State, request: VectorRequest, id: str, generation: Generation) -> VectorWriter:
        return VectorWriter()


@pytest.fixture
def vectors(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer, says: Any) -> Any:
    route = (PATH, "POST", partial(generate, VectorFormat()))
    monkeypatch.setattr(app, "ROUTES", (*app.ROUTES, route))
    engine = FakeEngine(says("never said"), info=replace(INFO, pooling=PoolingInfo(dimension=2)))
    with running(tokenizer, engine.reply, engine=engine) as server:
        yield server


def test_vectors_come_from_the_same_pipeline(vectors: Any) -> None:
    answer = vectors.post(PATH, {"input": ["abc", "abcdef"], "encoding_format": "float"}).json
    first, second = (add.prompt for add in vectors.engine.adds)
    assert answer["vectors"] == [[len(first), 1.0], [len(second), 1.0]]
    assert answer["usage"]["prompt_tokens"] == len(first) + len(second)
    assert answer["usage"]["completion_tokens"] == 0
    (spec,) = {id(add.spec): add.spec for add in vectors.engine.adds}.values()
    assert spec.pooling == Pooling()
    assert spec.sampling is None


def test_a_prompt_may_fill_the_whole_context_where_nothing_is_generated(
    vectors: Any, tokenizer: Tokenizer
) -> None:
    text = "x"
    while len(tokenizer.encode(text)) < vectors.engine.info.max_model_len:
        text += chr(ord("a") + len(text) % 26)
    assert vectors.post(PATH, {"input": [text]}).status == 200
    refused = vectors.post(PATH, {"input": [text + " z z"]})
    assert refused.status == 400
    assert "at most 256 tokens" in refused.json["fault"]


def test_its_errors_have_its_own_shape_and_others_keep_theirs(vectors: Any) -> None:
    assert vectors.post(PATH, {}).json == {"fault": "Missing required parameter: input."}
    assert vectors.post(PATH, {"input": ["a"], "encoding_format": "base64"}).status == 400
    assert vectors.post(PATH, {"input": ["a"], "inputs": 1}).json["fault"].endswith("Did you mean input?")
    vectors.engine.queue_limit = 0
    full = vectors.post(PATH, {"input": ["a"]})
    assert (full.status, full.headers["retry-after"]) == (503, "3")
    assert full.json["fault"].startswith("the queue is full")
    assert "error" in vectors.post("/v1/completions", {"prompt": "a"}).json
