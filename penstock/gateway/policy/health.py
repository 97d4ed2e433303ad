"""Whether a replica is asked: what its answers and its probes say, and how it comes back.

    healthy ── 3 failures in a row, or half of 20 ──▶ ejected 5 s, 10 s, … 5 min ──▶ slowly back over 10 s
       ▲────────────────────────── a minute without a failure: forgotten ─────────────────────┘

A probe that says "not ready" (draining, stuck, loading) takes it out at once, and back in as soon as it says
otherwise. Times are seconds of any clock that only goes forward.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

IN_A_ROW = 3
RECENT = 20
"""Requests of which half may fail."""
EJECTION = 5.0
LONGEST = 300.0
WARM_UP = 10.0
FORGOTTEN = 60.0
_LEAST = 0.1


@dataclass(slots=True)
class Health:
    """Of one replica."""

    in_a_row: int = 0
    recent: deque[bool] = field(default_factory=lambda: deque(maxlen=RECENT))
    """Of the latest requests, whether each failed."""
    ejections: int = 0
    ejected_until: float = 0.0
    failed_at: float = float("-inf")
    ready: bool = True
    """What the last probe said; of who is not probed, true."""
    back_at: float = float("-inf")
    """When it came back from being out, for the warm-up."""

    def succeeded(self, now: float) -> None:
        """A request was answered."""
        self.in_a_row = 0
        self.recent.append(False)
        if self.ejections and now - self.failed_at > FORGOTTEN:
            self.ejections = 0

    def failed(self, now: float) -> None:
        """A request failed, by the replica's fault."""
        self.in_a_row += 1
        self.recent.append(True)
        self.failed_at = now
        if now < self.ejected_until:
            return
        too_many = len(self.recent) == RECENT and 2 * sum(self.recent) >= RECENT
        if self.in_a_row >= IN_A_ROW or too_many:
            self.ejections += 1
            self.ejected_until = now + min(LONGEST, EJECTION * 2.0 ** min(self.ejections - 1, 16))
            self.back_at = self.ejected_until
            self.recent.clear()

    def probed(self, ready: bool, now: float) -> None:
        """A probe has an answer."""
        if ready and not self.ready:
            self.back_at = max(self.back_at, now)
        self.ready = ready

    def started(self, now: float) -> None:
        """It is a new process: nothing that the old one did counts."""
        self.in_a_row = self.ejections = 0
        self.recent.clear()
        self.ejected_until, self.failed_at, self.back_at = 0.0, float("-inf"), now
        self.ready = True

    def weight(self, now: float) -> float:
        """How much of a healthy replica's share it gets: 0 (out) to 1."""
        if not self.ready or now < self.ejected_until:
            return 0.0
        warm = (now - self.back_at) / WARM_UP
        return 1.0 if warm >= 1.0 else max(_LEAST, warm)


@dataclass(slots=True)
class Progress:
    """Whether an engine that says 200 still computes: with requests running, its counters must grow.

    `patience` is how long they may stand still, in seconds.
    """

    patience: float = 30.0
    done: float = -1.0
    """Tokens in and out, as last seen to have changed."""
    since: float = 0.0

    def seen(self, running: float, done: float, now: float) -> bool:
        """Take in the engine's counters; false: it is stuck."""
        if done != self.done or running <= 0:
            self.done, self.since = done, now
            return True
        return now - self.since < self.patience
