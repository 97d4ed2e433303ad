"""The exception tree: every failure that a user can see.

    PenstockError                       500  internal_error
    ├─ InvalidRequest                   400  the client sent something that can never work
    │  ├─ ContextLengthExceeded         400  context_length_exceeded
    │  ├─ UnsupportedParameter          400  unsupported_parameter
    │  ├─ AuthenticationFailed          401  invalid_api_key
    │  ├─ ModelNotFound                 404  model_not_found
    │  ├─ RouteNotFound                 404 (405 where the path exists with another method)
    │  ├─ SlowReader                    408  slow_reader: the client does not read its stream
    │  └─ PayloadTooLarge               413  payload_too_large
    ├─ Unavailable                      503  try again later, or elsewhere
    │  ├─ QueueFull                     503  queue_full, with retry_after
    │  ├─ Draining                      503  draining
    │  ├─ EngineDead                    503  engine_dead, with the root cause
    │  │  └─ DeviceLost                 503  engine_dead: the device has failed under it
    │  └─ DeviceOutOfMemory             503  device_out_of_memory: too large for what is left of it
    ├─ RequestFailed                    500  this request broke in the engine; others go on
    └─ StartupError                     refused at start: printed as one message, exit code 2
       ├─ ModelLoadError                names the file
       └─ MemoryBudgetError             names the flag and the value that would fit

Each class carries what an HTTP answer and a terminal need: `status`, OpenAI's `type`, `code`, the `param` at
fault, and `advice` (what to do about it). The message says what happened and which value.
"""

from __future__ import annotations

import reprlib

_LONGEST_MESSAGE = 2000
_LONGEST_PARAM = 200
"""Characters of what a refused client is told."""


class PenstockError(Exception):
    """Base of every error that Penstock raises on purpose.

    Attributes:
        status: HTTP status code.
        type: OpenAI's `error.type`.
        code: a stable identifier, or None; OpenAI's `error.code` where OpenAI has it (`http.errors`).
        param: the request field or command line flag at fault, or None.
        advice: what to do about it; appended to the message.
        retry_after: seconds for the `Retry-After` header, or None.
    """

    status = 500
    type = "internal_error"
    code: str | None = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        advice: str = "",
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.advice = advice
        self.retry_after = retry_after

    def __str__(self) -> str:
        return f"{self.message} {self.advice}".strip()


class InvalidRequest(PenstockError):
    """The request can never be served as it is.

    Whatever a client sent comes back to it, and into logs: message and param are cut to a bounded length
    here, whoever wrote them. Where a value is quoted, `quote` keeps the rest of the message readable.
    """

    status = 400
    type = "invalid_request_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        advice: str = "",
        retry_after: int | None = None,
    ) -> None:
        super().__init__(
            brief(message, _LONGEST_MESSAGE),
            param=None if param is None else brief(param, _LONGEST_PARAM),
            advice=brief(advice, _LONGEST_MESSAGE),
            retry_after=retry_after,
        )


class ContextLengthExceeded(InvalidRequest):
    """Prompt, or prompt plus wanted output, is longer than the model's context."""

    code = "context_length_exceeded"


class UnsupportedParameter(InvalidRequest):
    """A known field of the API that this server does not implement."""

    code = "unsupported_parameter"


class AuthenticationFailed(InvalidRequest):
    """No API key, or a wrong one."""

    status = 401
    code = "invalid_api_key"


class ModelNotFound(InvalidRequest):
    """The request names a model that is not served here."""

    status = 404
    code = "model_not_found"


class RouteNotFound(InvalidRequest):
    """No such path, or not with this method."""

    status = 404


class SlowReader(InvalidRequest):
    """More of a stream waits for its client to read it than is kept."""

    status = 408
    code = "slow_reader"


class PayloadTooLarge(InvalidRequest):
    """The request body is over the limit."""

    status = 413
    code = "payload_too_large"


class Unavailable(PenstockError):
    """The server cannot take this request now."""

    status = 503
    type = "service_unavailable"


class QueueFull(Unavailable):
    """The bounded queue is full: an early no is better than a time-out."""

    code = "queue_full"
    bound: str | None = None
    """Name of the setting that bounds it."""


class Draining(Unavailable):
    """The server is shutting down and takes no new work."""

    code = "draining"


class EngineDead(Unavailable):
    """The engine process has died; the message carries its root cause."""

    code = "engine_dead"


class DeviceLost(EngineDead):
    """The device fails every call from now on; raised by executors. The engine ends with it."""


class DeviceOutOfMemory(Unavailable):
    """The device's memory is exhausted. Raised by executors for a step, and the end of a request for which
    not even one token can be computed alone; another replica may have the memory."""

    code = "device_out_of_memory"


class RequestFailed(PenstockError):
    """One request failed in the engine, with its cause."""

    code = "request_failed"


class StartupError(PenstockError):
    """The server refuses to start."""

    code = "startup_error"


class ModelLoadError(StartupError):
    """The model directory cannot be served; names the file."""


class MemoryBudgetError(StartupError):
    """The model or its KV cache does not fit; names the flag and the value that would fit."""


def quote(value: object) -> str:
    """A client's value as a message may show it: its repr in at most a line, and in bounded time whatever it
    holds."""
    return brief(_BRIEF.repr(value))


def brief(text: str, longest: int = 80) -> str:
    """A text as a message may show it: its beginning, where it has more than `longest` characters."""
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


class _Brief(reprlib.Repr):
    """reprlib's, which looks at the first entries only; also where the library sorts all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxlist = self.maxdict = self.maxtuple = 8
        self.maxstring = self.maxother = 78

    def repr_str(self, value: str, level: int) -> str:
        return repr(value if len(value) <= self.maxstring else value[: self.maxstring] + "...")

    def repr_int(self, value: int, level: int) -> str:
        bits = value.bit_length()
        return repr(value) if bits <= 256 else f"<integer of {bits} bits>"

    def repr_dict(self, value: dict[object, object], level: int) -> str:
        if level <= 0:
            return "{...}"
        shown = []
        for number, (key, item) in enumerate(value.items()):
            if number == self.maxdict:
                shown.append("...")
                break
            shown.append(f"{self.repr1(key, level - 1)}: {self.repr1(item, level - 1)}")
        return "{" + ", ".join(shown) + "}"


_BRIEF = _Brief()


def cause(error: BaseException) -> str:
    """One line for an exception that is none of ours: its class, and its message if it has one."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


#: Classes that travel between the engine and the API process, by name.
BY_NAME: dict[str, type[PenstockError]] = {
    cls.__name__: cls
    for cls in (
        PenstockError,
        InvalidRequest,
        ContextLengthExceeded,
        UnsupportedParameter,
        SlowReader,
        Unavailable,
        QueueFull,
        Draining,
        EngineDead,
        DeviceLost,
        DeviceOutOfMemory,
        RequestFailed,
        StartupError,
        ModelLoadError,
        MemoryBudgetError,
    )
}
