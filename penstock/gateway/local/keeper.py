"""Between `penstock up` and an engine: a small process that leaves nothing behind.

    python keeper.py GRACE COMMAND…

What the command starts, and whatever outlives it, ends with it (PR_SET_CHILD_SUBREAPER: orphans are ours).
Standard input is the life line, a socket: when it reaches its end, `up` is gone, even by kill -9, and so is
the engine. A byte on it says that the command has ended, while its leftovers may take a moment longer. And if
this process itself is killed, the kernel kills the command (PR_SET_PDEATHSIG).

    SIGTERM, SIGINT    are passed on, once: the command drains; after GRACE seconds it is killed
    SIGQUIT            kills at once
    exit status        the command's own; 128 + N for signal N, as in a shell; 127 if it cannot be started

Standard library only, and no import of ours: each replica pays for it 30 ms of a processor, and 10 MB.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import time
from types import FrameType

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGCHLD)
_ABANDONED = 3.0
"""Seconds that the command gets to end by itself when `up` is gone: nobody reads its answers any more."""
_LEFTOVERS = 2.0
"""Seconds that whatever outlives the command gets, to remove its temporary files."""


def main(arguments: list[str]) -> int:
    """Run a command, and see to its end."""
    grace, command = float(arguments[0]), arguments[1:]
    return Keeper(grace).run(command)


class Keeper:
    """One command and its deadline."""

    def __init__(self, grace: float) -> None:
        self._grace = grace
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._parent = os.getppid()
        self._child = 0
        self._deadline: float | None = None
        """Monotonic time from which on it is killed."""

    def run(self, command: list[str]) -> int:
        """Returns the exit status for this process."""
        self._libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        wake, waker = os.pipe()
        os.set_blocking(waker, False)
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
            signal.signal(number, self._on_signal)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)  # only to wake up
        # whoever reads our output may be gone before us
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        self._child = self._start(command)
        if self._deadline is not None:  # told to end before there was anything to end
            self._signal(signal.SIGTERM)
        poller = select.poll()
        poller.register(wake, select.POLLIN)
        poller.register(0, select.POLLIN)
        while (status := self._reap()) is None:
            for descriptor, _ in poller.poll(self._timeout()):
                if descriptor == wake:
                    _drain(wake)
                elif not os.read(0, 4096):
                    poller.unregister(0)
                    self._end(_ABANDONED)
            if os.getppid() != self._parent:  # its end of the pipe may have been inherited by somebody
                self._end(_ABANDONED)
            if self._deadline is not None and time.monotonic() >= self._deadline:
                self._signal(signal.SIGKILL)
        try:
            os.write(0, b".")
        except OSError:  # nobody is there, or it is a pipe
            pass
        self._clear()
        return status

    def _start(self, command: list[str]) -> int:
        # a signal that comes between fork and exec waits: our handlers are not the command's
        signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)
        pid = os.fork()
        if pid:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)
            return pid
        try:
            self._libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() == 1:  # the keeper died in between
                os._exit(128 + signal.SIGKILL)
            for number in (*_HANDLED, signal.SIGPIPE):
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)
            null = os.open(os.devnull, os.O_RDONLY)
            os.dup2(null, 0)
            os.execvp(command[0], command)
        except OSError as error:
            os.write(2, f"{command[0]} cannot be started: {error.strerror}\n".encode())
        os._exit(127)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGQUIT:
            self._deadline = 0.0
        else:
            self._end(self._grace)

    def _end(self, grace: float) -> None:
        """Have the command end itself, within so many seconds."""
        deadline = time.monotonic() + grace
        if self._deadline is None:
            self._signal(signal.SIGTERM)
            self._deadline = deadline
        self._deadline = min(self._deadline, deadline)

    def _signal(self, number: int) -> None:
        if self._child:
            try:
                os.kill(self._child, number)
            except ProcessLookupError:
                pass

    def _timeout(self) -> int:
        """Milliseconds until there is something to do in any case."""
        if self._deadline is None:
            return 1000
        return max(1, min(1000, int(1000 * (self._deadline - time.monotonic()))))

    def _reap(self) -> int | None:
        """Bury whoever has ended; the command's exit status, once it has."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return None
            if pid == 0:
                return None
            if pid == self._child:
                return _exit_status(status)

    def _clear(self) -> None:
        """End what the command has left behind: it is all ours now, whatever group or session it is in."""
        kill_at = time.monotonic() + _LEFTOVERS
        while True:
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                if time.monotonic() >= kill_at or self._deadline == 0.0:
                    for child in _children():
                        try:
                            os.kill(child, signal.SIGKILL)
                        except ProcessLookupError:
                            pass
                time.sleep(0.02)


def _children() -> list[int]:
    """Processes whose parent is this one."""
    me = str(os.getpid())
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as file:
                    # the name, in parentheses, may hold anything
                    fields = file.read().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[1] == me:
                found.append(int(entry))
    return found


def _exit_status(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _drain(descriptor: int) -> None:
    try:
        while os.read(descriptor, 4096):
            pass
    except BlockingIOError:
        pass


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
