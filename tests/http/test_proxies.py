"""Behind proxies: who the client is, whom to believe, and what that is good for."""

from __future__ import annotations

import logging
import socket
import threading
from pathlib import Path

import pytest

from penstock.core.errors import StartupError
from penstock.http.config import HttpConfig
from penstock.http.proxies import Proxies

from .conftest import listening
from .live import PATIENCE, Live, parse, until_closed

INSIDE = Proxies(["10.0.0.0/8", "fd00::/8", "192.0.2.1"])


def client(*headers: tuple[str, str], proxies: Proxies = INSIDE) -> str | None:
    return proxies.client({"headers": [(name.encode(), value.encode()) for name, value in headers]})


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("203.0.113.9", "203.0.113.9"),
        ("203.0.113.9, 10.0.0.7", "203.0.113.9"),
        ("6.6.6.6, 203.0.113.9,10.0.0.7 ,\t10.1.2.3", "203.0.113.9"),
        ("10.0.0.5, 203.0.113.9", "203.0.113.9"),  # left of the client, anybody may write a trusted one
        ("10.0.0.9, 10.0.0.7", "10.0.0.9"),  # from inside
        ("203.0.113.9:4711", "203.0.113.9"),
        ("2001:db8::1, fd00::2", "2001:db8::1"),
        ("[2001:db8::1]:80", "2001:db8::1"),
        ("::ffff:203.0.113.9, ::ffff:10.0.0.7", "203.0.113.9"),
        ("203.0.113.9, unknown", None),
        ("203.0.113.9, _hidden, 10.0.0.7", "10.0.0.7"),
        ("' or 1=1 --, 203.0.113.9", "203.0.113.9"),
        ("203.0.113.9,", None),
        ("", None),
        ("203.0.113.999", None),
        ("\r\n203.0.113.9", None),
    ],
)
def test_the_first_from_the_right_that_is_not_trusted(said: str, found: str | None) -> None:
    assert client(("x-forwarded-for", said)) == found


def test_several_headers_are_one_list() -> None:
    lines = [
        ("x-forwarded-for", "6.6.6.6"),
        ("x-forwarded-for", "203.0.113.9"),
        ("x-forwarded-for", "10.0.0.7"),
    ]
    assert client(*lines) == "203.0.113.9"


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("for=203.0.113.9", "203.0.113.9"),
        ('for=6.6.6.6, For="203.0.113.9:80";proto=https;by=10.0.0.7, for=10.0.0.7', "203.0.113.9"),
        ('proto=http; for="[2001:db8::1]:4711"', "2001:db8::1"),
        ('for=6.6.6.6;host="a,for=7.7.7.7", for=203.0.113.9', "203.0.113.9"),
        ('for=6.6.6.6, for=", for=203.0.113.9', None),  # a quote that would swallow what the proxy adds
        ('host="a;for=6.6.6.6";for=203.0.113.9', "203.0.113.9"),
        ('host=a";for=6.6.6.6;for=203.0.113.9', None),
        ("proto = http ; FOR = 203.0.113.9 ;", "203.0.113.9"),
        ("for=203.0.113.9, for=_hidden", None),
        ("for=203.0.113.9, proto=https", None),
        ("by=203.0.113.9", None),
        ("notfor=203.0.113.9", None),
        ("", None),
    ],
)
def test_forwarded_is_read_in_the_same_way(said: str, found: str | None) -> None:
    assert client(("forwarded", said)) == found


def test_a_header_that_the_proxy_does_not_write_says_nothing() -> None:
    """It passes that one on as the client has sent it."""
    assert client(("x-forwarded-for", "203.0.113.9"), ("forwarded", "for=6.6.6.6")) is None
    assert client(("x-forwarded-for", "203.0.113.9"), ("forwarded", "for=203.0.113.9")) == "203.0.113.9"


def test_very_long_lists_are_read_in_little_time() -> None:
    assert client(("x-forwarded-for", "10.0.0.1," * 7000 + "203.0.113.9")) == "203.0.113.9"
    many = [f"10.{each >> 8}.{each & 255}.1" for each in range(5000)]
    assert client(("x-forwarded-for", ",".join(many))) == many[-64]
    for evil in (
        "for=" * 16000,
        '"' * 64000,
        "; " * 32000,
        ",;for=" * 10000,
        "a=b;" * 16000,
        "a=" + " " * 64000 + '"',
    ):
        client(("forwarded", evil))


