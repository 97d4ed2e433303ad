"""For tests that configure the logging of their own process: afterwards it is as it was."""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def kept_logging() -> Iterator[None]:
    """Keeps what `penstock.observe.logs.configure` changes."""
    root = logging.getLogger()
    before = root.handlers[:], root.level, logging.raiseExceptions
    hooks = warnings.showwarning, sys.excepthook, threading.excepthook, sys.unraisablehook
    try:
        yield
    finally:
        root.handlers[:], logging.raiseExceptions = before[0], before[2]
        root.setLevel(before[1])
        warnings.showwarning, sys.excepthook, threading.excepthook, sys.unraisablehook = hooks
