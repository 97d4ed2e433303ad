"""Steps under way: planned and submitted, not yet committed, in their order.

Of each it keeps the block tables that its items had. Tables grow in place, and who loses his blocks gets a
new list, so that what a step has written is known even when its request has left.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from .plan import Plan, StepResult

Standing = tuple[str, int, list[int]]
"""(request, epoch, block table)"""


@dataclass(frozen=True, slots=True)
class Flight:
    """One step; a table for each of the plan's items."""

    plan: Plan
    tables: list[list[int]]


class Flights:
    """All of them, the oldest first."""

    def __init__(self) -> None:
        self._flights: deque[Flight] = deque()

    def begin(self, plan: Plan, tables: list[list[int]]) -> None:
        """A step was planned."""
        self._flights.append(Flight(plan, tables))

    def end(self, plan: Plan, result: StepResult) -> Flight:
        """It is to be committed. Raises ValueError unless it is the oldest, and its result has an outcome for
        each item."""
        if not self._flights or self._flights[0].plan is not plan or len(result.outcomes) != len(plan.items):
            count = len(result.outcomes)
            raise ValueError(f"step {plan.step} with {count} outcomes is not the next one to commit")
        return self._flights.popleft()

    def count(self, request: str) -> int:
        """In how many of them a request is."""
        return sum(item.request == request for flight in self._flights for item in flight.plan.items)

    def standing_on(
        self,
        worthless: Collection[int],
        ended: Flight,
        block_size: int,
        running: Iterable[Standing],
        copied: Iterable[Standing] = (),
    ) -> list[Standing]:
        """Who reads one of these blocks as the step that has just ended has left them: in that step, in one
        under way, or else; with the part of its table that begins there.

        Steps happen in their order, so whoever fills such a block anew in a later step reads what he has
        written himself, and so does everybody who shares it from then on; unless he stands on another one.

        Args:
            running: who holds blocks now.
            copied: whose blocks were copied before a later step.
        """
        stale = set(worthless)
        found: list[Standing] = []
        for flight in (ended, *self._flights):
            for item, table in zip(flight.plan.items, flight.tables, strict=True):
                opened = -(-item.start // block_size)
                """Its first block in which nothing stood before."""
                place = _first_of(stale, table[:opened])
                if place is not None:
                    found.append((item.request, item.epoch, table[place:]))
                elif flight is not ended:
                    stale.difference_update(table[opened : -(-(item.start + item.tokens) // block_size)])
        for blocks, others in ((stale, running), (worthless, copied)):
            for request, epoch, table in others:
                place = _first_of(blocks, table)
                if place is not None:
                    found.append((request, epoch, table[place:]))
        return found


def _first_of(blocks: Collection[int], table: Sequence[int]) -> int | None:
    """Place of the first one in a table."""
    return next((place for place, block in enumerate(table) if block in blocks), None)
