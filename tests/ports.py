"""Ports for programs that must be told theirs before they listen."""

from __future__ import annotations

import itertools
import os
import random
import socket

_FIRST, _WIDTH, _SLICES = 20_000, 1_500, 8
"""Below the ports that kernels lend to whoever connects (Linux: from 32,768), so that none of those takes one
between our look and the program's; and a slice for each of pytest's workers."""

_slice = _FIRST + _WIDTH * (int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % _SLICES)
_next = itertools.count(random.SystemRandom().randrange(_WIDTH))


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now, and that this worker has not given out of late."""
    for _ in range(_WIDTH):
        port = _slice + next(_next) % _WIDTH
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError(f"all ports from {_slice} to {_slice + _WIDTH - 1} are taken")
