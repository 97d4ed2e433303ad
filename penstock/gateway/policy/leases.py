"""One account for many workers: each holds a lease of a part of the cap, and counts its requests within it.

    account (in the store)   used + Σ leases ≤ cap
    lease of a worker        reserved + used there ≤ granted

So the cap holds whatever the workers do at the same time, and a request waits for the store only where its
worker's lease is used up. A worker says what it keeps and what it needs; `decide` says what it gets. Amounts
are absolute, so that an answer that was lost is repaired by asking again.

Where the rest does not suffice but others hold leases, the worker's lease is marked as short, with the time;
the others hear of the mark, give back what they do not use, and say which mark they have heard. So there are
four answers: granted; pending (others that live have not yet heard); refused (they have, and use what they
hold); in doubt (it would fit if a worker that is not heard of had not used what it holds).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .accounts import SPAN
from .amounts import Limit, Window

TTL = 15.0
"""Seconds for which a worker that is not heard of is believed to live."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What a worker tells of one account."""

    id: str
    limit: Limit
    start: int
    keep: int
    """Its lease as it uses it now; below that nothing is taken."""
    need: int = 0
    """What waiting requests need on top of that."""
    least: int = 0
    """What the first of them needs."""
    demand: int = 0
    """What it is likely to need within a second or so."""
    heard: float = 0.0
    """The newest mark of others that it had heard of when it said what it keeps."""


@dataclass(frozen=True, slots=True)
class Grant:
    """What it got."""

    id: str
    granted: int
    """Its lease from now on: at least what it kept."""
    room: int
    """What nobody holds."""
    pending: bool = False
    """Short, and others have not yet been heard: worth asking again in a moment."""
    doubt: bool = False
    """Short, and nobody knows whether the cap is reached: it depends on what a silent worker has used."""


@dataclass(frozen=True, slots=True)
class Lease:
    """Another worker's lease of the account."""

    granted: int
    heard: float
    """The newest mark that it has answered."""
    alive: bool
    counts: bool
    """Whether it still counts; a dead worker's may."""


def lives(*, gone: float | None, seen: float, now: float) -> bool:
    """Whether a worker is believed to live."""
    return gone is None and now - TTL < seen <= now + 1


def counts(window: Window, *, gone: float | None, seen: float, now: float) -> bool:
    """Whether a lease counts whose worker was last heard of at `seen`, and is known to be dead since `gone`.

    A budget's lease counts until its journal tells what was used: it is never given away on suspicion.
    """
    if window in ("day", "month"):
        return True
    until = gone if gone is not None else seen + TTL
    if until > now + TTL + 1:  # by a clock that has begun anew: the machine has started since
        return False
    return now < until + (SPAN + 1 if window == "minute" else 0)


def decide(
    ask: Ask, used: int, others: Iterable[Lease], wanted_since: float | None, now: float
) -> tuple[Grant, float | None]:
    """What a worker gets, and since when it is short of it (None if it is not).

    Args:
        used: what the account has counted for good.
        others: leases of the other workers on it.
        wanted_since: what the last call for this lease returned.
    """
    theirs = [lease for lease in others if lease.counts]
    held = sum(lease.granted for lease in theirs)
    silent = sum(lease.granted for lease in theirs if not lease.alive)
    cap = ask.limit.cap
    room = cap - used - held - ask.keep  # beyond what it keeps; negative after an overdraft
    alive = sum(lease.alive for lease in theirs)
    if ask.need > 0 and room < ask.least:
        since = now if wanted_since is None else wanted_since
        unheard = sum(lease.granted for lease in theirs if lease.alive and lease.heard < since)
        pending = room < ask.least <= room + unheard
        doubt = not pending and ask.least <= room + unheard + silent
        return Grant(ask.id, ask.keep, max(0, room), pending, doubt), since if pending else None
    granted = min(ask.need, max(0, room))
    if ask.need > 0:
        rest = room - granted
        if ask.limit.window == "minute":
            # no more than what it needs soon: should it die, its lease stays taken for a minute
            extra = min(rest if not alive else rest // (2 * (alive + 1)), max(ask.demand, 4 * ask.need))
        elif alive:
            extra = min(rest // (2 * (alive + 1)), max(ask.demand, 4 * ask.need))
        else:
            extra = rest
        granted += max(0, extra)
    return Grant(ask.id, ask.keep + granted, max(0, room - granted)), None
