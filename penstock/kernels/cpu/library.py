"""The compiled kernels, loaded: which file it is, and whether it can be trusted here.

Knows the build, the binding and the self-test.

    available()      the library, or None: then one warning has said what is lost and how to get it
    start_build()    compile in the background, early in a process that will want the kernels

PENSTOCK_CPU_KERNELS=0 does without them, silently.
"""

from __future__ import annotations

import logging
import os
import subprocess
import threading
import time
from pathlib import Path

from . import build, prebuilt
from .binding import Library

logger = logging.getLogger("penstock.kernels")

#: Seconds that a start waits for a compiler which is still running: several times the five to seven that it
#: needs, once per machine. Without the kernels, the engine would serve at half its speed for all its life.
#: One that hangs is found out earlier, by a program of one line (build.py).
WAIT_SECONDS = 30.0
#: The same, when the kernels were asked for by name.
PATIENCE = 300.0


class _State:
    """What this process knows about its library."""

    library: Library | None = None
    settled = False
    """Whether `library` is final."""
    builder: subprocess.Popen[bytes] | None = None
    lock = threading.Lock()
    """Of available()."""


def enabled() -> bool:
    """False if the environment says to do without the kernels; asked once per process."""
    return os.environ.get("PENSTOCK_CPU_KERNELS", "1").lower() not in ("0", "false", "no", "off")


def start_build() -> None:
    """Have the library compiled in the background, unless one is there, unwanted or impossible."""
    if not enabled() or _State.settled or _State.builder is not None:
        return
    try:
        there = build.find_library() is not None or prebuilt.fitting()
        if not there:
            build.target()  # no compiler, or none that answers, need not be tried in a process of its own
            _State.builder = build.start_build()
    except (OSError, build.BuildError):
        pass  # available() tries again, and says what is wrong


def available(wait_seconds: float = WAIT_SECONDS) -> Library | None:
    """The library, compiled and checked; the answer is the same for the rest of the process.

    Waits at most so long for a compiler. None means that torch has to do; a warning has said why.
    """
    with _State.lock:
        if not _State.settled:
            try:
                _State.library = _load(wait_seconds) if enabled() else None
            except build.BuildError as error:
                _warn(error.reason, error.advice)
            except Exception as error:
                _warn(
                    f"{type(error).__name__}: {error}.",
                    "Please report this; PENSTOCK_CPU_KERNELS=0 hides it.",
                )
            _State.settled = True
    return _State.library


def _load(wait_seconds: float) -> Library:
    """The first that can be trusted: compiled for this very processor, compiled ahead, compiled now.

    Raises what is wrong with the last of them; of the others, a warning says it.
    """
    own, paths = build.find_library(), prebuilt.fitting()
    last = None
    if own is not None:  # to compile again would only make the same again
        *paths, last = own, *paths
    for path in paths:
        try:
            return _checked(path)
        except Exception as error:
            logger.warning("CPU kernels: %s is not used. %s: %s.", path, type(error).__name__, error)
    return _checked(last or _compiled(wait_seconds))


def _checked(path: Path) -> Library:
    """Raises what is wrong with it."""
    library = Library(path)
    from .self_test import check  # late, as torch is: see start_build

    check(library)
    return library


def _compiled(wait_seconds: float) -> Path:
    """Compile in the background, or go on waiting for what start_build began."""
    build.target()  # says at once what makes a build impossible
    if _State.builder is None:
        _State.builder = build.start_build()
    _wait(wait_seconds)
    path = build.find_library()
    if path is None:
        raise build.BuildError("The compiler left no library.", "Run python -m penstock.kernels.cpu.build.")
    return path


def _wait(seconds: float) -> None:
    """Until the background build is done. Raises BuildError if it failed, or needs longer."""
    builder = _State.builder
    if builder is None:
        return
    started = time.monotonic()
    logger.info("compiling the CPU kernels for this machine, once; waiting for at most %.0f s", seconds)
    try:
        _, complaint = builder.communicate(timeout=seconds)
    except subprocess.TimeoutExpired as error:
        if builder.stderr is not None:
            builder.stderr.close()  # nobody will ask how it ended
        waited = time.monotonic() - started
        raise build.BuildError(
            f"They are still being compiled after {waited:.0f} s.", "They will be there at the next start."
        ) from error
    _State.builder = None
    if builder.returncode:
        raise build.BuildError(complaint.decode(errors="replace").strip(), "")


def _warn(reason: str, advice: str) -> None:
    logger.warning(
        "No CPU kernels: all runs through torch's operators, at about half the speed. %s %s",
        reason,
        advice,
    )
