"""The final bills of requests, those that nobody waited for included: a feed for a gateway's ledger.

    GET /v1/bills?after=CURSOR&limit=N    →  {"data": [bill, …], "next": CURSOR, "lost": 0, "under_way": []}
    GET /v1/bills?after=CURSOR&id=A&id=B  →  of the bills behind the cursor those of A and B, and which of the
                                             two are under way still

Who asked at a cursor, and finds by it neither a bill nor that the request is under way, and nothing lost,
knows that it used nothing: it never came, was refused, or had to leave the queue.

A bill is there once the last event of every choice has come. The sum of the bills is the time that the
device was busy with requests. The feed holds the latest ones in memory: a cursor says of which start of the
server it is, so that a reader learns that bills were lost, and how many, where that is known.
"""

from __future__ import annotations

import secrets
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from itertools import islice

import msgspec

from penstock.core.errors import InvalidRequest, quote

KEPT = 100_000
"""Bills in memory, some 30 MB at most."""
MOST = 10_000
"""Bills of one answer."""
MOST_IDS = 100
"""Requests that are looked for at a time."""


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
    under_way: tuple[str, ...] = ()
    """Of the requests that were looked for, those whose bills are still to come."""


class Bills:
    """The latest bills, numbered from 1."""

    def __init__(self, kept: int = KEPT) -> None:
        self._bills: deque[Bill] = deque(maxlen=kept)
        self._count = 0
        self._start = secrets.token_hex(6)
        self._under_way: Counter[str] = Counter()

    def arrived(self, id: str) -> None:
        """A request is under way; clients choose ids, and may repeat them."""
        self._under_way[id] += 1

    def left(self, id: str) -> None:
        """It is no longer: its bill is there, or it has used nothing. Once for each `arrived`."""
        self._under_way[id] -= 1
        if self._under_way[id] <= 0:
            del self._under_way[id]

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
        begin, lost = self._begin(after)
        data = list(self._behind(begin, limit))
        return Page(data, self._cursor(begin + len(data)), lost)

    def find(self, ids: Sequence[str], after: str | None) -> Page:
        """The bills of some requests behind a cursor, and which of these are under way.

        Raises InvalidRequest as `page` does, and for too many.
        """
        if len(ids) > MOST_IDS:
            raise InvalidRequest(f"{len(ids)} ids are too many; {MOST_IDS} at a time.", param="id")
        begin, lost = self._begin(after)
        wanted = set(ids)
        data = [bill for bill in self._behind(begin, KEPT) if bill.request_id in wanted]
        return Page(data, self._cursor(self._count), lost, tuple(id for id in ids if id in self._under_way))

    def _behind(self, position: int, limit: int) -> Iterator[Bill]:
        begin = position - (self._count - len(self._bills))
        return islice(self._bills, begin, begin + limit)

    def _cursor(self, position: int) -> str:
        return f"{self._start}:{position}"

    def _begin(self, after: str | None) -> tuple[int, int | None]:
        """(position of the first bill behind a cursor, how many before it are lost)."""
        first = self._count - len(self._bills)
        if after is None:
            return first, first
        position, known = self._position(after)
        begin = max(position, first)
        return begin, begin - position if known else None

    def _position(self, cursor: str) -> tuple[int, bool]:
        """(bills before it, whether it is of this start)."""
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
