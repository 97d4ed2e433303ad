"""Several processes behind one port: they inherit the listening socket, and share all else by the store.

    parent: no loop, no threads, no database ──fork──▶ worker 0 … worker n-1
        SIGTERM, SIGINT, SIGHUP   are passed on to all
        a worker dies             another one takes its place, after 1 s, 2 s, … 30 s if that goes on
        the parent dies           the kernel ends the workers (PR_SET_PDEATHSIG): they drain

It knows processes and signals; what a worker does is a function that returns its exit status.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import time
import traceback
from collections.abc import Callable

from penstock.core.errors import StartupError

logger = logging.getLogger("penstock.gateway")

_PR_SET_PDEATHSIG = 1
_WATCHED = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD}
_LONGEST = 30.0
_STEADY = 60.0
"""Seconds after which a worker that dies is no sign of a trouble that lasts."""


def in_child(work: Callable[[], str | None]) -> str | None:
    """What `work` returns, done in a process of its own: whatever it starts ends with it.

    Raises StartupError with the message of the one that it raises there.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        try:
            said = b"+" + (work() or "").encode()
        except StartupError as error:
            said = b"-" + str(error).encode()
        except BaseException:
            traceback.print_exc()
            said = b"-The gateway cannot be started; see above."
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(said)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read()
    os.waitpid(pid, 0)
    if not said.startswith(b"+"):
        raise StartupError(said[1:].decode() or "The gateway cannot be started.")
    return said[1:].decode() or None


def run(count: int, serve: Callable[[], int]) -> int:
    """Run `serve` in `count` processes until a signal; returns 0 if all of them ended so."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
    workers = {_start(serve): time.monotonic() for _ in range(count)}
    failures, stopping, worst = 0, False, 0
    due: list[float] = []
    """When the places of those that died are filled."""
    while workers or (due and not stopping):
        patience = max(0.0, min(due) - time.monotonic()) if due and not stopping else 3600.0
        received = signal.sigtimedwait(_WATCHED, patience)
        number = None if received is None else received.si_signo
        if number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            stopping = stopping or number != signal.SIGHUP
            for pid in workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM if number == signal.SIGINT else number)
        for pid, status in _ended():
            begun = workers.pop(pid, None)
            if begun is None:
                continue
            if stopping and status != -signal.SIGTERM:  # which ends one that has not begun to serve
                worst = max(worst, abs(status))
            if not stopping:
                failures = 0 if time.monotonic() - begun > _STEADY else failures + 1
                wait = min(_LONGEST, 2.0 ** (failures - 1)) if failures else 0.0
                logger.error("worker %d has ended with %d; another starts in %g s", pid, status, wait)
                due.append(time.monotonic() + wait)
        while due and not stopping and min(due) <= time.monotonic():
            due.remove(min(due))
            workers[_start(serve)] = time.monotonic()
    return min(worst, 1)


def _start(serve: Callable[[], int]) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _WATCHED)
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() == parent:
            status = serve()
    except BaseException:
        traceback.print_exc()
    finally:
        logging.shutdown()
        os._exit(status)


def _ended() -> list[tuple[int, int]]:
    """Children that have ended, each with its exit status, negative for a signal."""
    found = []
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            found.append((pid, os.waitstatus_to_exitcode(status)))
    return found
