"""A real encoder behind a real server: the official client, Cohere's shape, batches of all that it does."""

from __future__ import annotations

import base64
import json
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.model.encoders import make_encoder, modules
from tests.test_offline_pooling import with_tokenizer

from .server import START_SECONDS, Server, serving

PROMPTS = {"query": "w7 w8 ", "passage": "w9 "}
LINES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/embeddings", {"input": ["w1 w2", "w3"]}),
    ("/v1/score", {"text_1": "w1 w2", "text_2": ["w1 w2", "w3"]}),
    ("/v1/rerank", {"query": "w1", "documents": ["w2", "w1"]}),
    ("/v2/embed", {"texts": ["w1"], "embedding_types": ["binary"], "input_type": "search_query"}),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = {
        **modules("mean", normalize=True),
        "config_sentence_transformers.json": {"prompts": PROMPTS, "default_prompt_name": None},
    }
    return with_tokenizer(make_encoder(tmp_path_factory.mktemp("bert"), "bert", files=files))


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    flags = ("--dtype", "float32", "--served-model-name", "bert", "--batch-dir", str(folder / "batches"))
    with serving(str(model), *flags, log=folder / "log") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=60) as made:
        yield made


def post(server: Server, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def test_coheres_types_are_one_vector(server: Server, client: openai.OpenAI) -> None:
    types = ["float", "base64", "ubinary", "binary"]
    told = post(server, "/v2/embed", {"texts": ["w1 w2", "w3"], "embedding_types": types})
    plain = [each.embedding for each in client.embeddings.create(model="bert", input=["w1 w2", "w3"]).data]
    embeddings = told["embeddings"]
    assert embeddings["float"] == [pytest.approx(each, abs=1e-6) for each in plain]
    for place, vector in enumerate(embeddings["float"]):
        assert list(struct.unpack("<48f", base64.b64decode(embeddings["base64"][place]))) == vector
        bits = [byte >> 7 - bit & 1 for byte in embeddings["ubinary"][place] for bit in range(8)]
        assert bits == [int(number >= 0) for number in vector]
        assert [byte + 128 for byte in embeddings["binary"][place]] == embeddings["ubinary"][place]
    assert told["meta"]["billed_units"] == {"input_tokens": 7}


def test_a_model_is_asked_in_the_words_that_it_was_trained_with(server: Server) -> None:
    """As sentence-transformers' `encode(prompt_name=…)` does it: the words stand before the text."""
    for wanted, name in (("search_query", "query"), ("search_document", "passage")):
        told = post(server, "/v2/embed", {"texts": ["w1"], "input_type": wanted})
        said = post(server, "/v2/embed", {"texts": [PROMPTS[name] + "w1"]})
        assert told["embeddings"]["float"] == [pytest.approx(said["embeddings"]["float"][0], abs=1e-6)]
        assert told["texts"] == ["w1"]


@pytest.mark.parametrize(("url", "body"), LINES)
def test_a_batch_has_what_its_endpoint_answers(
    server: Server, client: openai.OpenAI, url: Any, body: dict[str, Any]
) -> None:
    asked = b"".join(
        json.dumps({"custom_id": str(number), "method": "POST", "url": url, "body": body}).encode() + b"\n"
        for number in range(3)
    )
    file = client.files.create(file=("in.jsonl", asked), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint=url, completion_window="24h")
    deadline = time.monotonic() + START_SECONDS
    while batch.status not in ("completed", "failed") and time.monotonic() < deadline:
        time.sleep(0.05)
        batch = client.batches.retrieve(batch.id)
    assert (batch.status, batch.error_file_id) == ("completed", None)
    output = [
        json.loads(line) for line in client.files.content(batch.output_file_id or "").read().splitlines()
    ]
    assert [line["custom_id"] for line in output] == ["0", "1", "2"]
    plain = post(server, url, body)
    for line in output:
        assert _figures(line["response"]["body"]) == pytest.approx(_figures(plain), abs=1e-6)
    assert batch.usage is not None
    assert batch.usage.input_tokens == 3 * plain["usage"]["prompt_tokens"]


def _figures(answer: dict[str, Any]) -> list[float]:
    """The numbers that are asked for, in order."""
    if "embeddings" in answer:
        return [number for vectors in answer["embeddings"].values() for row in vectors for number in row]
    entries = answer["data"] if "data" in answer else answer["results"]
    names = ("embedding", "score", "relevance_score")
    found = [each[name] for each in entries for name in names if name in each]
    return [number for each in found for number in (each if isinstance(each, list) else [each])]


@pytest.mark.slow
def test_run_batch_asks_different_endpoints(model: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [*LINES, ("/v1/chat/completions", {"messages": [{"role": "user", "content": "w1"}]})]
    source.write_text(
        "".join(
            json.dumps({"custom_id": url, "method": "POST", "url": url, "body": body}) + "\n"
            for url, body in lines
        )
    )
    command = [sys.executable, "-m", "penstock", "run-batch", "--model", str(model), "--dtype", "float32"]
    done = subprocess.run(
        [*command, "-i", str(source), "-o", str(output)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "4 answered, 1 with an error" in done.stderr
    told = {line["custom_id"]: line["response"] for line in map(json.loads, output.read_text().splitlines())}
    assert [told[url]["status_code"] for url, _ in lines] == [200, 200, 200, 200, 400]
    ranked = told["/v1/rerank"]["body"]["results"]
    assert [each["index"] for each in ranked] == [1, 0]
    assert told["/v1/score"]["body"]["data"][0]["score"] == pytest.approx(1.0, abs=1e-5)
