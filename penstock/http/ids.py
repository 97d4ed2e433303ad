"""Ids of responses and of the engine's requests behind them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from starlette.types import Scope

_LONGEST = 256

_numbers: Iterator[str] = map(str, itertools.count(1))


def number_as(process: int) -> None:
    """From now on, numbers begin with this one: each of several processes before an engine has its own."""
    global _numbers
    _numbers = map(f"{process}.{{}}".format, itertools.count(1))


@dataclass(frozen=True, slots=True)
class ResponseId:
    """The id of one response."""

    response: str
    """As the client sees it: `chatcmpl-…`."""
    engine: str
    """Beginning of the engine's request ids: unique, even when clients repeat theirs."""


def acceptable(id: str) -> bool:
    """Whether a client's request id can stand in a header and in a log line."""
    return 0 < len(id) <= _LONGEST and id.isprintable()


def response_id(prefix: str, scope: Scope, asked: str | None) -> ResponseId:
    """As in vLLM: the X-Request-Id header wins, then the field request_id, then a fresh one.

    prefix: of the id; a dash follows, unless it brings its own end (`msg_`).
    """
    given = scope.get("client_request_id")
    base = str(given or asked or scope["request_id"])
    scope["request_id"] = base
    response = prefix + base if prefix.endswith("_") else f"{prefix}-{base}"
    return ResponseId(response=response, engine=f"{response}#{next(_numbers)}")
