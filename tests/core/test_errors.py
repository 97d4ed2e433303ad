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
