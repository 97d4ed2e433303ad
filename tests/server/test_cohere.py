"""POST /v2/embed: Cohere's embeddings over HTTP, in the shape that vLLM gives them."""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from penstock.core.pooling import PoolingInfo, Vectors
from penstock.server import shapes
from penstock.server.cohere import _as_type
from penstock.text.chat_template import ChatTemplate
from penstock.text.tokenizer import Tokenizer

from .conftest import LiveServer
from .test_pooling import CROSS, EMBED, END, START, asked, framed, ids, pooling

__all__ = ["framed"]

PATH = "/v2/embed"
TRAINED = {
    "query": "Q: ",
    "passage": "P: ",
    "Clustering": "C: ",
    "document": "",
}


@pytest.fixture(scope="module")
def _embeds(framed: Tokenizer) -> Iterator[LiveServer]:
    with pooling(framed, EMBED) as server:
        yield server


@pytest.fixture
def embeds(_embeds: LiveServer) -> LiveServer:
    _embeds.engine.reset(lambda _: [])
    return _embeds


@pytest.fixture(scope="module")
def trained(framed: Tokenizer) -> Iterator[LiveServer]:
    with pooling(framed, PoolingInfo(dimension=2, type="cls", instructions=TRAINED)) as server:
        yield server


def prompts(server: LiveServer) -> list[list[int]]:
    return [prompt for prompt, _ in asked(server)]


def test_embeddings_by_type(embeds: LiveServer) -> None:
    fields = {"embedding_types": ["base64", "float", "base64"], "truncate": "END", "model": "tiny"}
    answer = embeds.post(PATH, {"texts": ["abc", "d"], **fields})
    body = msgspec.json.decode(answer.body, type=shapes.CohereEmbeddings)
    assert list(answer.json["embeddings"]) == ["base64", "float"]
    assert body.embeddings.floats == [[5.0, 1.0], [3.0, 1.0]]
    assert body.embeddings.base64 is not None
    assert [struct.unpack("<2f", base64.b64decode(each)) for each in body.embeddings.base64] == [
        (5.0, 1.0),
        (3.0, 1.0),
    ]
    assert body.texts == ["abc", "d"]
    assert body.meta == {"api_version": {"version": "2"}, "billed_units": {"input_tokens": 8}}
    assert answer.json["response_type"] == "embeddings_by_type"
    assert (body.usage.prompt_tokens, body.usage.device_seconds) == (8, pytest.approx(0.002))
    assert prompts(embeds) == [[START, *ids("abc"), END], [START, *ids("d"), END]]


def test_floats_are_what_is_given_where_nothing_is_asked_for(embeds: LiveServer) -> None:
    for types in (None, []):
        answer = embeds.post(PATH, {"texts": ["a"], "embedding_types": types}).json
        assert answer["embeddings"] == {"float": [[3.0, 1.0]]}


def test_bits_of_eight_numbers_are_a_byte() -> None:
    vectors = Vectors.of([1.0, -1.0, 0.0, -0.0, -5.0, 2.0, -1.0, 1.0] + [-1.0] * 8 + [1.0] * 8)
    assert _as_type(vectors, "ubinary") == [0b10110101, 0, 255]
    assert _as_type(vectors, "binary") == [0b10110101 - 128, -128, 127]


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"max_tokens": 5}, "abc"),
        ({"max_tokens": 5, "truncate": "END"}, "abc"),
        ({"max_tokens": 5, "truncate": "START"}, "def"),
        ({"max_tokens": 8, "truncate": "NONE"}, "abcdef"),
        ({"truncate": "NONE"}, "abcdef"),
    ],
)
def test_which_end_is_cut_off(embeds: LiveServer, fields: dict[str, Any], kept: str) -> None:
    assert embeds.post(PATH, {"texts": ["abcdef"], **fields}).status == 200
    assert prompts(embeds) == [[START, *ids(kept), END]]


@pytest.mark.parametrize(("truncate", "end"), [("END", slice(1, 4)), ("START", slice(-4, -1))])
def test_a_text_over_the_context_is_cut_to_it(embeds: LiveServer, truncate: str, end: slice) -> None:
    text = "abc" + "x" * 4000 + "xyz"
    assert embeds.post(PATH, {"texts": [text], "truncate": truncate}).status == 200
    (prompt,) = prompts(embeds)
    assert len(prompt) == 256
    assert prompt[end] == ids("abc" if truncate == "END" else "xyz")
    refused = embeds.post(PATH, {"texts": [text], "truncate": "NONE"})
    assert (refused.status, refused.json["error"]["code"]) == (400, "context_length_exceeded")


@pytest.mark.parametrize(
    ("wanted", "begins"),
    [
        (None, ""),
        ("query", "Q: "),
        ("search_query", "Q: "),
        ("search_document", ""),
        ("passage", "P: "),
        ("clustering", "C: "),
    ],
)
def test_texts_begin_as_the_model_was_trained(trained: LiveServer, wanted: str | None, begins: str) -> None:
    answer = trained.post(PATH, {"texts": ["ab"], "input_type": wanted})
    assert answer.json["texts"] == ["ab"]
    assert prompts(trained) == [[START, *ids(f"{begins}ab"), END]]


