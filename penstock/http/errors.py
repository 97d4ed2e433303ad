"""From exceptions to OpenAI-shaped answers.

    {"error": {"message": …, "type": …, "param": …, "code": …, "reason": …}}

`code` is a word where OpenAI defines it, which clients switch on; else the status as a number, as in vLLM,
and the word that this project has for it, if any, is the `reason`.

It knows the tree in `core.errors` and how ASGI sends a response. Whatever is not in that tree is a bug: it is
logged with its trace under an error id, and the client gets the id and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import uuid
from collections.abc import Callable

import msgspec
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from penstock.core.errors import Draining, InvalidRequest, PenstockError, RouteNotFound, Unavailable, brief

from .examples import right_form
from .exchange import ClientGone, header, respond
from .ids import acceptable
from .sse import event

logger = logging.getLogger("penstock.http")


_OPENAI_CODES = frozenset(
    {
        "context_length_exceeded",
        "insufficient_quota",
        "invalid_api_key",
        "invalid_type",
        "model_not_found",
        "previous_response_not_found",
        "rate_limit_exceeded",
        "unknown_parameter",
        "unsupported_parameter",
    }
)
_HEADERS = "penstock.headers"
"""Key of a scope: headers for the answer."""


class MethodNotAllowed(RouteNotFound):
    """The path exists, but not with this method."""

    status = 405
    code = "method_not_allowed"


class MalformedRequest(InvalidRequest):
    """This is not HTTP, or can be read in two ways."""

    code = "malformed_request"


class RequestTimeout(InvalidRequest):
    """The request did not arrive in time."""

    status = 408
    code = "request_timeout"


class UriTooLong(InvalidRequest):
    """The request line is over the limit."""

    status = 414
    code = "uri_too_long"


class HeadersTooLarge(InvalidRequest):
    """The headers are over a limit."""

    status = 431
    code = "headers_too_large"


class UnknownCoding(InvalidRequest):
    """The body is transferred in a coding that this server does not have."""

    status = 501
    code = "unsupported_transfer_encoding"


class UnknownVersion(InvalidRequest):
    """A version of HTTP that this server does not speak."""

    status = 505
    code = "unsupported_http_version"


class TooManyConnections(Unavailable):
    """All connections, or those of one client, are taken."""

    code = "too_many_connections"


def add_header(scope: Scope, name: bytes, value: bytes) -> None:
    """Have the answer to a request carry a header, whatever it will be: whole, a stream or an error."""
    scope.setdefault(_HEADERS, []).append((name, value))


def error_object(error: PenstockError) -> dict[str, dict[str, str | int | None]]:
    """The OpenAI-shaped body of an error."""
    body: dict[str, str | int | None] = {"message": str(error), "type": error.type, "param": error.param}
    if error.code in _OPENAI_CODES:
        body["code"] = error.code
    else:
        body["code"] = error.status
        if error.code is not None:
            body["reason"] = error.code
    return {"error": body}


def error_bytes(error: PenstockError) -> bytes:
    """The same as JSON."""
    return msgspec.json.encode(error_object(error))


def internal(error: BaseException, where: str) -> PenstockError:
    """Log an unexpected exception with its trace; return what the client may know of it."""
    error_id = secrets.token_hex(6)
    logger.error("error %s in %s", error_id, where, exc_info=error)
    failure = PenstockError(
        f"Internal server error (id {error_id}).", advice="The server's log has the details under this id."
    )
    failure.code = "internal_error"
    return failure


async def send_error(
    send: Send,
    error: PenstockError,
    headers: dict[str, str] | None = None,
    body: Callable[[PenstockError], bytes] = error_bytes,
) -> None:
    """Answer with an error's status, headers and body."""
    extra = dict(headers or {})
    if error.status == 401:
        extra["WWW-Authenticate"] = "Bearer"
    if error.retry_after is not None:
        extra["Retry-After"] = str(error.retry_after)
    await respond(send, body(error), status=error.status, headers=extra)


class ErrorMiddleware:
    """Turns every exception into an answer, and goes on. It also gives every exchange an id
    (`scope["request_id"]`, the client's X-Request-Id if it sends one) and says it in the answer.

    The body is OpenAI's, unless an application has put a function of the error into `scope["error_body"]`.
    """

    def __init__(self, app: ASGIApp, *, id_header: bool = True) -> None:
        self._app = app
        self._id_header = id_header

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun: list[tuple[bytes, bytes]] | None = None
        ended = False

        async def watched(message: Message) -> None:
            nonlocal begun, ended
            if begun is not None:
                ended = not message.get("more_body", False)
            else:
                begun = message["headers"]
                message["headers"] += scope.get(_HEADERS, ())
                if self._id_header:
                    message["headers"].append(
                        (b"x-request-id", scope["request_id"].encode("latin-1", "replace"))
                    )
            await send(message)

        scope["app"] = self  # makes Starlette's router raise instead of answering in plain text
        scope["client_request_id"] = _given_id(scope)
        scope["request_id"] = scope["client_request_id"] or uuid.uuid4().hex
        headers: dict[str, str] = {}
        error: PenstockError
        try:
            await self._app(scope, receive, watched)
            return
        except ClientGone:
            return
        except asyncio.CancelledError:  # the server ends now, whatever is under way; so does this task
            error = Draining("The server is shutting down.")
            if begun is not None:
                if not ended and any(value.startswith(b"text/event-stream") for _, value in begun):
                    last = event(_body(scope)(error))  # without the [DONE] of a stream that is whole
                    await send({"type": "http.response.body", "body": last, "more_body": False})
                return
        except PenstockError as exc:
            # without its trace, whose frames hold it and the request: a cycle that waits for the collector
            error = exc.with_traceback(None)
        except HTTPException as exc:
            error, headers = _routing_error(scope, exc)
        except Exception as exc:
            error = internal(exc, f"{scope['method']} {scope['path']}")
        if begun is None:
            await send_error(watched, error, headers, body=_body(scope))
        else:  # too late for a status: a cut connection tells the client that the body is not whole
            raise ConnectionAbortedError(error.message)


def _body(scope: Scope) -> Callable[[PenstockError], bytes]:
    body: Callable[[PenstockError], bytes] = scope.get("error_body", error_bytes)
    return body


def _given_id(scope: Scope) -> str | None:
    given = header(scope, b"x-request-id")
    return given if given and acceptable(given) else None


def _routing_error(scope: Scope, exc: HTTPException) -> tuple[PenstockError, dict[str, str]]:
    headers = dict(exc.headers or {})
    method, path = scope["method"], brief(scope["path"])
    if exc.status_code == 405:
        allowed = ", ".join(sorted(headers.get("Allow", "").split(", ")))
        headers["Allow"] = allowed
        form = "" if method == "POST" else right_form(path, scope["scheme"], header(scope, b"host") or "")
        advice = f"Use {allowed}. {form}".rstrip()
        return MethodNotAllowed(f"{method} is not allowed for {path}.", advice=advice), headers
    return RouteNotFound(f"There is no {method} {path}."), headers
