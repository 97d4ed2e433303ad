"""Bytes on the wire that no client library sends: oversized and endless bodies, offers, no HTTP at all."""

from __future__ import annotations

import json

import pytest

from .conftest import listening
from .live import Live

# ---- bodies that are too large ----


def test_a_large_body(server: Live) -> None:
    answer = server.post("/echo", b'{"messages": "' + b"x" * (10 * 1024 * 1024) + b'"}')
    assert answer.status == 413
    assert answer.error["reason"] == "payload_too_large"
    assert str(10 * 1024 * 1024) in answer.error["message"]


HEAD = b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"


def test_a_large_chunked_body() -> None:
    with listening(max_body_bytes=1000) as server:
        chunk = b"258\r\n" + b"x" * 600 + b"\r\n"
        answer = server.raw(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", chunk, chunk, b"0\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 413 ")
        small = json.dumps({"hello": "you"}).encode()
        body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(small), small)
        assert server.raw(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", body).startswith(b"HTTP/1.1 200 ")


def test_a_large_body_that_waits_for_permission_is_refused_unsent() -> None:
    with listening(max_body_bytes=1000) as server:
        answer = server.raw(HEAD + b"Content-Length: 2000\r\nExpect: 100-continue\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 413 ")


def test_an_endless_body_is_cut_off() -> None:
    with listening(max_body_bytes=1000) as server:
        chunk = b"258\r\n" + b"x" * 600 + b"\r\n"
        answer = server.raw(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 20)
        assert answer.startswith(b"HTTP/1.1 413 ")


OFFER = (
    HEAD.replace(b"close", b"Upgrade, HTTP2-Settings, close") + b"Upgrade: h2c\r\nHTTP2-Settings: AAMA\r\n"
)


@pytest.mark.parametrize("cut", [0, 3])
def test_an_offer_to_speak_another_protocol_is_ignored(server: Live, cut: int) -> None:
    body = json.dumps({"hello": "you"}).encode()
    whole = OFFER + b"Content-Length: %d\r\n\r\n" % len(body) + body
    answer = server.raw(whole[: len(whole) - cut], whole[len(whole) - cut :])
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(b'{"hello":"you"}')
    chunked = OFFER + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    assert server.raw(chunked).startswith(b"HTTP/1.1 200 ")


def test_an_offer_without_a_body_keeps_the_connection(server: Live) -> None:
    offer = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
    last = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    assert server.raw(offer + offer + last).count(b"HTTP/1.1 200 ") == 3


def test_connect_is_refused(server: Live) -> None:
    assert server.raw(b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n").startswith(b"HTTP/1.1 4")


def test_bytes_that_are_no_http(server: Live) -> None:
    assert server.raw(b"\x16\x03\x01 hello\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    assert server.get("/health").status == 200
