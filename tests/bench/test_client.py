import asyncio
import itertools
from typing import Any

import pytest

from penstock.bench.client import (
    Outcome,
    RequestRecord,
    Target,
    find_model,
    open_session,
    send_request,
    split_base_url,
)
from penstock.bench.errors import BenchError
from penstock.bench.prompts import Prompt
from penstock.bench.startup import free_port
from tests.bench.fake_server import FakeServer, Reply


def ask(
    server: FakeServer, reply: Reply | None = None, *, endpoint: str = "/v1/completions", **target: Any
) -> RequestRecord:
    """One request, under a clock that goes on by 1 s each time somebody looks at it."""
    ticks = itertools.count(1.0)
    record = RequestRecord(index=0, intended=0.0)
    if reply is not None:
        server.script = [reply]

    async def main() -> None:
        where = Target(
            target.pop("base_url", server.url), endpoint, target.pop("model", "fake-model"), **target
        )
        async with open_session() as session:
            await send_request(session, where, Prompt("Hi", 8), record, lambda: next(ticks))

    asyncio.run(main())
    return record


@pytest.mark.parametrize("endpoint", ["/v1/completions", "/v1/chat/completions"])
def test_a_complete_stream(server: FakeServer, endpoint: str) -> None:
    usage = {"prompt_tokens": 11, "prompt_tokens_details": {"cached_tokens": 8}, "device_seconds": 0.25}
    record = ask(server, Reply(tokens=("a", "é", "c"), usage=usage), endpoint=endpoint)
    assert record.outcome is Outcome.COMPLETED
    assert (record.prompt_tokens, record.output_tokens, record.cached_tokens) == (11, 3, 8)
    assert record.device_seconds == 0.25
    assert record.tokens_from_usage
    assert record.finish_reason == "stop"
    assert len(record.chunk_times) == 3
    assert record.sent is not None
    assert record.finished is not None
    assert record.sent < record.chunk_times[0] <= record.chunk_times[-1] <= record.finished


def test_usage_wins_over_the_number_of_chunks(server: FakeServer) -> None:
    record = ask(server, Reply(tokens=("ab", "cd"), usage={"completion_tokens": 4}))
    assert (record.output_tokens, len(record.chunk_times)) == (4, 2)


def test_without_usage_chunks_are_counted(server: FakeServer) -> None:
    record = ask(server, Reply(send_usage=False))
    assert record.outcome is Outcome.COMPLETED
    assert (record.output_tokens, record.tokens_from_usage, record.prompt_tokens) == (3, False, None)


def test_a_model_that_ends_at_once_is_no_failure(server: FakeServer) -> None:
    record = ask(server, Reply(tokens=()))
    assert record.outcome is Outcome.COMPLETED
    assert record.output_tokens == 0
    assert record.chunk_times == [record.finished]


def test_what_is_sent(server: FakeServer) -> None:
    ask(server, body={"temperature": 0, "ignore_eos": True}, headers={"X-Team": "blue"})
    assert server.requests == [
        {
            "model": "fake-model",
            "prompt": "Hi",
            "max_tokens": 8,
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0,
            "ignore_eos": True,
        }
    ]
    assert server.headers[0]["X-Team"] == "blue"


@pytest.mark.parametrize(
    ("reply", "cause", "message"),
    [
        (Reply(status=503, body={"error": {"message": "queue is full"}}), "HTTP 503", "queue is full"),
        (Reply(body={"choices": []}), "not a stream", "the server answered JSON"),
        (Reply(error={"message": "the engine died"}), "error in stream", "the engine died"),
        (Reply(done=False), "stream cut", "after 3 chunks"),
        (Reply(cut=True), "connection lost mid-stream", "Error"),
        (Reply(raw="{half"), "invalid JSON in stream", "'{half'"),
        (Reply(raw="[1]"), "error in stream", "expected a JSON object"),
    ],
)
def test_failures_have_a_cause_and_a_message(
    server: FakeServer, reply: Reply, cause: str, message: str
) -> None:
    record = ask(server, reply)
    assert record.outcome is Outcome.FAILED
    assert record.cause == cause
    assert message in (record.message or "")
    assert record.finished is not None


def test_an_unknown_model_fails_with_the_words_of_the_server(server: FakeServer) -> None:
    record = ask(server, model="nobody")
    assert (record.cause, record.message) == ("HTTP 404", "The model `nobody` does not exist.")


def test_nobody_listens(server: FakeServer) -> None:
    record = ask(server, base_url=f"http://127.0.0.1:{free_port()}")
    assert (record.cause, record.message) == ("cannot connect", "Connection refused")


def test_a_stalled_stream_times_out(server: FakeServer) -> None:
    record = ask(server, Reply(hold_at=0), timeout=0.01)
    assert (record.outcome, record.cause) == (Outcome.FAILED, "timeout")
    assert "--request-timeout" in (record.message or "")


def test_a_cancelled_request_stays_unfinished(server: FakeServer) -> None:
    server.script = [Reply(hold_at=0)]
    record = RequestRecord(index=0, intended=0.0)

    async def main() -> None:
        async with open_session() as session:
            target = Target(server.url, "/v1/completions", "fake-model")
            task = asyncio.create_task(send_request(session, target, Prompt("Hi", 8), record))
            await asyncio.to_thread(server.holding.wait)
            task.cancel()
            await asyncio.wait({task})

    asyncio.run(main())
    assert record.outcome is Outcome.UNFINISHED
    assert record.sent is not None
    assert record.finished is None


def find(server: FakeServer, url: str | None = None) -> str:
    async def main() -> str:
        async with open_session() as session:
            return await find_model(session, url or server.url, {})

    return asyncio.run(main())


def test_the_first_model_is_found(server: FakeServer) -> None:
    server.models = ["one", "two"]
    assert find(server) == "one"


def test_why_no_model_is_found(server: FakeServer) -> None:
    server.models = []
    with pytest.raises(BenchError, match=r"lists no model; name one with --model"):
        find(server)
    server.key = "secret"
    with pytest.raises(BenchError, match=r"HTTP 401; pass --api-key"):
        find(server)
    with pytest.raises(BenchError, match=r"/nothing/v1/models answered HTTP 404"):
        find(server, server.url + "/nothing")
    with pytest.raises(BenchError, match=r"no server at http://127.*: Connection refused; start one"):
        find(server, f"http://127.0.0.1:{free_port()}")


@pytest.mark.parametrize("url", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"])
def test_base_urls_are_normalised(url: str) -> None:
    assert split_base_url(url) == "http://h:1"


@pytest.mark.parametrize("url", ["h:1", "ftp://h", "http://", ""])
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(BenchError, match="--base-url"):
        split_base_url(url)
