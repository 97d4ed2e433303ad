"""Flags of the listener at the ends of their ranges, and their defaults as docs/flags.md has them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from penstock.core.errors import StartupError
from penstock.http.config import HttpConfig
from penstock.http.limits import Limits


@pytest.mark.parametrize(
    ("name", "low", "below"),
    [
        ("port", 0, -1),
        ("max_body_bytes", 1, 0),
        ("max_header_bytes", 1024, 1023),
        ("max_header_count", 16, 15),
        ("max_connections", 1, 0),
        ("max_connections_per_client", 0, -1),
        ("timeout_headers", 0.1, 0.09),
        ("timeout_body", 0.1, 0.09),
        ("timeout_send", 0.1, 0.09),
        ("timeout_keep_alive", 0, -1),
        ("shutdown_timeout", 0, -0.1),
    ],
)
def test_the_least_value_works_and_a_smaller_one_is_refused(name: str, low: float, below: float) -> None:
    assert getattr(HttpConfig(**{name: low}), name) == low  # type: ignore[arg-type]
    flag = "--" + name.replace("_", "-")
    with pytest.raises(StartupError) as caught:
        HttpConfig(**{name: below})  # type: ignore[arg-type]
    assert str(caught.value) == f"{flag} must be at least {low:g}, got {below:g}."
    assert caught.value.param == flag


@pytest.mark.parametrize(
    ("fields", "flag"),
    [
        ({"port": 65536}, "--port"),
        ({"api_key": ("",)}, "--api-key"),
        ({"api_key": ("good", "\t")}, "--api-key"),
        ({"uvicorn_log_level": "INFO"}, "--uvicorn-log-level"),
        ({"root_path": "llm/"}, "--root-path"),
        ({"ssl_keyfile": "key.pem"}, "--ssl-certfile"),
        ({"ssl_certfile": "cert.pem"}, "--ssl-certfile"),
    ],
)
def test_what_cannot_work_is_named(fields: dict[str, Any], flag: str) -> None:
    with pytest.raises(StartupError) as caught:
        HttpConfig(**fields)
    assert caught.value.param == flag
    assert str(caught.value).startswith(f"{flag} ") or "--ssl-keyfile and --ssl-certfile" in str(caught.value)


def test_what_can_work_does() -> None:
    assert HttpConfig(port=65535).port == 65535
    assert HttpConfig(root_path="/llm").root_path == "/llm"
    assert HttpConfig(ssl_keyfile="a", ssl_certfile="b").ssl_certfile == "b"
    for level in ("critical", "error", "warning", "info", "debug", "trace"):
        assert HttpConfig(uvicorn_log_level=level).uvicorn_log_level == level


@pytest.mark.parametrize("name", ["api_key", "allowed_origins", "allowed_methods", "allowed_headers"])
def test_one_text_is_a_tuple_of_one_and_a_list_a_tuple(name: str) -> None:
    for given, kept in (("a", ("a",)), (["a", "b"], ("a", "b")), (("a",), ("a",))):
        assert getattr(HttpConfig(**{name: given}), name) == kept  # type: ignore[arg-type]


def test_an_empty_origin_is_none() -> None:
    assert HttpConfig(allowed_origins=("", "https://a.example", "")).allowed_origins == ("https://a.example",)


def check_documented_defaults(config: type) -> None:
    """Every field's default is the one that docs/flags.md promises."""
    page = (Path(__file__).parents[2] / "docs" / "flags.md").read_text()
    for field in dataclasses.fields(config):
        flag = field.name.replace("_", "-")
        name = "MODEL" if field.metadata.get("positional") else rf"--(?:\[no-\])?{flag}"
        [row] = re.findall(rf"^\| `{name}`.*", page, re.MULTILINE)
        told = re.search(r"\(default: ([^)]*)\)", row)
        value = field.default
        if isinstance(value, bool):
            value = "on" if value else "off"
        elif isinstance(value, tuple):
            value = " ".join(value)
        if value in (None, ""):
            assert told is None, row
        elif told is None:
            assert f"{value} is" in row, row
        else:
            assert told[1] == str(value), row


def test_defaults_are_those_of_the_documentation() -> None:
    check_documented_defaults(HttpConfig)


# ---- limits of a connection ----


def test_limits_are_those_of_the_flags() -> None:
    config = HttpConfig(
        max_header_bytes=2000,
        max_header_count=20,
        timeout_keep_alive=7,
        timeout_headers=3.0,
        timeout_body=4.0,
        timeout_send=5.0,
        max_connections_per_client=9,
    )
    assert Limits.of(config, 50) == Limits(
        header_bytes=2000,
        header_count=20,
        idle=7,
        headers=3.0,
        body=4.0,
        send=5.0,
        connections=50,
        per_client=9,
    )
    # connections that are not kept still get time for their one request
    assert Limits.of(dataclasses.replace(config, timeout_keep_alive=0), 50).idle == 3.0


@pytest.mark.parametrize(
    ("shortest", "interval"), [(100.0, 1.0), (4.0, 1.0), (2.0, 0.5), (0.1, 0.025), (0.04, 0.02)]
)
@pytest.mark.parametrize("name", ["idle", "headers", "body", "send"])
def test_deadlines_are_looked_after_four_times_as_often_as_the_shortest_one(
    name: str, shortest: float, interval: float
) -> None:
    limits = dataclasses.replace(
        Limits(1024, 16, idle=200.0, headers=200.0, body=200.0, send=200.0, connections=1, per_client=0),
        **{name: shortest},  # type: ignore[arg-type]
    )
    assert limits.interval == interval
