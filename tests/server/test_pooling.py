"""Embeddings, scores, ranks and classes over HTTP: fields, shapes, truncation, refusals."""

from __future__ import annotations

import base64
import json
import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import numpy as np
import pytest
from msgspec.structs import replace
from tokenizers import processors

from penstock.core.pooling import Pooling, PoolingInfo, Vectors
from penstock.server import shapes
from penstock.server.vectors import as_bytes
from penstock.text.chat_template import ChatTemplate
from penstock.text.tokenizer import Tokenizer

from .conftest import LiveServer, running
from .fake_engine import INFO, FakeEngine
from .tiny import make_tokenizer

EMBED = PoolingInfo(dimension=2, matryoshka=(1, 2), type="cls")
CLASSES = PoolingInfo(tasks=("classify", "token_classify"), labels=("low", "high"))
CROSS = PoolingInfo(tasks=("classify",), labels=("near",))
START, END = 256, 257
EMBEDDINGS, POOL, CLASSIFY, SCORE, RERANK = "/v1/embeddings", "/pooling", "/classify", "/score", "/rerank"


@pytest.fixture(scope="module")
def framed() -> Tokenizer:
    """One token for a byte, `<|start|>` before a text and `<|end|>` behind it, as BERT's."""
    rust = make_tokenizer()._rust
    rust.post_processor = processors.TemplateProcessing(
        single="<|start|> $A <|end|>",
        pair="<|start|> $A <|end|> $B:1 <|end|>:1",
        special_tokens=[("<|start|>", START), ("<|end|>", END)],
    )
    template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}{{ instruction | default('') }}"
    )
    return Tokenizer(rust, chat_templates={"default": template})


@contextmanager
def pooling(tokenizer: Tokenizer, info: PoolingInfo, **options: Any) -> Iterator[LiveServer]:
    engine = FakeEngine(lambda _: [], info=replace(INFO, pooling=info))
    with running(tokenizer, engine.reply, engine=engine, **options) as server:
        yield server


@pytest.fixture(scope="module")
def _embeds(framed: Tokenizer) -> Iterator[LiveServer]:
    with pooling(framed, EMBED) as server:
        yield server


@pytest.fixture
def embeds(_embeds: LiveServer) -> LiveServer:
    _embeds.engine.reset(lambda _: [])
    return _embeds


@pytest.fixture(scope="module")
def crosses(framed: Tokenizer) -> Iterator[LiveServer]:
    with pooling(framed, CROSS) as server:
        yield server


def ids(text: str) -> list[int]:
    return make_tokenizer().encode(text)


def asked(server: LiveServer) -> list[tuple[list[int], int | None]]:
    """(token ids, where the second text begins) of each prompt, in order; they are forgotten."""
    adds, server.engine.adds = server.engine.adds, []
    specs = {id(add.spec): add.spec for add in adds}.values()
    return [(list(prompt.token_ids), prompt.second) for spec in specs for prompt in spec.prompts]


# ---- embeddings ----


def test_an_embedding_of_each_input(embeds: LiveServer) -> None:
    answer = embeds.post(EMBEDDINGS, {"model": "tiny", "input": ["abc", "d"], "user": "x"})
    body = msgspec.json.decode(answer.body, type=shapes.Embeddings)
    assert [(each.index, each.embedding) for each in body.data] == [(0, [5.0, 1.0]), (1, [3.0, 1.0])]
    assert (body.usage.prompt_tokens, body.usage.completion_tokens, body.usage.total_tokens) == (8, 0, 8)
    assert body.usage.device_seconds == pytest.approx(0.002)
    assert (body.usage.queue_ms, body.usage.ttft_ms) == (500.0, 750.0)
    assert answer.json["id"].startswith("embd-")
    assert asked(embeds) == [([START, *ids("abc"), END], None), ([START, *ids("d"), END], None)]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([7, 8], [[7, 8]]),
        ([7.0, "8"], [[7, 8]]),
        ([[7], [8, 9]], [[7], [8, 9]]),
        (["a", [9]], [[START, *ids("a"), END], [9]]),
    ],
)
def test_token_ids_are_taken_as_they_are(embeds: LiveServer, given: Any, expected: Any) -> None:
    assert embeds.post(EMBEDDINGS, {"input": given}).status == 200
    assert [prompt for prompt, _ in asked(embeds)] == expected


