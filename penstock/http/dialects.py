"""What Anthropic's Messages and OpenAI's Responses have that OpenAI's elder dialects have not: the shapes of
errors, whole and in a stream. Engines and gateways fail alike.

    PenstockError ──▶ messages_error · messages_error_event · responses_error_event
    path ──spoken──▶ scope["error_body"]: who has no key is told so in the dialect that he speaks

It knows shapes; which paths there are is said by whoever serves them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec
from starlette.types import ASGIApp, Receive, Scope, Send

from penstock.core.errors import PenstockError

from .errors import error_object
from .sse import event

ErrorBody = Callable[[PenstockError], bytes]

_MESSAGES_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    529: "overloaded_error",
}


def messages_error(error: PenstockError) -> bytes:
    """The body of an error, as Anthropic writes it. What is the client's fault otherwise is an
    invalid_request_error, too."""
    other = "invalid_request_error" if 400 <= error.status < 500 else "api_error"
    kind = _MESSAGES_TYPES.get(error.status, other)
    return msgspec.json.encode({"type": "error", "error": {"type": kind, "message": str(error)}})


def messages_error_event(error: PenstockError) -> bytes:
    """What ends a stream of Messages that has failed; nothing follows it."""
    return event(messages_error(error), "error")


def responses_error_event(error: PenstockError, sequence_number: int | None = None) -> bytes:
    """What ends a stream of Responses that has failed; nothing follows it."""
    body = {**error_object(error)["error"], "type": "error"}
    if sequence_number is not None:
        body["sequence_number"] = sequence_number
    return event(msgspec.json.encode(body), "error")


def spoken(app: ASGIApp, bodies: Mapping[str, ErrorBody]) -> ASGIApp:
    """Have every error of these paths written in their dialect, those of the layers within included."""

    async def speaking(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (body := bodies.get(scope["path"])) is not None:
            scope["error_body"] = body
        await app(scope, receive, send)

    return speaking
