"""Several processes behind one port: they inherit the listening socket, and share all else by the store.

    parent: no loop, no threads, no database ──fork──▶ worker 0 … worker n-1, and a companion, if there is one
        SIGTERM, SIGINT, SIGHUP   are passed on to all, as STOP, STOP and RELOAD: `obey`
        a worker dies             another one takes its place, after 1 s, 2 s, … 30 s if that goes on
        the parent dies           the kernel ends the workers (PR_SET_PDEATHSIG): they drain

It knows processes and signals; what a worker does is a function that returns its exit status.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from types import FrameType

from penstock.core.errors import PenstockError, StartupError

logger = logging.getLogger("penstock.gateway")

_PR_SET_PDEATHSIG = 1
_WATCHED = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD}
STOP, RELOAD, HURRY = signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT
"""What the parent tells its children. Others than it is told itself: a terminal, or systemd, tells all
processes at once, and who hears a SIGTERM from both would take it for two, which mean haste."""
_LONGEST = 30.0
_REFUSED = 2
"""Status of a process that has said why."""
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
            logger.exception("the start has failed")
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


def run(count: int, serve: Callable[[], int], companion: Callable[[], int] | None = None) -> int:
    """Run `serve` in `count` processes until a signal; returns 0 if all of them ended so.

    companion: runs in a process that is there from before the first of them until after the last, and ends at
    STOP, or in haste at HURRY, which is also what it gets when this process dies. If it ends by itself, all
    end, with its status.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
    beside = None if companion is None else _start(companion, HURRY)
    workers = {_start(serve): time.monotonic() for _ in range(count)}
    failures, stops, worst, verdict, asked = 0, 0, 0, 0, False
    due: list[float] = []
    """When the places of those that died are filled."""
    while workers or beside is not None or (due and not stops):
        patience = max(0.0, min(due) - time.monotonic()) if due and not stops else 3600.0
        received = signal.sigtimedwait(_WATCHED, patience)
        number = None if received is None else received.si_signo
        if number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            stops += number != signal.SIGHUP
            _tell(workers, RELOAD if number == signal.SIGHUP else STOP)
        for pid, status in _ended():
            if pid == beside:
                beside, verdict = None, status if status >= 0 else 1
                if not stops:
                    if status != _REFUSED:
                        logger.critical("the process that has the engines has ended with %d", status)
                    stops = 1
                    _tell(workers, STOP)
                    verdict = verdict or 1
                continue
            begun = workers.pop(pid, None)
            if begun is None:
                continue
            if stops and status != -STOP:  # which ends one that has not begun to serve
                worst = max(worst, abs(status))
            if not stops:
                failures = 0 if time.monotonic() - begun > _STEADY else failures + 1
                wait = min(_LONGEST, 2.0 ** (failures - 1)) if failures else 0.0
                logger.error("worker %d has ended with %d; another starts in %g s", pid, status, wait)
                due.append(time.monotonic() + wait)
        while due and not stops and min(due) <= time.monotonic():
            due.remove(min(due))
            workers[_start(serve)] = time.monotonic()
        if beside is not None and stops > 1:
            _tell([beside], HURRY)
        elif beside is not None and stops and not workers and not asked:
            asked = True
            _tell([beside], STOP)
    return verdict or min(worst, 1)


def obey(actions: Mapping[signal.Signals, Callable[[], None]]) -> None:
    """In a worker, whose loop runs: do what the parent says. `actions`: what each signal does."""
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(STOP, actions[signal.SIGTERM])
    loop.add_signal_handler(RELOAD, actions[signal.SIGHUP])


def _heard_by_parent(number: int, frame: FrameType | None) -> None:
    """It says so."""


def _tell(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _start(serve: Callable[[], int], orphaned: signal.Signals = STOP) -> int:
    """A process that runs `serve`; its id. `orphaned`: what the kernel sends it when this one dies."""
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, _heard_by_parent)  # not SIG_IGN, which whatever is started would inherit
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _WATCHED)
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, orphaned, 0, 0, 0)
        if os.getppid() == parent:
            status = serve()
    except PenstockError as error:  # of the moment, as a busy database: the parent has looked at what lasts
        logger.error("%s", error)
        status = _REFUSED
    except BaseException:
        logger.exception("a process of the gateway has failed")
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