def test_special_tokens_can_be_left_out(embeds: LiveServer) -> None:
    embeds.post(EMBEDDINGS, {"input": "ab", "add_special_tokens": False})
    assert asked(embeds) == [(ids("ab"), None)]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"truncate_prompt_tokens": 4}, [START, *ids("ab"), END]),
        ({"truncate_prompt_tokens": 4, "truncation_side": "left"}, [START, *ids("de"), END]),
        ({"truncate_prompt_tokens": 2}, [START, END]),
        ({"truncate_prompt_tokens": -1}, [START, *ids("abcde"), END]),
        ({"truncate_prompt_tokens": 3, "add_special_tokens": False}, ids("abc")),
    ],
)
def test_truncation_keeps_the_special_tokens(embeds: LiveServer, fields: Any, expected: list[int]) -> None:
    assert embeds.post(EMBEDDINGS, {"input": "abcde", **fields}).status == 200
    assert asked(embeds) == [(expected, None)]


def test_a_long_text_is_cut_to_the_context(embeds: LiveServer) -> None:
    text = "x" * 9000
    refused = embeds.post(EMBEDDINGS, {"input": text})
    assert (refused.status, refused.json["error"]["code"]) == (400, "context_length_exceeded")
    assert embeds.post(EMBEDDINGS, {"input": text, "truncate_prompt_tokens": -1}).status == 200
    assert asked(embeds) == [([START, *ids("x" * 254), END], None)]
    assert embeds.post(EMBEDDINGS, {"input": [[1] * 300], "truncate_prompt_tokens": 5}).status == 200
    assert asked(embeds) == [([1] * 5, None)]


def test_base64_in_all_types(embeds: LiveServer) -> None:
    for dtype, wanted, order in (
        ("float32", np.float32, "<"),
        ("float32", np.float32, ">"),
        ("float16", np.float16, ">"),
    ):
        endianness = {"<": "little", ">": "big"}[order]
        fields = {"encoding_format": "base64", "embed_dtype": dtype, "endianness": endianness}
        answer = embeds.post(EMBEDDINGS, {"input": "abc", **fields}).json
        read = np.frombuffer(
            base64.b64decode(answer["data"][0]["embedding"]), np.dtype(wanted).newbyteorder(order)
        )
        assert read.tolist() == [5.0, 1.0]


def test_bfloat16_rounds_to_nearest_even() -> None:
    torch = pytest.importorskip("torch")
    numbers = [1.0, 1.00390625, 1.01171875, -3.1415927, 1e-30, 65504.0, 0.0]
    raw = as_bytes(Vectors.of(numbers), "bfloat16", "native")
    words = torch.tensor(numbers).bfloat16().view(torch.int16).tolist()
    assert list(struct.unpack(f"={len(numbers)}h", raw)) == words


def test_the_official_client_reads_them(embeds: LiveServer) -> None:
    """It asks for base64 by itself."""
    with embeds.client() as client:
        answer = client.embeddings.create(model="tiny", input=["abc", "defg"])
        assert [each.embedding for each in answer.data] == [[5.0, 1.0], [6.0, 1.0]]
        assert answer.usage.prompt_tokens == 11
        assert (
            client.embeddings.create(model="tiny", input=[1, 2], encoding_format="float").data[0].index == 0
        )
        client.embeddings.create(model="tiny", input="x", dimensions=1)
    assert embeds.engine.adds[-1].spec.pooling == Pooling("cls", "embed", True, 1)


