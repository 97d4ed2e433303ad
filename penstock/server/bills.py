"""The final bills of requests, those that nobody waited for included: a feed for a gateway's ledger.

    GET /v1/bills?after=CURSOR&limit=N  →  {"data": [bill, …], "next": CURSOR, "lost": 0}

A bill is there once the last event of every choice has come. The sum of the bills is the time that the
device was busy with requests. The feed holds the latest ones in memory: a cursor says of which start of the
server it is, so that a reader learns that bills were lost, and how many, where that is known.
"""

from __future__ import annotations

import secrets
from collections import deque
from itertools import islice

import msgspec

from penstock.core.errors import InvalidRequest, quote

KEPT = 100_000
"""Bills in memory, some 30 MB at most."""
MOST = 10_000
"""Bills of one answer."""


class Bill(msgspec.Struct, frozen=True, kw_only=True):
    """What one request used, all of its choices together."""

    request_id: str
    """The client's X-Request-Id, or the one that it was given."""
    tenant: str = ""
    finish_reasons: tuple[str, ...] = ()
    """Of its choices, in order; `abort` where the client had gone."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    device_seconds: float = 0.0
    ended_at: float = 0.0
    """Unix time."""


class Page(msgspec.Struct, frozen=True):
    """One answer of the feed."""

    data: list[Bill]
    next: str
    """Where to go on."""
    lost: int | None = 0
    """Bills between the cursor and the first of `data` that are not there any more; null where the cursor is
    of an earlier start, whose bills are lost."""


class Bills:
    """The latest bills, numbered from 1."""

    def __init__(self, kept: int = KEPT) -> None:
        self._bills: deque[Bill] = deque(maxlen=kept)
        self._count = 0
        self._start = secrets.token_hex(6)

    def add(self, bill: Bill) -> None:
        """A request has ended."""
        self._bills.append(bill)
        self._count += 1

    def page(self, after: str | None, limit: int = 1000) -> Page:
        """The bills behind a cursor, at most `limit`, the oldest first; all that are there without one.

        Raises InvalidRequest for a cursor that this feed cannot have given.
        """
        if not 1 <= limit <= MOST:
            raise InvalidRequest(f"limit must be from 1 to {MOST}, got {limit}.", param="limit")
        position, known = self._position(after)
        first = self._count - len(self._bills)
        begin = max(position, first)
        data = list(islice(self._bills, begin - first, begin - first + limit))
        lost = begin - position if known and after is not None else (None if after is not None else first)
        return Page(data, f"{self._start}:{begin + len(data)}", lost)

    def _position(self, cursor: str | None) -> tuple[int, bool]:
        """(bills before it, whether it is of this start)."""
        if cursor is None:
            return 0, True
        start, _, number = cursor.partition(":")
        if not (start and number.isdecimal() and len(number) <= 18):
            raise InvalidRequest(
                f"{quote(cursor)} is no cursor of this feed.",
                param="after",
                advice="Give `next` of the last answer, or nothing to begin with.",
            )
        if start != self._start:
            return 0, False
        if int(number) > self._count:
            raise InvalidRequest(f"{quote(cursor)} is beyond the feed's end.", param="after")
        return int(number), True
