"""Bytes that are no HTTP, or that a proxy could read otherwise than we do: each is refused in OpenAI's shape.

RFC 9112 says which: 3.2 (Host), 5 (line ends, folding), 6 (framing), 11.2 (request smuggling).
"""

from __future__ import annotations

import logging

import pytest

from .conftest import listening
from .live import Live, parse, until_closed

GET = b"GET /health HTTP/1.1\r\nHost: x\r\n"
POST = b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"

MALFORMED = {
    "not HTTP": b"\x16\x03\x01 hello\r\n\r\n",
    "no Host": b"GET /health HTTP/1.1\r\n\r\n",
    "two Hosts": GET + b"Host: y\r\n\r\n",
    "two equal Hosts": GET + b"host: x\r\n\r\n",
    "a URL without a path": b"GET http://x HTTP/1.1\r\nHost: x\r\n\r\n",
    "a relative URL": b"GET health HTTP/1.1\r\nHost: x\r\n\r\n",
    "NUL in the URL": b"GET /\0 HTTP/1.1\r\nHost: x\r\n\r\n",
    "bytes in the URL": b"GET /health?\xff HTTP/1.1\r\nHost: x\r\n\r\n",
    "CONNECT": b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n",
    "a URL that is none": b"GET ftp://evil:99999/health HTTP/1.1\r\nHost: x\r\n\r\n",
    "bare LF": b"GET /health HTTP/1.1\nHost: x\n\n",
    "bare LF after a header": GET + b"A: b\nC: d\r\n\r\n",
    "bare CR after a header": GET + b"A: b\rC: d\r\n\r\n",
    "CR in a value": GET + b"A: b\r\rc\r\n\r\n",
    "folded": GET + b"A: b\r\n c\r\n\r\n",
    "folded by a tab": GET + b"A: b\r\n\tc\r\n\r\n",
    "a space before the first header": b"GET /health HTTP/1.1\r\n Host: x\r\n\r\n",
    "a space before the colon": GET + b"Content-Length : 2\r\n\r\nab",
    "no colon": GET + b"abc\r\n\r\n",
    "no name": GET + b": b\r\n\r\n",
    "NUL in a name": GET + b"A\0: b\r\n\r\n",
    "NUL in a value": GET + b"A: b\0c\r\n\r\n",
    "a control character in a value": GET + b"A: b\x01c\r\n\r\n",
    "two lengths": POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{} ",
    "two equal lengths": POST + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}",
    "a list of lengths": POST + b"Content-Length: 2, 2\r\n\r\n{}",
    "a length with a sign": POST + b"Content-Length: +2\r\n\r\n{}",
    "a negative length": POST + b"Content-Length: -2\r\n\r\n{}",
    "a hexadecimal length": POST + b"Content-Length: 0x2\r\n\r\n{}",
    "an empty length": POST + b"Content-Length:\r\n\r\n{}",
    "a length without end": POST + b"Content-Length: 99999999999999999999999\r\n\r\n{}",
    "a length, and chunks": POST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks, and a length": POST + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n0\r\n\r\n",
    "chunked twice": POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked is not the last": POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "chunked after a vertical tab": POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "chunks in HTTP/1.0": b"POST /echo HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a chunk's size in 0x": CHUNKED + b"0x2\r\n{}\r\n0\r\n\r\n",
    "a chunk's size below 0": CHUNKED + b"-2\r\n{}\r\n0\r\n\r\n",
    "a chunk's size without end": CHUNKED + b"fffffffffffffffff\r\n{}\r\n0\r\n\r\n",
    "a chunk's size before LF": CHUNKED + b"2\n{}\n0\n\n",
    "a chunk's size before a space": CHUNKED + b"2 \r\n{}\r\n0\r\n\r\n",
    "a chunk's extension before LF": CHUNKED + b"2;a\nb\r\n{}\r\n0\r\n\r\n",
    "a chunk that is longer than it says": CHUNKED + b"2\r\n{}XX\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED.keys())
def test_what_is_malformed_is_a_400(server: Live, data: bytes) -> None:
    answer = parse(server.raw(data))
    assert (answer.status, answer.error["reason"]) == (400, "malformed_request")
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["connection"] == "close"
    assert "callback" not in answer.error["message"]


@pytest.mark.parametrize("coding", [b"gzip, chunked", b"gzip", b"xchunked", b"chunked;q=1"])
def test_codings_that_nobody_decodes(server: Live, coding: bytes) -> None:
    answer = parse(server.raw(POST + b"Transfer-Encoding: " + coding + b"\r\n\r\n0\r\n\r\n"))
    assert (answer.status, answer.error["reason"]) in [
        (501, "unsupported_transfer_encoding"),
        (400, "malformed_request"),  # of which the body's end cannot be told
    ]
    assert answer.status == 501 or not coding.endswith(b", chunked")


