"""Attacks on a real gateway in front of a fake upstream: what reaches the upstream, the logs, the ledger."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from tests.e2e.server import eventually
from tests.gateway.process import Process, gateway
from tests.gateway.upstream import Upstream
from tests.http.live import until_closed

from .fuzz.cases import Case
from .fuzz.cases import make as make_case
from .fuzz.drive import Report, blocks, run
from .fuzz.oracle import REFUSALS, Answer
from .test_connections import connected, wait_until_closed

SPEC = """
upstreams:
  ours:
    url: {url}
    kind: openai
    models: {{tiny: {{context: 100000, price: {{input: 1, output: 2, as_of: 2026-01-01, source: test}}}}}}
routes:
  demo: {{targets: [{{model: tiny, upstream: ours}}], retries: 0}}
gateway: {{port: 0, tag_headers: {{feature: x-feature}}}}
"""
BODY = {"model": "demo", "max_tokens": 4, "messages": [{"role": "user", "content": "Hi!"}]}
CHAT = "/v1/chat/completions"


class House:
    """The gateway and what is behind it."""

    def __init__(self, process: Process, upstream: Upstream) -> None:
        self.gateway, self.upstream = process, upstream

    def raw(self, *parts: bytes) -> bytes:
        """What comes back until the gateway closes."""
        with socket.create_connection(("127.0.0.1", self.gateway.port), timeout=30) as connection:
            try:
                for part in parts:
                    connection.sendall(part)
            except OSError:  # it has heard enough
                pass
            return until_closed(connection)

    def request(self, target: bytes, *lines: bytes, method: bytes = b"POST", body: bytes = b"") -> bytes:
        """One request with a key, whose connection is closed after it."""
        head = [
            method + b" " + target + b" HTTP/1.1",
            b"Host: x",
            b"Connection: close",
            b"Content-Type: application/json",
            b"Authorization: Bearer " + self.gateway.key.encode(),
            b"Content-Length: %d" % len(body),
            *lines,
        ]
        return self.raw(b"\r\n".join(head) + b"\r\n\r\n" + body)

    def works(self) -> bool:
        return self.gateway.post(CHAT, BODY).status == 200


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("gateway")
    upstream = Upstream().start()
    flags = ("--timeout-headers", "1", "--timeout-body", "1", "--timeout-keep-alive", "1")
    try:
        with gateway(folder, SPEC.format(url=upstream.url), *flags) as process:
            yield House(process, upstream)
    finally:
        upstream.stop()


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


TRICKS = [
    b"/metrics/../v1/load_lora_adapter",
    b"/v1/../metrics",
    b"/v1/../sleep",
    b"/v1/%2e%2e/sleep",
    b"/v1/%2e%2e%2fsleep",
    b"/v1/..%2fsleep",
    b"/v1/..;/sleep",
    b"/v1/.%00./sleep",
    b"/v1/chat/completions/../../../sleep",
    b"/v1/chat/completions/%2e%2e/%2e%2e/%2e%2e/sleep",
    b"/v1/chat/completions;/../sleep",
    b"/v1/chat%2fcompletions/../x",
    b"/v1//chat/completions",
    b"//v1/chat/completions",
    b"//evil.example/v1/chat/completions",
    b"/v1/chat/completions\\..\\..\\sleep",
    b"/V1/chat/completions",
    b"/v1/responses/../../sleep",
    b"/v1/responses/..%2f..%2fsleep",
    b"/v1/responses/resp_1%2f..%2f..%2fsleep/cancel",
    b"/v1/models/../../sleep",
    b"/v1/files/file-1",
    b"/v1/files/../../sleep",
    b"/v1/files/..%2f..%2fsleep/content",
    b"/v1/files/file-1%2f..%2f..%2fsleep",
    b"/v1/batches/batch_1/cancel",
    b"/v1/batches/../../sleep",
    b"/v1/batches/batch_1%2f..%2f..%2fsleep/cancel",
    b"/v1/fine_tuning/jobs",
    b"/sleep",
    b"/wake_up",
    b"/reset_prefix_cache",
    b"/server_info",
    b"/v1/load_lora_adapter",
    b"http://127.0.0.1/sleep",
    b"http://evil.example/v1/../sleep",
    b"*",
]


@pytest.mark.parametrize("target", TRICKS, ids=lambda each: each.decode())
@pytest.mark.parametrize("method", [b"POST", b"GET", b"DELETE"], ids=lambda each: each.decode())
def test_no_path_reaches_what_is_not_relayed(house: House, target: bytes, method: bytes) -> None:
    before = len(house.upstream.asked)
    answer = house.request(target, method=method, body=json.dumps(BODY).encode())
    assert status(answer) in (400, 404, 405), answer[:200]
    assert len(house.upstream.asked) == before


@pytest.mark.parametrize(
    "target",
    [
        b"http://evil.example/v1/chat/completions",
        b"/v1/chat/completions?x=/../sleep",
        b"/v1/chat/%63ompletions",
        b"/v1/chat/completions/",
    ],
    ids=lambda each: each.decode(),
)
def test_what_is_relayed_goes_to_the_upstreams_own_path(house: House, target: bytes) -> None:
    """Other spellings of it, as absolute forms and escapes are, leave no trace."""
    before = len(house.upstream.asked)
    answer = house.request(target, body=json.dumps(BODY).encode())
    asked = house.upstream.asked[before:]
    assert status(answer) in (200, 400, 404), answer[:200]
    assert [(each.path, each.headers["host"]) for each in asked] in (
        [],
        [(CHAT, house.upstream.url.removeprefix("http://"))],
    )


@pytest.mark.parametrize("method", [b"CONNECT", b"TRACE", b"PROPFIND", b"PUT", b"PATCH"])
def test_other_methods_are_refused(house: House, method: bytes) -> None:
    before = len(house.upstream.asked)
    assert status(house.request(CHAT.encode(), method=method)) in (400, 404, 405)
    assert len(house.upstream.asked) == before


SMUGGLED = {
    "line folding": b"X-Feature: a\r\n  X-Request-Id: b",
    "a bare line feed": b"X-Feature: a\nX-Evil: yes",
    "a bare carriage return": b"X-Feature: a\rX-Evil: yes",
    "NUL": b"X-Feature: a\0b",
    "two lengths": b"Content-Length: 3",
    "a length and chunks": b"Transfer-Encoding: chunked",
    "an empty name": b": x",
    "a name with a space": b"X Evil: yes",
}


@pytest.mark.parametrize("line", SMUGGLED.values(), ids=SMUGGLED.keys())
def test_headers_that_smuggle(house: House, line: bytes) -> None:
    before = len(house.upstream.asked)
    answer = house.request(CHAT.encode(), line, body=json.dumps(BODY).encode())
    for asked in house.upstream.asked[before:]:
        assert not any("evil" in f"{name}{value}".lower() for name, value in asked.headers.items())
        assert asked.json["model"] == "tiny"
    assert answer.count(b"HTTP/1.1 ") <= 1 + answer.count(b"HTTP/1.1 400")
    assert b"x-evil" not in answer.lower()
    assert house.works()


INJECTED = [b"a\x1b[2Jb", b"\x9b31m", b'"}\\n{"level":"x"', b"%0d%0aX-Evil:yes", b"\xe2\x80\xae", b"a" * 4000]


@pytest.mark.parametrize("value", INJECTED, ids=range(len(INJECTED)))
@pytest.mark.parametrize("name", [b"X-Request-Id", b"X-Feature", b"traceparent", b"User-Agent"])
def test_values_do_not_write_into_logs_or_headers(house: House, name: bytes, value: bytes) -> None:
    answer = house.request(CHAT.encode(), name + b": " + value, body=json.dumps(BODY).encode())
    assert status(answer) in (200, 400), answer[:200]
    head = answer.partition(b"\r\n\r\n")[0]
    assert not any(line.lower().startswith(b"x-evil") for line in head.split(b"\r\n"))
    assert not any(byte < 32 and byte not in b"\r\n" for byte in head)
    log = house.gateway.log
    assert "\x1b" not in log
    assert "\x9b" not in log
    assert house.gateway.key not in log


@pytest.mark.parametrize(
    "model", ["x\r\nX-Evil: yes", "\x1b[2J", "\u202etxt", "../../sleep", "demo\x00", "d" * 100_000]
)
def test_names_of_models_do_not_either(house: House, model: str) -> None:
    before = len(house.upstream.asked)
    answer = house.request(CHAT.encode(), body=json.dumps({**BODY, "model": model}).encode())
    assert status(answer) == 404
    assert len(answer) < 4000
    assert len(house.upstream.asked) == before
    assert b"\r\nx-evil" not in answer.lower()
    assert not set("\x1b\u202e\0") & set(house.gateway.log)


@pytest.mark.parametrize(
    ("head", "piece", "expected"),
    [
        (b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nA: ", b"x" * 65536, 431),
        (b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n", b"a: b\r\n" * 10_000, 431),
        (b"GET /", b"x" * 65536, 414),
    ],
    ids=["a header", "headers", "a URL"],
)
def test_what_is_too_large(house: House, head: bytes, piece: bytes, expected: int) -> None:
    answer = house.raw(head, *[piece] * 100)
    assert not answer or status(answer) == expected
    assert house.works()


@pytest.mark.parametrize(
    "data",
    [b"", b"POST /v1/chat", b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n", b"body"],
    ids=["silent", "half a line", "half a head", "half a body"],
)
def test_two_hundred_who_do_not_go_on(house: House, data: bytes) -> None:
    """Slow-loris: they are sent away, and others are served meanwhile."""
    if data == b"body":
        data = (
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n"
            b"Content-Type: application/json\r\nAuthorization: Bearer "
            + house.gateway.key.encode()
            + b"\r\n\r\n{"
        )
    before = len(house.upstream.asked)
    with connected(house.gateway, 200, data) as held:
        assert house.works()
        wait_until_closed(held)
    assert len(house.upstream.asked) == before + 1


# ---- fuzz ----


def wrong(case: Case, answer: Answer) -> str | None:
    """What is wrong with an answer of the gateway: a 5xx, an error without a message."""
    if case.method in ("HEAD", "OPTIONS") or answer.status == 200:
        return None
    if answer.status not in (*REFUSALS, 403):
        return f"{answer.status}: {answer.body[:80]!r}"
    error = msgspec.json.decode(answer.body)["error"]
    return None if isinstance(error["message"], str) and error["message"] else "no message"


def fuzz(house: House, seed: int, count: int) -> Report:
    """Send cases with the gateway's key; its books are looked at afterwards."""
    key = (b"Authorization", b"Bearer " + house.gateway.key.encode())

    def make(seed: int, number: int) -> Case:
        case = make_case(seed, number)
        kept = tuple(each for each in case.headers if each[0].lower() != b"authorization")
        return replace(case, headers=(*kept, key))

    total = Report()
    for report in run(house.gateway.port, seed, blocks(0, count), 8, make=make, wrong=wrong):
        total.merge(report)
    return total


def test_fuzz(house: House) -> None:
    """A few hundred cases of the fuzzer that attacks the engine's server."""
    report = fuzz(house, seed=7, count=600)
    assert report.findings == {}
    assert report.hangs == 0
    assert report.statuses["200"] > 20


def test_the_books_add_up(house: House) -> None:
    """After all of the above: a row for each request that an upstream was asked, and for no other."""
    metered: dict[str, Any] = {}
    for each in house.upstream.asked:
        if each.path not in ("/tokenize", "/detokenize", "/v1/messages/count_tokens"):
            metered[each.headers["x-request-id"]] = each
    eventually(lambda: len(house.gateway.rows()) >= len(metered))
    rows = {row["id"]: row for row in house.gateway.rows()}
    assert len(rows) == len(house.gateway.rows())
    assert set(metered) <= set(rows)
    assert all(rows[id]["attempts"] == 0 for id in set(rows) - set(metered))  # whoever left before that
    assert {row["end"] for row in rows.values()} <= {"done", "client_gone", "upstream_failed"}
    page = house.gateway.log
    assert "Traceback" not in page
    assert "CRITICAL" not in page
