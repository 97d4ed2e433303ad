"""Files and batches: OpenAI's client, the life cycle, broken lines, owners, and what a crash leaves."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from msgspec.structs import replace

from penstock.core.pooling import PoolingInfo
from penstock.server.batches.lines import BadLine, answered, read_line
from penstock.server.batches.store import BatchStore, File
from penstock.server.batches.usage import usage_of
from penstock.text.tokenizer import Tokenizer

from .conftest import LiveServer, running
from .fake_engine import INFO, PATIENCE, FakeEngine
from .tiny import MODEL, REPLY

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
FILES, BATCHES = "/v1/files", "/v1/batches"


def chat(id: str, **fields: Any) -> dict[str, Any]:
    body = {"model": MODEL, "messages": [{"role": "user", "content": id}], **fields}
    return {"custom_id": id, "method": "POST", "url": CHAT, "body": body}


def jsonl(*lines: Any) -> bytes:
    return b"".join(
        (line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines
    )


def begin(
    client: openai.OpenAI, content: bytes, endpoint: Any = CHAT, window: Any = "24h"
) -> openai.types.Batch:
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window=window)


def ended(client: openai.OpenAI, id: str) -> openai.types.Batch:
    """The batch when nothing is done for it any more; asked again and again, as clients do."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        batch = client.batches.retrieve(id)
        if batch.status in ("completed", "failed", "cancelled", "expired"):
            return batch
    raise AssertionError(batch)