def test_messages_are_written_by_the_template(embeds: LiveServer) -> None:
    talk = [{"role": "user", "content": "hi"}]
    for body in ({"messages": talk}, {"input": talk}):
        assert embeds.post(EMBEDDINGS, body).status == 200
        assert [prompt for prompt, _ in asked(embeds)] == [ids("user:hi;")]
    two = {"messages": [talk, [{"role": "system", "content": "x"}]], "add_special_tokens": True}
    assert embeds.post(EMBEDDINGS, two).status == 200
    assert [prompt for prompt, _ in asked(embeds)] == [
        [START, *ids(f"{said};"), END] for said in ("user:hi", "system:x")
    ]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "input", "input or messages"),
        ({"input": ""}, "input", "must not be empty"),
        ({"input": []}, "input", "must not be empty"),
        ({"input": ["a", ""]}, "input[1]", "must not be empty"),
        ({"input": [[]]}, "input[0]", "must not be empty"),
        ({"input": {"text": "a"}}, "input", "Invalid type"),
        ({"input": [3, 400]}, "input", "out of vocabulary"),
        ({"input": [True, "x"]}, "input", "token ids only"),
        ({"input": "a", "messages": []}, "input", "not both"),
        ({"messages": ["a"]}, "messages", "list of messages"),
        ({"messages": []}, "messages", "list of messages"),
        ({"input": "a", "dimensions": 3}, "dimensions", "one of 1, 2"),
        (
            {"input": "a", "encoding_format": "hex"},
            "encoding_format",
            "one of float, base64, bytes, bytes_only",
        ),
        ({"input": "a", "embed_dtype": "fp8_e4m3"}, "embed_dtype", "float32, float16, bfloat16"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "-1 or at least 1"),
        ({"input": "a", "truncate_prompt_tokens": 1}, "truncate_prompt_tokens", "at least 2"),
        ({"input": "a", "truncate_prompt_tokens": 257}, "truncate_prompt_tokens", "at most 256"),
        ({"input": "a", "normalize": True}, "normalize", "Use use_activation"),
        ({"input": "a", "padding": "max_length"}, "padding", "not supported"),
        ({"input": "a", "dimension": 3}, "dimension", "Did you mean dimensions"),
        ({"input": "a", "priority": 1}, "priority", "must be 0"),
        ({"input": ["a"] * 5000}, "input", "at most 4096"),
        ({"input": "a", "model": "other"}, "model", "does not exist"),
        ({"input": "\ud800"}, None, "surrogate"),
    ],
)
def test_what_cannot_be_embedded(embeds: LiveServer, body: Any, param: str | None, words: str) -> None:
    answer = embeds.post(EMBEDDINGS, body)
    assert answer.status == (404 if "model" in body else 400), answer.body
    assert words in answer.json["error"]["message"]
    assert param is None or answer.json["error"]["param"] == param
    assert not embeds.engine.adds


def test_neutral_values_are_taken(embeds: LiveServer) -> None:
    body = {
        "input": "a",
        "padding": "do_not_pad",
        "dimensions": None,
        "mm_processor_kwargs": {},
        "encoding": 1,
    }
    answer = embeds.post(EMBEDDINGS, body)
    assert answer.status == 200
    assert answer.headers["x-penstock-ignored"] == "encoding"


# ---- pooling and classes ----


def test_pooling_gives_a_vector_or_one_for_each_token(embeds: LiveServer) -> None:
    answer = embeds.post(POOL, {"input": ["ab"]})
    body = msgspec.json.decode(answer.body, type=shapes.PooledInputs)
    assert body.data[0].data == [4.0, 1.0]
    tokens = embeds.post(POOL, {"input": [[3, 4]], "task": "token_embed"}).json
    assert tokens["data"] == [{"index": 0, "object": "pooling", "data": [[3.0, 1.0], [4.0, 1.0]]}]
    assert embeds.engine.adds[-1].spec.pooling == Pooling("all", "token_embed")
    raw = embeds.post(POOL, {"input": [[3, 4]], "task": "token_embed", "encoding_format": "base64"}).json
    assert base64.b64decode(raw["data"][0]["data"]) == struct.pack("=4f", 3, 1, 4, 1)
    plain = embeds.post(POOL, {"input": "a", "use_activation": False})
    assert plain.status == 200
    assert embeds.engine.adds[-1].spec.pooling == Pooling("cls", "embed", False)
    refused = embeds.post(POOL, {"input": "a", "task": "classify"})
    assert (refused.status, refused.json["error"]["param"]) == (400, "task")
    unknown = embeds.post(POOL, {"input": "a", "task": "reward"})
    assert (unknown.status, unknown.json["error"]["param"]) == (400, "task")


