"""A Unix socket to listen on: its file, who else may have it, and its end.

    PATH        the socket; the umask of the start, and the directories above it, say who may connect
    PATH.lock   locked while a server has PATH, from before its model is loaded until it ends

The lock tells a socket that somebody's crash has left, which is replaced, from one that a server has bound
and does not listen on yet. The kernel gives it back however a process ends.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat

from penstock.core.errors import StartupError, cause

_LONGEST = 107
"""Bytes of a socket's path, without the zero at its end (`sockaddr_un`)."""
_TRIES = 10
"""Times that a lock file may vanish between being opened and being locked."""


class UnixSocket(socket.socket):
    """A socket bound to a path; closing it removes its files."""

    def __init__(self, path: str) -> None:
        """Bind. Raises StartupError where the path cannot be had."""
        super().__init__(socket.AF_UNIX, socket.SOCK_STREAM)
        self.path = path
        self._lock: int | None = None
        try:
            if len(os.fsencode(path)) > _LONGEST:
                raise _refused(path, f"it is longer than {_LONGEST} bytes")
            self._lock = _lock(path)
            _remove_stale(path)
            self.bind(path)
        except OSError as error:
            self.close()
            raise _refused(path, cause(error) if error.strerror is None else error.strerror) from error
        except StartupError:
            self.close()
            raise
        self._inode = os.stat(path).st_ino

    def close(self) -> None:
        """Close it, and remove the files that are still its own. May be called twice."""
        super().close()
        if self._lock is None:
            return
        with contextlib.suppress(OSError):
            if os.stat(self.path).st_ino == getattr(self, "_inode", None):
                os.unlink(self.path)
        with contextlib.suppress(OSError):
            os.unlink(f"{self.path}.lock")  # while it is locked: nobody else can have it
        os.close(self._lock)
        self._lock = None


def _lock(path: str) -> int:
    """The lock of a path, as a descriptor."""
    file = f"{path}.lock"
    for _ in range(_TRIES):
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.stat(file).st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        except FileNotFoundError:  # whoever had it has ended meanwhile, and taken the file along
            pass
        except BlockingIOError:
            os.close(descriptor)
            raise _refused(path, "another server has it") from None
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)
    raise _refused(path, "other servers come and go there")


def _remove_stale(path: str) -> None:
    """Remove the socket of a server that has crashed, and nothing else."""
    try:
        kind = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(kind):
        raise _refused(path, "there is something else than a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except OSError as error:
            if error.errno == errno.ECONNREFUSED:  # nobody listens
                os.unlink(path)
                return
            if error.errno == errno.ENOENT:
                return
            raise
    raise _refused(path, "another process listens there")


def _refused(path: str, why: str) -> StartupError:
    return StartupError(
        f"Cannot listen on the Unix socket {path}: {why}.",
        param="--uds",
        advice="Give another path with --uds, in a directory that this process may write to.",
    )