def lines(client: openai.OpenAI, id: str | None) -> list[Any]:
    assert id is not None
    return [json.loads(line) for line in client.files.content(id).read().splitlines()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "batches"


@pytest.fixture
def serving(tokenizer: Tokenizer, says: Any, folder: Path) -> Iterator[LiveServer]:
    with running(tokenizer, says(REPLY), batch_dir=str(folder)) as server:
        yield server


@pytest.fixture
def client(serving: LiveServer) -> Iterator[openai.OpenAI]:
    with serving.client() as client:
        yield client


# ---- the life of a batch ----


def test_a_batch(client: openai.OpenAI, serving: LiveServer) -> None:
    begun = begin(client, jsonl(*(chat(f"r{i}", max_tokens=20) for i in range(5))))
    assert (begun.status, begun.object, begun.endpoint) == ("validating", "batch", CHAT)
    batch = ended(client, begun.id)
    assert batch.status == "completed"
    counts = batch.request_counts
    assert counts is not None
    assert (counts.total, counts.completed, counts.failed) == (5, 5, 0)
    assert batch.error_file_id is None
    assert batch.in_progress_at is not None
    assert batch.completed_at is not None
    output = lines(client, batch.output_file_id)
    assert [line["custom_id"] for line in output] == [f"r{i}" for i in range(5)]
    assert {line["response"]["status_code"] for line in output} == {200}
    assert {line["response"]["body"]["choices"][0]["message"]["content"] for line in output} == {REPLY}
    assert len({line["id"] for line in output}) == 5
    assert {add.spec.service_class for add in serving.engine.adds} == {"background"}
    used = [line["response"]["body"]["usage"] for line in output]
    assert begun.usage is None
    assert batch.usage is not None
    assert batch.usage.input_tokens == sum(each["prompt_tokens"] for each in used) > 0
    assert batch.usage.output_tokens == sum(each["completion_tokens"] for each in used) > 0
    assert batch.usage.total_tokens == batch.usage.input_tokens + batch.usage.output_tokens
    assert batch.usage.to_dict()["device_seconds"] == pytest.approx(
        sum(each["device_seconds"] for each in used), abs=1e-9
    )
    assert [each.id for each in client.batches.list()] == [batch.id]
    file = client.files.retrieve(batch.output_file_id or "")
    assert (file.purpose, file.bytes) == ("batch_output", len(client.files.content(file.id).read()))


POOLED: dict[str, list[dict[str, Any]]] = {
    "/v1/embeddings": [
        {"input": ["a", "bc"]},
        {"input": "abc", "encoding_format": "base64"},
        {"input": [5, 6], "dimensions": 1},
    ],
    "/v1/score": [{"text_1": "a", "text_2": ["b", "cd"]}, {"queries": ["a", "b"], "documents": ["c", "d"]}],
    "/v1/rerank": [{"query": "a", "documents": ["b", "cd", "efg"], "top_n": 2}],
    "/v2/rerank": [{"query": "a", "documents": [{"text": "b"}, "cd"]}],
    "/v2/embed": [{"texts": ["a", "bc"], "embedding_types": ["float", "base64"]}],
}


@pytest.fixture
def embedding(tokenizer: Tokenizer, folder: Path) -> Iterator[LiveServer]:
    info = PoolingInfo(dimension=2, matryoshka=True, type="cls")
    engine = FakeEngine(lambda _: [], info=replace(INFO, pooling=info))
    with running(tokenizer, engine.reply, engine=engine, batch_dir=str(folder)) as server:
        yield server


@pytest.mark.parametrize("url", POOLED)
def test_lines_of_a_model_that_pools_have_the_answers_of_their_endpoint(
    embedding: LiveServer, url: str
) -> None:
    """But for what is of the request: its id and its times."""

    def without(body: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in body.items() if name not in ("id", "created")}

    bodies = POOLED[url]
    asked = [{"custom_id": str(i), "url": url, "body": body} for i, body in enumerate(bodies)]
    with embedding.client() as client:
        batch = ended(client, begin(client, jsonl(*asked), endpoint=url).id)
        assert (batch.status, batch.error_file_id) == ("completed", None)
        output = lines(client, batch.output_file_id)
    assert {add.spec.service_class for add in embedding.engine.adds} == {"background"}
    plain = [embedding.post(url, body).json for body in bodies]
    assert [without(line["response"]["body"]) for line in output] == [without(body) for body in plain]
    used = [body["usage"] for body in plain]
    assert batch.usage is not None
    assert batch.usage.input_tokens == sum(each["prompt_tokens"] for each in used) > 0
    assert (batch.usage.output_tokens, batch.usage.total_tokens) == (0, batch.usage.input_tokens)
    assert batch.usage.to_dict()["device_seconds"] == pytest.approx(
        sum(each["device_seconds"] for each in used), abs=1e-9
    )


def test_an_answer_that_says_no_usage_ends_a_batch_all_the_same() -> None:
    """The usage of a batch is the last thing that it waits for."""
    answers = (b"\xffno JSON", b'{"usage": null}', b"{}", b'{"usage": {"prompt_tokens": 5}}')
    used = usage_of([answered("b", "c", 200, "r", body) for body in answers])
    assert (used["input_tokens"], used["total_tokens"]) == (5, 5)


def test_what_a_model_that_pools_refuses_is_in_the_error_file(embedding: LiveServer) -> None:
    url = "/v1/embeddings"
    bodies: list[Any] = [
        {"input": "a"},
        {"input": ""},
        {"input": "x" * 300},
        {"input": "a", "encoding_format": "bytes"},
        {"input": "a", "encoding_format": "bytes_only"},
        {"input": "a", "dimensions": 9},
    ]
    asked = [{"custom_id": str(i), "url": url, "body": body} for i, body in enumerate(bodies)]
    with embedding.client() as client:
        batch = ended(client, begin(client, jsonl(*asked), endpoint=url).id)
        assert [line["custom_id"] for line in lines(client, batch.output_file_id)] == ["0"]
        errors = lines(client, batch.error_file_id)
        none = ended(client, begin(client, jsonl(chat("a"))).id)
        (refused,) = lines(client, none.error_file_id)
    assert [line["response"] and line["response"]["status_code"] for line in errors] == [
        400,
        400,
        None,
        None,
        400,
    ]
    assert errors[2]["error"]["message"].startswith("body.encoding_format")
    assert refused["response"]["body"]["error"]["code"] == "unsupported_parameter"


def test_broken_lines_go_to_the_error_file_and_the_rest_runs(client: openai.OpenAI) -> None:
    content = b"\xef\xbb\xbf" + jsonl(  # some editors begin files with a byte order mark
        chat("good"),
        b"{broken",
        b"",
        chat("good"),
        {"custom_id": "no body", "url": CHAT},
        {**chat("elsewhere"), "url": TEXT},
        chat("stream", stream=True),
        chat("refused", temperature=-1),
        {**chat(""), "custom_id": ""},
        chat("also good"),
    )
    batch = ended(client, begin(client, content).id)
    assert batch.status == "completed"
    assert batch.request_counts is not None
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (
        9,
        2,
        7,
    )
    assert [line["custom_id"] for line in lines(client, batch.output_file_id)] == ["good", "also good"]
    errors = lines(client, batch.error_file_id)
    found = [
        (line["custom_id"], (line["error"] or {}).get("code"), (line["error"] or {}).get("line"))
        for line in errors
    ]
    assert found == [
        (None, "invalid_json_line", 2),
        ("good", "duplicate_custom_id", 4),
        ("no body", "invalid_json_line", 5),
        ("elsewhere", "invalid_url", 6),
        ("stream", "invalid_request", 7),
        ("refused", None, None),
        (None, "invalid_custom_id", 9),
    ]
    refused = errors[5]["response"]
    assert (refused["status_code"], refused["body"]["error"]["param"]) == (400, "temperature")


@pytest.mark.parametrize(
    ("url", "fields", "why"),
    [
        ("/v1/responses", {"background": True}, "body.background must be false"),
        ("/v1/responses", {"background": False, "stream": None}, None),
        ("/v1/embeddings", {"encoding_format": "bytes_only"}, "body.encoding_format must be float or base64"),
        ("/v1/embeddings", {"encoding_format": "base64"}, None),
    ],
)
def test_a_line_has_an_answer_that_a_line_can_have(url: str, fields: dict[str, Any], why: str | None) -> None:
    """Not a promise of one, and no bytes that are no JSON."""
    text = json.dumps({"custom_id": "a", "url": url, "body": {"input": "x", **fields}}).encode()
    if why is None:
        assert read_line(text, [url]).url == url
        return
    with pytest.raises(BadLine, match=why) as refused:
        read_line(text, [url])
    assert (refused.value.code, refused.value.custom_id) == ("invalid_request", "a")


def test_a_file_without_lines_and_one_with_too_many(tokenizer: Tokenizer, says: Any, folder: Path) -> None:
    options = {"batch_dir": str(folder), "max_batch_requests": 2}
    with running(tokenizer, says(REPLY), **options) as server, server.client() as client:
        for content, code in ((b"\n\n", "empty_file"), (jsonl(*map(chat, "abc")), "too_many_tasks")):
            batch = ended(client, begin(client, content).id)
            assert batch.status == "failed"
            assert batch.errors is not None
            assert [error.code for error in batch.errors.data or []] == [code]
            assert batch.output_file_id is None


def test_a_cancelled_batch_keeps_what_was_answered(client: openai.OpenAI, serving: LiveServer) -> None:
    engine = serving.engine
    engine.pause_at = 1
    begun = begin(client, jsonl(*map(chat, "abc")))
    engine.wait_until(lambda engine: engine.load == 3)
    assert client.batches.cancel(begun.id).status == "cancelling"
    batch = ended(client, begun.id)
    assert batch.status == "cancelled"
    engine.wait_until(lambda engine: engine.load == 0)
    errors = lines(client, batch.error_file_id)
    assert [(line["custom_id"], line["error"]["code"]) for line in errors] == [
        (id, "batch_cancelled") for id in "abc"
    ]
    with pytest.raises(openai.BadRequestError, match="cannot be cancelled"):
        client.batches.cancel(begun.id)


def test_a_batch_expires(client: openai.OpenAI, serving: LiveServer) -> None:
    serving.engine.pause_at = 1
    batch = ended(client, begin(client, jsonl(chat("late")), window="1s").id)
    assert batch.status == "expired"
    assert [line["error"]["code"] for line in lines(client, batch.error_file_id)] == ["batch_expired"]


def test_a_full_queue_is_waited_for(client: openai.OpenAI, serving: LiveServer) -> None:
    serving.engine.queue_limit = 0
    begun = begin(client, jsonl(chat("a")))
    serving.engine.wait_until(lambda engine: len(engine.adds) >= 1)
    serving.engine.queue_limit = None
    assert ended(client, begun.id).status == "completed"


# ---- crashes ----


def stopped_in_the_middle(
    tokenizer: Tokenizer, reply: Callable[..., Any], folder: Path, answered: int, total: int
) -> str:
    """A server that ends without a word after so many answers of a batch; the batch's id."""
    engine = FakeEngine(reply)
    plain = engine.generate

    def generate(spec: Any, late: Any = None) -> Any:
        number = int(tokenizer.decode(spec.prompts[0].token_ids[:40]).split("\n")[1][1:])
        engine.pause_at = None if number < answered else 0
        return plain(spec, late)

    engine.generate = generate  # type: ignore[method-assign]
    options: dict[str, Any] = {"engine": engine, "batch_dir": str(folder), "batch_concurrency": 1}
    with running(tokenizer, reply, **options) as server, server.client() as client:
        begun = begin(client, jsonl(*(chat(f"r{i}") for i in range(total))))
        deadline = time.monotonic() + PATIENCE
        while client.batches.retrieve(begun.id).request_counts.completed < answered:  # type: ignore[union-attr]
            assert time.monotonic() < deadline
    return begun.id


def test_a_new_start_goes_on_and_repeats_nothing(tokenizer: Tokenizer, says: Any, folder: Path) -> None:
    id = stopped_in_the_middle(tokenizer, says(REPLY), folder, answered=3, total=6)
    options = {"batch_dir": str(folder)}
    with running(tokenizer, says("Again."), **options) as server, server.client() as client:
        batch = ended(client, id)
        assert batch.status == "completed"
        output = lines(client, batch.output_file_id)
    assert [line["custom_id"] for line in output] == [f"r{i}" for i in range(6)]
    texts = [line["response"]["body"]["choices"][0]["message"]["content"] for line in output]
    assert texts == [REPLY] * 3 + ["Again."] * 3
    assert len(server.engine.adds) == 3


def test_results_are_there_once_whatever_is_repeated(tmp_path: Path) -> None:
    store = BatchStore(tmp_path)
    told = {"id": "batch_1", "input_file_id": "file-1"}
    store.save(told, "me", live=True)
    assert store.add_result("batch_1", 2, b"two", failed=False)
    assert not store.add_result("batch_1", 2, b"again", failed=True)
    assert store.add_result("batch_1", 1, b"one", failed=False)
    file = File(id="file-o", owner="me", purpose="batch_output", filename="o", bytes=0, created_at=1)
    for _ in range(2):  # a crash after the file was written has it written again
        assert store.add_lines(file, "batch_1", failed=False).bytes == 8
        assert (store.contents / "file-o").read_bytes() == b"one\ntwo\n"
    with pytest.raises(OSError, match="another server"):
        BatchStore(tmp_path)
    store.close()
    again = BatchStore(tmp_path)
    assert again.done("batch_1") == {1: False, 2: False}
    assert [each.told for each in again.live()] == [told]
    again.save(told, "me", live=False)
    assert again.done("batch_1") == {}
    again.close()


def test_the_usage_of_every_dialect() -> None:
    openai = {
        "prompt_tokens": 5,
        "completion_tokens": 2,
        "prompt_tokens_details": {"cached_tokens": 1},
        "completion_tokens_details": {"reasoning_tokens": 2},
        "device_seconds": 0.5,
        "queue_ms": None,
    }
    responses = {
        "input_tokens": 7,
        "output_tokens": 3,
        "input_tokens_details": {"cached_tokens": 4},
        "output_tokens_details": {"reasoning_tokens": 1},
        "total_tokens": 10,
        "device_seconds": 0.25,
    }
    anthropic = {
        "input_tokens": 10,
        "output_tokens": 1,
        "cache_read_input_tokens": 20,
        "cache_creation_input_tokens": 0,
    }
    vectors = {"prompt_tokens": 3, "completion_tokens": 0, "total_tokens": 3}
    bodies = [{"usage": each} for each in (openai, responses, anthropic, vectors)] + [{}]
    lines = [answered("i", "c", 200, "r", json.dumps(body).encode()) for body in bodies]
    lines.append(answered("i", "c", 200, "r", b"\x00\xff numbers"))  # what says nothing ends nothing
    assert usage_of(lines) == {
        "input_tokens": 45,
        "input_tokens_details": {"cached_tokens": 25},
        "output_tokens": 6,
        "output_tokens_details": {"reasoning_tokens": 3},
        "total_tokens": 51,
        "device_seconds": 0.75,
    }


# ---- files ----


def test_files_are_listed_read_and_deleted(client: openai.OpenAI) -> None:
    made = [client.files.create(file=(f"{i}.jsonl", b"x" * i), purpose="batch") for i in range(3)]
    assert [file.bytes for file in made] == [0, 1, 2]
    assert [file.id for file in client.files.list()] == [file.id for file in reversed(made)]
    page = client.files.list(limit=2, order="asc")
    assert ([file.id for file in page.data], page.has_more) == ([file.id for file in made[:2]], True)
    assert [file.id for file in page] == [file.id for file in made]
    assert list(client.files.list(purpose="vision")) == []
    assert client.files.content(made[2].id).read() == b"xx"
    assert client.files.delete(made[0].id).deleted
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(made[0].id)
    with pytest.raises(openai.NotFoundError):
        client.batches.create(input_file_id=made[0].id, endpoint=CHAT, completion_window="24h")


def test_the_input_of_a_batch_that_goes_on_stays(client: openai.OpenAI, serving: LiveServer) -> None:
    serving.engine.pause_at = 1
    begun = begin(client, jsonl(chat("a")))
    with pytest.raises(openai.BadRequestError, match="input of a batch"):
        client.files.delete(begun.input_file_id)
    client.batches.cancel(begun.id)
    ended(client, begun.id)
    assert client.files.delete(begun.input_file_id).deleted


def test_a_file_over_the_limit_and_other_bad_uploads(tokenizer: Tokenizer, says: Any, folder: Path) -> None:
    with running(tokenizer, says(REPLY), batch_dir=str(folder), max_file_bytes=10) as server:
        with server.client() as client:
            assert client.files.create(file=("a", b"x" * 10), purpose="batch").bytes == 10
            with pytest.raises(openai.APIStatusError, match="--max-file-bytes") as large:
                client.files.create(file=("a", b"x" * 11), purpose="batch")
            assert large.value.status_code == 413
            with pytest.raises(openai.BadRequestError, match="purpose must be one of"):
                client.files.create(file=("a", b"x"), purpose="fun")  # type: ignore[arg-type]
            assert server.post(FILES, {"file": "x"}).status == 415
            assert len(list(client.files.list())) == 1
        assert len(list((folder / "files").iterdir())) == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"endpoint": "/v1/images"}, "endpoint"),
        ({"endpoint": None}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"completion_window": "90d"}, "completion_window"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"input_file_id": 5}, "input_file_id"),
        ({"priority": 1}, "priority"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after"),
    ],
)
def test_bad_batches(client: openai.OpenAI, serving: LiveServer, fields: dict[str, Any], param: str) -> None:
    file = client.files.create(file=("a", jsonl(chat("a"))), purpose="batch")
    body = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h", **fields}
    refused = serving.post(BATCHES, body)
    assert (refused.status, refused.json["error"]["param"]) == (400, param)
    other = client.files.create(file=("a", b"x"), purpose="user_data")
    body = {"input_file_id": other.id, "endpoint": CHAT, "completion_window": "1h"}
    refused = serving.post(BATCHES, body)
    assert (refused.status, refused.json["error"]["param"]) == (400, "input_file_id")


