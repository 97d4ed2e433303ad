"""The accounts that workers share, in memory: what ledger/store.py keeps in tables; for simulation, tests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from .leases import Ask, Grant, Lease, counts, decide, lives


@dataclass
class _Holding:
    granted: int = 0
    wanted_since: float | None = None
    heard: float = 0.0


@dataclass
class _Worker:
    seen: float
    gone: float | None = None


@dataclass
class Bank:
    """All accounts. `now` is by a clock that is never set."""

    used: dict[str, int] = field(default_factory=dict)
    """Account → what was charged for good."""
    _leases: dict[str, dict[str, _Holding]] = field(default_factory=dict)
    _workers: dict[str, _Worker] = field(default_factory=dict)

    def beat(self, worker: str, now: float) -> tuple[int, dict[str, float]]:
        """A worker lives; returns how many others do, and what they are short of: account → newest mark."""
        self._workers[worker] = _Worker(now)
        others = {id for id, each in self._workers.items() if id != worker and _lives(each, now)}
        pressed: dict[str, float] = {}
        for account, holdings in self._leases.items():
            for id in others & holdings.keys():
                if (since := holdings[id].wanted_since) is not None:
                    pressed[account] = max(since, pressed.get(account, since))
        return len(others), pressed

    def lease(self, worker: str, asks: Sequence[Ask], now: float) -> list[Grant]:
        """Give leases."""
        grants = []
        for ask in asks:
            holdings = self._leases.setdefault(ask.id, {})
            others = []
            for id, holding in holdings.items():
                if id == worker:
                    continue
                each = self._workers[id]
                counted = counts(ask.limit.window, gone=each.gone, seen=each.seen, now=now)
                others.append(Lease(holding.granted, holding.heard, _lives(each, now), counted))
            mine = holdings.setdefault(worker, _Holding())
            grant, since = decide(ask, self.used.get(ask.id, 0), others, mine.wanted_since, now)
            holdings[worker] = _Holding(grant.granted, since, ask.heard)
            grants.append(grant)
        return grants

    def granted(self, account: str, worker: str) -> int:
        """A worker's lease."""
        mine = self._leases.get(account, {}).get(worker)
        return 0 if mine is None else mine.granted

    def charge(self, worker: str, amounts: Mapping[str, int]) -> None:
        """Amounts move from a worker's leases into the accounts."""
        for id, amount in amounts.items():
            self.used[id] = self.used.get(id, 0) + amount
            if (mine := self._leases.get(id, {}).get(worker)) is not None:
                mine.granted = max(0, mine.granted - amount)

    def bury(self, worker: str, amounts: Mapping[str, int], ended: Iterable[str], now: float) -> None:
        """A worker is dead, and `amounts` is all that it had not yet charged; its leases of the accounts
        `ended` are void."""
        self.charge(worker, amounts)
        self._workers[worker].gone = now
        for id in ended:
            self._leases.get(id, {}).pop(worker, None)


def _lives(worker: _Worker, now: float) -> bool:
    return lives(gone=worker.gone, seen=worker.seen, now=now)
