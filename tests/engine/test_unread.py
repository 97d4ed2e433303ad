"""What waits for a client that does not read is bounded, ends clearly, and is billed."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from penstock.core.plan import Event, TokenLogprob
from penstock.core.request_spec import FinishReason
from penstock.engine.unread import TOGETHER, Call, Unread
from tests.e2e.server import eventually, serving


class Cut:
    """Unread with a limit of 10, and who was cut off."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.unread = Unread(10, self.calls.append)

    def read(self, call: Call) -> list[Event]:
        """The next batch, which is there."""

        async def get() -> list[Event]:
            return await asyncio.wait_for(self.unread.get(call), 5)

        return asyncio.run(get())


def tokens(count: int, name: str = "a") -> Event:
    return Event(name, tuple(range(count)))


def last(name: str = "a", count: int = 1) -> Event:
    return Event(name, tuple(range(count)), finish=FinishReason.LENGTH, device_seconds=1.5)


def test_who_reads_in_time_is_never_cut_off_however_large_a_batch_is() -> None:
    cut = Cut()
    call = cut.unread.open(["a"])
    for size in (1, 9, 10, 11, 5000, 1):
        cut.unread.put(call, [tokens(size)])
        assert cut.read(call) == [tokens(size)]
    assert not cut.calls
    assert call.waiting == 0


def test_the_bound_is_on_what_waits_already() -> None:
    cut = Cut()
    call = cut.unread.open(["a"])
    cut.unread.put(call, [tokens(9)])
    cut.unread.put(call, [tokens(1)])
    assert call.waiting == 10
    assert not cut.calls
    cut.unread.put(call, [tokens(1)])
    assert cut.calls == [call]
    assert (call.waiting, cut.unread._waiting) == (0, 0), "what waited is dropped"
    cut.unread.put(call, [last()])
    (end,) = cut.read(call)
    assert (end.finish, end.tokens, end.device_seconds) == (FinishReason.ERROR, (), 1.5)
    assert end.failure is not None
    assert end.failure.type == "SlowReader"
    assert "--max-unread-tokens" in end.failure.advice


def test_logprobs_count_and_those_of_prompts_do_not() -> None:
    logprob = TokenLogprob(1, -1.0, 1, ((1, -1.0), (2, -2.0), (3, -3.0), (4, -4.0)))
    cut = Cut()
    call = cut.unread.open(["a"])
    cut.unread.put(call, [Event("a", (), prompt_logprobs=(logprob,) * 1000)])
    cut.unread.put(call, [Event("a", (1, 2), (logprob, logprob))])
    assert call.waiting == 10
    cut.unread.put(call, [tokens(1)])
    assert cut.calls == [call]


def test_those_that_had_ended_when_it_was_cut_off_keep_their_bills() -> None:
    cut = Cut()
    call = cut.unread.open(["a", "b"])
    cut.unread.put(call, [last("a", 10)])
    cut.unread.put(call, [tokens(1, "b")])
    assert cut.calls == [call]
    (ended,) = cut.read(call)
    assert (ended.request, ended.finish, ended.device_seconds) == ("a", FinishReason.ERROR, 1.5)
    cut.unread.put(call, [last("b")])
    assert [event.request for event in cut.read(call)] == ["b"]


def test_of_many_that_wait_the_one_with_most_is_cut_off_also_after_its_end() -> None:
    cut = Cut()
    calls = [cut.unread.open([str(number)]) for number in range(2 * TOGETHER)]
    cut.unread.put(calls[0], [last("0", 9)])  # nobody reads it, and no event will come
    for call in (*calls[1:], *calls[1:]):
        cut.unread.put(call, [tokens(4, *call.ids)])
    assert calls[0] in cut.calls
    assert sum(call.waiting for call in calls) < 10 * TOGETHER + 4
    assert [event.finish for event in cut.read(calls[0])] == [FinishReason.ERROR]


def test_closing_a_call_gives_its_share_back() -> None:
    cut = Cut()
    for number in range(3 * TOGETHER):
        call = cut.unread.open([str(number)])
        cut.unread.put(call, [tokens(9, str(number))])
        cut.unread.close(call)
    assert not cut.calls
    assert cut.unread._waiting == 0


def test_an_engine_that_ends_is_told_after_what_is_there() -> None:
    cut = Cut()
    call = cut.unread.open(["a"])
    cut.unread.put(call, [tokens(3)])
    call.end()
    assert cut.read(call) == [tokens(3)]
    assert cut.read(call) == []


@pytest.fixture
def reads_nothing() -> Callable[[int, bytes], socket.socket]:
    """A client with a small window, which it never empties."""

    def connect(port: int, body: bytes) -> socket.socket:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", port))
        lines = ("POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json")
        head = "\r\n".join((*lines, f"Content-Length: {len(body)}", "", ""))
        client.sendall(head.encode() + body)
        return client

    return connect


def test_a_stream_that_is_never_read_ends(
    tmp_path: Path, reads_nothing: Callable[[int, bytes], socket.socket]
) -> None:
    flags = ("--dtype", "float32", "--kv-cache-memory-bytes", "16MiB", "--max-unread-tokens", "5000")
    # much text from few tokens: the system takes megabytes of it before the server has to wait
    body = {
        "prompt": "A Pod is",
        "max_tokens": 1500,
        "n": 2,
        "logprobs": 200,
        "stream": True,
        "ignore_eos": True,
    }
    with serving(*flags, "--max-logprobs", "200", log=tmp_path / "log") as server:
        client = reads_nothing(server.port, json.dumps(body).encode())
        with client:
            eventually(lambda: "does not read its stream" in server.log, 60)
            eventually(lambda: json.loads(server.get("/load")[1])["server_load"] == 0)
            eventually(lambda: server.metric("vllm:num_requests_running") == 0)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
            answer = http.client.HTTPResponse(client)
            client.settimeout(60)
            answer.begin()
            rest = answer.read()
        assert b'"code":408,"reason":"slow_reader"' in rest
        assert b"--max-unread-tokens" in rest
        page = server.metrics()
        assert page.total("vllm:request_success_total", finished_reason="error") == 2
        bills = page.total("penstock:request_device_seconds_sum")
        assert bills == pytest.approx(page.total("penstock:device_seconds_total", state="busy"), rel=1e-6)
        assert page.total("vllm:generation_tokens_total") < 2 * 1500
