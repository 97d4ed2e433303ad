"""The process that runs chat templates: one at a time, each with limits of time, memory and characters.

    python -m penstock.text.template_worker      started by template_pool, which holds the other end of stdin

    request    seconds (float64)  length (uint64)  marshal((text, variables or None, characters))
    answer     kind (1 byte)  stays (1 byte)  length (uint64)  UTF-8

Without variables, a template is compiled only, and the answer is its content format. A request that takes
longer than its seconds ends the process by SIGALRM, whatever it is doing, and even if nobody waits for it any
more. Its address space has a limit; after a request that took much of it, the process says that it ends. It
has none of its parent's secrets: its environment holds what Python needs.

The parent trusts nothing of an answer but its length.
"""

from __future__ import annotations

import gc
import marshal
import os
import resource
import signal
import socket
import struct
import sys
from collections.abc import Callable
from typing import Any

REQUEST = struct.Struct("=dQ")
ANSWER = struct.Struct("=ccQ")

TEXT = b"="
SYNTAX = b"S"
"""Line, a space, jinja2's message."""
REFUSED = b"R"
"""The template's own words, through raise_exception."""
FAILED = b"F"
TOO_LONG = b"L"
NO_MEMORY = b"M"

MEMORY = 256 << 20
"""Bytes of address space beyond what the process has when it is ready."""
_KEEPS = 64 << 20
"""Bytes more than that, after a request, and the process is replaced."""
_LINE = 500
"""Characters of a message."""


class _TooLong(Exception):
    """More characters than are allowed."""


def _run(text: str, variables: dict[str, Any] | None, characters: int) -> tuple[bytes, str]:
    """(kind, what to say)"""
    import jinja2

    from .jinja_sandbox import compiled, content_format

    try:
        if variables is None:
            return TEXT, content_format(text)
        pieces, left = [], characters
        for piece in compiled(text).generate(**variables):
            left -= len(piece)
            if left < 0:
                raise _TooLong
            pieces.append(piece)
        return TEXT, "".join(pieces)
    except _TooLong:
        return TOO_LONG, ""
    except MemoryError:
        return NO_MEMORY, ""
    except jinja2.TemplateSyntaxError as error:
        return SYNTAX, f"{error.lineno} {str(error.message)[:_LINE]}"
    except jinja2.TemplateError as error:
        if type(error) is jinja2.TemplateError:
            return REFUSED, str(error)[:_LINE]
        return FAILED, f"{type(error).__name__}: {str(error)[:_LINE]}"
    except Exception as error:  # a template is a program: anything may go wrong in it
        return FAILED, f"{type(error).__name__}: {str(error)[:_LINE]}"


def _answer(body: bytearray) -> tuple[bytes, bytes]:
    """(kind, text in UTF-8) for a request."""
    try:
        kind, text = _run(*marshal.loads(body))
        return kind, text.encode("utf-8", "surrogatepass")
    except MemoryError:
        return NO_MEMORY, b""


def receive(connection: socket.socket, size: int) -> bytearray:
    """So many bytes. Raises EOFError when the other end has gone."""
    data = bytearray(size)
    view, done = memoryview(data), 0
    while done < size:
        got = connection.recv_into(view[done:])
        if not got:
            raise EOFError
        done += got
    return data


def pages(field: int) -> int:
    """Of /proc/self/statm: 0 the address space, 1 what is resident; in bytes, 0 where it is not told."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[field]) * resource.getpagesize()
    except OSError:
        return 0


def confine(memory: int) -> int:
    """Bound what the process may take from now on: so many bytes of address space beyond what it has. What is
    resident of it now, in bytes."""
    gc.collect()
    gc.freeze()
    space, idle = pages(0), pages(1)
    if space:
        resource.setrlimit(resource.RLIMIT_AS, (space + memory, space + memory))
    return idle


def serve(prepare: Callable[[], Callable[[bytearray], tuple[bytes, bytes, bool]]]) -> int:
    """Answer until the parent closes its end, or an answer is the last one.

    prepare: makes what answers: request → (kind, text in UTF-8, whether the process can be asked again).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's; the parent decides
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection = socket.socket(fileno=0)
    answer = prepare()
    while True:
        try:
            seconds, length = REQUEST.unpack(receive(connection, REQUEST.size))
            signal.setitimer(signal.ITIMER_REAL, seconds)  # its signal's default action ends the process
            kind, text, stays = answer(receive(connection, length))
            signal.setitimer(signal.ITIMER_REAL, 0)
            connection.sendall(ANSWER.pack(kind, b"1" if stays else b"0", len(text)) + text)
            if not stays:
                return 0
        except (EOFError, ConnectionError):
            return 0


def _prepare() -> Callable[[bytearray], tuple[bytes, bytes, bool]]:
    from . import jinja_sandbox

    jinja_sandbox.compiled("{{ messages }}{% for i in range(2) %}{{ i | tojson }}{% endfor %}").render()
    idle = confine(MEMORY)

    def answer(body: bytearray) -> tuple[bytes, bytes, bool]:
        kind, text = _answer(body)
        return kind, text, kind != NO_MEMORY and pages(1) - idle <= _KEEPS

    return answer


if __name__ == "__main__":
    status = serve(_prepare)
    sys.stderr.flush()
    os._exit(status)  # nothing to tidy up