def test_an_answer_with_a_vector_for_each_token_is_bounded(framed: Tokenizer) -> None:
    with pooling(framed, EMBED, max_response_bytes=400) as server:
        assert server.post(POOL, {"input": "abcdefgh"}).status == 200
        refused = server.post(POOL, {"input": "abcdefgh", "task": "token_embed"})
        assert refused.status == 400
        assert "--max-response-bytes" in refused.json["error"]["message"]


def test_classes(framed: Tokenizer) -> None:
    with pooling(framed, CLASSES) as server:
        body = msgspec.json.decode(
            server.post(CLASSIFY, {"input": ["ab", "c"]}).body, type=shapes.Classifications
        )
        assert [(each.label, each.probs, each.num_classes) for each in body.data] == [
            ("high", pytest.approx([0.04, 1.0]), 2),
            ("high", pytest.approx([0.03, 1.0]), 2),
        ]
        assert (
            server.post(EMBEDDINGS, {"input": "a"})
            .json["error"]["message"]
            .startswith("The model is not made for embeddings.")
        )
        refused = server.post(SCORE, {"text_1": "a", "text_2": "b"})
        assert (refused.status, "2 labels" in refused.json["error"]["message"]) == (400, True)
        dimensions = server.post(POOL, {"input": "a", "dimensions": 1})
        assert (dimensions.status, dimensions.json["error"]["param"]) == (400, "dimensions")


# ---- scores and ranks ----


@pytest.mark.parametrize(
    "names", [("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2")]
)
def test_scores_of_embeddings_are_cosines(embeds: LiveServer, names: tuple[str, str]) -> None:
    left, right = names
    body = msgspec.json.decode(
        embeds.post("/v1/score", {left: "abc", right: ["abc", "abcdefgh"]}).body, type=shapes.Scores
    )
    assert [each.score for each in body.data] == pytest.approx([1.0, 51 / math.sqrt(26 * 101)])
    assert body.usage.prompt_tokens == 5 + 5 + 10
    pairs = embeds.post(SCORE, {left: ["a", "abc"], right: ["a", "abcdefgh"]}).json
    assert [each["score"] for each in pairs["data"]] == pytest.approx([1.0, 51 / math.sqrt(26 * 101)])


def test_scores_of_a_cross_encoder_read_both_texts_together(crosses: LiveServer) -> None:
    asked(crosses)
    answer = crosses.post(SCORE, {"text_1": "q", "text_2": ["ab", "c"]}).json
    assert [each["score"] for each in answer["data"]] == pytest.approx([0.06, 0.05])
    assert asked(crosses) == [
        ([START, *ids("q"), END, *ids("ab"), END], 3),
        ([START, *ids("q"), END, *ids("c"), END], 3),
    ]


@pytest.mark.parametrize(
    ("fields", "first", "second"),
    [
        ({"truncate_prompt_tokens": 9}, "abc", "def"),
        ({"truncate_prompt_tokens": 8, "truncation_side": "left"}, "bc", "zde"),
        ({"truncate_prompt_tokens": 5}, "a", "d"),
        ({"max_tokens_per_doc": 2}, "abc", "de"),
        ({"max_tokens_per_query": 1, "max_tokens_per_doc": 4}, "a", "defy"),
    ],
)
def test_the_longer_text_is_cut_first(crosses: LiveServer, fields: Any, first: str, second: str) -> None:
    asked(crosses)
    document = "defyzde" if "z" in second else "defy…"
    assert crosses.post(SCORE, {"text_1": "abc", "text_2": document, **fields}).status == 200
    assert asked(crosses) == [([START, *ids(first), END, *ids(second), END], 2 + len(first))]