def test_files_and_batches_belong_to_their_key(tokenizer: Tokenizer, says: Any, folder: Path) -> None:
    options = {"api_key": ("k1", "k2"), "gateway_key": ("g",), "batch_dir": str(folder)}
    with running(tokenizer, says(REPLY), **options) as server, server.client("k1") as mine:
        begun = begin(mine, jsonl(chat("a")))
        batch = ended(mine, begun.id)
        strangers = [
            {"Authorization": "Bearer k2"},
            {"Authorization": "Bearer g", "X-Penstock-Tenant": "t"},
            {"Authorization": "Bearer g"},
        ]
        for who in strangers:
            for id in (batch.input_file_id, batch.output_file_id):
                for method, suffix in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
                    assert server.request(method, f"{FILES}/{id}{suffix}", headers=who).status == 404
            assert server.request("GET", f"{BATCHES}/{batch.id}", headers=who).status == 404
            assert server.request("POST", f"{BATCHES}/{batch.id}/cancel", headers=who).status == 404
            body = {"input_file_id": batch.input_file_id, "endpoint": CHAT, "completion_window": "24h"}
            assert server.post(BATCHES, body, who).status == 404
            for path in (FILES, BATCHES):
                assert server.request("GET", path, headers=who).json["data"] == []
                after = f"{path}?after={batch.id if path == BATCHES else batch.input_file_id}"
                assert server.request("GET", after, headers=who).status == 404
        assert len(mine.files.list().data) == 2


def test_a_server_without_a_folder_says_so(server: LiveServer) -> None:
    for path in (FILES, BATCHES):
        refused = server.get(path)
        assert refused.status == 404
        assert "--batch-dir" in refused.json["error"]["message"]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (b"null", "invalid_json_line"),
        (b"[" * 5000, "invalid_json_line"),
        (b'{"custom_id": 5, "url": "/v1/completions", "body": {}}', "invalid_json_line"),
        (b'{"custom_id": "a", "url": "/v1/completions", "body": []}', "invalid_json_line"),
        (b'{"custom_id": "a", "url": "/v1/completions", "body": {}, "method": "GET"}', "invalid_url"),
        (b"x" * (17 << 20), "line_too_long"),
        (b'{"custom_id": "a", "url": "/v1/completions", "body": {"background": true}}', "invalid_request"),
    ],
)
def test_lines_that_are_none(text: bytes, code: str) -> None:
    with pytest.raises(BadLine) as bad:
        read_line(text, (TEXT,))
    assert bad.value.code == code
