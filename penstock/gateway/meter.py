"""The seam between the door and whoever counts.

    reserve (worst case; may refuse) ─▶ the request runs ─▶ commit (what it used)

Between the two the reservation counts as used. It is durable before `reserve` returns: whatever dies in
between, the request has one row, at worst `unsettled` at its reservation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from penstock.core.errors import Unavailable

from .policy.amounts import Amounts, Limit
from .records import Asked, Row


class LimitReached(Unavailable):
    """A limit refuses a request: a rate (comes back by itself, soon) or a budget (does not, for a client)."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"

    def __init__(
        self, limit: Limit, *, remaining: int, resets_at: float, retry_after: int | None, message: str
    ) -> None:
        """`retry_after`: seconds after which the request may pass; None where it never will as it is."""
        super().__init__(message, retry_after=retry_after)
        self.limit = limit
        self.remaining = remaining
        self.resets_at = resets_at  # Unix time
        self.passes_later = retry_after is not None
        if limit.unit in ("dollars", "device_seconds"):
            self.type = self.code = "insufficient_quota"


class NotCounted(Unavailable):
    """Nobody can tell at present whether a limit is reached, so that the request cannot be let through."""

    code = "ledger_unavailable"


class Standing(Protocol):
    """How much of a limit is left, for headers."""

    limit: Limit
    remaining: int
    resets_at: float


class Reservation(Protocol):
    """What was granted to one request. Ends with `commit`, once."""

    row: Row

    @property
    def standings(self) -> Sequence[Standing]:
        """What is left of each of its limits."""
        ...


Granted = TypeVar("Granted", bound=Reservation)


class Meter(Protocol[Granted]):
    """Whoever counts: one truth for all workers and gateways. `Granted` is what its reservations are."""

    async def reserve(self, row: Row, limits: Sequence[Limit], worst: Amounts) -> Granted:
        """Let a request through, its worst case counted against all of `limits` or none. Raises LimitReached
        only where the limit is reached; Unavailable where nobody can tell."""
        ...

    async def count(self, limits: Sequence[Limit]) -> None:
        """Count a request that uses no device, and has no row. Raises as `reserve`."""
        ...

    def asked(self, reservation: Granted, asked: Asked) -> None:
        """An upstream will be asked now: should this process die, its bill settles the row. Never waits,
        never raises."""
        ...

    def hand_over(self, reservation: Granted, used: Amounts, row: Row, worst: Amounts) -> Granted:
        """The request has ended with `used`, and its row is final; another one, which `row` is of, begins
        with `worst` of what was reserved for both. Durable, both or neither, before it returns; never waits.
        Raises Unavailable, and then the first one goes on as it was."""
        ...

    def commit(self, reservation: Granted, used: Amounts) -> None:
        """The request has ended and its row is final: count what it used instead of its worst case, and write
        the row behind. Never waits, never raises."""
        ...

    async def close(self) -> None:
        """Everything that is written behind is written."""
        ...