def test_cohere_s_own_type_reaches_a_model_that_calls_it_passage(framed: Tokenizer) -> None:
    with pooling(framed, PoolingInfo(dimension=2, instructions={"passage": "P: "})) as server:
        assert server.post(PATH, {"texts": ["ab"], "input_type": "search_document"}).status == 200
        assert prompts(server) == [[START, *ids("P: ab"), END]]


def test_what_the_texts_are_for_does_nothing_where_the_model_makes_no_difference(embeds: LiveServer) -> None:
    answer = embeds.post(PATH, {"texts": ["ab"], "input_type": "search_query"})
    assert answer.headers["x-penstock-ignored"] == "input_type"
    assert prompts(embeds) == [[START, *ids("ab"), END]]


def test_inputs_are_written_by_the_template(trained: LiveServer) -> None:
    inputs = [{"content": [{"type": "text", "text": "ab"}, {"type": "text", "text": "c"}]}]
    answer = trained.post(PATH, {"inputs": inputs, "input_type": "query"})
    assert "texts" not in answer.json
    assert prompts(trained) == [ids("system:Q: ;user:ab\nc;")]


def test_inputs_need_a_template(framed: Tokenizer) -> None:
    bare = ChatTemplate.from_tokenizer(Tokenizer(framed._rust))
    with pooling(framed, EMBED, template=bare) as server:
        refused = server.post(PATH, {"inputs": [{"content": [{"type": "text", "text": "ab"}]}]})
        assert refused.status == 400
        assert "template" in refused.json["error"]["message"]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "texts", "texts or inputs"),
        ({"texts": ["a"], "inputs": [{}]}, "texts", "not both"),
        ({"texts": []}, "texts", "must not be empty"),
        ({"inputs": []}, "inputs", "must not be empty"),
        ({"texts": ["a", ""]}, "texts[1]", "must not be empty"),
        ({"texts": "a"}, "texts", "Invalid type"),
        ({"texts": ["a"] * 5000}, "texts", "at most 4096"),
        ({"images": ["data:,"]}, "images", "not supported"),
        ({"inputs": [{}]}, "inputs[0].content", "Missing"),
        ({"inputs": [{"content": []}]}, "inputs[0].content", "must not be empty"),
        ({"inputs": [{"content": [{"type": "image_url"}]}]}, "inputs[0].content[0].type", "text only"),
        ({"inputs": [{"content": [{"type": "text"}]}]}, "inputs[0].content[0].text", "Missing"),
        ({"texts": ["a"], "embedding_types": ["int8"]}, "embedding_types[0]", "calibration"),
        (
            {"texts": ["a"], "embedding_types": ["hex"]},
            "embedding_types[0]",
            "float, base64, binary, ubinary",
        ),
        ({"texts": ["a"], "embedding_types": ["binary"]}, "embedding_types", "embeddings have 2"),
        ({"texts": ["a"], "truncate": "MIDDLE"}, "truncate", "NONE, START, END"),
        ({"texts": ["a"], "max_tokens": 0}, "max_tokens", "1 to 256"),
        ({"texts": ["a"], "max_tokens": 257}, "max_tokens", "1 to 256"),
        ({"texts": ["abcdef"], "max_tokens": 7, "truncate": "NONE"}, "texts", "8 tokens"),
        ({"texts": ["a"], "output_dimension": 3}, "dimensions", "one of 1, 2"),
        ({"texts": ["a"], "input_typ": "query"}, "input_typ", "Did you mean input_type"),
    ],
)
def test_what_cannot_be_embedded(embeds: LiveServer, body: Any, param: str, words: str) -> None:
    answer = embeds.post(PATH, body)
    assert answer.status == 400, answer.body
    assert (answer.json["error"]["param"], words in answer.json["error"]["message"]) == (param, True), (
        answer.body
    )
    assert not embeds.engine.adds


def test_an_input_type_that_the_model_does_not_know(trained: LiveServer) -> None:
    answer = trained.post(PATH, {"texts": ["a"], "input_type": "classification"})
    assert (answer.status, answer.json["error"]["param"]) == (400, "input_type")
    assert "Clustering, document, passage, query" in answer.json["error"]["message"]


def test_a_model_that_does_not_embed_says_so(framed: Tokenizer, server: LiveServer) -> None:
    with pooling(framed, CROSS) as crosses:
        refused = crosses.post(PATH, {"texts": ["a"]})
        assert (refused.status, refused.json["error"]["param"]) == (400, "model")
    assert server.post(PATH, {"texts": ["a"]}).json["error"]["code"] == "unsupported_parameter"


def test_matryoshka_embeddings(embeds: LiveServer) -> None:
    assert embeds.post(PATH, {"texts": ["a"], "output_dimension": 1}).status == 200
    pooled = embeds.engine.adds[-1].spec.pooling
    assert pooled is not None
    assert (pooled.task, pooled.dimensions, pooled.activate) == ("embed", 1, True)


def test_bits_are_of_the_numbers_that_are_left(framed: Tokenizer) -> None:
    """A model of 12 numbers has no bytes of bits; its first 8 have."""
    with pooling(framed, PoolingInfo(dimension=12, matryoshka=True)) as server:
        server.engine.pool = lambda _: Vectors.of([-1.0, 1.0] * 4)  # type: ignore[method-assign]
        body = {"texts": ["a"], "embedding_types": ["ubinary"]}
        assert server.post(PATH, body).status == 400
        told = server.post(PATH, {**body, "output_dimension": 8}).json
        assert told["embeddings"] == {"ubinary": [[0b01010101]]}