def test_ranks_in_the_shapes_of_vllm_jina_and_cohere(crosses: LiveServer) -> None:
    documents = ["a", {"text": "abc"}, "ab", "abd"]
    body = msgspec.json.decode(
        crosses.post("/v1/rerank", {"query": "q", "documents": documents}).body, type=shapes.Ranking
    )
    assert [(each.index, each.document) for each in body.results] == [
        (1, shapes.RankedText("abc")),
        (3, shapes.RankedText("abd")),  # equal scores: in the order of the request
        (2, shapes.RankedText("ab")),
        (0, shapes.RankedText("a")),
    ]
    best = crosses.post(
        "/rerank", {"query": "q", "documents": documents, "top_n": 1, "return_documents": False}
    )
    assert best.json["results"] == [{"index": 1, "relevance_score": pytest.approx(0.07)}]
    assert "meta" not in best.json
    cohere = crosses.post("/v2/rerank", {"query": "q", "documents": ["x"] * 101, "top_n": 2}).json
    assert len(cohere["results"]) == 2
    assert cohere["meta"] == {"api_version": {"version": "2"}, "billed_units": {"search_units": 2}}


def test_multi_vector_scores_are_sums_of_the_largest_products(framed: Tokenizer) -> None:
    info = PoolingInfo(tasks=("token_embed", "embed"), dimension=2)
    with pooling(framed, info) as server:
        answer = server.post(SCORE, {"text_1": "a", "text_2": "bc"}).json
        query, document = [START, *ids("a"), END], [START, *ids("bc"), END]
        want = sum(max(float(q) * d + 1 for d in document) for q in query)
        assert answer["data"][0]["score"] == pytest.approx(want)


def test_a_template_writes_the_prompt_where_the_operator_says_so(framed: Tokenizer) -> None:
    source = (
        "{{ instruction | default('-') }}|{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}"
    )
    template = ChatTemplate.from_tokenizer(framed, source)
    with pooling(framed, CROSS, template=template, chat_template=source) as server:
        assert server.post(SCORE, {"text_1": "a", "text_2": "b", "instruction": "find"}).status == 200
        assert asked(server) == [([START, *ids("find|query=a;document=b;"), END], None)]
        refused = server.post(SCORE, {"text_1": "a", "text_2": "b", "max_tokens_per_doc": 3})
        assert (refused.status, refused.json["error"]["param"]) == (400, "max_tokens_per_doc")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (SCORE, {"text_1": "a"}, "text_2"),
        (SCORE, {"text_2": "a"}, "text_1"),
        (SCORE, {"text_1": "a", "queries": "b", "text_2": "c"}, "queries"),
        (SCORE, {"text_1": ["a", "b"], "text_2": ["c"]}, "text_1"),
        (SCORE, {"text_1": [], "text_2": ["c"]}, "text_1"),
        (SCORE, {"text_1": "a", "text_2": [""]}, "text_2[0]"),
        (SCORE, {"text_1": "a", "text_2": [{"content": []}]}, "text_2[0]"),
        (SCORE, {"text_1": "a", "text_2": "b", "max_tokens_per_doc": 256}, "max_tokens_per_doc"),
        (SCORE, {"text_1": "a", "text_2": "b", "instruction": "x"}, "instruction"),
        (SCORE, {"text_1": "x" * 300, "text_2": "b"}, "text_1"),
        (RERANK, {"documents": ["a"]}, "query"),
        (RERANK, {"query": "", "documents": ["a"]}, "query"),
        (RERANK, {"query": "a", "documents": []}, "documents"),
        (RERANK, {"query": "a", "documents": ["b"], "top_n": -1}, "top_n"),
        (RERANK, {"query": "a", "documents": ["b"], "rank_fields": ["title"]}, "rank_fields"),
        (CLASSIFY, {"input": ""}, "input"),
    ],
)
def test_what_cannot_be_scored(crosses: LiveServer, path: str, body: Any, param: str) -> None:
    asked(crosses)
    answer = crosses.post(path, body)
    assert (answer.status, answer.json["error"]["param"]) == (400, param), answer.body
    assert not crosses.engine.adds


