"""The seam between the meter and whoever keeps the limits, and how a refusal is told."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Protocol, TypeVar

from penstock.gateway.meter import LimitReached, Standing
from penstock.gateway.policy.amounts import NANO, Amounts, Limit, Unit

NOTHING = Amounts(requests=0)
"""What a request has used that did not come to pass."""
_WORDS: dict[Unit, str] = {
    "requests": "requests",
    "tokens": "tokens",
    "concurrent": "requests at a time",
    "dollars": "dollars",
    "device_seconds": "device-seconds",
}


class Ticket(Protocol):
    """What one request has reserved."""

    @property
    def number(self) -> int | None:
        """The number that was drawn for it, by which `bury` settles it."""
        ...

    @property
    def charged(self) -> tuple[str, ...]:
        """Ids of the accounts that the ledger charges for good: budgets of days and months."""
        ...


T = TypeVar("T", bound=Ticket)


Uses = Callable[[Sequence[int]], Awaitable[Mapping[int, Mapping[Unit, int]]]]
"""What requests of a worker, by their numbers, have used of each unit, as the ledger has it; those that are
not there have used nothing. Raises Unavailable."""


class Counters(Protocol[T]):
    """Whoever keeps the limits."""

    def reserve_now(self, limits: Sequence[Limit], worst: Amounts) -> T | None:
        """Reserve without waiting, if that can be."""
        ...

    async def reserve(self, limits: Sequence[Limit], worst: Amounts) -> T:
        """Reserve against all limits or none. Raises LimitReached; NotCounted where it cannot be counted."""
        ...

    def split(self, ticket: T, later: Amounts) -> T:
        """Take out of a reservation the part that was meant for `later`; see Shares.split. Never waits, never
        raises."""
        ...

    def settle(self, ticket: T, used: Amounts) -> None:
        """A request has ended. Never raises."""
        ...

    def standings(self, ticket: T) -> Sequence[Standing]:
        """What is left of each limit."""
        ...

    def folded(self, amounts: Mapping[str, int], *, doubted: bool = False) -> None:
        """The ledger has charged these amounts to the accounts; `doubted`: some time ago."""
        ...

    async def corrected(self, amounts: Mapping[str, int]) -> None:
        """The ledger has settled rows that were written before: so much more, or less, is used of budgets.
        Never raises."""
        ...

    async def bury(self, worker: str, used: Uses) -> None:
        """A worker has died, and its journal is in the ledger. Raises Unavailable; may then be repeated."""
        ...

    async def close(self) -> None:
        """Give back what is not in use."""
        ...


class Left:
    """A Standing."""

    __slots__ = ("limit", "remaining", "resets_at")

    def __init__(self, limit: Limit, remaining: int, resets_at: float) -> None:
        self.limit = limit
        self.remaining = remaining
        self.resets_at = resets_at


def quantity(unit: Unit, amount: int) -> str:
    """An amount in the words of people: `$12.50`, `90 device-seconds`, `1000 tokens`."""
    if unit == "dollars":
        whole, nano = divmod(amount, NANO)
        digits = f"{nano:09}".rstrip("0")
        return f"${whole}.{digits:0<2}"
    if unit == "device_seconds":
        return f"{amount / NANO:.12g} device-seconds"
    return f"{amount} {_WORDS[unit]}"


def reads(limit: Limit) -> str:
    """A limit in the words of people: `$5.00 per day of team:search`."""
    per = "" if limit.window == "now" else f" per {limit.window}"
    return f"{quantity(limit.unit, limit.cap)}{per} of {limit.scope}"


def refusal(
    limit: Limit, amount: int, *, remaining: int, now: float, resets_at: float, frees_in: float | None
) -> LimitReached:
    """The error that says which limit, its value, and when it resets. `frees_in`: seconds until the request
    fits by time alone, if it does.

    What is more than a whole rate is OpenAI's "Request too large": a 429 that no waiting helps.
    """
    words = reads(limit)
    wait: float | None
    if amount > limit.cap and limit.unit in ("requests", "concurrent"):
        message, wait = f"The limit is {words}: no request passes.", None
    elif amount > limit.cap:
        budget = limit.window in ("day", "month")
        message = (
            f"{'This request' if budget else 'Request too large: it'} needs up to "
            f"{quantity(limit.unit, amount)}, and the limit is {words}. It can never pass as it is; a lower "
            "max_tokens or a shorter prompt needs less."
        )
        wait = resets_at - now if budget else None  # by then paces may be others
    else:
        message = f"The limit of {words} is reached: {quantity(limit.unit, max(0, remaining))} left"
        if limit.unit not in ("requests", "concurrent"):
            message += f", and this request may need {quantity(limit.unit, amount)}"
        if limit.window in ("day", "month"):
            message += f". It resets at {datetime.fromtimestamp(resets_at, UTC):%Y-%m-%d %H:%M} UTC"
        message += "."
        wait = 1.0 if frees_in is None else frees_in
    return LimitReached(
        limit,
        remaining=max(0, remaining),
        resets_at=resets_at,
        retry_after=None if wait is None else max(1, math.ceil(wait)),
        message=message,
    )
