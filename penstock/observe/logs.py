r"""One format for every line that a process of ours logs, whoever wrote it.

    text    2026-11-21 20:05:15.123 INFO     api[4711] serving demo at http://localhost:8000/v1
    json    {"time": "2026-11-21T20:05:15.123Z", "level": "INFO", "process": "api", "pid": 4711,
             "logger": "penstock.server", "message": "serving demo at …", …}

A message of several lines and a traceback are `| ` lines with the same beginning in text, and stay within
the object in JSON ("exception"). Other control characters are escaped. So nothing that a client sends can
look like a line of ours. A record's `extra={"fields": {…}}` are further fields of the object;
`extra={"trace": "…"}` is a traceback that another process has sent.

Python's warnings, uncaught exceptions, and those of threads go the same way. It knows logging and sys;
standard library only.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from types import TracebackType
from typing import Any, TextIO

FORMATS = ("text", "json")

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""What moves a terminal's cursor, ends a line somewhere, or turns text around; all but newlines and tabs."""

logger = logging.getLogger("penstock")


class TextFormatter(logging.Formatter):
    """For people: local time, level, process, message."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """The lines of a record."""
        when = _local(int(record.created))
        head = f"{when}.{_milliseconds(record):03d} {record.levelname:<8} {self._process}[{record.process}] "
        message, trace = _parts(self, record)
        if not trace and message.isprintable():
            return head + message
        first, *more = message.split("\n")
        lines = [first, *(f"| {line}" for line in more), *(f"| {line}" for line in trace.splitlines())]
        return "\n".join(head + _CONTROL.sub(_escaped, line) for line in lines)


class JsonFormatter(logging.Formatter):
    """For machines: one object a line, in ASCII."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """The object of a record."""
        when = _universal(int(record.created))
        message, trace = _parts(self, record)
        entry: dict[str, Any] = {
            "time": f"{when}.{_milliseconds(record):03d}Z",
            "level": record.levelname,
            "process": self._process,
            "pid": record.process,
            "logger": record.name,
            "message": message,
        }
        entry.update(getattr(record, "fields", {}))
        if trace:
            entry["exception"] = trace
        return json.dumps(entry, default=str)


def configure(process: str, *, level: str = "info", format: str = "text") -> None:
    """Send everything that this process logs to standard error, in one format.

    Args:
        process: what the lines call it: api, engine.
        level: the least that is logged; `trace`, which uvicorn has, is `debug`: it would show headers.
        format: one of FORMATS.
    """
    handler = logging.StreamHandler(_StandardError())
    handler.setFormatter(JsonFormatter(process) if format == "json" else TextFormatter(process))
    logging.raiseExceptions = (
        False  # a message that cannot be formatted must not print a traceback of its own
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper().replace("TRACE", "DEBUG"))
    adopt()
    warnings.showwarning = _warn
    sys.excepthook = _uncaught
    threading.excepthook = _uncaught_in_thread
    sys.unraisablehook = _unraisable


def adopt() -> None:
    """Take away the handlers that libraries have given their loggers, so that their lines come to ours.

    Does nothing in a process whose logging is somebody else's.
    """
    if not configured():
        return
    for known in list(logging.root.manager.loggerDict.values()):
        if isinstance(known, logging.Logger) and known.handlers:
            known.handlers.clear()
            known.propagate = True


def configured() -> bool:
    """Whether `configure` was called in this process."""
    return _formatter() is not None


def in_json() -> bool:
    """Whether it was, for JSON: then nothing else may be written to standard error."""
    return isinstance(_formatter(), JsonFormatter)


def wants_json(arguments: Sequence[str]) -> bool:
    """Whether a command line asks for logs in JSON; it may be one that cannot be parsed."""
    words = [argument.replace("_", "-").lower() for argument in arguments]
    return "--log-format=json" in words or ("--log-format", "json") in pairwise(words)


def complain(text: str) -> None:
    """Say why a command ends: a line of the log if there is one, else the words alone."""
    if configured():
        logger.critical("%s", text)
    else:
        print(text, file=sys.stderr)


class _StandardError:
    """What sys.stderr is at the time of writing: tests and daemons exchange it."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


def _formatter() -> TextFormatter | JsonFormatter | None:
    for handler in logging.getLogger().handlers:
        if isinstance(handler.formatter, TextFormatter | JsonFormatter):
            return handler.formatter
    return None


def _parts(formatter: logging.Formatter, record: logging.LogRecord) -> tuple[str, str]:
    """(message, traceback or "")"""
    try:
        message = record.getMessage()
    except Exception as error:  # wrong arguments: better the bare message than none
        message = f"{record.msg} ({type(error).__name__} in its arguments)"
    trace = str(getattr(record, "trace", "") or "")
    if record.exc_info and record.exc_info[0] is not None:
        trace = formatter.formatException(record.exc_info)
    if record.stack_info:
        trace = f"{trace}\n{record.stack_info}".strip()
    return message, trace.rstrip()


@lru_cache(maxsize=2)
def _local(second: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))


@lru_cache(maxsize=2)
def _universal(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


def _milliseconds(record: logging.LogRecord) -> int:
    return int(record.created % 1 * 1000)


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    logging.getLogger("py.warnings").warning("%s: %s (%s:%d)", category.__name__, message, filename, lineno)


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        logger.critical("interrupted")
        return
    logger.critical("uncaught %s: %s", kind.__name__, error, exc_info=(kind, error, trace))


def _uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None and not issubclass(args.exc_type, SystemExit):
        name = args.thread.name if args.thread is not None else "a thread"
        info = (args.exc_type, args.exc_value, args.exc_traceback)
        logger.error("uncaught %s in %s", args.exc_type.__name__, name, exc_info=info)


def _unraisable(args: sys.UnraisableHookArgs) -> None:
    if args.exc_value is not None:
        info = (args.exc_type, args.exc_value, args.exc_traceback)
        logger.error("%s in %r", args.err_msg or "Exception ignored", args.object, exc_info=info)