@pytest.mark.parametrize("line", [b"GET /health HTTP/2.0", b"GET /health"])
def test_other_versions(server: Live, line: bytes) -> None:
    answer = parse(server.raw(line + b"\r\nHost: x\r\n\r\n"))
    assert (answer.status, answer.error["reason"]) == (505, "unsupported_http_version")


WELL_FORMED = {
    "HTTP/1.0 without Host": b"GET /health HTTP/1.0\r\n\r\n",
    "empty lines first": b"\r\n\r\n" + GET + b"Connection: close\r\n\r\n",
    "an absolute URL": b"GET http://y/health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    "a fragment": b"GET /health#x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    "bytes in a value": GET + b"A: \xff\xc3\r\nConnection: close\r\n\r\n",
    "Chunked": POST
    + b"Connection: close\r\nTransfer-Encoding: Chunked\r\n\r\n2;a=b\r\n{}\r\n0\r\nX: y\r\n\r\n",
    "a body where none is due": GET + b"Connection: close\r\nContent-Length: 2\r\n\r\n{}",
}


def test_nobody_is_told_to_go_on_in_http_1_0(server: Live) -> None:
    """RFC 9110, 10.1.1: the expectation is ignored. A proxy might take the 100 for the answer."""
    head = b"POST /echo HTTP/1.%d\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 2\r\n"
    old, new = (head % minor + b"Connection: close\r\n\r\n{}" for minor in (0, 1))
    assert b" 100 Continue" not in server.raw(old)
    assert server.raw(new).count(b" 200 ") == 1


@pytest.mark.parametrize("data", WELL_FORMED.values(), ids=WELL_FORMED.keys())
def test_what_is_unusual_is_served(server: Live, data: bytes) -> None:
    assert server.raw(data).startswith(b"HTTP/1.1 200 ")


def test_a_trailer_is_no_header() -> None:
    with listening(api_key=("key",)) as server:
        head = b"POST /echo HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        trailer = b"2\r\n{}\r\n0\r\nAuthorization: Bearer key\r\n\r\n"
        assert server.raw(head + trailer).startswith(b"HTTP/1.1 401 ")


def test_garbage_after_a_request_does_not_get_into_its_answer(server: Live) -> None:
    """The answer is whole, and nothing follows it: what would, a proxy could take for another client's."""
    body = b'{"hello":"you"}'
    request = POST + b"Content-Length: %d\r\n\r\n" % len(body) + body
    answer = parse(server.raw(request + b"GARBAGE\r\n\r\n" + request))
    assert (answer.status, answer.body) == (200, body)
    assert answer.headers["connection"] == "close"


def test_garbage_in_a_body_that_has_been_answered(server: Live) -> None:
    with server.connect() as connection:
        connection.sendall(POST.replace(b"/echo", b"/nowhere") + b"Transfer-Encoding: chunked\r\n\r\n")
        head = b""
        while b"no_such" not in head and b"}}" not in head:
            head += connection.recv(65536)
        connection.sendall(b"XX\r\n")
        assert parse(head).status == 404
        assert until_closed(connection) == b""


def test_requests_that_are_sent_ahead_are_answered_in_order(server: Live) -> None:
    bodies = [b'{"n":%d}' % n for n in range(8)]
    requests = [POST + b"Content-Length: 7\r\n\r\n" + body for body in bodies]
    last = GET + b"Connection: close\r\n\r\n"
    received = server.raw(b"".join(requests) + last)
    assert received.count(b"HTTP/1.1 200 ") == 9
    places = [received.index(body) for body in bodies]
    assert places == sorted(places)


def test_too_many_requests_sent_ahead(server: Live) -> None:
    """What waits for an earlier answer is bounded, and so is what it takes in memory."""
    with server.connect() as connection:
        connection.sendall((GET + b"\r\n") * 5000)
        assert until_closed(connection).count(b"HTTP/1.1 200 ") <= 1 + 16


def test_malformed_requests_do_not_fill_the_log(server: Live, caplog: pytest.LogCaptureFixture) -> None:
    with listening() as quiet, caplog.at_level(logging.WARNING):
        for _ in range(5):
            quiet.raw(b"nothing\r\n\r\n")
    lines = [record.getMessage() for record in caplog.records if record.name == "penstock.http"]
    assert len([line for line in lines if "is refused" in line]) == 1


def test_a_refusal_reaches_a_client_that_still_sends() -> None:
    """Closing with bytes unread resets the connection, and the answer is lost on the way."""
    with listening(max_header_bytes=4096) as server, server.connect() as connection:
        connection.sendall(GET)
        for _ in range(40):
            connection.sendall(b"A: " + b"x" * 1000 + b"\r\n")
        assert parse(until_closed(connection)).status == 431
