"""A meter in memory, for tests of the door: the same words as the real ones, without windows that roll."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from penstock.gateway.limits.counters import refusal
from penstock.gateway.policy.amounts import Amounts, Limit
from penstock.gateway.records import Asked, Principal, Row


@dataclass
class Standing:
    limit: Limit
    remaining: int
    resets_at: float


@dataclass
class Granted:
    row: Row
    limits: Sequence[Limit]
    worst: Amounts
    standings: list[Standing]
    committed: bool = False


@dataclass
class MemoryMeter:
    """Counts used and reserved of each limit; refuses what would not fit."""

    now: float = 1_800_000_000.0
    used: dict[Limit, int] = field(default_factory=dict)
    reserved: dict[Limit, int] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    """Final ones, in the order of their ends."""
    attempts: list[Asked] = field(default_factory=list)
    open: dict[str, Granted] = field(default_factory=dict)
    ended: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    async def reserve(self, row: Row, limits: Sequence[Limit], worst: Amounts) -> Granted:
        for limit in limits:
            taken = self.used.get(limit, 0) + self.reserved.get(limit, 0)
            if taken + worst.of(limit.unit) > limit.cap:
                raise refusal(
                    limit,
                    worst.of(limit.unit),
                    remaining=limit.cap - taken,
                    now=self.now,
                    resets_at=self.now + 60,
                    frees_in=60.0,
                )
        standings = []
        for limit in limits:
            self.reserved[limit] = self.reserved.get(limit, 0) + worst.of(limit.unit)
            left = limit.cap - self.used.get(limit, 0) - self.reserved[limit]
            standings.append(Standing(limit, left, self.now + 60))
        assert row.id not in self.open
        row.reserved_tokens, row.reserved_dollars = worst.tokens, worst.dollars
        row.reserved_device_seconds = worst.device_seconds
        granted = self.open[row.id] = Granted(row, limits, worst, standings)
        return granted

    async def count(self, limits: Sequence[Limit]) -> None:
        granted = await self.reserve(Row(id="", at=0, key_id=""), limits, Amounts())
        del self.open[""]
        for limit in granted.limits:
            self.reserved[limit] -= 1
            self.used[limit] = self.used.get(limit, 0) + 1

    def asked(self, reservation: Granted, asked: Asked) -> None:
        assert not reservation.committed
        self.attempts.append(asked)

    def hand_over(self, reservation: Granted, used: Amounts, row: Row, worst: Amounts) -> Granted:
        limits = [limit for limit in reservation.limits if limit.unit not in ("requests", "concurrent")]
        stays = [limit for limit in reservation.limits if limit.unit == "concurrent"]
        for limit in limits:
            assert worst.of(limit.unit) <= reservation.worst.of(limit.unit)
            self.reserved[limit] -= worst.of(limit.unit)
        rest = Amounts(
            tokens=reservation.worst.tokens - worst.tokens,
            dollars=reservation.worst.dollars - worst.dollars,
            device_seconds=reservation.worst.device_seconds - worst.device_seconds,
        )
        reservation.limits = [limit for limit in reservation.limits if limit not in stays]
        reservation.worst = rest
        self.open[reservation.row.id] = self.open.pop(row.id)
        self.commit(reservation, used)
        for limit in limits:
            self.reserved[limit] += worst.of(limit.unit)
        row.reserved_tokens, row.reserved_dollars = worst.tokens, worst.dollars
        row.reserved_device_seconds = worst.device_seconds
        granted = self.open[row.id] = Granted(row, [*limits, *stays], worst, reservation.standings)
        return granted

    def commit(self, reservation: Granted, used: Amounts) -> None:
        assert not reservation.committed
        reservation.committed = True
        del self.open[reservation.row.id]
        for limit in reservation.limits:
            self.reserved[limit] -= reservation.worst.of(limit.unit)
            if limit.unit != "concurrent":
                self.used[limit] = self.used.get(limit, 0) + used.of(limit.unit)
        self.rows.append(reservation.row)
        self.ended.release()

    async def close(self) -> None:
        pass


class MemoryKeys:
    """Keys by their secret."""

    def __init__(self, keys: dict[str, Principal]) -> None:
        self.keys = keys

    async def principal(self, secret: str) -> Principal | None:
        return self.keys.get(secret)
