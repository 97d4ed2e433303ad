"""The process in which answers meet patterns, schemas and functions of yours: one at a time, with a deadline.

    python -m penstock.evaluate.graders.worker MEMORY     started by `desk`, which holds the other ends

    request    seconds (float64)  length (uint64)  msgpack [what, answer, expected, about]
    answer     length (uint64)  msgpack [score, why] or [null, why it cannot be graded]

A pattern that backtracks for ever, a schema that does, a function that hangs: SIGALRM ends the process, and
its parent starts another one. MEMORY bytes of address space at most beyond what it begins with, or 0 for
no bound, which functions of yours get: they may import anything.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import os
import resource
import signal
import struct
import sys
from typing import Any

import msgspec

from penstock.core.errors import brief, cause

REQUEST = struct.Struct("=dQ")
ANSWER = struct.Struct("=Q")
_WHY = 500
"""Characters of a reason."""


def verdict(value: Any) -> tuple[float | None, str]:
    """What a hook has said: a bool, a number from 0 to 1, or an object with `score` and maybe `reason`."""
    why = ""
    if isinstance(value, dict):
        why = brief(str(value.get("reason") or ""), _WHY)
        value = value.get("score")
    if isinstance(value, bool):
        return float(value), why
    if isinstance(value, int | float) and 0 <= value <= 1:
        return float(value), why
    return None, f"it answered {brief(repr(value), 100)}, which is neither a bool nor a number from 0 to 1"


def _function(name: str) -> Any:
    module, _, attribute = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # the folder in which the command runs, as python -m has it
    return getattr(importlib.import_module(module), attribute)


def _answer(body: bytes) -> tuple[float | None, str]:
    from .spec import Python, read_grader
    from .text import grade

    what, answer, expected, about = msgspec.msgpack.decode(body)
    grader = read_grader(what)
    try:
        if isinstance(grader, Python):
            said = _function(grader.function)(about)
            return verdict(asyncio.run(said) if inspect.iscoroutine(said) else said)
        score, why = grade(grader, answer, tuple(expected))
        return score, brief(why, _WHY)
    except MemoryError:
        return None, "it takes too much memory"
    except Exception as error:  # a pattern, a schema or somebody's function: anything may go wrong
        return None, brief(cause(error), _WHY)


def main() -> int:
    """Answer until the parent closes its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's; the parent decides
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a function prints is no answer
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory := int(sys.argv[1]):
        import jsonschema  # noqa: F401  its memory is not an answer's

        space = _address_space()
        resource.setrlimit(resource.RLIMIT_AS, (space + memory, space + memory))
    while head := requests.read(REQUEST.size):
        seconds, length = REQUEST.unpack(head)
        body = requests.read(length)
        signal.setitimer(signal.ITIMER_REAL, seconds)  # its signal's default action ends the process
        said = msgspec.msgpack.encode(_answer(body))
        signal.setitimer(signal.ITIMER_REAL, 0)
        answers.write(ANSWER.pack(len(said)) + said)
        answers.flush()
    return 0


def _address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # threads that a function has left behind are not waited for
