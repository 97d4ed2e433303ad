"""How many connections there may be, how long each may take for what, and what is said when that is too much.

    accept ─▶ admit ─┬─ room ────────────────────────────▶ ordinary
                     ├─ an idle one is closed for it ────▶ ordinary
                     ├─ room in the reserve ─────────────▶ restricted: health and metrics, 503 for the rest
                     └─ none ────────────────────────────▶ refused

    sweep, about once a second: deadlines that have passed, readers that do not read

A connection is idle from its beginning, and from the end of each answer, until the head of a request is
whole; the one that has been idle longest goes first. Knows when and how many; the connection knows what to
do then.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from .config import HttpConfig
from .peers import Peers
from .proxies import Proxies

logger = logging.getLogger("penstock.http")

RESERVE = 64
"""Connections beyond the limit that health probes and scrapes can still have."""
_HEARING = 0.05
"""Seconds that a new connection gets before it is closed for another: a probe's request is there by then. Who
comes meanwhile goes into the reserve, or waits to be accepted."""
_SPARE_DESCRIPTORS = 64
"""Descriptors that are left to everything else: files, pipes, sockets of the engine's messages."""
_FEWEST = 8
"""Connections below which no server is started."""
_AT_ONCE = 64
"""Connections whose time is up that are dealt with before the loop goes on to something else."""
_SOON = 0.005
"""Seconds until the next of them."""
_SILENCE = 60.0
"""Seconds between two lines of a kind in the log."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a connection may take. Times are seconds."""

    header_bytes: int
    header_count: int
    idle: float
    """For the first byte of a request, after the connection is made or after an answer."""
    headers: float
    """From the first byte of a request to the end of its headers."""
    body: float
    """From the end of the headers to the end of the body, while the server reads."""
    send: float
    """Without one byte of an answer being taken."""
    connections: int
    per_client: int
    """Of one address; 0 is no limit."""

    @classmethod
    def of(cls, config: HttpConfig, connections: int) -> Limits:
        """The limits of a configuration, with the number of connections that the descriptors allow."""
        return cls(
            header_bytes=config.max_header_bytes,
            header_count=config.max_header_count,
            idle=config.timeout_keep_alive or config.timeout_headers,
            headers=config.timeout_headers,
            body=config.timeout_body,
            send=config.timeout_send,
            connections=connections,
            per_client=0
            if config.uds is not None
            else config.max_connections_per_client,  # it has no addresses
        )

    @property
    def interval(self) -> float:
        """Seconds between two sweeps: limits are kept to a quarter of the shortest, or to a second."""
        return min(1.0, max(0.02, min(self.idle, self.headers, self.body, self.send) / 4))


class Held(Protocol):
    """A connection, as its limits see it."""

    address: str
    restricted: bool
    deadline: float
    """When `expire` is due; infinite while the server has to act."""

    def expire(self, now: float) -> None:
        """The deadline has passed."""
        ...

    @property
    def drained(self) -> bool:
        """Whether nothing of an answer is left that the client has to take."""
        ...

    def unsent(self) -> int:
        """Bytes of an answer that the client does not take, if the server waits for it."""
        ...

    def cut(self) -> None:
        """Close now, whatever is under way."""
        ...