# ---- bytes, and SageMaker's door ----


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("path", [EMBEDDINGS, POOL])
def test_embeddings_as_bytes(embeds: LiveServer, path: str, dtype: str) -> None:
    fields = {"input": ["abc", "d"], "embed_dtype": dtype, "endianness": "big"}
    answer = embeds.post(path, {**fields, "encoding_format": "bytes"})
    assert (answer.status, answer.headers["content-type"]) == (200, "application/octet-stream")
    told = json.loads(answer.headers["metadata"])
    assert (told["model"], told["usage"]["prompt_tokens"]) == ("tiny", 8)
    size = np.dtype(dtype).itemsize
    assert told["data"] == [
        {"index": index, "embed_dtype": dtype, "endianness": "big", "shape": [2]}
        | {"start": 2 * size * index, "end": 2 * size * (index + 1)}
        for index in range(2)
    ]
    found = np.frombuffer(answer.body, np.dtype(dtype).newbyteorder(">")).reshape(2, 2).tolist()
    assert found == [[5.0, 1.0], [3.0, 1.0]]
    alone = embeds.post(path, {**fields, "encoding_format": "bytes_only"})
    assert alone.body == answer.body
    assert "metadata" not in alone.headers


def test_bytes_of_every_token_have_rows(embeds: LiveServer) -> None:
    answer = embeds.post(POOL, {"input": "abc", "task": "token_embed", "encoding_format": "bytes"})
    (entry,) = json.loads(answer.headers["metadata"])["data"]
    assert entry["shape"] == [5, 2]
    assert (entry["start"], entry["end"], len(answer.body)) == (0, 40, 40)


def test_invocations_of_models_that_pool(embeds: LiveServer, crosses: LiveServer) -> None:
    def kind(server: LiveServer, body: dict[str, Any]) -> str:
        answer = server.post("/invocations", body)
        assert answer.status == 200, answer.body
        return str(answer.json["id"]).partition("-")[0]

    hi = [{"role": "user", "content": "a"}]
    pair, ranked = {"text_1": "a", "text_2": "b"}, {"query": "a", "documents": ["b"]}
    assert [kind(embeds, body) for body in ({"input": "a"}, {"messages": hi}, pair, ranked)] == [
        *("embd", "embd", "score", "rerank")
    ]
    queries = {"queries": "a", "documents": ["b"]}
    assert [kind(crosses, body) for body in ({"input": "a"}, queries, ranked)] == [
        *("classify", "score", "rerank")
    ]
    assert embeds.post("/invocations", {"model": "tiny"}).status == 400


# ---- the other kind of model ----


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/completions", {"prompt": "a"}),
        ("/invocations", {"prompt": "a"}),
        ("/v1/responses", {"input": "a"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3}),
    ],
)
def test_a_model_that_pools_generates_nothing(embeds: LiveServer, path: str, body: Any) -> None:
    answer = embeds.post(path, {"model": "tiny", **body})
    assert answer.status == 400
    assert "does not generate text: it is served for embed, token_embed" in answer.json["error"]["message"]
    assert not embeds.engine.adds


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (EMBEDDINGS, {"input": "a"}),
        (POOL, {"input": "a"}),
        (CLASSIFY, {"input": "a"}),
        ("/v1/score", {"text_1": "a", "text_2": "b"}),
        ("/v2/rerank", {"query": "a", "documents": ["b"]}),
    ],
)
def test_a_model_that_generates_pools_nothing(server: LiveServer, path: str, body: Any) -> None:
    answer = server.post(path, body)
    assert (answer.status, answer.json["error"]["code"]) == (400, "unsupported_parameter")
    assert "--runner pooling" in answer.json["error"]["message"]


# ---- figures ----


def test_the_metrics_count_them(framed: Tokenizer) -> None:
    with pooling(framed, EMBED) as server:
        server.post(EMBEDDINGS, {"input": ["abc", "d"]})
        page = server.get("/metrics").body.decode()
    lines = {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
        for line in page.splitlines()
        if line[0] != "#"
    }
    own = 'engine="0",model_name="tiny"'
    assert lines['vllm:request_success_total{engine="0",finished_reason="stop",model_name="tiny"}'] == 2
    assert lines[f"vllm:e2e_request_latency_seconds_count{{{own}}}"] == 2
    assert lines[f"vllm:e2e_request_latency_seconds_sum{{{own}}}"] == 1.5
    assert lines[f"vllm:request_prompt_tokens_sum{{{own}}}"] == 8
    assert lines[f"vllm:request_generation_tokens_sum{{{own}}}"] == 0
    assert lines[f"vllm:request_params_max_tokens_count{{{own}}}"] == 0
    assert lines[f"vllm:time_to_first_token_seconds_count{{{own}}}"] == 0