def test_who_is_trusted() -> None:
    assert [
        INSIDE.trusts(each) for each in ("10.9.9.9", "192.0.2.1", "192.0.2.2", "fd00::1", "unix", "x")
    ] == [*(True, True, False, True, False, False)]
    assert Proxies(["unix"]).trusts("unix")
    with pytest.raises(StartupError, match=r"--trusted-proxies: 'here' is no address"):
        HttpConfig(trusted_proxies=("unix", "10.0.0.1", "here"))


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.name == "penstock.access"]


def test_the_access_log_has_the_client(caplog: pytest.LogCaptureFixture) -> None:
    said = {"X-Forwarded-For": "6.6.6.6, 203.0.113.9"}
    with caplog.at_level(logging.INFO, "penstock.access"):
        with listening(trusted_proxies=("127.0.0.1",)) as server:
            assert server.post("/echo", {}, said).status == 200
        with listening(trusted_proxies=("10.0.0.0/8",)) as server:
            assert server.post("/echo", {}, said).status == 200
        with listening() as server:
            assert server.post("/echo", {}, said).status == 200
    trusted, *others = lines(caplog)
    assert trusted.startswith("203.0.113.9:0 - ")
    assert len(others) == 2
    assert all(each.startswith("127.0.0.1:") for each in others)


def test_over_a_unix_socket(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    request = b"GET /models HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Forwarded-For: 203.0.113.9\r\n\r\n"
    for index, trusted in enumerate(((), ("unix",))):
        path = str(tmp_path / f"s{index}")
        caplog.set_level(logging.INFO, "penstock.access")
        with listening(uds=path, trusted_proxies=trusted), socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(PATIENCE)
            connection.connect(path)
            connection.sendall(request)
            until_closed(connection)
    assert [each.partition(" ")[0] for each in lines(caplog)] == ["unix", "203.0.113.9:0"]


def test_a_proxys_connections_are_not_one_clients_and_its_clients_are_counted() -> None:
    with listening(trusted_proxies=("127.0.0.1",), max_connections_per_client=1) as server:
        with server.connect() as busy:
            ask(busy, "203.0.113.9")
            assert busy.recv(65536).startswith(b"HTTP/1.1 200 ")  # and its answer goes on
            refused = answer(server, "6.6.6.6, 203.0.113.9")
            assert parse(refused).status == 503
            assert parse(refused).reason == "too_many_connections"
            assert parse(answer(server, "203.0.113.9", b"/health")).status == 200
            with server.connect() as other:
                ask(other, "203.0.113.10")
                assert other.recv(65536).startswith(b"HTTP/1.1 200 ")
                with server.connect() as hidden:
                    ask(hidden, "_hidden")
                    assert hidden.recv(65536).startswith(b"HTTP/1.1 200 ")
                    assert parse(answer(server, "unknown")).status == 503  # nobody hides twice
        until(lambda: parse(answer(server, "203.0.113.9")).status == 405)


def test_nobody_else_is_let_off_the_limit_of_connections() -> None:
    options = {"trusted_proxies": ("10.0.0.0/8",), "max_connections_per_client": 1}
    with listening(**options) as server, server.connect() as busy:
        ask(busy, "203.0.113.9")
        assert busy.recv(65536).startswith(b"HTTP/1.1 200 ")
        assert parse(answer(server, "203.0.113.10")).status == 503


def ask(connection: socket.socket, address: str, path: bytes = b"/endless") -> None:
    head = b"GET %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Forwarded-For: %s\r\n\r\n"
    connection.sendall(head % (path, address.encode()))


def answer(server: Live, address: str, path: bytes = b"/echo") -> bytes:
    with server.connect() as connection:
        ask(connection, address, path)
        return until_closed(connection)


def until(condition: object) -> None:
    """Until something is so; the server notices that a client has gone in its own time."""
    assert callable(condition)
    waited = threading.Event()
    for _ in range(int(PATIENCE / 0.01)):
        if condition():
            return
        waited.wait(0.01)
    raise AssertionError("it does not come to be so")
