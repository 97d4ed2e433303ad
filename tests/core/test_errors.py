"""Errors: what a client gets of each, as OpenAI's clients expect it."""

from __future__ import annotations

import pytest

from penstock.core import errors
from penstock.core.errors import PenstockError


@pytest.mark.parametrize(
    ("name", "status", "type_", "code"),
    [
        ("PenstockError", 500, "internal_error", None),
        ("InvalidRequest", 400, "invalid_request_error", None),
        ("ContextLengthExceeded", 400, "invalid_request_error", "context_length_exceeded"),
        ("UnsupportedParameter", 400, "invalid_request_error", "unsupported_parameter"),
        ("AuthenticationFailed", 401, "invalid_request_error", "invalid_api_key"),
        ("ModelNotFound", 404, "invalid_request_error", "model_not_found"),
        ("RouteNotFound", 404, "invalid_request_error", None),
        ("SlowReader", 408, "invalid_request_error", "slow_reader"),
        ("PayloadTooLarge", 413, "invalid_request_error", "payload_too_large"),
        ("Unavailable", 503, "service_unavailable", None),
        ("QueueFull", 503, "service_unavailable", "queue_full"),
        ("Draining", 503, "service_unavailable", "draining"),
        ("EngineDead", 503, "service_unavailable", "engine_dead"),
        ("DeviceOutOfMemory", 503, "service_unavailable", "device_out_of_memory"),
        ("RequestFailed", 500, "internal_error", "request_failed"),
        ("StartupError", 500, "internal_error", "startup_error"),
        ("ModelLoadError", 500, "internal_error", "startup_error"),
        ("MemoryBudgetError", 500, "internal_error", "startup_error"),
    ],
)
def test_what_each_error_is_over_http(name: str, status: int, type_: str, code: str | None) -> None:
    error = getattr(errors, name)("what happened", param="field", advice="what to do", retry_after=3)
    assert isinstance(error, PenstockError)
    assert (error.status, error.type, error.code) == (status, type_, code)
    assert (error.message, error.param, error.retry_after) == ("what happened", "field", 3)
    assert str(error) == "what happened what to do"


def test_the_least_that_an_error_says() -> None:
    error = PenstockError("what happened")
    assert (error.param, error.advice, error.retry_after) == (None, "", None)
    assert str(error) == "what happened"


def test_errors_travel_by_name() -> None:
    assert all(kind.__name__ == name for name, kind in errors.BY_NAME.items())
    assert {"RequestFailed", "QueueFull", "DeviceOutOfMemory"} <= set(errors.BY_NAME)


def test_a_foreign_exception_in_one_line() -> None:
    assert errors.cause(ValueError("no such thing")) == "ValueError: no such thing"
    assert errors.cause(KeyError()) == "KeyError"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("x" * 78, repr("x" * 78)),
        ("x" * 79, "'" + "x" * 76 + "..."),
        ("x" * 10_000, "'" + "x" * 76 + "..."),
        ("é\n", r"'é\n'"),
        (-(2**256) + 1, str(-(2**256) + 1)),
        (2**256, "<integer of 257 bits>"),
        (10**9, "1000000000"),
        (1.5, "1.5"),
        (None, "None"),
        ([1] * 8, "[1, 1, 1, 1, 1, 1, 1, 1]"),
        ([1] * 9, "[1, 1, 1, 1, 1, 1, 1, 1, ...]"),
        ({n: n for n in range(8)}, "{0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 6, 7: 7}"),
        ({n: n for n in range(9)}, "{0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 6, 7: 7, ...}"),
        ({"b": 1, "a": 2}, "{'b': 1, 'a': 2}"),
        ([[[[1]]]], "[[[[...]]]]"),
        ([[[1]]], "[[[1]]]"),
        ({1: {2: {3: {4: 5}}}}, "{1: {2: {3: {...}}}}"),
        ({}, "{}"),
        ({1, 2}, "{1, 2}"),
    ],
)
def test_a_quoted_value_is_at_most_a_line(value: object, shown: str) -> None:
    assert errors.quote(value) == shown
    assert len(errors.quote(value)) <= 80


def test_what_a_client_is_told_has_an_end() -> None:
    for length in (2000, 2001):
        message = errors.InvalidRequest("x" * length, param="y" * (length - 1800)).message
        assert message == ("x" * 2000 if length == 2000 else "x" * 1997 + "...")
    assert errors.InvalidRequest("", param="y" * 200).param == "y" * 200
    assert errors.InvalidRequest("", param="y" * 201).param == "y" * 197 + "..."
    assert errors.PenstockError("x" * 3000).message == "x" * 3000  # our own words are not cut
