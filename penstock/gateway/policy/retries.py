"""When another attempt is made, and after which pause.

Nothing is tried again once the client has seen a byte of an answer, but for streams that can go on elsewhere
(`resume`). Before that, what may be the upstream's own trouble is; what the upstream says of the request
itself is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Fault = Literal["busy", "connect", "reset", "slow", "stalled", "status", "invalid", "cut", "error"]
"""How an upstream fails: all its places are taken; no connection; lost before an answer; no headers in time;
no further piece in time; an error status; an answer that is none; one that ends too early; an event that says
so."""

RETRIED_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529})
"""Answers that another attempt may better."""
OWN_FAULT_STATUS = frozenset({401, 402, 403})
"""Answers to the gateway's own key: the client's is not at fault, and is not told so."""

_FIRST = 0.1
_LONGEST = 5.0
"""Seconds."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """What came of one."""

    fault: Fault
    status: int | None = None
    """That the upstream answered with."""
    retry_after: float | None = None
    """Seconds that it asks to wait."""


def ejects(attempt: Attempt) -> bool:
    """Whether it speaks against the replica's health: who is merely full, or refuses what it is asked, is not
    ill."""
    status = attempt.status or 0
    refused = 400 <= status < 500 and status not in RETRIED_STATUS
    return attempt.fault != "busy" and status != 429 and not refused


def pause(number: int, attempt: Attempt, draw: float, *, elsewhere: bool) -> float | None:
    """Seconds until the next attempt, or None where waiting so long is not worth it.

    Args:
        number: of the attempt that has failed, from 1.
        draw: a number of [0, 1). The back-off is drawn from zero to its bound ("full jitter").
        elsewhere: the next one is at another replica, which did not ask to wait.
    """
    if elsewhere:
        return 0.0
    if attempt.retry_after is not None:
        if attempt.retry_after > _LONGEST:
            return None
        return attempt.retry_after + draw * _FIRST
    return min(_LONGEST, _FIRST * 2.0 ** (number - 1)) * draw