class Connections:
    """All connections of a server, or of one of its processes; `peers` hears of their number."""

    def __init__(
        self,
        limits: Limits,
        clock: Callable[[], float],
        peers: Peers | None = None,
        proxies: Proxies | None = None,
    ) -> None:
        self.limits = limits
        self.peers = peers
        self._proxies = proxies
        self.log = OccasionalLog(clock)
        self._clock = clock
        self._open: set[Held] = set()
        # ordinary, restricted: since when, oldest first
        self._idle: tuple[dict[Held, float], dict[Held, float]] = ({}, {})
        self._restricted = 0
        self._of_client: dict[str, int] = {}
        self._stalled: dict[Held, tuple[int, float]] = {}  # bytes unsent, and since when it is so many
        self._swept_at = clock()
        self._next = limits.interval

    def __len__(self) -> int:
        return len(self._open)

    @property
    def receptive(self) -> bool:
        """Whether a connection that comes now can be heard."""
        return (
            len(self._open) - self._restricted < self.limits.connections
            or self._restricted < RESERVE
            or self._oldest(restricted=False) is not None
            or self._oldest(restricted=True) is not None
        )

    def admit(self, connection: Held) -> bool:
        """Whether a new connection may stay; sets whether it is restricted, and its first deadline."""
        limits, address = self.limits, connection.address
        crowd = self._of_client.get(address, 0) >= limits.per_client > 0
        if crowd and self._proxies is not None and self._proxies.trusts(address):
            crowd = False  # it speaks for many; theirs are counted one by one (proxies.few_of_each)
        if crowd:
            self.log.warning(
                "per client",
                "%s has %d connections (--max-connections-per-client): it gets 503 on further ones.",
                address,
                limits.per_client,
            )
        room = len(self._open) - self._restricted < limits.connections
        connection.restricted = crowd or not (room or self._make_room(restricted=False))
        if connection.restricted:
            if self._restricted >= RESERVE and not self._make_room(restricted=True):
                self.log.warning("refused", "Connections are refused unheard: the reserve is taken, too.")
                return False
            self._restricted += 1
            if not crowd:
                self.log.warning(
                    "full",
                    "All %d connections are busy (--max-connections): only health and metrics are answered "
                    "on further ones.",
                    limits.connections,
                )
        self._open.add(connection)
        if self.peers is not None:
            self.peers.tell(len(self._open))
        self._of_client[address] = self._of_client.get(address, 0) + 1
        self.idle(connection)
        return True

    def idle(self, connection: Held, *, awaited: bool = True) -> None:
        """It has nothing to do for a client, and may be closed for another one. Where a request is `awaited`,
        that has a deadline from now on; one that has begun has its own."""
        if connection in self._open:
            now = self._clock()
            self._idle[connection.restricted].setdefault(connection, now)
            if awaited:
                connection.deadline = now + self.limits.idle

    def busy(self, connection: Held) -> None:
        """The head of a request is there."""
        self._idle[connection.restricted].pop(connection, None)

    def forget(self, connection: Held) -> None:
        """It is gone."""
        if connection not in self._open:
            return
        self._open.discard(connection)
        if self.peers is not None:
            self.peers.tell(len(self._open))
        self._idle[connection.restricted].pop(connection, None)
        self._stalled.pop(connection, None)
        self._restricted -= connection.restricted
        left = self._of_client[connection.address] - 1
        if left:
            self._of_client[connection.address] = left
        else:
            del self._of_client[connection.address]

    def sweep(self) -> float:
        """Look after deadlines and after readers that do not read.

        Returns in how many seconds to do it again: of thousands who are late together, only some are
        sent away at a time, so that the loop gets to others in between.
        """
        now = self._clock()
        # time in which the loop did not run is nobody's fault: what was sent meanwhile has not been read yet
        lost = now - self._swept_at - self._next
        self._swept_at = now
        if lost > 0.5:
            for connection in self._open:
                connection.deadline += lost
        late = [each for each in self._open if each.deadline <= now]
        for connection in late[:_AT_ONCE]:
            connection.expire(now)
        for connection in [each for each in self._open if self._stuck(each, now)]:
            self.log.warning(
                "send",
                "A client took nothing of its answer for %g s (--timeout-send) and is cut off.",
                self.limits.send,
            )
            connection.cut()
        self.log.flush()
        self._next = self.limits.interval if len(late) <= _AT_ONCE else _SOON
        return self._next

    def _stuck(self, connection: Held, now: float) -> bool:
        unsent = connection.unsent()
        if not unsent:
            self._stalled.pop(connection, None)
            return False
        before, since = self._stalled.get(connection, (-1, now))
        if unsent != before:
            self._stalled[connection] = (unsent, now)
            return False
        return now - since >= self.limits.send

    def _oldest(self, *, restricted: bool) -> Held | None:
        """Who has been idle for longest, has been heard, and has taken all of its last answer."""
        latest = self._clock() - _HEARING
        for connection, since in self._idle[restricted].items():
            if since > latest:
                return None
            if connection.drained:
                return connection
        return None

    def _make_room(self, *, restricted: bool) -> bool:
        oldest = self._oldest(restricted=restricted)
        if oldest is None:
            return False
        if not restricted:
            self.log.warning(
                "evicted",
                "There are %d connections (--max-connections): the longest idle one is closed for a new one.",
                self.limits.connections,
            )
        self.forget(oldest)
        oldest.cut()
        return True


class OccasionalLog:
    """Lines about what clients can cause as often as they like: one of a kind and minute, with a count."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._said_at: dict[str, float] = {}
        self._unsaid: dict[str, int] = {}

    def warning(self, kind: str, message: str, *args: object) -> None:
        """Log a line, or count it where one of its kind has been logged within a minute."""
        now = self._clock()
        if now - self._said_at.get(kind, -math.inf) < _SILENCE:
            self._unsaid[kind] = self._unsaid.get(kind, 0) + 1
            return
        self._said_at[kind] = now
        logger.warning(message, *args)

    def flush(self) -> None:
        """Log the counts of the minutes that have passed."""
        if not self._unsaid:
            return
        now = self._clock()
        for kind in [kind for kind in self._unsaid if now - self._said_at[kind] >= _SILENCE]:
            self._said_at[kind] = now
            logger.warning("The same (%s) happened %d more times.", kind, self._unsaid.pop(kind))


def affordable(wanted: int) -> int:
    """Connections that the process can have, at most `wanted`, with its limit of descriptors raised as far as
    it may.

    Raises ValueError where it cannot even have a few.
    """
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
        except (OSError, ValueError):  # macOS: the hard limit may be more than the kernel allows
            logger.debug("the limit of descriptors stays at %d", soft)
    if soft == resource.RLIM_INFINITY:
        return wanted
    possible = soft - _in_use() - _SPARE_DESCRIPTORS - RESERVE
    if possible < min(wanted, _FEWEST):
        raise ValueError(f"the limit of {soft} open files leaves no room for connections; raise `ulimit -n`")
    if possible < wanted:
        logger.warning(
            "--max-connections %d is lowered to %d: the process may have %d open files (`ulimit -n`).",
            wanted,
            possible,
            soft,
        )
    return min(wanted, possible)


def _in_use() -> int:
    for listing in ("/proc/self/fd", "/dev/fd"):
        try:
            return len(os.listdir(listing))
        except OSError:
            continue
    return 64
