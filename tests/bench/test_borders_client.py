"""One request and its record, at the edges of what servers say."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from penstock.bench.client import (
    Outcome,
    RequestRecord,
    Target,
    find_model,
    get_json,
    open_session,
    post_json,
    send_request,
    split_base_url,
)
from penstock.bench.client import (
    reason as reason_of,
)
from penstock.bench.errors import BenchError
from penstock.bench.prompts import Prompt, read_jsonl
from penstock.bench.report import group_errors, latencies, parse_goodput

from .fake_server import FakeServer, Reply
from .test_report import failed, report_of

# ---- what the server counted ----


@pytest.mark.parametrize(
    ("usage", "fields"),
    [
        ({}, (None, 4, False, None, None)),
        ({"completion_tokens": None, "prompt_tokens": 7}, (7, 4, False, None, None)),
        ({"completion_tokens": 0}, (None, 0, True, None, None)),
        ({"prompt_tokens_details": None}, (None, 4, False, None, None)),
        ({"prompt_tokens_details": {"cached_tokens": 3}, "device_seconds": 0.5}, (None, 4, False, 3, 0.5)),
    ],
)
def test_usage_is_taken_over_where_there_is_some(usage: dict[str, Any], fields: tuple[Any, ...]) -> None:
    record = RequestRecord(0, 0.0, output_tokens=4)
    record.read_usage(usage)
    found = (record.prompt_tokens, record.output_tokens, record.tokens_from_usage)
    assert (*found, record.cached_tokens, record.device_seconds) == fields


def test_a_later_usage_does_not_take_back_an_earlier_one() -> None:
    record = RequestRecord(0, 0.0)
    record.read_usage(
        {"prompt_tokens": 1, "prompt_tokens_details": {"cached_tokens": 2}, "device_seconds": 3.0}
    )
    record.read_usage({"completion_tokens": 4})
    assert (record.prompt_tokens, record.cached_tokens, record.device_seconds) == (1, 2, 3.0)
    assert record.output_tokens == 4


# ---- sessions ----


def test_a_session_has_no_limits_of_its_own() -> None:
    async def scene() -> None:
        async with open_session() as session:
            connector = session.connector
            assert isinstance(connector, aiohttp.TCPConnector)
            assert (connector.limit, connector.limit_per_host) == (0, 0)
            assert (session.timeout.total, session.timeout.sock_connect) == (None, None)

    asyncio.run(scene())


# ---- answers ----


def ask(server: FakeServer, *replies: Reply, prompt: Prompt | None = None) -> RequestRecord:
    server.script = list(replies)
    record = RequestRecord(0, 0.0)

    async def main() -> None:
        async with open_session() as session:
            target = Target(server.url, "/v1/completions", "fake-model", {"X-A": "1"})
            await send_request(session, target, prompt or Prompt("Hi", 8), record)

    asyncio.run(main())
    return record


class Pieces:
    """A session whose one answer is a stream of these bytes."""

    status = 200
    content_type = "text/event-stream"

    def __init__(self, *pieces: bytes) -> None:
        self._pieces = pieces
        self.content = self
        self.asked: list[dict[str, Any]] = []

    def post(self, url: str, **options: Any) -> Pieces:
        self.asked.append({"url": url, **options})
        return self

    async def __aenter__(self) -> Pieces:
        return self

    async def __aexit__(self, *_: object) -> None: ...

    async def iter_any(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            yield piece


def streamed(*pieces: bytes) -> tuple[RequestRecord, Pieces]:
    record, session = RequestRecord(0, 0.0), Pieces(*pieces)
    target = Target("http://h", "/v1/completions", "m", {"X-A": "1"})
    asyncio.run(send_request(session, target, Prompt("Hi", 8), record))  # type: ignore[arg-type]
    return record, session


def test_a_stream_without_any_choice_is_empty() -> None:
    record, session = streamed(b'data: {"choices": [], "usage": {}}\n\n', b"data: [DONE]\n\n")
    assert (record.outcome, record.cause) == (Outcome.FAILED, "empty stream")
    assert record.message == "[DONE] came without any choice"
    [asked] = session.asked
    assert asked["url"] == "http://h/v1/completions"
    assert asked["headers"] == {"Content-Type": "application/json", "X-A": "1"}


def test_a_model_that_ends_at_once_has_one_time() -> None:
    end = b'data: {"choices": [{"text": "", "finish_reason": "stop"}]}\n\n'
    record, _ = streamed(end + b"data: [DONE]\n\n")
    assert (record.outcome, record.finish_reason, record.output_tokens) == (Outcome.COMPLETED, "stop", 0)
    assert record.chunk_times == [record.finished]
    cut, _ = streamed(end)
    assert (cut.cause, cut.message) == (
        "stream cut",
        "the stream ended after 0 chunks without [DONE]",
    )


def test_what_is_known_beforehand_is_kept_where_the_server_says_nothing(server: FakeServer) -> None:
    record = ask(server, Reply(send_usage=False), prompt=Prompt([1, 2, 3], 8, 3))
    assert (record.prompt_tokens, record.output_tokens, record.tokens_from_usage) == (3, 3, False)


def test_other_requests_say_status_and_json_or_text(server: FakeServer) -> None:
    async def scene() -> None:
        async with open_session() as session:
            assert await get_json(session, f"{server.url}/version", {}) == (200, {"version": "9.9"})
            status, text = await get_json(session, f"{server.url}/nowhere", {})
            assert status == 404
            assert "Not Found" in text
            assert await post_json(session, f"{server.url}/tokenize", {}, {"prompt": "a b"}) == (404, "")
            server.tokens_per_word = 3.0
            assert await post_json(session, f"{server.url}/tokenize", {}, {"prompt": "a b"}) == (
                200,
                {"count": 6},
            )
            assert await find_model(session, server.url, {}) == "fake-model"

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("number", "text", "reason"),
    [
        (1, "x", "Operation not permitted"),
        (111, "x", "Connection refused"),
        (0, "said", "said"),
        (-2, "said", "said"),
        (None, "said", "said"),
        (None, "", "OSError"),
        (0, "", "OSError"),
    ],
)
def test_the_systems_words_come_first(number: int | None, text: str, reason: str) -> None:
    error = OSError(text)
    error.errno = number
    assert reason_of(error) == reason


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://h:1//", "http://h:1"),
        ("http://h/x/v1/", "http://h/x"),
        ("https://hX", "https://hX"),
        ("http://h/v1/v1", "http://h/v1"),
    ],
)
def test_base_urls(url: str, base: str) -> None:
    assert split_base_url(url) == base


# ---- what the report makes of records ----


def test_an_end_that_is_missing_leaves_no_latencies() -> None:
    record = RequestRecord(0, 1.0, 2.0, [3.0])
    assert not any(latencies(record).values())


def test_only_failures_with_a_cause_are_grouped() -> None:
    unfinished = RequestRecord(0, 1.0, 2.0, cause="left over")
    nameless = RequestRecord(0, 1.0, 2.0, outcome=Outcome.FAILED)
    named = failed(1, 1.0, 2.0, "timeout")
    assert group_errors([unfinished, nameless, named]) == [
        {"cause": "timeout", "count": 1, "example": "message 1"}
    ]


def test_the_first_colon_ends_the_name_of_a_metric() -> None:
    with pytest.raises(BenchError, match="--goodput 'ttft:5:6'"):
        parse_goodput(["ttft:5:6"])
    assert report_of(failed(0, 100.0, 101.0), goodput_ms={"ttft": 1.0})["goodput_share"] == 0.0
    from .test_report import done

    assert report_of(done(0, 100.0, 100.0, 100.5), goodput_ms={"ttft": 501.0})["goodput_share"] == 1.0


def test_files_are_utf_8_wherever_they_are_read(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes('{"prompt": "é"}'.encode())
    read = type(path).read_text

    def as_latin(self: Any, encoding: str | None = None, errors: str | None = None) -> str:
        return read(self, encoding or "latin-1", errors)  # what some machines take by default

    monkeypatch.setattr(type(path), "read_text", as_latin)
    assert read_jsonl(path, 1, chat=False, output_len=1) == [Prompt("é", 1)]
