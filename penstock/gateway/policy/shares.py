"""A worker's part of all accounts: requests are counted within leases, which are asked for and given back.

    reserve ─▶ Ticket, or None: short ─▶ wait ─▶ asks ─▶ (store: decide) ─▶ granted ─▶ reserve
    pressed: another worker is short ─▶ what is idle goes back with the next asks
    tick, once a second ─▶ what stays idle goes back

A machine of values and `now`; whoever drives it carries asks to the store and grants back, one round at a
time. A lease is lowered here before the store hears of it, and raised after the store has said so: what a
lost message leaves behind is a lease that is larger in the store than here, until the next round.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from .accounts import SPAN, Account
from .amounts import Amounts, Limit
from .leases import Ask, Grant

REMEMBER = 0.1
"""Seconds for which a refusal is believed without asking the store again."""
AHEAD = 0.1
"""Seconds between two times that more is asked for before anybody waits for it."""
IDLE = 120.0
"""Seconds after which an account that nobody uses is forgotten."""


class Share(Account):
    """An account within a lease, and what the worker knows of the rest."""

    __slots__ = (
        "ahead",
        "asked",
        "demand",
        "doubt",
        "first",
        "heard",
        "known",
        "last",
        "low",
        "marked",
        "pending",
        "refused",
        "refused_before",
        "refused_until",
        "returning",
        "room",
        "taken",
        "waiting",
    )

    def __init__(self, limit: Limit, now: float) -> None:
        super().__init__(limit, now)
        self.known: int | None = 0  # its lease as the store has it; None after an answer that was lost
        self.room = 0  # what nobody held when the store was last asked
        self.waiting: list[int] = []  # amounts of requests that wait for a lease, in their order
        self.taken = 0  # reserved since the last tick
        self.demand = 0  # reserved between the last two ticks
        self.last = now  # last reservation
        self.ahead = 0.0  # when more was last asked for before anybody waited
        self.low = False  # less is left than half a second takes
        self.pending = False  # the last answer was not final: others are to be heard
        self.marked = (0, 0.0)  # number and time of the asks from which on they are
        self.first = 0  # of `waiting`, when the store was last asked
        self.refused: int | None = None  # smallest amount that the last answer refused
        self.doubt = False  # whether it did so because of a silent worker
        self.refused_before = 0  # it is true of whoever waited before the asks of this number
        self.refused_until = 0.0  # and, for a moment, of whoever comes
        self.heard = 0.0  # newest mark of others that are short
        self.asked = False  # an answer is under way
        self.returning = False  # something is to be told: a lower lease, or only that it has been heard

    def fold(self, amount: int) -> None:
        """As for the account; the store has lowered the lease, too."""
        super().fold(amount)
        if self.known is not None:
            self.known = max(0, self.known - amount)

    def remaining(self, now: float) -> int:
        """What is left of the cap as far as this worker knows."""
        return max(0, min(self.cap, self.free(now) + self.room))

    def resets_at(self, now: float) -> float:
        """Unix time at which all of the cap is free, as far as time does it."""
        if self._slots is not None:
            self.held(now)
            return self._slots[-1][0] + SPAN + 1.0 if self._slots else now
        return self.end if self.is_budget else now


class Ticket:
    """What one request has reserved."""

    __slots__ = ("amounts", "shares")

    number = None
    """The counters know it by no number."""

    def __init__(self, shares: list[Share], amounts: list[int]) -> None:
        self.shares = shares
        self.amounts = amounts

    @property
    def charged(self) -> tuple[str, ...]:
        """Ids of the accounts that the store counts for good."""
        return tuple([share.id for share in self.shares if share.is_budget])


class Shares:
    """All accounts that a worker has to do with."""

    def __init__(self) -> None:
        self._shares: dict[tuple[str, str, str], Share] = {}
        self._past: dict[str, Share] = {}  # of windows that are over, until they are settled
        self.alone = True  # no other worker shares the accounts
        self.low = False  # of some account less is left than half a second takes
        self.number = 0  # of asks so far

    def __iter__(self) -> Iterator[Share]:
        yield from self._shares.values()
        yield from self._past.values()

    def share(self, limit: Limit, now: float) -> Share:
        """The account of a limit in the window around `now`."""
        key = (limit.scope, limit.unit, limit.window)
        share = self._shares.get(key)
        if share is None or not share.start <= now < share.end:
            return self._turn(key, limit, now)
        if share.cap != limit.cap:
            share.cap, share.limit = limit.cap, limit
            share.granted = min(share.granted, share.held(now))
            share.refused, share.returning = None, True
        return share

    def _turn(self, key: tuple[str, str, str], limit: Limit, now: float) -> Share:
        old = self._shares.get(key)
        if old is not None:
            self._past[old.id] = old
        new = Share(limit, now)
        # a clock that was set back leads into a window that had seemed to be over
        self._shares[key] = new = self._past.pop(new.id, new)
        return new

    def reserve(
        self, limits: Sequence[Limit], worst: Amounts, now: float, *, valid: bool = True
    ) -> Ticket | None:
        """Count a request's worst case against all limits, or none of them (None).

        `valid` is whether leases that others may take over in time are still this worker's.
        """
        shares, amounts = [], []
        for limit in limits:
            share = self.share(limit, now)
            amount = worst.of(limit.unit)
            if share.free(now) < amount or not (valid or share.is_budget):
                return None
            shares.append(share)
            amounts.append(amount)
        for share, amount in zip(shares, amounts, strict=True):
            share.reserve(amount, now)
            share.taken += amount
            share.last = now
            if share.demand and share.room > 0 and now - share.ahead >= AHEAD:
                self._look_ahead(share, now)
        return Ticket(shares, amounts)

    def _look_ahead(self, share: Share, now: float) -> None:
        """Ask for more before anybody has to wait for it, where the store had more to give."""
        if share.free(now) < share.demand // 2 and not share.asked:
            share.ahead, share.low, self.low = now, True, True

    def settle(self, ticket: Ticket, used: Amounts, now: float) -> None:
        """A request has ended."""
        for share, amount in zip(ticket.shares, ticket.amounts, strict=True):
            share.settle(amount, used.of(share.limit.unit), now)
            share.refused = None  # what was refused may fit now

    def split(self, ticket: Ticket, later: Amounts) -> Ticket:
        """Take out of a reservation what was meant for `later`, whose ticket it becomes. What is counted once
        for both (a request of a minute, one at a time) goes with it; the accounts see no change."""
        amounts = []
        for index, (share, amount) in enumerate(zip(ticket.shares, ticket.amounts, strict=True)):
            part = 0 if share.limit.unit == "requests" else min(amount, later.of(share.limit.unit))
            amounts.append(part)
            ticket.amounts[index] -= part
        return Ticket(ticket.shares, amounts)

    def short(self, limits: Sequence[Limit], worst: Amounts, now: float) -> list[tuple[Share, int]]:
        """The accounts that do not let a request through at present, and the amounts."""
        pairs = [(self.share(limit, now), worst.of(limit.unit)) for limit in limits]
        return [(share, amount) for share, amount in pairs if share.free(now) < amount]

    def asks(self, now: float) -> list[Ask]:
        """What to tell the store now. The answers come by `granted`, all of them, before the next asks."""
        found = []
        self.number += 1
        self.low = False
        for share in self:
            if share.returning:  # requests that wait do not hold up those of others that would fit
                share.granted = max(share.held(now), 0)
            if not (share.waiting or share.returning or share.low) and share.granted == share.known:
                continue
            free = max(0, share.free(now))
            need = max(int(share.low), sum(share.waiting) - free)
            share.returning, share.low, share.asked = False, False, True
            share.first = share.waiting[0] if share.waiting else 0
            least = max(0, share.first - free)
            demand = max(share.demand, share.taken)
            keep = max(share.granted, share.held(now))
            found.append(Ask(share.id, share.limit, share.start, keep, need, least, demand, share.heard))
        return found

    def granted(self, asks: Sequence[Ask], grants: Sequence[Grant], asked: float = 0.0) -> None:
        """The store's answers to `asks`, in their order, of the moment `asked`."""
        shares = {share.id: share for share in self}
        for ask, grant in zip(asks, grants, strict=True):
            share = shares[ask.id]
            short = grant.granted < ask.keep + ask.least
            share.known, share.asked = grant.granted, False
            share.granted, share.room = grant.granted, grant.room
            share.refused = share.first if short and not grant.pending else None
            if not share.pending:
                share.marked = (self.number, asked)
            share.pending, share.doubt = grant.pending, grant.doubt
            share.refused_before, share.refused_until = share.marked[0], share.marked[1] + REMEMBER
            if grant.pending and not share.waiting:
                share.returning = True  # whoever wanted it has left; the store is to forget it

    def lost(self, asks: Sequence[Ask]) -> None:
        """No answer came to `asks`, and nobody knows whether the store has heard them."""
        ids = {ask.id for ask in asks}
        for share in self:
            if share.id in ids:
                share.known, share.returning, share.asked = None, True, False

    def folded(self, amounts: Mapping[str, int], *, doubted: bool = False) -> None:
        """The store has counted these amounts for good, by account, and lowered the leases by them; never
        between `asks` and their answers. `doubted`: some time ago; what it was asked since may have raised
        them again."""
        if not amounts:
            return
        for share in self:
            amount = amounts.get(share.id)
            if not amount:
                continue
            share.fold(amount)
            if doubted:
                share.known = None

    def pressed(self, marks: Mapping[str, float], now: float) -> bool:
        """Other workers are short of these accounts (id → mark); whether there is something to tell."""
        told = False
        for share in self:
            if (mark := marks.get(share.id)) is not None:
                share.heard = max(mark, share.heard)
                share.granted = max(0, share.held(now))
                share.returning = told = True
        return told

    def tick(self, now: float) -> bool:
        """Once a second: leases that are not used shrink, accounts that are not used are forgotten. Returns
        whether there is something to tell the store."""
        for key, share in list(self._shares.items()):
            share.demand, share.taken = share.taken, 0
            self._shrink(share, now)
            if self._is_over(share, now) and now - share.last > IDLE:
                del self._shares[key]
        for id, share in list(self._past.items()):
            self._shrink(share, now)
            if self._is_over(share, now):
                del self._past[id]
        return any(share.granted != share.known or share.returning for share in self)

    def _is_over(self, share: Share, now: float) -> bool:
        idle = share.granted == share.known == 0 and not (share.waiting or share.asked)
        return idle and share.held(now) == 0

    def _shrink(self, share: Share, now: float) -> None:
        idle = share.free(now) - 2 * share.demand
        over = now >= share.end
        keeps = self.alone and share.limit.window != "minute" and not over
        if idle > 0 and not share.waiting and not (keeps and now - share.last < IDLE):
            share.granted -= idle

    def shift(self, seconds: int) -> None:
        """The clock was set by so much (Account.shift)."""
        for share in self:
            share.shift(seconds)

    def give_back(self, now: float) -> list[Ask]:
        """The worker ends: everything that is not in use goes back."""
        for share in self:
            share.waiting.clear()
            share.returning = True
        return self.asks(now)
